"""Frames of clouds with as few elements as their symmetry allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probsym_fast.distributions.distribution import Distribution, Penalties
from probsym_fast.distributions.frames import (
    SMOOTH,
    _centered,
    _checked_smooth,
    _element,
    _linear,
    _orientation,
)
from probsym_fast.draws import Draws
from probsym_fast.groups import Group


class MinimalFrame(Distribution):
    """Minimal frames: axes through the farthest points, so that a cloud without symmetry has one frame.

    The first axis points from the centroid to the farthest point, the next one to the point that is farthest from the axes
    before, and so on; in the special groups the last one completes them with determinant 1. Of points that are equally far
    each sample takes one at random. So a square in the plane has the 8 frames that its symmetry asks for, where `Frame` draws
    from 4 signs of every pair of axes. Where all points lie in the space of the axes so far, the next axis is uniform.

    smooth: distances are equal up to this share of the cloud's size, about. Frames are computed in float64. Gradients: to the
    positions of the points that are taken. Predictions jump where another point becomes the farthest. Clouds, groups and
    errors as in `Frame`. Source: the idea of minimal frames is Lin et al. 2024 (arXiv 2406.07598); this choice is our own.
    """

    def __init__(self, group: Group, smooth: float = SMOOTH):
        self.linear = _linear("MinimalFrame", group, False)
        super().__init__(group)
        self.smooth = _checked_smooth("MinimalFrame", smooth)

    def draw(self, batch: Any, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        draws, linear = draws or Draws(), self.linear
        y, valid = _centered("MinimalFrame", batch, linear.d)
        B, n, d = y.shape
        size = y.detach().square().sum(-1).amax(1).sqrt() if n else y.new_zeros(B)  # (B,)
        size = torch.where(size > 0, size, 1)[:, None]
        ties = draws.fork(0).uniform((B, samples, n, d), "frame", device=y.device)  # more padding only appends
        rest = (y / size[..., None])[:, None].expand(-1, samples, -1, -1)  # (B, S, n, d), orthogonal to the axes so far
        other = draws.fork(1).normal((B, samples, d, d), "axes", device=y.device)
        axes: list[Tensor] = []
        for k in range(d):
            found = _without(other[:, :, k], axes)
            if n and not (linear.special and k == d - 1):
                far = rest.detach().square().sum(-1) + self.smooth * ties[..., k]
                place = torch.where(valid[:, None], far, -1).argmax(-1)[..., None, None].expand(-1, -1, 1, d)
                point = rest.gather(2, place)[:, :, 0]
                outside = point.detach().square().sum(-1, keepdim=True).sqrt() > max(self.smooth, SMOOTH)
                found = torch.where(outside, torch.where(outside, point, 1), found)
            axis = _unit(found)
            axes.append(axis)
            rest = rest - (rest * axis[:, :, None]).sum(-1, keepdim=True) * axis[:, :, None]
        frames = torch.stack(axes, -1)  # (B, S, d, d)
        if linear.special:
            frames = torch.cat([frames[..., :-1], frames[..., -1:] * _orientation(frames)], -1)
        return _element(self.group, frames.to(linear.dtype(batch)), batch), {}


def _without(x: Tensor, axes: list[Tensor]) -> Tensor:
    """x (B, S, d) less its parts along orthonormal axes, twice for rounding."""
    for axis in axes * 2:
        x = x - (x * axis).sum(-1, keepdim=True) * axis
    return x


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()
