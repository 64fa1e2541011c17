"""Permutations of the nodes of batched graphs, S samples per graph: hard, or soft with a straight-through gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy
import torch
from torch import Tensor

from probsym_fast._checks import (
    as_int,
    as_number,
    check_count,
    check_float,
    check_num_nodes,
    looks_at_values,
    transformed,
)

SMALLEST_TAU = 1e-30  # 1 / tau stays finite in float32
MOST_ITERATIONS = 10_000
P = TypeVar("P", bound="Permutation")
NOT_GIVEN = cast(Tensor, None)  # default of fields that are Tensors after construction


@dataclass(eq=False)
class Permutation:
    """Which node is in which slot: `y[j] = x[order[j]]`, `rank[order[j]] = j`.

    `p @ x` is the product of its matrix and rows, `ops.permute`. `p[...]` indexes the leading axes, `p.to(...)` moves or
    converts. Models use permutations (B, S, N): S samples for each of B graphs.

    order: (..., N) int64, identity beyond num_nodes. num_nodes: int64 of the size of the first leading axis, or None (all N
    valid). rank: the inverse of order; computed if not given. checked: skip all checks, for results of computations on
    permutations. Raises TypeError for dtypes, ValueError for shapes and unless order is such a permutation and rank its
    inverse (on a GPU only in debug mode).
    """

    order: Tensor
    num_nodes: Tensor | None = None
    rank: Tensor = NOT_GIVEN
    checked: InitVar[bool] = field(default=False, kw_only=True)
    # set by `with_lead`: the permutations (B, S, N), and which fields view theirs
    _viewed: tuple[Permutation, tuple] | None = field(default=None, init=False, repr=False)

    by_sample: ClassVar[tuple[str, ...]] = ("order", "rank")  # fields (..., N)
    product: ClassVar[Callable[..., Tensor]]  # `ops.permute`

    @staticmethod
    def from_orders(orders: Any, N: int | None = None) -> Permutation:
        """(B, S, N): one graph an order (n,) or (S, n), of 1..N nodes; identity beyond. N: default the longest.

        orders: a list of orders, each a list, a NumPy array or a Tensor of ints; or one array or Tensor (B, n) or (B, S, n).
        -1 after the nodes of an order is padding, in all samples of a graph as often: [[2, 0, 1, -1], [1, 0, -1, -1]].

        Raises TypeError unless the entries are ints, ValueError for shapes, for -1 elsewhere and unless they are permutations
        (on a GPU only in debug mode).
        """
        owner = "Permutation.from_orders"
        if not isinstance(orders, Sequence | Tensor | numpy.ndarray) or isinstance(orders, str):
            kind = type(orders).__name__
            raise TypeError(f"{owner}: orders must be a list of orders, an array or a Tensor, got {kind}")
        found = [_as_order(f"{owner}: orders[{k}]", x) for k, x in enumerate(orders)] if len(orders) else []
        if not found or any(
            not 1 <= x.ndim <= 2 or x.shape[:-1] != found[0].shape[:-1] or not x.numel() for x in found
        ):
            got = [tuple(x.shape) for x in found][:16]
            raise ValueError(f"{owner}: orders must be one or more of (n,), or of (S, n) with one S, got {got}")
        most = max(x.shape[-1] for x in found)
        N = most if N is None else check_count(owner, "N", N, least=most)
        device = found[0].device
        rows = torch.full((len(found), math.prod(found[0].shape[:-1]), N), -1, device=device)
        for row, x in zip(rows, found, strict=True):
            row[:, : x.shape[-1]] = x
        nodes, slots = rows != -1, torch.arange(N, device=device)
        counts = nodes.sum(-1)  # (B, S)
        if looks_at_values(rows):
            wrong = (nodes != (slots < counts[:, :1, None])).any(-1).any(-1)
            for b in wrong.nonzero().flatten().tolist()[:1]:
                raise ValueError(
                    f"{owner}: orders[{b}] must have -1 only after its nodes, in each sample as often,"
                    f" got {found[b].tolist()[:16]}"
                )
        return Permutation(torch.where(nodes, rows, slots), counts[:, 0])

    def __post_init__(self, checked: bool):
        if checked:
            return
        _check_index("order", self.order)
        B, N = self.order.shape[0] if self.order.ndim > 1 else 1, self.order.shape[-1]
        self.num_nodes = check_num_nodes("Permutation", self.num_nodes, B, N, self.order.device)
        if self.rank is None:
            _check_order(self.order, self.num_nodes)
            self.rank = inverse(self.order)
            return
        _check_index("rank", self.rank)
        if self.rank.shape != self.order.shape or self.rank.device != self.order.device:
            raise ValueError(
                f"Permutation: rank must be {tuple(self.order.shape)} on {self.order.device} as order is, "
                f"got {tuple(self.rank.shape)} on {self.rank.device}"
            )
        if looks_at_values(self.order, self.rank, self.num_nodes):
            slots = torch.arange(N, device=self.order.device)
            inside = self.rank.clamp(0, N - 1)  # if order inverts rank, both are permutations
            _refuse_any(
                (inside != self.rank) | (self.order.gather(-1, inside) != slots), "rank", self.rank, "undo order"
            )
            _check_beyond(self.order, self.num_nodes)

    @property
    def shape(self) -> torch.Size:
        """(..., N), for models (B, S, N)."""
        return self.order.shape

    @property
    def device(self) -> torch.device:
        return self.order.device

    def __matmul__(self, x: Any) -> Any:
        """P x: `ops.permute(p, x)`. Of another permutation Q of this shape: P Q, a hard permutation.

        P Q has the valid nodes of P, or all N if either is of all. RuntimeError if P or Q requires a gradient, ValueError
        for another shape.
        """
        if not isinstance(x, Permutation):
            return self.product(x)
        if x.shape != self.shape:
            raise ValueError(f"Permutation: both must be {tuple(self.shape)}, got {tuple(x.shape)}")
        self.check_detached("compose")
        x.check_detached("compose")
        num_nodes = None if x.num_nodes is None else self.num_nodes
        order, rank = self.order.gather(-1, x.order), x.rank.gather(-1, self.rank)
        return Permutation(order, num_nodes, rank, checked=True)

    def __getitem__(self, index: Any) -> Permutation:
        """The permutations at an index of the leading axes: ints, slices, `...`, masks or index tensors.

        Raises IndexError for an index that reaches the last axis.
        """
        lead, N = self.order[..., 0], self.shape[-1]
        count = math.prod(lead.shape)
        at = torch.arange(count, device=lead.device).view(lead.shape)[index]
        parts = {name: getattr(self, name).reshape(count, N)[at] for name in self.by_sample}
        if self.num_nodes is None:
            return replace(self, **parts, checked=True)
        entry = at.reshape(at.shape or (1,)) // max(1, math.prod(lead.shape[1:]))  # of the first leading axis
        first = entry.flatten(1) if entry.ndim > 1 else entry[:, None]
        if not math.prod(first.shape):  # of no samples
            return replace(self, **parts, num_nodes=self.num_nodes.new_full(first.shape[:1], N), checked=True)
        if looks_at_values(first) and (first != first[:, :1]).any():
            raise IndexError(
                f"Permutation: an index must keep graphs along the first axis where they have num_nodes, got {index}"
            )
        return replace(self, **parts, num_nodes=self.num_nodes[first[:, 0]], checked=True)

    def to(self, *to: Any, **settings: Any) -> Permutation:
        """On another device, or with its scores in another floating dtype: arguments as for `nn.Module.to`.

        Raises TypeError for another dtype.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*to, **settings)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"Permutation.to: dtype must be floating, got {dtype}")
        given = {name: getattr(self, name) for name in (*self.by_sample, "num_nodes")}
        parts = {
            name: x.to(device, dtype if x.is_floating_point() else None, non_blocking)
            for name, x in given.items()
            if x is not None
        }
        return replace(self, **parts, checked=True)

    def of_samples(self) -> Permutation:
        """The same as (B, S, N): B the size of the first leading axis, S the product of the others."""
        if self.order.ndim == 3:
            return self
        if self._viewed is not None and self._viewed[1] == self._ids():
            return self._viewed[0]  # gradients then skip the views
        B = self.order.shape[0] if self.order.ndim > 1 else 1
        S = math.prod(self.order.shape[1:-1])  # Size.numel() would fix it in exported programs
        parts = {name: getattr(self, name).reshape(B, S, self.order.shape[-1]) for name in self.by_sample}
        return replace(self, **parts, checked=True)

    def with_lead(self: P, lead: Sequence[int]) -> P:
        """The permutations (B, S, N) with other leading axes of the same number."""
        parts = {name: getattr(self, name).view(*lead, self.order.shape[-1]) for name in self.by_sample}
        viewed = replace(self, **parts, checked=True)
        viewed._viewed = self, viewed._ids()
        return viewed

    def _ids(self) -> tuple:
        """What tells whether a field was replaced."""
        return tuple(id(getattr(self, name)) for name in (*self.by_sample, "num_nodes"))

    def hard(self, dtype: torch.dtype | None = None) -> Tensor:
        """P[u, j] = 1 where rank[u] == j, else 0: (..., N, N), rows nodes, columns slots; no gradient."""
        slots = torch.arange(self.order.shape[-1], device=self.order.device)
        return (self.rank[..., None] == slots).to(dtype or torch.get_default_dtype())

    def dense(self) -> Tensor:
        """The matrix that acts on data: (..., N, N), rows nodes, columns slots."""
        return self.hard()

    @property
    def requires_grad(self) -> bool:
        """Whether it needs a gradient; never for a hard permutation."""
        return False

    def detach(self) -> Permutation:
        """The same permutation without a gradient."""
        return self

    def inverse(self) -> Permutation:
        """The inverse, a hard permutation.

        Raises RuntimeError if this one requires a gradient, which the inverse would lose.
        """
        self.check_detached("inverse")
        return Permutation(self.rank, self.num_nodes, self.order, checked=True)

    def check_detached(self, name: str) -> None:
        """RuntimeError if a gradient is needed, since the result of `name` carries none."""
        if self.requires_grad:
            raise RuntimeError(
                f"{name}: the result carries no gradient, so the permutation must not require one, got a SoftPermutation"
                " that does; use p.detach() or torch.no_grad()"
            )

    def narrow(self, start: int, count: int) -> Permutation:
        """Samples start, ..., start + count - 1 of (B, S, N): (B, count, N), views, with their gradients."""
        if self.order.ndim != 3:
            raise ValueError(f"Permutation.narrow: order must be (B, S, N), got {tuple(self.shape)}")
        parts = {name: getattr(self, name).narrow(1, start, count) for name in self.by_sample}
        return replace(self, **parts, checked=True)


