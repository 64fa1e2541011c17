"""vector_edge_convolution for its second derivatives: from what a call has found, and in steps that keep no pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from probsym_fast._checks import transformed, vmapped
from probsym_fast.ops.reference.vector_edge_convolution import (
    VARIANCE_EPS,
    dot,
    linear,
    nearest,
    node_maps,
    norm_moments,
    of_taken,
    pairs,
    per_channel,
    valid,
)

AT_ONCE = 2**18  # values of pairs at a time


def convolution_of_taken(
    x: Tensor,
    feature: Tensor,
    direction: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_nodes: Tensor | None,
    taken: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    neighbors: int,
) -> Tensor:
    """y with what a call has found: the neighbours `taken` (w, n, M) and the statistics."""
    inside = None if num_nodes is None else valid(num_nodes, x.shape[2])
    x, maps = x if inside is None else torch.where(inside, x, 0), node_maps(feature, direction)
    if running_mean is None or running_var is None:
        of_p = maps.unflatten(0, (2, 2, -1))[:, 0].flatten(0, 1)
        neighbor, center = linear(of_p, x).unflatten(0, (2, -1))
        mean, variance = known_moments(neighbor, center, nearest(x, neighbors, inside), mean, variance, count)
    scale = gain * (variance + VARIANCE_EPS).rsqrt()
    y = of_taken(taken, scale, bias - scale * mean, maps, x)
    return y if inside is None else torch.where(inside, y, 0)


def known_moments(
    neighbor: Tensor, center: Tensor, near: Tensor, mean: Tensor, variance: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """`norm_moments` of p_ij = neighbor_j + center_i, (w, d, n, M) both, over near pairs (i, j, M): their known values
    with the gradient. count: number of near pairs."""
    if transformed():
        return norm_moments(pairs(neighbor, center), near)
    return _Moments.apply(neighbor, center, near, mean, variance, count)


class _Moments(Function):
    @staticmethod
    def forward(ctx: Any, neighbor: Tensor, center: Tensor, near: Tensor, *known: Tensor) -> Any:
        mean, variance, count = known
        ctx.save_for_backward(neighbor, center, near, mean, count.to(mean.dtype))
        return mean.clone(), variance.clone()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Any:
        neighbor, center, near, mean, count = ctx.saved_tensors
        if vmapped(d_mean, d_variance):
            found = _first(d_mean, d_variance, neighbor, center, near)
        else:
            found = _Gradient.apply(d_mean, d_variance, neighbor, center, near, mean, count)
        return *found, None, None, None, None


class _Gradient(Function):
    """d p = p (slope + offset / |p|) with slope = 2 d_variance / count and offset = d_mean / count - slope mean."""

    @staticmethod
    def forward(ctx: Any, d_mean: Tensor, d_variance: Tensor, neighbor: Tensor, center: Tensor, *known: Tensor) -> Any:
        near, mean, count = known
        ctx.save_for_backward(d_mean, d_variance, neighbor, center, near, mean, count)
        slope = d_variance * 2 / count
        offset = d_mean / count - slope * mean
        d_neighbor, d_center = torch.empty_like(neighbor), torch.empty_like(center)
        for m in _clouds(neighbor):
            p = pairs(neighbor[..., m], center[..., m])
            inverse = _inverse_norm(p)
            p.mul_(_affine(offset, inverse, slope).mul_(near[..., m]).unsqueeze(1))
            d_neighbor[..., m], d_center[..., m] = p.sum(2), p.sum(3)
        return d_neighbor, d_center

    @staticmethod
    def backward(ctx: Any, h_neighbor: Tensor, h_center: Tensor) -> Any:
        """From h, the gradient by d p: with s = <h, p>, the gradient of sum s (slope + offset / |p|) over near pairs."""
        d_mean, d_variance, neighbor, center, near, mean, count = ctx.saved_tensors
        further = torch.is_grad_enabled()
        if further or vmapped(h_neighbor, h_center):
            with torch.enable_grad():
                given = [
                    x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors[:4]
                ]
                first = _first(given[0], given[1], given[2], given[3], near)
            return *torch.autograd.grad(first, given, (h_neighbor, h_center), create_graph=further), None, None, None
        slope = d_variance * 2 / count
        offset = d_mean / count - slope * mean
        kept, by_offset, by_slope = [], torch.zeros_like(mean), torch.zeros_like(mean)
        for m in _clouds(neighbor):
            p, h = pairs(neighbor[..., m], center[..., m]), pairs(h_neighbor[..., m], h_center[..., m])
            inverse, s = _inverse_norm(p), dot(h, p).mul_(near[..., m])
            by_slope += s.flatten(1).sum(1)
            s.mul_(inverse)
            by_offset += s.flatten(1).sum(1)
            kept.append((inverse, s))  # s / |p|
        by_mean = -slope * by_offset / count  # the offset's, by a norm
        d_neighbor, d_center = torch.empty_like(neighbor), torch.empty_like(center)
        for m, (inverse, s) in zip(_clouds(neighbor), kept, strict=True):
            p, h = pairs(neighbor[..., m], center[..., m]), pairs(h_neighbor[..., m], h_center[..., m])
            h.mul_(_affine(offset, inverse, slope).mul_(near[..., m]).unsqueeze(1))
            of_p = _affine(-offset, s.mul_(inverse), by_mean).mul_(inverse).mul_(near[..., m])
            h.addcmul_(p, of_p.unsqueeze(1))
            d_neighbor[..., m], d_center[..., m] = h.sum(2), h.sum(3)
        by_variance = (by_slope - mean * by_offset) * 2 / count
        return by_offset / count, by_variance, d_neighbor, d_center, None, None, None


def _clouds(neighbor: Tensor) -> Iterator[slice]:
    w, d, n, M = neighbor.shape
    step = max(1, AT_ONCE // (w * d * n * n))
    return (slice(first, first + step) for first in range(0, M, step))


def _inverse_norm(p: Tensor) -> Tensor:
    return dot(p, p).add_(1e-12).rsqrt_()


def _affine(factor: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    """factor x + shift, both (w,)."""
    return torch.addcmul(per_channel(shift, x), per_channel(factor, x), x)


def _first(d_mean: Tensor, d_variance: Tensor, neighbor: Tensor, center: Tensor, near: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the moments in plain torch."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (neighbor, center)]
        moments = norm_moments(pairs(own[0], own[1]), near)
    return torch.autograd.grad(moments, own, (d_mean, d_variance), create_graph=further)
