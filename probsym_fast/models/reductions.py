"""Reductions of the samples' predictions: the mean and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probsym_fast._autocast import promoted
from probsym_fast._checks import looks_at_values
from probsym_fast.groups import Batch
from probsym_fast.models.predictions import leaves, mapped, named_leaves, spread

REDUCTIONS = "mean", "none", "max", "weighted", "best"
Score = str | Tensor | Callable[[Any], Tensor]  # of "weighted" and "best"; `Symmetrized.forward` explains it


class Reduction(NamedTuple):
    """How the samples' predictions become one: the arguments of `Symmetrized.forward`."""

    kind: str = "mean"
    weights: Tensor | None = None
    score: Score | None = None

    @property
    def draws_weights(self) -> bool:
        """Whether the weights come from the distribution."""
        return self.kind == "weighted" and self.weights is None and self.score is None

    def check(self, batch: Batch, samples: int, distribution: nn.Module | None) -> None:
        """Raises as `Symmetrized.forward`. distribution: None for given elements, which have no weights of their own."""
        kind, weights, score = self
        if kind == "mean" and weights is None and score is None:
            return
        check_kind(kind)
        if not isinstance(weights, Tensor | None):
            raise TypeError(f"Symmetrized: weights must be a Tensor or None, got {type(weights).__name__}")
        if weights is not None and (kind != "weighted" or score is not None):
            why = "a score" if kind == "weighted" else f"reduce {kind!r}"
            raise ValueError(f"Symmetrized: weights must be None with {why}, got {tuple(weights.shape)}")
        if score is not None:
            check_score(score)
            if kind not in ("weighted", "best"):
                raise ValueError(f"Symmetrized: score must be None with reduce {kind!r}, got {_name(score)}")
        if kind == "best" and score is None:
            raise ValueError("Symmetrized: score must be a key, a function or a Tensor with reduce 'best', got None")
        if self.draws_weights and not hasattr(distribution, "elements_and_weights"):
            raise ValueError(
                f"Symmetrized: weights must be (B, S) = {(batch.size, samples)}, got None; without weights give a score, or a"
                " distribution with the method elements_and_weights"
            )
        if weights is not None:
            check_weights("Symmetrized", weights, (batch.size, samples))

    def of(self, each: Any, model: nn.Module, batch: Batch, weights: Tensor | None) -> Any:
        """The reduced prediction from those of the samples: leaves (S, ...) -> (...). weights: the distribution's."""
        if self.kind == "none":
            return each
        if self.kind == "max":
            _check_real(each)
            return mapped(lambda x: x.amax(0), each)
        if self.kind == "best":
            chosen = self._scores(each, batch).argmax(1)  # the first of equals
            return mapped(_at, each, _of_rows(chosen, model, batch, each))
        weights = self.weights if weights is None else weights
        shares = self._scores(each, batch).softmax(1) if weights is None else normalised(weights)
        return mapped(_weighted, each, _of_rows(shares, model, batch, each))

    def _scores(self, each: Any, batch: Batch) -> Tensor:
        """(B, S) in float32 or better."""
        score, samples = self.score, leaves(each)[0].shape[0]
        if isinstance(score, Tensor):
            x, wanted = score, (batch.size, samples)
        else:
            x, wanted = _score(score, each), (samples, batch.size)
            x = x[..., 0] if isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == 1 else x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Symmetrized: score must give a floating-point Tensor, got {got}")
        if tuple(x.shape) != wanted:
            axes = "(B, S)" if isinstance(score, Tensor) else "(S, B) or (S, B, 1)"
            raise ValueError(f"Symmetrized: score must give {axes} with {wanted}, got {tuple(x.shape)}")
        if looks_at_values(x) and x.isnan().any():
            raise ValueError("Symmetrized: score must give no NaN, got NaN")
        x = x if isinstance(score, Tensor) else x.T
        return x.to(promoted(x.dtype, torch.float32))


