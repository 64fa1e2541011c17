"""Groups: elements in compact form and their action; direct products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from probsym_fast._checks import check_type
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.elements import taken
from probsym_fast.ops.permutation import Relaxation

PACKAGE = __name__.partition(".")[0]


class Group(ABC):
    """A group whose elements come in batches (B, S): B graphs, S samples each.

    A layout names the axes of a tensor after (B,) or (B, S), one letter each: "n" nodes (permuted), "v" a vector (rotated),
    "p" a point (rotated and translated), "c" channels (unchanged). Positions of particles are "np", velocities "nv",
    features of pairs "nnc". The groups of this package refuse other letters, but for "h" and "w" of those that act on the
    plane (`Cyclic`, `Dihedral`, `SpecialOrthogonal(2)`, `Orthogonal(2)`): rows and columns of an image, moved together about
    its centre (`groups.move_images`). Images are "chw", masks "hw", grids of tokens "hwc", fields of vectors "vhw". Your own
    group may use letters of its own and lists them in `moves`; a `Product` then passes these axes only to it.

    moves: letters of the axes that the group moves; no other factor of a product may move them. None: unknown, and the group
        counts as moving every axis. outputs: names of the outputs that `project` reads; None: unknown. order: the number of
        elements of a finite group, which `elements` then lists; None: infinite, or not known.
    """

    moves: str | None = None
    outputs: tuple[str, ...] | None = None
    order: int | None = None

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "act" in vars(cls) and cls.__module__.partition(".")[0] != PACKAGE:  # those of this package are tested
            cls.act = _checked(cls.act)  # type: ignore[method-assign]

    @abstractmethod
    def identity(self, batch: Batch, samples: int) -> Any:
        """The neutral element for every graph and sample."""

    @abstractmethod
    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Any:
        """Elements from the Haar measure; translations, which have none, take the batch's centroid."""

    def anywhere(self, batch: Batch, samples: int, draws: Draws | None = None) -> Any:
        """Random elements that reach all of the group, to test models with: `uniform`, but translations are normal."""
        return self.uniform(batch, samples, draws)

    def elements(self, batch: Batch) -> Any:
        """Every element of a finite group once, (B, order), in a fixed order. Raises ValueError for other groups."""
        raise ValueError(f"{self}: the group must be finite to list its elements, got one without `order`")

    def in_turn(self, batch: Batch, samples: int, draws: Draws | None = None) -> Any:
        """Uniform elements of a finite group: a random one for every `order` samples, times each element in turn."""
        draws, every = draws or Draws(), self.elements(batch)
        order = cast(int, self.order)
        u = draws.uniform((batch.size, samples), "element", device=batch.device, block=order)
        place = draws.place(samples, order, batch.device).expand(batch.size, samples)
        return self.compose(taken(every, (order * u).long()), taken(every, place))

    @abstractmethod
    def compose(self, g: Any, h: Any) -> Any:
        """The element that acts as h, then g. Differentiable, or RuntimeError if a gradient would be lost."""

    @abstractmethod
    def inverse(self, g: Any) -> Any:
        """The element that undoes g. Differentiable, or RuntimeError if a gradient would be lost."""

    @abstractmethod
    def act(self, g: Any, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        """g . x (or g^-1 . x): x is (B, *layout) or (B, S, *layout); returns (B, S, *layout).

        mean: average over the samples, (B, *layout). Differentiable in g and x. Raises ValueError for unknown letters
        and for shapes that do not fit the layout. What the `act` of your own group returns is checked: TypeError unless it is
        a Tensor, ValueError for another shape.
        """

    def plane(self, g: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """g as elements of the plane (`groups.plane_of`). Raises ValueError for a group that does not act on it."""
        raise ValueError(f"{self}: the group must act on the plane, as Dihedral(4) does, got one without `plane`")

    def __repr__(self) -> str:
        return type(self).__name__

    def keeps(self, layout: str) -> bool:
        """Whether every element leaves tensors of this layout unchanged; False if unknown."""
        return self.moves is not None and not set(self.moves) & set(layout)

    def project(
        self,
        outputs: Mapping[str, Tensor],
        batch: Batch,
        *,
        relaxation: Relaxation = Relaxation(),
        draws: Draws | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Elements from the outputs of an equivariant network, and penalties (scalars) to add to the loss.

        "scores" (B, S, N) become soft permutations (`relaxation`: how soft), "matrices" (B, S, d, d) orthogonal
        matrices, and the batch's centroid translations. Raises KeyError for a missing output. A group that no
        `distributions.Learned` draws from may leave it out; it then raises NotImplementedError.
        """
        raise NotImplementedError(f"{self}: project must be defined for a learned distribution")

    def block(self, kind: str) -> int:
        """Number of consecutive samples that depend on each other with this kind of draws (`Draws`)."""
        return 1 if kind == "independent" else 2

    def __mul__(self, other: Group) -> Group:
        if not isinstance(other, Group):
            return NotImplemented
        return Product(self, other)


def _checked(act: Callable[..., Any]) -> Callable[..., Any]:
    """The `act` of a group from elsewhere, which checks what it returns: TypeError for its type, ValueError for its shape."""

    @wraps(act)
    def checked(self: Group, g: Any, x: Any, layout: Any, **settings: Any) -> Any:
        y, owner = act(self, g, x, layout, **settings), type(self).__name__
        if not isinstance(x, Tensor) or not isinstance(layout, str):
            return y
        if not isinstance(y, Tensor):
            raise TypeError(f"{owner}: act must return a Tensor, got {type(y).__name__}")
        rest = x.shape[x.ndim - len(layout) :]
        axes, leading = ("(B, *layout)", 1) if settings.get("mean") else ("(B, S, *layout)", 2)
        if y.ndim != leading + len(rest) or y.shape[0] != x.shape[0] or y.shape[leading:] != rest:
            wanted = f"{axes} = {(x.shape[0], *['S'] * (leading - 1), *rest)} for layout {layout!r}"
            raise ValueError(f"{owner}: act must return {wanted}, got {tuple(y.shape)}")
        return y

    return checked


LETTERS = "nvpc"


def check_layout(owner: Group, layout: str) -> None:
    """TypeError unless layout is a str, ValueError for a letter that is neither one of LETTERS nor moved by the group."""
    letters = "".join(dict.fromkeys(LETTERS + (owner.moves or "")))
    if not isinstance(layout, str):
        raise TypeError(f"{owner}: layout must be a str, got {type(layout).__name__}")
    if unknown := [letter for letter in layout if letter not in letters]:
        raise ValueError(f"{owner}: layout must use only the letters {letters!r}, got {unknown[0]!r} in {layout!r}")


def sample_axis(x: Tensor, layout: str, shape: Sequence[int]) -> bool:
    """Whether x has a sample axis before those of the layout.

    ValueError unless x has the axes of the layout after (B,) or (B, S), and its B and S are those of the elements, whose
    shape begins with (B, S). TypeError unless x is a Tensor.
    """
    check_type("act", "x", x, Tensor, "a Tensor")
    if x.ndim not in (len(layout) + 1, len(layout) + 2):
        raise ValueError(
            f"act: x must be (B, [S,] *{layout!r}), {len(layout)} axes after the batch, got {tuple(x.shape)}"
        )
    has_samples = x.ndim == len(layout) + 2
    given, wanted = tuple(x.shape[: 1 + has_samples]), tuple(shape[: 1 + has_samples])
    if given != wanted and not (has_samples and given == (wanted[0], 1)):
        axes = "(B, S)" if has_samples else "(B,)"
        raise ValueError(f"act: x must begin with {axes} = {wanted} as g does, got {given}")
    return has_samples


def wanted(outputs: Mapping[str, Tensor], name: str, group: str) -> Tensor:
    if name not in outputs:
        raise KeyError(f"{group}: the network must return {name!r}, got {sorted(outputs)}")
    return outputs[name]


class Product(Group):
    """G_1 x G_2 x ...: elements are tuples; the actions commute. Written `Symmetric(5) * Euclidean(3)`.

    Each factor moves its own axes and reads its own outputs. Conflicts raise only where they occur: `act` and `plane` raise
    ValueError for a layout letter that two factors move (`Group.moves`), `project` for an output that two factors read
    (`Group.outputs`) and for a penalty that two factors return. Uniform elements never conflict. Raises TypeError if a
    factor is no group, ValueError without factors.
    """

    factors: tuple[Group, ...]

    def __init__(self, *factors: Group):
        for factor in factors:
            check_type("Product", "each factor", factor, Group, "a Group")
        flat = [f for factor in factors for f in (factor.factors if isinstance(factor, Product) else (factor,))]
        if not flat:
            raise ValueError("Product: needs at least one group, got none")
        for factor in flat:
            check_type(repr(factor), "moves", factor.moves, str | None, "a str or None")
            names = factor.outputs
            if names is not None and not (
                isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
            ):
                raise TypeError(f"{factor}: outputs must be a tuple of names, got {names!r}")
        self.factors = tuple(flat)
        moved = "".join(f.moves or "" for f in flat)
        self.moves = None if None in [f.moves for f in flat] else "".join(dict.fromkeys(moved))
        known = [f.outputs for f in flat]
        self.outputs = None if None in known else tuple(dict.fromkeys(name for names in known for name in names or ()))
        orders = [f.order for f in flat]
        self.order = None if None in orders else math.prod(order for order in orders if order)
        self._shared_letters = _twice(moved)

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))

    def keeps(self, layout: str) -> bool:
        return all(f.keeps(layout) for f in self.factors)

    def identity(self, batch: Batch, samples: int) -> tuple:
        return tuple(f.identity(batch, samples) for f in self.factors)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple:
        draws = draws or Draws()
        if draws.kind == "stratified" and self.order is not None:
            return self.in_turn(batch, samples, draws)
        return tuple(f.uniform(batch, samples, draws.fork(k)) for k, f in enumerate(self.factors))

    def anywhere(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple:
        draws = draws or Draws()
        return tuple(f.anywhere(batch, samples, draws.fork(k)) for k, f in enumerate(self.factors))

    def elements(self, batch: Batch) -> tuple:
        if self.order is None:
            return super().elements(batch)
        number, parts = torch.arange(self.order, device=batch.device), []
        for factor in reversed(self.factors):  # the last one runs fastest
            order = cast(int, factor.order)
            parts.append(taken(factor.elements(batch), (number % order).expand(batch.size, -1)))
            number = number // order
        return tuple(reversed(parts))

    def plane(self, g: tuple, dtype: torch.dtype = torch.float32) -> Tensor:
        """That of the factor that moves images. Raises ValueError where two do, as `act`."""
        self._check_parts(g)
        self._check_movers("hw")
        for factor, element in zip(self.factors, g, strict=True):
            if "h" in (factor.moves or ""):
                return factor.plane(element, dtype)
        return super().plane(g, dtype)

    @property
    def n(self) -> int | None:
        """The number of nodes that a factor permutes; None if none does."""
        sizes = (getattr(f, "n", None) for f in self.factors if not f.keeps("n"))
        return next((n for n in sizes if n is not None), None)

    def block(self, kind: str) -> int:
        if kind == "stratified" and self.order is not None:
            return self.order
        return math.lcm(*(f.block(kind) for f in self.factors))

    def _check_parts(self, g: Any, name: str = "g") -> None:
        """Raises unless g is a tuple of an element for each factor."""
        check_type(str(self), name, g, tuple, "a tuple of the factors' elements")
        if len(g) != len(self.factors):
            raise ValueError(f"{self}: {name} must have {len(self.factors)} parts, got {len(g)}")

    def _check_movers(self, layout: str) -> None:
        """ValueError for an axis that two factors move, or may move."""
        for letter in self._shared_letters:
            if letter in layout:
                raise ValueError(
                    f"{self}: the factors must move different axes of x, got layout {layout!r} with {letter!r} moved by two"
                )
        unknown = [f for f in self.factors if f.moves is None]
        others = "".join(f.moves or "" for f in self.factors)
        for factor in unknown:
            if len(unknown) > 1 or set(layout) & set(others):
                raise ValueError(
                    f"{self}: the factors must move different axes of x, and {factor} does not list its own in `moves`"
                )

    def compose(self, g: tuple, h: tuple) -> tuple:
        self._check_parts(g)
        self._check_parts(h, "h")
        return tuple(f.compose(a, b) for f, a, b in zip(self.factors, g, h, strict=True))

    def inverse(self, g: tuple) -> tuple:
        self._check_parts(g)
        return tuple(f.inverse(a) for f, a in zip(self.factors, g, strict=True))

    def act(self, g: tuple, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        self._check_parts(g)
        self._check_movers(layout)
        last = len(self.factors) - 1
        for k, (factor, element) in enumerate(zip(self.factors, g, strict=True)):
            known = LETTERS + (factor.moves or "")  # other factors' letters are channels for this one
            own = "".join(letter if letter in known else "c" for letter in layout)
            x = factor.act(element, x, own, inverse=inverse, mean=mean and k == last)
        return x

    def project(
        self, outputs: Mapping[str, Tensor], batch: Batch, *, draws: Draws | None = None, **settings: Any
    ) -> tuple[tuple, dict[str, Tensor]]:
        draws, pairs = draws or Draws(), []
        readers: dict[str, Group] = {}
        for k, factor in enumerate(self.factors):
            noted = _Noted(outputs)
            pairs.append(
                factor.project(noted if factor.outputs is None else outputs, batch, draws=draws.fork(k), **settings)
            )
            for name in noted.read if factor.outputs is None else factor.outputs:
                if readers.setdefault(name, factor) is not factor:
                    raise ValueError(f"{self}: each output must be read by one factor, got {name!r} read by two")
        penalties: dict[str, Tensor] = {}
        for _, some in pairs:
            for name, value in some.items():
                if name in penalties:
                    raise ValueError(f"{self}: each penalty must come from one factor, got {name!r} from two")
                penalties[name] = value
        return tuple(g for g, _ in pairs), penalties


class _Noted(Mapping[str, Tensor]):
    """Outputs that record which of them are read, for a group that does not list them in `outputs`."""

    def __init__(self, outputs: Mapping[str, Tensor]):
        self.outputs = outputs
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        value = self.outputs[name]
        self.read.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def __contains__(self, name: object) -> bool:
        return name in self.outputs


def _twice(items: Iterable[str]) -> list[str]:
    """The items that occur more than once."""
    return [item for item, count in Counter(items).items() if count > 1]
