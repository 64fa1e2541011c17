"""The orthogonal groups: rotations and reflections."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast._checks import check_count
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.elements import product
from probsym_fast.groups.group import Group, check_layout, sample_axis, wanted
from probsym_fast.ops.permutation import Relaxation


class Orthogonal(Group):
    """O(d) on the vector ("v") and point ("p") axes. Elements are matrices (B, S, d, d)."""

    moves, outputs = "vp", ("matrices",)
    special = False

    def __init__(self, d: int = 3):
        self.d = check_count(type(self).__name__, "d", d)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.d})"

    def identity(self, batch: Batch, samples: int) -> Tensor:
        eye = torch.eye(self.d, dtype=_at_least_float32(batch.dtype), device=batch.device)
        return eye.expand(batch.size, samples, self.d, self.d)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Tensor:
        """Gram-Schmidt of normal matrices follows the Haar measure, and so does g D for any fixed D of the group.

        D runs through `signs`: the identity and one partner with antithetic draws, all sign changes of the axes with
        stratified ones.
        """
        draws = draws or Draws()
        signs = self.signs(draws.kind)
        shape = (batch.size, samples, self.d, self.d)
        normal = draws.normal(shape, "orthogonal", device=batch.device, block=len(signs))
        g = ops.orthogonal_frame(normal.to(_at_least_float32(batch.dtype)), special=self.special)
        if len(signs) == 1:
            return g
        place = draws.place(samples, len(signs), batch.device)
        return g * signs.to(g)[place][:, None]  # the columns: g D

    def signs(self, kind: str) -> Tensor:
        """(m, d) diagonals of the matrices D of m consecutive samples, by the kind of draws; an even number of -1 in SO(d).

        The antithetic partner is -1. In SO(d) with odd d it is the rotation that keeps the first axis and reverses the
        others.
        """
        d = self.d
        if kind == "antithetic":
            signs = torch.ones(2, d, dtype=torch.int64)
            signs[1, 1 if self.special and d % 2 else 0 :] = -1
        elif kind == "stratified":
            signs = torch.cartesian_prod(*[torch.tensor([1, -1])] * d).view(-1, d)
            signs = signs[signs.prod(1) == 1] if self.special else signs
        else:
            signs = torch.ones(1, d, dtype=torch.int64)
        return signs

    def block(self, kind: str) -> int:
        return len(self.signs(kind))

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return product(g, h)

    def inverse(self, g: Tensor) -> Tensor:
        return g.mT

    def act(self, g: Tensor, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        has_samples = sample_axis(x, layout, g.shape)
        axes = [i for i, letter in enumerate(layout) if letter in "vp"]
        for k, axis in enumerate(axes):
            first = 2 if has_samples else 1
            if x.shape[first + axis] != self.d:
                raise ValueError(f"{self}: axis {first + axis} of x must have size {self.d}, got {tuple(x.shape)}")
            lead, rest = x.shape[:first], x.shape[first:]
            flat = x.reshape(*lead, math.prod(rest[:axis]), self.d, math.prod(rest[axis + 1 :]))
            last = mean and k == len(axes) - 1
            out = ops.act_orthogonal(flat, g, inverse=inverse, mean=last)
            x, has_samples = out.reshape(*out.shape[: 1 if last else 2], *rest), True
        if axes:
            return x
        x = x if has_samples else x[:, None].expand(x.shape[0], g.shape[1], *x.shape[1:])
        return x.mean(1) if mean else x

    def project(
        self,
        outputs: Mapping[str, Tensor],
        batch: Batch,
        *,
        relaxation: Relaxation = Relaxation(),
        draws: Draws | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        matrices = wanted(outputs, "matrices", repr(self))
        if matrices.shape[-2:] != (self.d, self.d):
            raise ValueError(f"{self}: matrices must be (B, S, {self.d}, {self.d}), got {tuple(matrices.shape)}")
        return ops.orthogonal_frame(matrices, special=self.special), {}


class SpecialOrthogonal(Orthogonal):
    """SO(d): the rotations."""

    special = True


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
