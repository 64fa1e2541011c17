"""Rigid motions: translations, with or without rotations and reflections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from probsym_fast._checks import check_count
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.elements import product
from probsym_fast.groups.group import Group, check_layout, sample_axis
from probsym_fast.groups.orthogonal import Orthogonal, SpecialOrthogonal
from probsym_fast.ops.permutation import Relaxation


class Motion(NamedTuple):
    """x -> frame x + shift: frame (B, S, d, d) or None (no rotation), shift (B, S, d)."""

    frame: Tensor | None
    shift: Tensor


class Motions(Group):
    """Translations of R^d with or without a linear group: what Translation, Euclidean and SpecialEuclidean share.

    An element's shift is the batch's centroid, so translation is removed and restored.
    """

    linear: Orthogonal | None = None  # none: translations only

    def __init__(self, d: int = 3):
        self.d = check_count(type(self).__name__, "d", d)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.d})"

    def centered(self, frame: Tensor | None, batch: Batch, samples: int) -> Motion:
        """The motion with this frame (B, samples, d, d), or None, whose shift is the batch's centroid."""
        if batch.center is None:
            raise ValueError(f"{self}: batch.center must be (B, {self.d}), got None")
        return Motion(frame, batch.center[:, None].expand(-1, samples, -1))

    def identity(self, batch: Batch, samples: int) -> Motion:
        frame = self.linear.identity(batch, samples) if self.linear else None
        return Motion(frame, torch.zeros(batch.size, samples, self.d, dtype=batch.dtype, device=batch.device))

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Motion:
        frame = self.linear.uniform(batch, samples, draws) if self.linear else None
        return self.centered(frame, batch, samples)

    def anywhere(self, batch: Batch, samples: int, draws: Draws | None = None) -> Motion:
        """Shifts around the centroid, as far as a normal vector of length about sqrt(d)."""
        draws = draws or Draws()
        g = self.uniform(batch, samples, draws.fork(0))
        return Motion(
            g.frame, g.shift + draws.fork(1).normal(tuple(g.shift.shape), "shift", device=batch.device).to(g.shift)
        )

    def block(self, kind: str) -> int:
        return self.linear.block(kind) if self.linear else super().block(kind)

    def compose(self, g: Motion, h: Motion) -> Motion:
        if g.frame is None:
            return Motion(None, g.shift + h.shift)
        assert h.frame is not None  # an element of the same group
        return Motion(product(g.frame, h.frame), product(g.frame, h.shift[..., None])[..., 0].to(g.shift) + g.shift)

    def inverse(self, g: Motion) -> Motion:
        if g.frame is None:
            return Motion(None, -g.shift)
        return Motion(g.frame.mT, -product(g.frame.mT, g.shift[..., None])[..., 0].to(g.shift))

    def act(self, g: Motion, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        if layout.count("p") > 1:
            raise ValueError(f"{self}: layout must have at most one point axis, got {layout!r}")
        first, point = 2 if sample_axis(x, layout, g.shift.shape) else 1, layout.find("p")
        if point >= 0 and x.shape[first + point] != self.d:
            raise ValueError(f"{self}: axis {first + point} of x must have size {self.d}, got {tuple(x.shape)}")
        if inverse and point >= 0:
            x = (x if x.ndim == len(layout) + 2 else x[:, None]) - self._along(g.shift, layout, point)
        if g.frame is not None:
            assert self.linear is not None  # the group of g has rotations
            x = self.linear.act(g.frame, x, layout, inverse=inverse, mean=mean)
        else:
            x = x if x.ndim == len(layout) + 2 else x[:, None].expand(x.shape[0], g.shift.shape[1], *x.shape[1:])
            x = x.mean(1) if mean else x
        if not inverse and point >= 0:
            shift = self._along(g.shift, layout, point)
            x = x + (shift.mean(1) if mean else shift)
        return x

    @staticmethod
    def _along(shift: Tensor, layout: str, axis: int) -> Tensor:
        """(B, S, d) with singleton axes around the point axis."""
        return shift.reshape(*shift.shape[:2], *([1] * axis), shift.shape[-1], *([1] * (len(layout) - axis - 1)))

    def project(
        self,
        outputs: Mapping[str, Tensor],
        batch: Batch,
        *,
        relaxation: Relaxation = Relaxation(),
        draws: Draws | None = None,
    ) -> tuple[Motion, dict[str, Tensor]]:
        if self.linear is None:
            return self.centered(None, batch, next(iter(outputs.values())).shape[1]), {}
        frame, penalties = self.linear.project(outputs, batch)
        return self.centered(frame, batch, frame.shape[1]), penalties


class Translation(Motions):
    """R^d on the point ("p") axes. Its element for a batch is the centroid, so translation is removed and restored."""

    moves, outputs = "p", ()


class Euclidean(Motions):
    """E(d): rotations, reflections and translations."""

    moves, outputs = Orthogonal.moves, Orthogonal.outputs

    def __init__(self, d: int = 3):
        super().__init__(d)
        self.linear = Orthogonal(d)


class SpecialEuclidean(Motions):
    """SE(d): rotations and translations."""

    moves, outputs = SpecialOrthogonal.moves, SpecialOrthogonal.outputs

    def __init__(self, d: int = 3):
        super().__init__(d)
        self.linear = SpecialOrthogonal(d)
