"""vector_edge_convolution in plain torch, and the parts that other steps of Vector Neurons share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast._checks import looks_at_values, transformed

VARIANCE_EPS = 1e-5


def vector_edge_convolution(
    x: Tensor,
    feature: Tensor,
    direction: Tensor,
    pool: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_nodes: Tensor | None,
    neighbors: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (C, d, n, M), feature and direction (w, 2 C) -> y (w, d, n, M), taken (w, n, M), mean, variance (w,), count ()."""
    check_values(x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes)
    inside = None if num_nodes is None else valid(num_nodes, x.shape[2])
    x = x if inside is None else torch.where(inside, x, 0)
    near = nearest(x, neighbors, inside)
    neighbor, center = linear(node_maps(feature, direction), x).unflatten(0, (2, 2, -1))
    p, q = pairs(neighbor[0], center[0]), pairs(neighbor[1], center[1])
    if running_mean is None or running_var is None:
        count = near.sum()
        mean, variance = norm_moments(p, near)
    else:
        count = near.new_zeros((), dtype=torch.int64)
        mean, variance = running_mean.detach().clone(), running_var.detach().clone()
    scale = gain * (variance + VARIANCE_EPS).rsqrt()
    y = activation(p, q, scale, bias - scale * mean)
    with torch.no_grad():
        taken = highest(torch.where(near, dot(y, linear(pool, y)), -math.inf))
    index = taken.long().unsqueeze(1).expand(-1, x.shape[1], -1, -1).unsqueeze(3)
    y = y.gather(3, index).squeeze(3)
    if inside is not None:
        y, taken = torch.where(inside, y, 0), torch.where(inside, taken, torch.zeros_like(taken))
    return y, taken, mean, variance, count


def of_taken(taken: Tensor, scale: Tensor, shift: Tensor, maps: Tensor, x: Tensor) -> Tensor:
    """The activation of pairs with the neighbours `taken` (w, n, M): maps (4 w, C) of `node_maps`, x (C, d, n, M)."""
    neighbor, center = linear(maps, x).unflatten(0, (2, 2, -1))  # of p and q both
    index = taken.long().unsqueeze(1).expand_as(neighbor[0])
    p, q = (part.gather(2, index) + own for part, own in zip(neighbor, center, strict=True))
    return activation(p, q, scale, shift)


def check_values(x: Tensor, *arguments: Tensor | int | None) -> None:
    """ValueError unless each of num_nodes is 0 to n, where checks may read values. arguments: those of the op."""
    counts = arguments[7]
    if not isinstance(counts, Tensor) or not looks_at_values(counts):
        return
    bad = counts[(counts < 0) | (counts > x.shape[2])]
    if len(bad):
        message = f"each of num_nodes must be in 0..{x.shape[2]}, got {int(bad[0])}"
        raise ValueError(f"vector_edge_convolution: {message}")


def valid(num_nodes: Tensor, n: int) -> Tensor:
    """(n, M): whether a node is one of the first num_nodes (M,) of its cloud."""
    return torch.arange(n, device=num_nodes.device)[:, None] < num_nodes


@torch.no_grad()
def nearest(x: Tensor, k: int, inside: Tensor | None = None) -> Tensor:
    """(i, j, M): whether j is among the k nodes nearest to i, itself included, over all channels, and both are inside (n, M).

    Includes all nodes as far as the k-th, so the choice does not depend on the order of the nodes.
    """
    n, clouds = x.shape[2:]
    both = None if inside is None else inside & inside[:, None]
    if k >= n:
        return torch.ones(n, n, clouds, dtype=torch.bool, device=x.device) if both is None else both
    nodes = x.detach().flatten(0, 1).permute(2, 1, 0).contiguous()  # (M, n, channels d)
    distance = torch.cdist(nodes, nodes, compute_mode="donot_use_mm_for_euclid_dist")
    if inside is not None:
        distance = distance.masked_fill(~inside.t()[:, None], math.inf)
    near = (distance <= distance.kthvalue(k, -1, keepdim=True).values).permute(1, 2, 0)
    return near.contiguous() if both is None else near & both


def node_maps(feature: Tensor, direction: Tensor) -> Tensor:
    """(4 w, C), of feature and direction for a neighbour, then for a center: W [x_j - x_i, x_i] = A x_j + (C - A) x_i."""
    (a_p, c_p), (a_q, c_q) = feature.chunk(2, 1), direction.chunk(2, 1)
    return torch.cat([a_p, a_q, c_p - a_p, c_q - a_q])


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product over axis 1, the d components."""
    differentiated = torch.is_grad_enabled() and (
        x.requires_grad or y.requires_grad
    )  # a component's gradient is all zeros
    if transformed() or differentiated:  # vmap has no addcmul_
        return (x * y).sum(1)
    first, *others = zip(x.unbind(1), y.unbind(1), strict=True)  # whose gradient is one stack, not d sums of zeros
    out = first[0] * first[1]
    for parts in others:
        out.addcmul_(*parts)
    return out


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in) times (in, d, ...) -> (out, d, ...)"""
    return (weight @ x.flatten(1)).unflatten(1, x.shape[1:])


def per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *(1,) * (like.dim() - 1))


def norm_of(p: Tensor) -> Tensor:
    return (dot(p, p) + 1e-12).sqrt()


def pairs(neighbor: Tensor, center: Tensor) -> Tensor:
    """Maps of nodes (w, d, n, M) -> their sums (w, d, i, j, M)."""
    return neighbor.unsqueeze(2) + center.unsqueeze(3)


def norm_moments(p: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (w,) of |p| over near pairs: p (w, d, i, j, M)."""
    norm = norm_of(p).flatten(1)
    taken = near.to(norm.dtype).flatten()
    count = taken.sum()
    mean = norm @ taken / count
    return mean, (norm - mean[:, None]).square() @ taken / count


def activation(p: Tensor, q: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Norm scaling of p (w, d, ...), then leaky ReLU along q (w or 1, d, ...); scale and shift (w,)."""
    norm = norm_of(p)
    s = per_channel(scale, norm) + per_channel(shift, norm) / norm
    c = F.relu(-s * dot(p, q)) * -0.8 / (dot(q, q) + 1e-6)
    return p * s.unsqueeze(1) - q * c.unsqueeze(1)


def index_dtype(size: int) -> torch.dtype:
    """The dtype for stored indices below size."""
    return torch.uint8 if size <= 2**8 else torch.int16 if size <= 2**15 else torch.int32


def highest(height: Tensor) -> Tensor:
    """The last j where height (w, i, j, m) is largest: (w, i, m). Faster on a CPU than max over an inner axis."""
    n = height.shape[2]
    place = torch.arange(n, dtype=index_dtype(n), device=height.device).view(n, 1)
    return (height == height.amax(2, keepdim=True)).to(place.dtype).mul_(place).amax(2)
