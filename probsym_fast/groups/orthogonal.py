"""The orthogonal groups: rotations and reflections."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.group import check_layout, sample_axis
from probsym_fast.groups.images import image_axes, move_along
from probsym_fast.groups.linear import Linear, act_by_matrices, check_matrices


class Orthogonal(Linear):
    """O(d) on the vector ("v") and point ("p") axes, O(2) also on images ("h" and "w"). Elements: matrices (B, S, d, d)."""

    special = False

    def __init__(self, d: int = 3):
        super().__init__(d)
        if self.d == 2 and self.moves == Linear.moves:
            self.moves = "vphw"

    def frames(self, matrices: Tensor) -> Tensor:
        return ops.orthogonal_frame(matrices, special=self.special)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Tensor:
        """Gram-Schmidt of normal matrices follows the Haar measure, and so does g D for any fixed D of the group.

        D runs through `signs`: the identity and one partner with antithetic draws, all sign changes of the axes with
        stratified ones.
        """
        draws = draws or Draws()
        signs = self.signs(draws.kind)
        shape = (batch.size, samples, self.d, self.d)
        normal = draws.normal(shape, "orthogonal", device=batch.device, block=len(signs))
        g = self.frames(normal.to(self.dtype(batch)))
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

    def inverse(self, g: Tensor) -> Tensor:
        return g.mT

    def act(self, g: Tensor, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        if "h" in (self.moves or "") and (image := image_axes(self, layout)) is not None:
            check_matrices(self, g)
            x = x if sample_axis(x, layout, g.shape) else x[:, None]
            x = move_along(self, x, image, g, inverse)
        return act_by_matrices(self, g, x, layout, inverse=inverse, mean=mean)

    def plane(self, g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if "h" not in (self.moves or ""):
            return super().plane(g, dtype)
        check_matrices(self, g)
        return g


class SpecialOrthogonal(Orthogonal):
    """SO(d): the rotations."""

    special = True
