"""Reductions of the samples' predictions: the mean and others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from probsym_fast._checks import looks_at_values
from probsym_fast.groups import Batch

REDUCTIONS = "mean", "none", "max", "weighted"


def check_reduction(reduce: str, weights: Tensor | None, batch: Batch, samples: int) -> None:
    """Raises unless reduce is in REDUCTIONS and weights are (B, S), finite, >= 0, not all 0; None unless "weighted"."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"Symmetrized: reduce must be one of {REDUCTIONS}, got {reduce!r}")
    if not isinstance(weights, Tensor | None):
        raise TypeError(f"Symmetrized: weights must be a Tensor or None, got {type(weights).__name__}")
    if (weights is None) == (reduce == "weighted"):
        wanted = f"(B, S) = {(batch.size, samples)}" if reduce == "weighted" else f"None with reduce {reduce!r}"
        raise ValueError(
            f"Symmetrized: weights must be {wanted}, got {None if weights is None else tuple(weights.shape)}"
        )
    if weights is None:
        return
    if tuple(weights.shape) != (batch.size, samples):
        raise ValueError(f"Symmetrized: weights must be (B, S) = {(batch.size, samples)}, got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"Symmetrized: weights must be floating point, got {weights.dtype}")
    if looks_at_values(weights):
        bad = ~(weights.isfinite() & (weights >= 0)).all(1) | (weights.sum(1) == 0)
        if bad.any():
            b = int(bad.nonzero()[0])
            raise ValueError(f"Symmetrized: weights must be finite and >= 0 with a sum > 0, got {weights[b].tolist()}")


def weights_of_rows(readout: nn.Module, batch: Any, weights: Tensor, each: Tensor) -> Tensor:
    """weights (B, S), normalised to sum to 1, for the rows of predictions (S, rows, ...): (S, rows, 1, ...).

    A row belongs to a graph, or to the graph of its node or pair, as the readout's attribute `rows` says. Dividing by the
    largest weight first keeps sums from overflowing and changes neither quotients nor gradients.
    """
    weights = weights / weights.detach().amax(1, keepdim=True)
    shares = (weights / weights.sum(1, keepdim=True)).to(each.dtype)
    rows = getattr(readout, "rows", "graphs")
    if rows != "graphs":
        shares = shares[batch.graph if rows == "nodes" else batch.graph[batch.pairs[0]]]
    return shares.T.reshape(*each.shape[:2], *[1] * (each.ndim - 2))
