"""Direct products of groups that act on different axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from probsym_fast.groups._batch import Batch
from probsym_fast.groups._draws import Draws
from probsym_fast.groups._group import Group


class Product(Group):
    """G_1 x G_2 x ...: elements are tuples; the actions commute. Written `Symmetric(5) * Euclidean(3)`."""

    def __init__(self, *factors: Group):
        flat = [f for factor in factors for f in (factor.factors if isinstance(factor, Product) else (factor,))]
        if not flat:
            raise ValueError("Product: needs at least one group, got none")
        self.factors = tuple(flat)

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))

    def identity(self, batch: Batch, samples: int) -> tuple:
        return tuple(f.identity(batch, samples) for f in self.factors)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple:
        draws = draws or Draws()
        return tuple(f.uniform(batch, samples, draws.fork(k)) for k, f in enumerate(self.factors))

    def block(self, kind: str) -> int:
        return max(f.block(kind) for f in self.factors)  # powers of 2

    def compose(self, g: tuple, h: tuple) -> tuple:
        return tuple(f.compose(a, b) for f, a, b in zip(self.factors, g, h, strict=True))

    def inverse(self, g: tuple) -> tuple:
        return tuple(f.inverse(a) for f, a in zip(self.factors, g, strict=True))

    def act(self, g: tuple, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        last = len(self.factors) - 1
        for k, (factor, element) in enumerate(zip(self.factors, g, strict=True)):
            x = factor.act(element, x, layout, inverse=inverse, mean=mean and k == last)
        return x

    def project(
        self, outputs: Mapping[str, Tensor], batch: Batch, *, draws: Draws | None = None, **settings: Any
    ) -> tuple[tuple, dict[str, Tensor]]:
        draws = draws or Draws()
        pairs = [f.project(outputs, batch, draws=draws.fork(k), **settings) for k, f in enumerate(self.factors)]
        penalties = {name: value for _, some in pairs for name, value in some.items()}
        return tuple(g for g, _ in pairs), penalties
