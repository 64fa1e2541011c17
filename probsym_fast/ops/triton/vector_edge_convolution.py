"""vector_edge_convolution and its gradient, for some clouds at a time.

    weight (`vector_channels`);   maps = weight x, by the library;   near;   moments of the norms of near pairs, and from them
    the statistics;   the chosen neighbours;   y
Backward: weight, maps and near again; d of the chosen pairs, with sums that give the slopes of the statistics; d of the maps;
products of the library; d of feature and direction. Pairs are computed again wherever they are read (`vector_pairs`). No sum
uses atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops.reference.vector_edge_convolution import valid
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_tensors
from probsym_fast.ops.triton.vector_channels import Channels
from probsym_fast.ops.triton.vector_pairs import Pairs, nearest
from probsym_fast.ops.triton.vector_pairs_gradient import chosen_gradient, maps_gradient
from probsym_fast.ops.vector_edge_convolution import beyond_kernels

BYTES = 2**28  # of maps and their gradients at a time


class Call:
    """The checked arguments, and what runs on some of the clouds.

    weight (4 W, C), pool (W, W) and scaling (2, W): channels are padded to a multiple of 4, W, with zeros.
    """

    weight: Tensor
    pool: Tensor
    scaling: Tensor
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
        self.x, self.neighbors = x, neighbors
        self.d, self.n, self.w = d, n, w
        self.channels = Channels(*(t.contiguous() for t in (feature, direction, pool, gain, bias)))

    def prepare(self, mean: Tensor | None, variance: Tensor | None) -> None:
        """weight, pool and scaling, which is not filled without statistics."""
        self.weight, self.pool, self.scaling = self.channels.parameters(mean, variance)

    def parts(self, values: int) -> list[slice]:
        """The clouds, as many at a time as `values` numbers a channel of a vector each allow."""
        step = max(1, BYTES // (4 * self.n * (self.d * values * self.channels.sizes[2] + self.n)))
        return [slice(first, min(self.M, first + step)) for first in range(0, max(self.M, 1), step)]

    def pairs(self, some: slice) -> Pairs:
        """Of some clouds; those of the last call again without computing."""
        if self._last is None or self._last[0] != some:
            self._last = None  # frees memory
            x, inside = self.some(self.x, some), None if self.inside is None else self.inside[:, some]
            maps = x.flatten(1).t() @ self.weight.t()
            pairs = Pairs(maps, nearest(x, self.neighbors, inside), self.n, x.shape[3], self.d, self.channels.sizes[2])
            self._last = some, pairs
        return self._last[1]

    def some(self, values: Tensor, some: slice) -> Tensor:
        """values (..., n, M) of some clouds; 0 for nodes that are not valid."""
        values = values[..., some].contiguous()
        return values if self.inside is None else torch.where(self.inside[:, some], values, 0)

    def convolution(self, some: slice) -> tuple[Tensor, Tensor]:
        """y (w, d, n, M) and the chosen neighbours (w, n, M) of some clouds."""
        found = self.pairs(some).convolution(self.pool, self.scaling, self.w)
        if self.inside is None:
            return found
        y, taken = (x.masked_fill_(~self.inside[:, some], 0) for x in found)
        return y, taken


def forward(
    x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors)
    if running_mean is None and not call.M:
        raise Refused(ValueError, "x must be of at least one cloud without running statistics, got M = 0")
    with torch.autocast(x.device.type, enabled=False):
        parts = call.parts(4)
        if running_mean is None:
            call.prepare(None, None)
            moments = [call.pairs(some).moments() for some in parts]
            mean, variance, count = call.channels.statistics(moments, call.scaling)
        else:
            mean, variance = (x.clone(memory_format=torch.contiguous_format) for x in (running_mean, running_var))
            count = torch.zeros((), dtype=torch.int64, device=x.device)
            call.prepare(mean, variance)
        if len(parts) == 1:
            y, taken = call.convolution(parts[0])
            return y, taken, mean, variance, count
        y = torch.empty(call.w, *x.shape[1:], dtype=x.dtype, device=x.device)
        taken = torch.empty(call.w, *x.shape[2:], dtype=torch.uint8, device=x.device)
        for some in parts:
            y[..., some], taken[..., some] = call.convolution(some)
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
    (C, d, n, M), w = x.shape, call.w
    given = {"mean": (mean, (w,)), "variance": (variance, (w,)), "count": (count, ())}
    check_tensors(x.device, d_y=(d_y, (w, d, n, M)), taken=(taken, (w, n, M)), **given)
    mean, variance = mean.contiguous(), variance.contiguous()
    call.prepare(mean, variance)
    parts, sums = call.parts(10), []
    d_weight = torch.empty_like(call.weight)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x and len(parts) > 1 else None

    def chosen(some: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Those of some clouds, d of their p and q, and of scaling by part."""
        own = taken[..., some].contiguous()
        return own, *chosen_gradient(call.pairs(some), call.some(d_y, some), own, call.scaling)

    with torch.autocast(x.device.type, enabled=False):
        for some in parts:
            found = chosen(some)
            sums.append(found[2])
        d_gain, d_bias, slopes = call.channels.gradients(sums, mean, variance, count, running_mean is None)
        for some in parts:
            own, d_pairs, _ = found if len(parts) == 1 else chosen(some)
            d_maps = maps_gradient(call.pairs(some), d_pairs, own, slopes)
            d_weight.addmm_(d_maps.t(), call.some(x, some).flatten(1).t(), beta=0 if some is parts[0] else 1)
            if needs_x:
                of_clouds = (call.weight.t() @ d_maps.t()).view(C, d, n, -1)
                if d_x is None:
                    d_x = of_clouds
                else:
                    d_x[..., some] = of_clouds
    d_feature, d_direction = call.channels.weight_gradients(d_weight)
    return d_x, d_feature, d_direction, d_gain, d_bias