@dataclass(eq=False)
class SoftPermutation(Permutation):
    """A permutation by sorted scores, with the gradient of its entropic relaxation (`soft_permutation`).

    scores: (..., N) sorted (and normalised) scores t, 0 beyond num_nodes. log_r, log_c: (..., N). They define
    `P[i, j] = exp(log_r_i + log_c_j - |t_i - t_j| / tau)`, rows in sorted order: doubly stochastic as far as the iterations
    have converged. tau: a finite number > 0.
    Raises as `Permutation`. Also TypeError unless scores, log_r and log_c have one floating dtype and tau is a number,
    ValueError for their shapes and tau, RuntimeError for their devices.
    """

    scores: Tensor = NOT_GIVEN
    log_r: Tensor = NOT_GIVEN
    log_c: Tensor = NOT_GIVEN
    tau: float = 0.01

    by_sample: ClassVar[tuple[str, ...]] = ("order", "rank", "scores", "log_r", "log_c")

    def __post_init__(self, checked: bool):
        super().__post_init__(checked)
        if checked:
            return
        owner, parts = "SoftPermutation", {name: getattr(self, name) for name in ("scores", "log_r", "log_c")}
        check_float(owner, **parts)
        for name, x in parts.items():
            if x.dtype != self.scores.dtype:
                raise TypeError(f"{owner}: {name} must be {self.scores.dtype} as scores is, got {x.dtype}")
            if x.shape != self.shape:
                raise ValueError(f"{owner}: {name} must be {tuple(self.shape)} as order is, got {tuple(x.shape)}")
            if x.device != self.order.device:
                raise RuntimeError(f"{owner}: {name} must be on {self.order.device} as order is, got {x.device}")
        self.tau, _ = check_relaxation(owner, self.tau, 0)

    @property
    def requires_grad(self) -> bool:
        """Whether scores, log_r or log_c may need a gradient; always under a torch.func transform."""
        if transformed():
            return True
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.scores, self.log_r, self.log_c))

    def detach(self) -> SoftPermutation:
        """The same soft permutation without a gradient."""
        parts = {name: getattr(self, name).detach() for name in ("scores", "log_r", "log_c")}
        return replace(self, **parts, checked=True)

    def sorted_soft(self) -> Tensor:
        """P with its rows in sorted order: (..., N, N), identity beyond num_nodes. Gradients: scores, log_r, log_c."""
        return sorted_soft(self.scores, self.log_r, self.log_c, self.num_nodes, self.tau)

    def hard(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().hard(dtype or self.scores.dtype)

    def soft(self) -> Tensor:
        """P[u, j], rows nodes, columns slots: (..., N, N); 2 N^2 operations and N^2 values per sample."""
        soft = self.sorted_soft()
        return soft.gather(
            -2, self.rank[..., None].expand(soft.shape)
        )  # take_along_dim would fix B in exported programs

    def dense(self) -> Tensor:
        """Value of `hard()`, gradient of `soft()`: (..., N, N)."""
        soft = self.soft()
        return self.hard() + (soft - soft.detach())


def sorted_soft(t: Tensor, log_r: Tensor, log_c: Tensor, num_nodes: Tensor | None, tau: float) -> Tensor:
    """exp(log_r_i + log_c_j - |t_i - t_j| / tau): (..., N, N) for sorted t (..., N), identity beyond num_nodes.

    |t_i - t_j| is differentiated with the sign of j - i, so tied scores have a gradient.
    """
    log_p = log_r[..., None] + log_c[..., None, :] - sorted_distance(t) / tau
    if num_nodes is None:
        return log_p.exp()
    valid = valid_slots(num_nodes, t.shape[-1], t.ndim)
    both = valid[..., None] & valid[..., None, :]
    eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    return torch.where(both, torch.where(both, log_p, 0).exp(), eye)


def sorted_distance(t: Tensor) -> Tensor:
    """t_i - t_j above the diagonal, t_j - t_i below: (..., N, N), the distances for descending t."""
    difference = t[..., :, None] - t[..., None, :]
    slots = torch.arange(t.shape[-1], device=t.device)
    return torch.where(slots[:, None] <= slots, difference, -difference)


class Relaxation(NamedTuple):
    """How soft a soft permutation is: the temperature and the Sinkhorn iterations of `ops.soft_permutation`."""

    tau: float = 0.01
    iterations: int = 20


def check_relaxation(owner: str, tau: Any, iterations: Any) -> tuple[float, int]:
    """tau and iterations as Python numbers. TypeError unless they are a number and an int, ValueError out of range."""
    temperature, count = as_number(tau), as_int(iterations)
    if temperature is None:
        raise TypeError(f"{owner}: tau must be a number, got {type(tau).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{owner}: tau must be finite and > 0, got {temperature}")
    if temperature < SMALLEST_TAU:
        raise ValueError(f"{owner}: tau must be at least {SMALLEST_TAU}, got {temperature}")
    if count is None:
        raise TypeError(f"{owner}: iterations must be an int, got {type(iterations).__name__}")
    if not 0 <= count <= MOST_ITERATIONS:
        raise ValueError(f"{owner}: iterations must be in 0..{MOST_ITERATIONS}, got {count}")
    return temperature, count


def valid_slots(num_nodes: Tensor, N: int, axes: int = 3) -> Tensor:
    """(B, 1, N) bool: slot j is valid where j < num_nodes. With 1 for all but the first and last of `axes` axes."""
    return torch.arange(N, device=num_nodes.device) < num_nodes.view(-1, *[1] * (axes - 1))


def _check_index(name: str, index: Tensor, owner: str = "Permutation") -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{owner}: {name} must be an int64 Tensor, got {got}")
    if index.ndim < 1:
        raise ValueError(f"{owner}: {name} must be (..., N), got {tuple(index.shape)}")


def _as_order(name: str, x: Any) -> Tensor:
    """A list, an array or a Tensor of ints as an int64 Tensor. TypeError for others."""
    wanted = f"{name} must be a list, an array or a Tensor of ints, got"
    if not isinstance(x, Tensor):
        try:
            array = numpy.array(x)
        except ValueError as error:
            raise TypeError(f"{wanted} {type(x).__name__} {x!r}"[:200]) from error
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{wanted} {array.dtype}")
        return torch.from_numpy(array.astype(numpy.int64))
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{wanted} {x.dtype}")
    return x.to(torch.int64)


def inverse(order: Tensor) -> Tensor:
    """rank: (..., N) with rank[order[j]] = j."""
    slots = torch.arange(order.shape[-1], device=order.device)
    return order.scatter(-1, order, slots.expand(order.shape))


def _check_order(order: Tensor, num_nodes: Tensor | None) -> None:
    """ValueError where order is not a permutation of the valid slots."""
    if looks_at_values(order, num_nodes):
        slots = torch.arange(order.shape[-1], device=order.device)
        _refuse_any(order.sort(dim=-1).values != slots, "order", order, f"hold each of 0..{len(slots) - 1} once")
        _check_beyond(order, num_nodes)


def _check_beyond(order: Tensor, num_nodes: Tensor | None) -> None:
    if num_nodes is not None:
        moved = order != torch.arange(order.shape[-1], device=order.device)
        wrong = moved & ~valid_slots(num_nodes, order.shape[-1], order.ndim)
        _refuse_any(wrong, "order", order, "leave the slots beyond num_nodes in place")


def _refuse_any(wrong: Tensor, name: str, index: Tensor, must: str) -> None:
    for at in wrong.any(-1).nonzero().tolist()[:1]:
        raise ValueError(f"Permutation: {name}{at or ''} must {must}, got {index[tuple(at)].tolist()[:16]}")
