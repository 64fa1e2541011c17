"""Permutations of the nodes of batched graphs, S samples per graph: hard, or soft with a straight-through gradient."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from probsym_fast._checks import as_int, as_number, check_float, check_num_nodes, looks_at_values, transformed

SMALLEST_TAU = 1e-30  # 1 / tau stays finite in float32
MOST_ITERATIONS = 10_000
NOT_GIVEN = cast(Tensor, None)  # default of fields that are Tensors after construction


@dataclass(eq=False)
class Permutation:
    """Which node is in which slot: `y[j] = x[order[j]]`, `rank[order[j]] = j`.

    order: (B, S, N) int64, identity beyond num_nodes. num_nodes: (B,) int64 or None (all N valid). rank: the inverse of
    order; computed if not given. checked: skip all checks, for results of computations on permutations. Raises
    TypeError for dtypes, ValueError for shapes and unless order is such a permutation and rank its inverse (on a GPU
    only in debug mode).
    """

    order: Tensor
    num_nodes: Tensor | None = None
    rank: Tensor = NOT_GIVEN
    checked: InitVar[bool] = field(default=False, kw_only=True)

    by_sample: ClassVar[tuple[str, ...]] = ("order", "rank")  # fields (B, S, N)

    def __post_init__(self, checked: bool):
        if checked:
            return
        _check_index("order", self.order)
        B, _, N = self.order.shape
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
        """(B, S, N)."""
        return self.order.shape

    def hard(self, dtype: torch.dtype | None = None) -> Tensor:
        """P[u, j] = 1 where rank[u] == j, else 0: (B, S, N, N), rows nodes, columns slots; no gradient."""
        slots = torch.arange(self.order.shape[-1], device=self.order.device)
        return (self.rank[..., None] == slots).to(dtype or torch.get_default_dtype())

    def dense(self) -> Tensor:
        """The matrix that acts on data: (B, S, N, N), rows nodes, columns slots."""
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
        """Samples start, ..., start + count - 1: (B, count, N), views, with their gradients."""
        parts = {name: getattr(self, name).narrow(1, start, count) for name in self.by_sample}
        return replace(self, **parts, checked=True)


@dataclass(eq=False)
class SoftPermutation(Permutation):
    """A permutation by sorted scores, with the gradient of its entropic relaxation (`soft_permutation`).

    scores: (B, S, N) sorted (and normalised) scores t, 0 beyond num_nodes. log_r, log_c: (B, S, N). They define
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
                raise ValueError(
                    f"{owner}: {name} must be (B, S, N) = {tuple(self.shape)} as order is, got {tuple(x.shape)}"
                )
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
        """P with its rows in sorted order: (B, S, N, N), identity beyond num_nodes. Gradients: scores, log_r, log_c."""
        return sorted_soft(self.scores, self.log_r, self.log_c, self.num_nodes, self.tau)

    def hard(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().hard(dtype or self.scores.dtype)

    def soft(self) -> Tensor:
        """P[u, j], rows nodes, columns slots: (B, S, N, N); 2 N^2 operations and N^2 values per sample."""
        soft = self.sorted_soft()
        return soft.gather(
            -2, self.rank[..., None].expand(soft.shape)
        )  # take_along_dim would fix B in exported programs

    def dense(self) -> Tensor:
        """Value of `hard()`, gradient of `soft()`: (B, S, N, N)."""
        soft = self.soft()
        return self.hard() + (soft - soft.detach())


def sorted_soft(t: Tensor, log_r: Tensor, log_c: Tensor, num_nodes: Tensor | None, tau: float) -> Tensor:
    """exp(log_r_i + log_c_j - |t_i - t_j| / tau): (..., N, N) for sorted t (..., N), identity beyond num_nodes.

    |t_i - t_j| is differentiated with the sign of j - i, so tied scores have a gradient.
    """
    log_p = log_r[..., None] + log_c[..., None, :] - sorted_distance(t) / tau
    if num_nodes is None:
        return log_p.exp()
    valid = valid_slots(num_nodes, t.shape[-1])
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


def valid_slots(num_nodes: Tensor, N: int) -> Tensor:
    """(B, 1, N) bool: slot j is valid where j < num_nodes."""
    return torch.arange(N, device=num_nodes.device) < num_nodes[:, None, None]


def _check_index(name: str, index: Tensor) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"Permutation: {name} must be an int64 Tensor, got {got}")
    if index.ndim != 3:
        raise ValueError(f"Permutation: {name} must be (B, S, N), got {tuple(index.shape)}")


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
        wrong = moved & ~valid_slots(num_nodes, order.shape[-1])
        _refuse_any(wrong, "order", order, "leave the slots beyond num_nodes in place")


def _refuse_any(wrong: Tensor, name: str, index: Tensor, must: str) -> None:
    for b, s in wrong.any(-1).nonzero().tolist()[:1]:
        raise ValueError(f"Permutation: {name}[{b}, {s}] must {must}, got {index[b, s].tolist()[:16]}")
