"""vector_edge_convolution and its gradient: four kernels and three, for some clouds at a time.

    maps = weight x, by the library;   near;   moments of the norms of near pairs;   the chosen neighbours;   y
Backward: near; d of the chosen pairs, with sums that give the slopes of the statistics; d of the maps; products of the
library. Pairs are computed again wherever they are read (`vector_pairs`). No sum uses atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast.ops.reference.vector_edge_convolution import VARIANCE_EPS, node_maps, valid
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_tensors
from probsym_fast.ops.triton.vector_pairs import Pairs, nearest
from probsym_fast.ops.triton.vector_pairs_gradient import chosen_gradient, maps_gradient
from probsym_fast.ops.vector_edge_convolution import beyond_kernels

BYTES = 2**28  # of maps and their gradients at a time


class Call:
    """The checked arguments, and what runs on some of the clouds. Channels are padded to a multiple of 4, W, with zeros."""

    _last: tuple[slice, Pairs] | None = None

    def __init__(self, x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors):
        (C, d, n, self.M), (w,) = check_axes("x", x, 4), check_axes("gain", gain, 1)
        if min(C, d, n, w) < 1:
            raise Refused(ValueError, f"sizes must be at least 1, got C, d, n and w = {(C, d, n, w)}")
        if neighbors < 1:
            raise Refused(ValueError, f"neighbors must be at least 1, got {neighbors}")
        if (lacking := beyond_kernels(x.device.type, tuple(x.shape), w)) is not None:
            raise Refused(ValueError, lacking)
        if (running_mean is None) != (running_var is None):
            raise Refused(ValueError, "running_mean must be given with running_var, got one of them")
        check_tensors(
            x.device,
            feature=(feature, (w, 2 * C)),
            direction=(direction, (w, 2 * C)),
            pool=(pool, (w, w)),
            bias=(bias, (w,)),
            running_mean=(running_mean, (w,)),
            running_var=(running_var, (w,)),
            num_nodes=(num_nodes, (self.M,)),
        )
        self.inside = None if num_nodes is None else valid(num_nodes, n)  # (n, M)
        self.x, self.gain, self.bias, self.neighbors = x, gain.contiguous(), bias.contiguous(), neighbors
        self.C, self.d, self.n, self.w, self.more = C, d, n, w, -w % 4
        maps = node_maps(feature, direction).view(4, w, C)
        self.weight = F.pad(maps, (0, 0, 0, self.more)).flatten(0, 1)  # (4 W, C)
        self.pool = F.pad(pool, (0, self.more, 0, self.more)).contiguous()

    def parts(self, values: int) -> list[slice]:
        """The clouds, as many at a time as `values` numbers a channel of a vector each allow."""
        step = max(1, BYTES // (4 * self.n * (self.d * values * (self.w + self.more) + self.n)))
        return [slice(first, min(self.M, first + step)) for first in range(0, max(self.M, 1), step)]

    def pairs(self, some: slice) -> Pairs:
        """Of some clouds; those of the last call again without computing."""
        if self._last is None or self._last[0] != some:
            self._last = None  # frees memory
            x, inside = self.some(self.x, some), None if self.inside is None else self.inside[:, some]
            maps = x.flatten(1).t() @ self.weight.t()
            pairs = Pairs(maps, nearest(x, self.neighbors, inside), self.n, x.shape[3], self.d, self.w + self.more)
            self._last = some, pairs
        return self._last[1]

    def some(self, values: Tensor, some: slice) -> Tensor:
        """values (..., n, M) of some clouds; 0 for nodes that are not valid."""
        values = values[..., some].contiguous()
        return values if self.inside is None else torch.where(self.inside[:, some], values, 0)

    def convolution(self, some: slice, scaling: Tensor) -> tuple[Tensor, Tensor]:
        """y (w, d, n, M) and the chosen neighbours (w, n, M) of some clouds."""
        found = self.pairs(some).convolution(self.pool, scaling, self.w)
        if self.inside is None:
            return found
        y, taken = (x.masked_fill_(~self.inside[:, some], 0) for x in found)
        return y, taken

    def padded(self, *rows: Tensor) -> Tensor:
        return F.pad(torch.stack(rows), (0, self.more))

    def scaling(self, mean: Tensor, variance: Tensor) -> Tensor:
        """(2, W): |p| becomes scale |p| + shift."""
        scale = self.gain * (variance + VARIANCE_EPS).rsqrt()
        return self.padded(scale, self.bias - scale * mean)

    def statistics(self, parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """mean, variance (w,) and count () int64 from the parts' moments, in their order."""
        count, mean, square = (torch.cat(some).double() for some in zip(*parts, strict=True))
        total = count.sum()
        middle = count @ mean / total
        variance = (square.sum(0) + count @ (mean - middle).square()) / total
        return middle[: self.w].to(self.x.dtype), variance[: self.w].to(self.x.dtype), total.long()

    def slopes(self, sums: Tensor, mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """d of gain, from that of scale and shift (2, W); and of norms by the statistics (2, W), as offset and slope."""
        d_scale, d_shift = sums[:, : self.w]
        inverse = (variance + VARIANCE_EPS).rsqrt()
        d_gain = (d_scale - mean * d_shift) * inverse
        slope = -d_gain * self.gain * inverse * inverse / count  # 2 d_variance / count
        return d_gain, self.padded(-self.gain * inverse * d_shift / count - slope * mean, slope)


def forward(
    x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors)
    if running_mean is None and not call.M:
        raise Refused(ValueError, "x must be of at least one cloud without running statistics, got M = 0")
    with torch.autocast(x.device.type, enabled=False):
        parts = call.parts(4)
        if running_mean is None:
            mean, variance, count = call.statistics([call.pairs(some).moments() for some in parts])
        else:
            mean, variance = running_mean.clone(), running_var.clone()
            count = torch.zeros((), dtype=torch.int64, device=x.device)
        scaling = call.scaling(mean, variance)
        if len(parts) == 1:
            y, taken = call.convolution(parts[0], scaling)
            return y, taken, mean, variance, count
        y = torch.empty(call.w, *x.shape[1:], dtype=x.dtype, device=x.device)
        taken = torch.empty(call.w, *x.shape[2:], dtype=torch.uint8, device=x.device)
        for some in parts:
            y[..., some], taken[..., some] = call.convolution(some, scaling)
    return y, taken, mean, variance, count


def backward(
    d_y,
    x,
    feature,
    direction,
    pool,
    gain,
    bias,
    running_mean,
    running_var,
    num_nodes,
    taken,
    mean,
    variance,
    count,
    neighbors,
    needs_x,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    call = Call(x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors)
    (_, d, n, M), w, C = x.shape, call.w, call.C
    given = {"mean": (mean, (w,)), "variance": (variance, (w,)), "count": (count, ())}
    check_tensors(x.device, d_y=(d_y, (w, d, n, M)), taken=(taken, (w, n, M)), **given)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_weight, scaling = torch.zeros_like(call.weight), call.scaling(mean, variance)

    def chosen(some: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Those of some clouds, d of their p and q, and of scale and shift."""
        own = taken[..., some].contiguous()
        return own, *chosen_gradient(call.pairs(some), call.some(d_y, some), own, scaling)

    with torch.autocast(x.device.type, enabled=False):
        parts, sums = call.parts(10), torch.zeros_like(scaling)
        for some in parts:
            found = chosen(some)
            sums += found[2]
        d_gain, slopes = call.slopes(sums, mean, variance, count)
        for some in parts:
            own, d_pairs, _ = found if len(parts) == 1 else chosen(some)
            d_maps = maps_gradient(call.pairs(some), d_pairs, own, slopes if running_mean is None else None)
            d_weight.addmm_(d_maps.t(), call.some(x, some).flatten(1).t())
            if d_x is not None:
                d_x[..., some] = (call.weight.t() @ d_maps.t()).view(C, d, n, -1)
    neighbor_p, neighbor_q, center_p, center_q = d_weight.view(4, -1, C)[:, :w]
    d_feature = torch.cat([neighbor_p - center_p, center_p], 1)
    d_direction = torch.cat([neighbor_q - center_q, center_q], 1)
    return d_x, d_feature, d_direction, d_gain, sums[1, :w].clone()
