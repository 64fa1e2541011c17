"""Averages over samples other than the plain mean, and the mean's standard error."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probsym_fast._checks import as_number, check_counts, looks_at_values
from probsym_fast.groups import Batch, Draws

REDUCTIONS = "mean", "none", "max", "weighted"
LEAST_BLOCKS = 8  # behind which a standard error may stop `estimate`: of two blocks it is 0 wherever they agree


class Estimate(NamedTuple):
    """prediction: the mean over samples. standard_error: of each of its entries, of the same shape; NaN where a single block
    was drawn. samples: how many were drawn."""

    prediction: Tensor
    standard_error: Tensor
    samples: int


def check_reduction(reduce: str, weights: Tensor | None, batch: Batch, samples: int) -> None:
    """Raises unless reduce is one of REDUCTIONS; with "weighted" alone, weights (B, S), finite, >= 0, not all 0."""
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
            raise ValueError(f"Symmetrized: weights must be finite, >= 0 and of a sum > 0, got {weights[b].tolist()}")


def weights_of_rows(readout: nn.Module, batch: Any, weights: Tensor, each: Tensor) -> Tensor:
    """weights (B, S), divided by their sums, for the rows of predictions (S, rows, ...): (S, rows, 1, ...).

    A row belongs to a graph, or to the graph of its node or pair, as the readout's attribute `rows` says. By the largest
    weight first, which changes neither quotients nor gradients, so that no sum overflows.
    """
    weights = weights / weights.detach().amax(1, keepdim=True)
    shares = (weights / weights.sum(1, keepdim=True)).to(each.dtype)
    rows = getattr(readout, "rows", "graphs")
    if rows != "graphs":
        shares = shares[batch.graph if rows == "nodes" else batch.graph[batch.pairs[0]]]
    return shares.T.reshape(*each.shape[:2], *[1] * (each.ndim - 2))


@torch.no_grad()
def estimate(
    model: nn.Module, batch: Batch, samples: int, draws: Draws, tolerance: float | None, step: int
) -> Estimate:
    """`Symmetrized.estimate`. Means of blocks of samples are independent: their variance over their number is that of the
    mean, gathered with Chan's formula in float32 or better."""
    samples, step = check_counts("estimate", samples=samples, step=step)
    if model.training:
        raise RuntimeError("estimate: the model must be in eval mode, got training mode")
    if model.samples_mesh is not None:
        raise ValueError(f"estimate: the model's samples_mesh must be None, got {model.samples_mesh}")
    if tolerance is not None:
        if (number := as_number(tolerance)) is None:
            raise TypeError(f"estimate: tolerance must be a number, got {type(tolerance).__name__} {tolerance!r}")
        if not number >= 0:
            raise ValueError(f"estimate: tolerance must be at least 0, got {number}")
        tolerance = number
    block = model.distribution.group.block(draws.kind)
    samples, step = (-(-count // block) * block for count in (samples, step))
    mean = squares = error = None
    done = 0  # blocks
    while done * block < samples:
        count = min(step, samples - done * block)
        each = model._predictions(batch, count, draws.starting(done * block))
        dtype, n = each.dtype, count // block
        each = each.to(torch.promote_types(dtype, torch.float32)).unflatten(0, (n, block)).mean(1)
        here = each.mean(0)
        spread = (each - here).square().sum(0)
        if mean is None:
            mean, squares = here, spread
        else:
            total, difference = done + n, here - mean
            mean = mean + difference * (n / total)
            squares = squares + spread + difference.square() * (done * n / total)
        done += n
        error = (squares / (done - 1) / done).sqrt() if done > 1 else torch.full_like(mean, torch.nan)
        if tolerance is not None and done >= LEAST_BLOCKS and float(error.max()) <= tolerance:
            break
    return Estimate(mean.to(dtype), error, done * block)
