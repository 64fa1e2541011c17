"""A readout whose prediction holds a score of each sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from probsym_fast.groups import Group


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
