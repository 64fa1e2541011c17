"""The fused steps of Vector Neurons: autograd functions that save little and compute the rest again.

Vector features are (channels, d, n, M), with M = B S clouds on the last axis. So every elementwise pass runs over
contiguous memory, and a linear map of the channels is one matrix product. Pairs of nodes are (channels, d, i, j, M). They
are processed for some clouds at a time, and the backward pass computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from probsym_fast._autocast import without_autocast
from probsym_fast.distributions._fused import Fused, gradient, needs_definition
from probsym_fast.ops.reference.vector_edge_convolution import (
    activation,
    dot,
    highest,
    index_dtype,
    linear,
    norm_moments,
    norm_of,
    of_taken,
    pairs,
    per_channel,
)

# |p| is sqrt(<p, p> + 1e-12), smooth at zero, and the leaky ReLU has the slope 0.2 = 1 - 0.8. These are literals: with
# dynamic=True torch.compile fails on a float of the module that several autograd functions read.
AT_ONCE = 1_600_000  # values held at a time on a CPU: few enough for its cache, enough to pay for a call
AT_ONCE_ELSEWHERE = 16_000_000  # on a GPU: a kernel then takes longer than its launch


def some_clouds(clouds: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Slices of the last axis, for `numbers` intermediate values per cloud.

    In recorded programs one slice: a number of them would fix the program's number of clouds.
    """
    if torch.compiler.is_compiling():
        return iter([slice(None)])
    step = max(1, (AT_ONCE if device.type == "cpu" else AT_ONCE_ELSEWHERE) // numbers)
    return (slice(first, first + step) for first in range(0, max(clouds, 1), step))


class NormMoments(Fused):
    """Mean and variance of |p| per channel, over all other axes: p (w, d, ...)."""

    @staticmethod
    def definition(p: Tensor) -> tuple[Tensor, Tensor]:
        norm = norm_of(p).flatten(1)
        return norm.mean(1), norm.var(1, correction=0)

    @staticmethod
    def forward(ctx, p: Tensor) -> tuple[Tensor, Tensor]:
        norm = dot(p, p).add_(1e-12).sqrt_()
        flat = norm.flatten(1)
        mean = flat.mean(1)
        ctx.save_for_backward(p, norm, mean)
        return mean, (flat - mean[:, None]).square_().mean(1)

    @staticmethod
    def backward(ctx, d_mean: Tensor, d_variance: Tensor):
        p, norm, mean = ctx.saved_tensors
        if needs_definition(d_mean, d_variance):
            return gradient(NormMoments.definition, [p], d_mean, d_variance)[0]
        return p * _norm_ratio(norm, mean, norm[0].numel(), d_mean, d_variance).unsqueeze(1)


def _norm_ratio(norm: Tensor, mean: Tensor, count: Tensor | int, d_mean: Tensor, d_variance: Tensor) -> Tensor:
    """d norm / norm, from the gradients of the mean and the variance."""
    slope = d_variance * 2 / count
    offset = d_mean / count - slope * mean
    return (per_channel(offset, norm) / norm).add_(per_channel(slope, norm))


class PairNormMoments(Fused):
    """`NormMoments` of p_ij = A x_j + C x_i over near pairs: near (i, j, M), weight [A, C] (2 w, in)."""

    @staticmethod
    def definition(near: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm_moments(pairs(*linear(weight, x).unflatten(0, (2, -1))), near)

    @staticmethod
    def forward(ctx, near: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        _, dim, n, clouds = x.shape
        parts = []
        for m in some_clouds(clouds, weight.shape[0] * dim * n * n, x.device):
            p = pairs(*linear(weight, x[..., m]).unflatten(0, (2, -1)))
            norm = dot(p, p).add_(1e-12).sqrt_().flatten(1)
            taken = near[..., m].to(norm.dtype).flatten()
            count = taken.sum()
            mean = (norm @ taken).div_(count)
            parts.append((count, mean, norm.sub_(mean[:, None]).square_() @ taken))
        counts, means, squares = (torch.stack(part, -1) for part in zip(*parts, strict=True))
        count = counts.sum()
        mean = (means @ counts).div_(count)
        variance = (squares.sum(1) + (means - mean[:, None]).square_() @ counts).div_(count)
        ctx.save_for_backward(near, weight, x, mean, count)
        return mean, variance

    @staticmethod
    def backward(ctx, d_mean: Tensor, d_variance: Tensor):
        near, weight, x, mean, count = ctx.saved_tensors
        if needs_definition(d_mean, d_variance):
            return tuple(gradient(PairNormMoments.definition, [near, weight, x], d_mean, d_variance))
        _, dim, n, clouds = x.shape
        d_weight = torch.zeros_like(weight)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        with without_autocast(x.device):  # it may be on in the backward pass
            for m in some_clouds(clouds, weight.shape[0] * dim * n * n, x.device):
                some = x[..., m].flatten(1)
                p = pairs(*(weight @ some).view(2, -1, *x[..., m].shape[1:]))
                norm = dot(p, p).add_(1e-12).sqrt_()
                ratio = _norm_ratio(norm, mean, count, d_mean, d_variance).mul_(near[..., m].to(norm.dtype))
                p.mul_(ratio.unsqueeze(1))
                d_out = torch.cat([p.sum(2), p.sum(3)]).flatten(1)
                d_weight.addmm_(d_out, some.t())
                if d_x is not None:
                    d_x[..., m] = (weight.t() @ d_out).view_as(x[..., m])
        return None, d_weight, d_x


def _activation_factors(p: Tensor, d: Tensor, scale: Tensor, shift: Tensor):
    """The activation is s p - c d. Returns s, c and what the gradient needs: 1/|p|, <p, d>, <d, d>."""
    inverse_norm = dot(p, p).add_(1e-12).rsqrt_()
    s = torch.addcmul(per_channel(scale, inverse_norm), per_channel(shift, inverse_norm), inverse_norm)
    pd, dd = dot(p, d), dot(d, d).add_(1e-6)
    c = (s * pd).clamp_max_(0).mul_(0.8).div_(dd)
    return s, c, inverse_norm, pd, dd


def _activation_gradient(
    g: Tensor, p: Tensor, d: Tensor, shift: Tensor, factors: Sequence[Tensor], d_p: Tensor, d_d: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of p and d to d_p and d_d, and returns those of scale and shift."""
    s, c, inverse_norm, pd, dd = factors
    d_s = dot(g, p)
    e = dot(g, d).div_(dd).mul_(c.sign())  # d_c / <d, d> on the leaky side, c < 0
    d_pd = e * 0.8
    d_s.addcmul_(d_pd, pd)
    d_pd.mul_(s)
    d_shift = d_s * inverse_norm
    d_scale_sum, d_shift_sum = d_s.flatten(1).sum(1), d_shift.flatten(1).sum(1)
    radial = d_shift.mul_(inverse_norm).mul_(inverse_norm).mul_(-per_channel(shift, d_shift))
    torch.mul(g, s.unsqueeze(1), out=d_p).addcmul_(d, d_pd.unsqueeze(1)).addcmul_(p, radial.unsqueeze(1))
    torch.mul(p, d_pd.unsqueeze(1), out=d_d).addcmul_(g, c.unsqueeze(1), value=-1)
    d_d.addcmul_(d, e.mul_(c).unsqueeze(1), value=-2)
    return d_scale_sum, d_shift_sum


class VectorActivation(Fused):
    """Norm scaling, then leaky ReLU along a direction.

    y = (scale |p| + shift) p / |p|, then y - (1 - slope) min(<y, d>, 0) d / <d, d>. p (w, d, ...), d (w or 1, d, ...),
    scale and shift (w,).
    """

    @staticmethod
    def definition(p: Tensor, d: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return activation(p, d, scale, shift)

    @staticmethod
    def forward(ctx, p: Tensor, d: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        s, c, *others = _activation_factors(p, d, scale, shift)
        ctx.save_for_backward(p, d, scale, shift, s, c, *others)
        return (p * s.unsqueeze(1)).addcmul_(d, c.unsqueeze(1), value=-1)

    @staticmethod
    def backward(ctx, g: Tensor):
        p, d, scale, shift, *factors = ctx.saved_tensors
        if needs_definition(g):
            return tuple(gradient(VectorActivation.definition, [p, d, scale, shift], g))
        d_p, d_d = torch.empty_like(p), torch.empty_like(p)
        d_scale, d_shift = _activation_gradient(g, p, d, shift, factors, d_p, d_d)
        return d_p, d_d.sum_to_size(d.shape), d_scale, d_shift


class EdgeActivation(Fused):
    """`VectorActivation` of all pairs of nodes, then VN max pooling per channel: the near y_ij with the largest <y, pool y>.

    near (i, j, M), pool (w, w), scale and shift (w,), x (in, d, n, M). weight (4 w, in) maps x to p and d of a
    neighbour and p and d of a center, which are added. -> (w, d, n, M). Only the pooled neighbours are differentiated.
    """

    @staticmethod
    def definition(near: Tensor, pool: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = linear(weight, x).unflatten(0, (2, 2, -1))
            y = activation(pairs(*out[:, 0]), pairs(*out[:, 1]), scale, shift)
            taken = highest(torch.where(near, dot(y, linear(pool, y)), -math.inf))
        return of_taken(taken, scale, shift, weight, x)

    @staticmethod
    def forward(ctx, near: Tensor, pool: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        width, (_, dim, n, clouds) = scale.shape[0], x.shape
        y = x.new_empty(width, dim, n, clouds)
        taken = x.new_empty(width, n, clouds, dtype=index_dtype(n))
        for m in some_clouds(clouds, 4 * width * dim * n * n, x.device):
            out = linear(weight, x[..., m]).view(2, 2, width, dim, n, -1)
            p, d = pairs(*out[:, 0]), pairs(*out[:, 1])
            s, c = _activation_factors(p, d, scale, shift)[:2]
            p.mul_(s.unsqueeze(1)).addcmul_(d, c.unsqueeze(1), value=-1)
            del d, s, c  # one pair tensor less at peak memory
            near_or_not = torch.where(near[..., m], 0.0, -math.inf).to(p.dtype)
            neighbor = highest(dot(p, linear(pool, p)).add_(near_or_not))
            taken[..., m] = neighbor
            index = neighbor.long().unsqueeze(1).expand(-1, dim, -1, -1).unsqueeze(3)
            y[..., m] = p.gather(3, index).squeeze(3)
        ctx.save_for_backward(taken, scale, shift, weight, x)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        taken, scale, shift, weight, x = ctx.saved_tensors
        if needs_definition(g):
            return None, *gradient(of_taken, [taken, scale, shift, weight, x], g)
        d_scale, d_shift, d_weight = (torch.zeros_like(t) for t in (scale, shift, weight))
        d_x = torch.empty_like(x) if ctx.needs_input_grad[5] else None
        with without_autocast(x.device):  # it may be on in the backward pass
            for m in some_clouds(g.shape[-1], 13 * math.prod(g.shape[:-1]), x.device):  # no tensor of pair size
                some, some_g = x[..., m].flatten(1), g[..., m]
                neighbor, center = (weight @ some).view(2, 2, *some_g.shape)  # of p and d both
                index = taken[..., m].long().unsqueeze(1).expand_as(neighbor)
                p, d = neighbor.gather(3, index).add_(center)
                factors = _activation_factors(p, d, scale, shift)
                d_out = center.new_empty(2, *center.shape)
                d_neighbor, d_center = d_out
                d_some_scale, d_some_shift = _activation_gradient(some_g, p, d, shift, factors, *d_center)
                d_scale += d_some_scale
                d_shift += d_some_shift
                d_neighbor.zero_().scatter_add_(3, index, d_center)
                d_out = d_out.view(len(weight), -1)
                d_weight.addmm_(d_out, some.t())
                if d_x is not None:
                    d_x[..., m] = (weight.t() @ d_out).view_as(x[..., m])
        return None, None, d_scale, d_shift, d_weight, d_x


class LargestInvariant(Fused):
    """max over the nodes of <x_c, z_v>: x (c, d, n or 1, M), z (v, d, n, M) -> (c, v, M)."""

    @staticmethod
    def definition(x: Tensor, z: Tensor) -> Tensor:
        return dot(x.unsqueeze(2), z.transpose(0, 1).unsqueeze(0)).max(2).values

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor) -> Tensor:
        n, clouds = z.shape[2:]
        values = x.new_empty(x.shape[0], z.shape[0], clouds)
        node = torch.empty_like(values, dtype=index_dtype(n))
        for m in some_clouds(clouds, 3 * math.prod(values.shape[:-1]) * n, x.device):
            largest = dot(x[..., m].unsqueeze(2), z[..., m].transpose(0, 1).unsqueeze(0)).max(2)
            values[..., m], node[..., m] = largest.values, largest.indices
        ctx.save_for_backward(x, z, node)
        return values

    @staticmethod
    def backward(ctx, g: Tensor):
        x, z, node = ctx.saved_tensors
        if needs_definition(g):
            return tuple(gradient(LargestInvariant.definition, [x, z], g))
        n, clouds = z.shape[2:]
        d_x, d_z = torch.empty_like(x), torch.empty_like(z)
        for m in some_clouds(clouds, 3 * math.prod(g.shape[:-1]) * n, x.device):
            some_x, some_z, some_g = x[..., m], z[..., m], g[..., m].unsqueeze(2)
            at_node = some_g.new_zeros(*g.shape[:2], n, some_g.shape[-1])  # (c, v, n, m)
            at_node.scatter_(2, node[..., m].long().unsqueeze(2), some_g)
            d_x[..., m] = dot(at_node.unsqueeze(2), some_z.unsqueeze(0)).sum_to_size(some_x.shape)
            d_z[..., m] = dot(at_node.transpose(0, 1).unsqueeze(2), some_x.unsqueeze(0))
        return d_x, d_z
