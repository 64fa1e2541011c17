"""Groups of matrices on vector and point axes: what the orthogonal, unitary and Lorentz groups share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast._checks import check_count, check_type
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.elements import product
from probsym_fast.groups.group import Group, check_layout, sample_axis, wanted
from probsym_fast.ops.permutation import Relaxation


class Linear(Group):
    """Matrices (B, S, d, d) that act on the vector ("v") and point ("p") axes. Subclasses define `frames` and `inverse`."""

    moves, outputs = "vp", ("matrices",)

    def __init__(self, d: int = 3):
        self.d = check_count(type(self).__name__, "d", d)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.d})"

    @abstractmethod
    def frames(self, matrices: Tensor) -> Tensor:
        """The group's elements from any matrices (..., d, d): `frames(g @ matrices) = g @ frames(matrices)`."""

    def dtype(self, batch: Batch) -> torch.dtype:
        """The elements' dtype: float32, or float64 as the batch."""
        return batch.dtype if batch.dtype == torch.float64 else torch.float32

    def identity(self, batch: Batch, samples: int) -> Tensor:
        eye = torch.eye(self.d, dtype=self.dtype(batch), device=batch.device)
        return eye.expand(batch.size, samples, self.d, self.d)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return product(g, h)

    def act(self, g: Tensor, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        return act_by_matrices(self, self.inverse(g) if inverse else g, x, layout, mean=mean)

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
        return self.frames(matrices), {}


def act_by_matrices(
    owner: Linear, g: Tensor, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False
) -> Tensor:
    """g (B, S, d, d) on the vector and point axes of x (B, [S,] *layout): (B, S, *layout), or its mean over the samples.

    inverse: by the transposes of real matrices.
    """
    check_layout(owner, layout)
    check_matrices(owner, g)
    has_samples = sample_axis(x, layout, g.shape)
    axes = [i for i, letter in enumerate(layout) if letter in "vp"]
    for k, axis in enumerate(axes):
        first, last = 2 if has_samples else 1, mean and k == len(axes) - 1
        if x.shape[first + axis] != owner.d:
            raise ValueError(f"{owner}: axis {first + axis} of x must have size {owner.d}, got {tuple(x.shape)}")
        lead, rest = x.shape[:first], x.shape[first:]
        flat = x.reshape(*lead, math.prod(rest[:axis]), owner.d, math.prod(rest[axis + 1 :]))
        if g.is_complex():
            if not x.is_complex():
                raise TypeError(f"{owner}: x must be complex, got {x.dtype}")
            out = product(g[:, :, None], flat if has_samples else flat[:, None]).to(flat.dtype)
            out = out.mean(1) if last else out
        else:
            out = ops.act_orthogonal(flat, g, inverse=inverse, mean=last)
        x, has_samples = out.reshape(*out.shape[: 1 if last else 2], *rest), True
    if axes:
        return x
    x = x if has_samples else x[:, None].expand(x.shape[0], g.shape[1], *x.shape[1:])
    return x.mean(1) if mean else x


def check_matrices(owner: Linear, g: Tensor) -> None:
    """TypeError unless g is a Tensor of floating point or complex numbers, ValueError unless it is (B, S, d, d)."""
    check_type(str(owner), "g", g, Tensor, "a Tensor")
    if not (g.is_floating_point() or g.is_complex()):
        raise TypeError(f"{owner}: g must be a floating point or complex Tensor, got {g.dtype}")
    if g.ndim != 4 or tuple(g.shape[2:]) != (owner.d, owner.d):
        raise ValueError(f"{owner}: g must be (B, S, {owner.d}, {owner.d}), got {tuple(g.shape)}")
