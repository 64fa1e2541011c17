"""Frames of clouds by tuples of their points, with probabilities that change continuously."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast.distributions.discrete import Discrete
from probsym_fast.distributions.distribution import Penalties
from probsym_fast.distributions.frames import (
    SMOOTH,
    _centered,
    _checked_smooth,
    _counts,
    _element,
    _linear,
    _orientation,
)
from probsym_fast.draws import Draws
from probsym_fast.groups import Group

ROUNDING = 1e-15  # of lengths in float64


class Tuples(NamedTuple):
    """points (B, n, d) around the centroid, their size (B, 1, 1), and the numbers (M, d - 1) of the points of each tuple."""

    batch: Any
    points: Tensor
    size: Tensor
    number: Tensor


class WeightedFrame(Discrete):
    """Weighted frames: every (d - 1)-tuple of a cloud's points gives a frame, with a probability that grows with its volume.

    Gram-Schmidt of the points relative to the centroid, and the axis that completes them: in the special groups with
    determinant 1, else with both signs. The probability is proportional to det(Y^T Y + e^2 I), for the points Y (d, d - 1) of
    the tuple and a small length e: the squared volume that it spans. So tuples that define no frame have next to none, and
    predictions change continuously where principal axes jump. There are n^(d - 1) tuples of n points (n^2 in space), twice as
    many frames in groups with reflections.

    smooth: e relative to the root mean square distance from the centroid. Each sample adds its own normal noise of size e to
    the points of its tuple. It decides where no tuple defines a frame, such as for points on one line: the axes that these
    leave open are uniform.

    `forward` draws independent samples. `elements_and_weights` with all of them as samples gives the weighted mean, with its
    gradient; see `Discrete`. It is exact where some tuple defines a frame. Else it is a mean over one noise per tuple.
    Clouds, groups, dtypes and errors as in `Frame`.
    Source: Dym et al. 2024 (arXiv 2402.16077), who define weighted frames; here weights are squared volumes.
    """

    def __init__(self, group: Group, smooth: float = SMOOTH, replacement: bool = False):
        self.linear = _linear("WeightedFrame", group, False)
        super().__init__(group, replacement)
        self.smooth = _checked_smooth("WeightedFrame", smooth)

    def count(self, batch: Any) -> int:
        """The number of frames of each cloud, M."""
        return batch.positions.shape[1] ** (self.linear.d - 1) * (1 if self.linear.special else 2)

    def candidates(self, batch: Any, draws: Draws) -> tuple[Any, Tensor, Penalties]:
        tuples, log_p, penalties = self._candidates(batch, draws)
        return self._taken(tuples, None, draws), log_p, penalties

    def _candidates(self, batch: Any, draws: Draws) -> tuple[Tuples, Tensor, Penalties]:
        """No noise: p is a function of the cloud."""
        y, valid = _centered("WeightedFrame", batch, self.linear.d)
        n, d = y.shape[1:]
        size = (y.detach().square().sum((1, 2))[:, None, None] / _counts(valid)).sqrt()
        size = torch.where(size > 0, size, 1)
        if d > 1:
            places = torch.meshgrid(*[torch.arange(n, device=y.device)] * (d - 1), indexing="ij")
            number = torch.stack([place.flatten() for place in places], -1)  # (n^(d - 1), d - 1)
        else:
            number = torch.zeros(1, 0, dtype=torch.int64, device=y.device)
        some = valid | ~valid.any(1, keepdim=True)  # a cloud without points has any frame
        log_volume = _log_volume(y[:, number] / size[..., None], max(self.smooth, ROUNDING))
        log_p = torch.where(some[:, number].all(-1), log_volume, -torch.inf).log_softmax(1)
        if not self.linear.special:
            log_p = torch.cat([log_p, log_p], 1) - math.log(2)
        return Tuples(batch, y, size, number), log_p, {}

    def _taken(self, g: Tuples, index: Tensor | None, draws: Draws) -> Any:
        """The frames of tuples index (B, S), each with its own noise; the second half of the tuples are mirrored."""
        d, M = self.linear.d, g.number.shape[0]
        if index is None:
            index = torch.arange(M * (1 if self.linear.special else 2), device=g.points.device)
            index = index.expand(g.points.shape[0], -1)
        number = g.number[index % M]  # (B, S, d - 1)
        rows = torch.arange(number.shape[0], device=number.device)[:, None, None]
        noise = draws.fork(2).normal((*index.shape, d, d), "points", device=number.device)
        points = g.points[rows, number] + self.smooth * g.size[..., None] * noise[:, :, : d - 1]
        columns = torch.cat([points, noise[:, :, d - 1 :]], 2).mT  # the last is any vector: only its rest counts
        frames = ops.orthogonal_frame(columns)
        sign = _orientation(frames) * torch.where(index < M, 1, -1)[..., None, None]
        frames = torch.cat([frames[..., :-1], frames[..., -1:] * sign], -1)
        return _element(self.group, frames.to(self.linear.dtype(g.batch)), g.batch)


def _log_volume(x: Tensor, e: float) -> Tensor:
    """log det(Y^T Y + e^2 I), for rows x = Y^T: (..., r, d) -> (...).

    By Gram-Schmidt of the rows with e I beside them, so that rounding is small also where the rows depend on each other.
    """
    r = x.shape[-2]
    beside = (e * torch.eye(r, dtype=x.dtype, device=x.device)).expand(*x.shape[:-1], r)
    log = x.new_zeros(x.shape[:-2])
    done: list[tuple[Tensor, Tensor]] = []
    for row in torch.cat([x, beside], -1).unbind(-2):
        for other, squared in done * 2:  # twice for rounding
            row = row - other * ((row * other).sum(-1) / squared)[..., None]
        done.append((row, row.square().sum(-1)))
        log = log + done[-1][1].log()
    return log
