"""Ready-made tasks on graphs of one's own: regression, classification of graphs, classification of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast.tasks import measures
from probsym_fast.tasks.own_graphs import OwnGraphs, OwnGraphsConfig
from probsym_fast.tasks.vision import binary_loss, check_binary
from probsym_fast.training.settings import Monitor


class Rescaled(nn.Module):
    """A readout whose outputs are in units of the target: scale * outputs + shift, both (T,)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, readout: nn.Module, shift: Tensor, scale: Tensor):
        super().__init__()
        self.readout, self.layout = readout, readout.layout
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, *inputs: Any) -> Tensor:
        return torch.addcmul(self.shift, self.readout(*inputs), self.scale)


@dataclass
class GraphRegressionConfig(OwnGraphsConfig):
    """Real targets of graphs.

    Args:
        error: the loss, "l1" or "mse", of targets divided by their standard deviation in the training set.
    """

    task: str = "graph_regression"
    error: Literal["l1", "mse"] = "l1"


class GraphRegression(OwnGraphs):
    """Targets () or (T,) or (1, T) per graph, real. Reports mean absolute error and R^2, in the targets' units."""

    Config = GraphRegressionConfig
    figures = "test_mae", "test_r2"

    @property
    def measure(self) -> str:  # type: ignore[override]  # read-only here
        return str(self.config.error)

    def rows(self, graph: Any) -> Tensor:
        y = self._field(graph).float().reshape(1, -1)
        if not y.isfinite().all():
            raise ValueError(f"data: {self.config.target} must be finite, got {y[~y.isfinite()][0].item()}")
        return y

    def outputs(self) -> int:
        return self.facts.values.shape[1]

    @cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (T,) over the training set; a constant target has deviation 1."""
        y = torch.cat(self.targets["train"]).double()
        deviation = y.std(0, correction=0)
        return y.mean(0).float(), torch.where(deviation > 0, deviation, 1.0).float()

    def readout(self, readout: nn.Module) -> nn.Module:
        return Rescaled(readout, *self.units)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target) / self.units[1].to(prediction.device)
        return error.abs().mean() if self.config.error == "l1" else error.square().mean()

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = {"mae": measures.mae(prediction, target)}
        return found | ({"r2": measures.r2(prediction, target)} if len(target) > 1 else {})


@dataclass
class GraphClassificationConfig(OwnGraphsConfig):
    """Classes or labels of graphs; the keys are those of `OwnGraphsConfig`."""

    task: str = "graph_classification"


@dataclass
class NodeClassificationConfig(OwnGraphsConfig):
    """Classes of nodes; the keys are those of `OwnGraphsConfig`."""

    task: str = "node_classification"


class _Classes(OwnGraphs):
    """Classes 0..C - 1, with cross-entropy and accuracy."""

    measure = "cross_entropy"

    def outputs(self) -> int:
        return int(self.facts.values.max()) + 1

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (prediction.argmax(1) == target).double().mean()}

    @property
    def monitor(self) -> Monitor:
        return Monitor("accuracy", "max")

    def _classes(self, graph: Any, count: int) -> Tensor:
        y, name = self._field(graph).flatten(), self.config.target
        if y.is_floating_point() or len(y) != count or (count and int(y.min()) < 0):
            raise ValueError(f"data: {name} must be ({count},) integers >= 0, got {tuple(y.shape)} {y.dtype}: {y[:3]}")
        return y.long()


class GraphClassification(_Classes):
    """One class () or (1,) of integers per graph; or labels (T,) or (1, T) of floats: 0, 1 or NaN where it is not known.

    Classes: cross-entropy and accuracy. Labels: binary cross-entropy and average precision.
    """

    Config = GraphClassificationConfig

    @cached_property
    def labels(self) -> bool:
        return self._field(self.graphs["train"][0]).is_floating_point()

    @property
    def measure(self) -> str:  # type: ignore[override]  # read-only here
        return "bce" if self.labels else "cross_entropy"

    def rows(self, graph: Any) -> Tensor:
        if not self.labels:
            return self._classes(graph, 1)
        y = self._field(graph).float().reshape(1, -1)
        check_binary(f"data: {self.config.target}", y)
        return y

    def outputs(self) -> int:
        return self.facts.values.shape[1] if self.labels else super().outputs()

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return binary_loss(prediction, target) if self.labels else super().loss(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not self.labels:
            return super().measures(prediction, target)
        return {"average_precision": measures.average_precision(prediction, target)}

    @property
    def monitor(self) -> Monitor:
        return Monitor("average_precision", "max") if self.labels else super().monitor


class NodeClassification(_Classes):
    """One class (n,) of integers per node. Cross-entropy; accuracy over all nodes of the set."""

    Config = NodeClassificationConfig
    per_node = True
    figures = ("test_accuracy",)

    def rows(self, graph: Any) -> Tensor:
        return self._classes(graph, int(graph.num_nodes))
