"""The concept of a group: elements in compact form, and how they act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from probsym_fast.groups._batch import Batch
from probsym_fast.groups._draws import Draws


class Group(ABC):
    """A group whose elements come in batches (B, S): B graphs, S samples each.

    A layout names the axes of a tensor behind (B,) or (B, S), a letter each: "n" nodes (permuted), "v" a vector
    (rotated), "p" a point (rotated and translated), "c" channels (left alone). Positions of particles are "np",
    velocities "nv", features of pairs "nnc".
    """

    @abstractmethod
    def identity(self, batch: Batch, samples: int) -> Any:
        """The neutral element for every graph and sample."""

    @abstractmethod
    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Any:
        """Elements drawn from the Haar measure; translations, which have none, take the batch's centre."""

    @abstractmethod
    def compose(self, g: Any, h: Any) -> Any:
        """The element that acts as h, then g."""

    @abstractmethod
    def inverse(self, g: Any) -> Any:
        """The element that undoes g."""

    @abstractmethod
    def act(self, g: Any, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        """g . x (or g^-1 . x): x is (B, *layout) or (B, S, *layout); returns (B, S, *layout).

        mean averages over the samples: (B, *layout). Differentiable in g and x. Raises ValueError for shapes that do
        not fit the layout.
        """

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
        from probsym_fast.groups.product import Product

        return Product(self, other)


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