def check_kind(kind: str) -> None:
    """ValueError unless kind is in REDUCTIONS."""
    if kind not in REDUCTIONS:
        raise ValueError(f"Symmetrized: reduce must be one of {REDUCTIONS}, got {kind!r}")


def check_score(score: Score | None) -> None:
    """TypeError unless score is a key, a Tensor, a function or None."""
    if not (score is None or isinstance(score, str | Tensor) or callable(score)):
        got = f"{type(score).__name__} {score!r}"
        raise TypeError(f"Symmetrized: score must be a key (str), a function, a Tensor or None, got {got}")


def check_weights(owner: str, weights: Tensor, shape: tuple[int, int]) -> None:
    """Raises unless weights are floating point, of this shape, finite, >= 0 and in no row all 0."""
    if tuple(weights.shape) != shape:
        raise ValueError(f"{owner}: weights must be (B, S) = {shape}, got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"{owner}: weights must be floating point, got {weights.dtype}")
    if looks_at_values(weights):
        bad = ~(weights.isfinite() & (weights >= 0)).all(1) | (weights.sum(1) == 0)
        if bad.any():
            b = int(bad.nonzero()[0])
            raise ValueError(f"{owner}: weights must be finite and >= 0 with a sum > 0, got {weights[b].tolist()}")


def normalised(weights: Tensor) -> Tensor:
    """weights (B, S) with sums of 1. Dividing by the largest first keeps sums from overflowing and changes no gradient."""
    weights = weights / weights.detach().amax(1, keepdim=True)
    return weights / weights.sum(1, keepdim=True)


def _of_rows(values: Tensor, model: nn.Module, batch: Any, each: Any) -> Any:
    """values (B, ...) of the inputs for the rows of each leaf (S, rows, ...): (rows, ...), in the structure of `each`.

    A row belongs to a graph, or to the graph of its node or pair, as the readout's attribute `rows` says.
    """

    def of(rows: str) -> Tensor:
        if rows == "graphs":
            return values
        return values[batch.graph if rows == "nodes" else batch.graph[batch.pairs[0]]]

    return mapped(of, spread("Symmetrized", "rows of the readout", getattr(model.readout, "rows", "graphs"), each))


def _weighted(each: Tensor, shares: Tensor) -> Tensor:
    """The sum of (S, rows, ...) weighted by shares (rows, S), in the dtype of `each`."""
    _check_rows(each, shares)
    shares = shares.to(each.real.dtype if each.is_complex() else each.dtype)
    index = (..., *[None] * (each.ndim - 2))  # a reshape would fix a program to more than one input
    return (shares.T[index] * each).sum(0)


def _at(each: Tensor, sample: Tensor) -> Tensor:
    """(S, rows, ...) at the sample of each row."""
    _check_rows(each, sample)
    return each[sample, torch.arange(sample.shape[0], device=sample.device)]


def _check_rows(each: Tensor, values: Tensor) -> None:
    if each.ndim < 2 or each.shape[1] != values.shape[0]:
        wanted = f"{values.shape[0]} rows, by the readout's attribute rows"
        raise ValueError(f"Symmetrized: prediction must have {wanted}, got {tuple(each.shape[1:])}")


def _check_real(each: Any) -> None:
    """TypeError for a complex leaf."""
    if any(x.is_complex() for x in leaves(each)):
        path, x = next((path, x) for path, x in named_leaves(each) if x.is_complex())
        raise TypeError(f"Symmetrized: prediction{path} must be real with reduce 'max', got {x.dtype}")


def _score(score: Any, each: Any) -> Any:
    """score(each), or the entry of that name."""
    if not isinstance(score, str):
        return score(each)
    if not isinstance(each, Mapping) or score not in each:
        got = f"a dict with {sorted(map(str, each))}" if isinstance(each, Mapping) else f"a {type(each).__name__}"
        raise ValueError(f"Symmetrized: prediction must be a dict with the score {score!r}, got {got}")
    return each[score]


def _name(score: Score) -> str:
    return repr(score) if isinstance(score, str) else type(score).__name__
