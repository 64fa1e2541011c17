"""Scores of the samples: a readout whose prediction holds one of each, and the confidence of class logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_float
from probsym_fast.groups import Group


def confidence(logits: Tensor) -> Tensor:
    """The largest softmax probability of class logits (..., K), K >= 2: (...), in float64, which keeps sure ones apart.

    As score of reduce="best" it takes the sample that the classifier is surest of:

        model = Symmetrized(backbone, embed, readout, Orbit(Dihedral(4)), reduce="best", score=confidence)

    Gradients: the logits. Raises TypeError unless they are floating point, ValueError for another shape.
    Source: Singhal et al. 2025 (arXiv 2507.10375) take the view that a trained model finds most typical, by other scores.
    """
    check_float("confidence", logits=logits)
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(f"confidence: logits must be (..., K) with K >= 2, got {tuple(logits.shape)}")
    return torch.softmax(logits.double(), -1).amax(-1)


class ScoredReadout(nn.Module):
    """A readout and a head that scores each sample: the prediction is {"prediction": the readout's, "score": (B,)}.

    head: module on the backbone's outputs, (B, S, ...) -> (B, S) or (B, S, 1); other shapes are a ValueError. As they depend
    on g^-1 x only, the score is invariant. With score="score", reduce="weighted" takes the softmax of the scores as weights,
    which the head then learns, and reduce="best" takes the sample with the highest score:

        readout = ScoredReadout(MeanReadout(), nn.Linear(width, 1))
        model = Symmetrized(backbone, embed, readout, distribution, reduce="weighted", score="score")
        predictions, _ = model(batch, samples=8)
        predictions["prediction"]
    """

    def __init__(self, readout: nn.Module, head: nn.Module):
        super().__init__()
        self.readout, self.head = readout, head

    @property
    def rows(self) -> dict[str, Any]:
        return {"prediction": getattr(self.readout, "rows", "graphs"), "score": "graphs"}

    @property
    def layout(self) -> dict[str, Any]:
        return {"prediction": getattr(self.readout, "layout", None), "score": "c"}

    def forward(self, outputs: Any, batch: Any, group: Group, g: Any) -> dict[str, Any]:
        score: Tensor = self.head(outputs)
        if score.ndim not in (2, 3) or score.shape[2:] not in ((), (1,)):
            raise ValueError(f"ScoredReadout: head must return (B, S) or (B, S, 1), got {tuple(score.shape)}")
        return {"prediction": self.readout(outputs, batch, group, g), "score": score.flatten(1).mean(1)}
