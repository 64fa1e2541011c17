"""The concept of a group: elements in compact form, and how they act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from probsym_fast.batches import Batch
from probsym_fast.draws import Draws


class Group(ABC):
    """A group whose elements come in batches (B, S): B graphs, S samples each.

    A layout names the axes of a tensor after (B,) or (B, S), a letter each: "n" nodes (permuted), "v" a vector
    (rotated), "p" a point (rotated and translated), "c" channels (left alone). Positions of particles are "np",
    velocities "nv", features of pairs "nnc". The groups of this package refuse other letters. A group of your own may
    have letters of its own: it names them in `moves`, so that a `Product` passes them to it and to no other factor.

    moves: the letters of the axes that the group moves and that no other factor of a product may move. None: not known;
        the group then counts as moving every axis. outputs: the names of the outputs that `project` reads.
    """

    moves: str | None = None
    outputs: tuple[str, ...] = ()

    @abstractmethod
    def identity(self, batch: Batch, samples: int) -> Any:
        """The neutral element for every graph and sample."""

    @abstractmethod
    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Any:
        """Elements drawn from the Haar measure; translations, which have none, take the batch's centre."""

    @abstractmethod
    def compose(self, g: Any, h: Any) -> Any:
        """The element that acts as h, then g. Differentiable, or RuntimeError where a gradient would be dropped."""

    @abstractmethod
    def inverse(self, g: Any) -> Any:
        """The element that undoes g. Differentiable, or RuntimeError where a gradient would be dropped."""

    @abstractmethod
    def act(self, g: Any, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        """g . x (or g^-1 . x): x is (B, *layout) or (B, S, *layout); returns (B, S, *layout).

        mean averages over the samples: (B, *layout). Differentiable in g and x. Raises ValueError for letters that are
        not known and for shapes that do not fit the layout.
        """

    def keeps(self, layout: str) -> bool:
        """Whether every element leaves tensors of this layout as they are; False where that is not known."""
        return self.moves is not None and not set(self.moves) & set(layout)

    @abstractmethod
    def project(
        self,
        outputs: Mapping[str, Tensor],
        batch: Batch,
        *,
        tau: float = 0.01,
        iterations: int = 20,
        draws: Draws | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Elements from the outputs of an equivariant network, and penalties (scalars) to be added to the loss.

        "scores" (B, S, N) go to permutations (tau and iterations as in `ops.soft_permutation`), "matrices"
        (B, S, d, d) to orthogonal matrices, the batch's centre to translations. Raises KeyError for an output that is
        missing.
        """

    def block(self, kind: str) -> int:
        """Samples in turn that depend on each other, by the kind of draws (`Draws`)."""
        return 1 if kind == "independent" else 2

    def __mul__(self, other: Group) -> Group:
        if not isinstance(other, Group):
            return NotImplemented
        from probsym_fast.groups.product import Product

        return Product(self, other)


LETTERS = "nvpc"


def check_layout(owner: object, layout: str, letters: str = LETTERS) -> None:
    """TypeError unless layout is a str, ValueError for a letter that is not one of `letters`."""
    if not isinstance(layout, str):
        raise TypeError(f"{owner}: layout must be a str, got {type(layout).__name__}")
    if unknown := [letter for letter in layout if letter not in letters]:
        raise ValueError(f"{owner}: layout must be of the letters {letters!r}, got {unknown[0]!r} in {layout!r}")


def sample_axis(x: Tensor, layout: str) -> bool:
    """Whether x has a sample axis before those of the layout; ValueError where it has neither one nor none."""
    if x.ndim not in (len(layout) + 1, len(layout) + 2):
        raise ValueError(
            f"act: x must be (B, [S,] *{layout!r}), {len(layout)} axes behind the batch, got {tuple(x.shape)}"
        )
    return x.ndim == len(layout) + 2


def wanted(outputs: Mapping[str, Tensor], name: str, group: str) -> Tensor:
    if name not in outputs:
        raise KeyError(f"{group}: the network must return {name!r}, got {sorted(outputs)}")
    return outputs[name]
