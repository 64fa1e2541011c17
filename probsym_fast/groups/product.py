"""Direct products of groups that act on different axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.group import LETTERS, Group, check_layout
from probsym_fast.ops._op import check_type


class Product(Group):
    """G_1 x G_2 x ...: elements are tuples; the actions commute. Written `Symmetric(5) * Euclidean(3)`.

    A factor moves axes of its own and reads outputs of its own. What two factors would share is refused where it is used:
    `act` raises ValueError for a layout with a letter that two factors move (`Group.moves`), `project` for an output that
    two factors read (`Group.outputs`) and for a penalty that two factors return. Uniform elements share nothing, so that
    any product has them. Raises TypeError where a factor is no group, ValueError without factors.
    """

    def __init__(self, *factors: Group):
        for factor in factors:
            check_type("Product", "each factor", factor, Group, "a Group")
        flat = [f for factor in factors for f in (factor.factors if isinstance(factor, Product) else (factor,))]
        if not flat:
            raise ValueError("Product: needs at least one group, got none")
        self.factors = tuple(flat)
        moved = "".join(f.moves or "" for f in flat)
        self.moves = None if None in [f.moves for f in flat] else "".join(dict.fromkeys(moved))
        self.outputs = tuple(dict.fromkeys(name for f in flat for name in f.outputs))
        self._letters = "".join(dict.fromkeys(LETTERS + moved))
        self._shared_letters = _twice(moved)
        self._shared_outputs = _twice(name for f in flat for name in f.outputs)

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))

    def keeps(self, layout: str) -> bool:
        return all(f.keeps(layout) for f in self.factors)

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
        check_layout(self, layout, self._letters)
        for letter in self._shared_letters:
            if letter in layout:
                raise ValueError(
                    f"{self}: the factors must move different axes of x, got layout {layout!r} with {letter!r} moved by two"
                )
        last = len(self.factors) - 1
        for k, (factor, element) in enumerate(zip(self.factors, g, strict=True)):
            known = LETTERS + (factor.moves or "")  # another factor's own letters are channels to this one
            own = "".join(letter if letter in known else "c" for letter in layout)
            x = factor.act(element, x, own, inverse=inverse, mean=mean and k == last)
        return x

    def project(
        self, outputs: Mapping[str, Tensor], batch: Batch, *, draws: Draws | None = None, **settings: Any
    ) -> tuple[tuple, dict[str, Tensor]]:
        if self._shared_outputs:
            raise ValueError(
                f"{self}: each output must be read by one factor, got {self._shared_outputs[0]!r} read by two"
            )
        draws = draws or Draws()
        pairs = [f.project(outputs, batch, draws=draws.fork(k), **settings) for k, f in enumerate(self.factors)]
        penalties: dict[str, Tensor] = {}
        for _, some in pairs:
            for name, value in some.items():
                if name in penalties:
                    raise ValueError(f"{self}: each penalty must be of one factor, got {name!r} of two")
                penalties[name] = value
        return tuple(g for g, _ in pairs), penalties


def _twice(items: Iterable[str]) -> list[str]:
    """The items that are there more than once."""
    return [item for item, count in Counter(items).items() if count > 1]
