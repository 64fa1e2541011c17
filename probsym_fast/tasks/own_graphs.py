"""Graphs of one's own: the configuration and the base of the ready-made tasks on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from probsym_fast.groups import Graphs, Symmetric
from probsym_fast.models import Symmetrized
from probsym_fast.tasks.graph_networks import GraphBackbone, Sizes
from probsym_fast.tasks.graphs import GRAPH_LIMITS, GraphDistribution, add_frames, collate
from probsym_fast.tasks.own_data import Lists, Splitting, splits_of
from probsym_fast.tasks.trials import InTrials
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, SHARE
from probsym_fast.training.settings import SAMPLES_LIMITS, TRAINING_LIMITS, Run, Samples, Training

LIMITS = {
    "backbone.width": COUNT,
    "backbone.layers": COUNT,
    "backbone.heads": COUNT,
    "backbone.grid": COUNT,
    "split.valid": SHARE,
    "split.test": SHARE,
    **{f"distribution.{key}": limit for key, limit in GRAPH_LIMITS.items()},
    **SAMPLES_LIMITS,
    **TRAINING_LIMITS,
}


def _samples() -> Samples:
    return Samples(train=8, valid=8, test=16, trials=3)


def _training() -> Training:
    return Training(epochs=100, batch=32, lr=1e-3, weight_decay=0.0, entropy=0.0)


@dataclass
class OwnGraphsConfig(Run):
    """Graphs of your own as PyTorch Geometric's Data: x (n, C), edge_index, maybe edge_attr, and a target.

    Args:
        task: name of the task.
        data: a folder with train.pt, valid.pt and test.pt, or one file; each holds a list of Data or an InMemoryDataset.
        split: how one file is cut into three.
        target: name of the field that is predicted.
        backbone: the network that is symmetrized.
        method: "ps" learned distribution, "ga" uniform, "fa" Laplacian frame, "canonical" learned without noise, one sample,
            "none" the nodes as they are.
        distribution: settings of the learned distribution.
        samples: group elements per graph.
        training: optimiser, epochs, devices.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {
        method: {"samples": {"train": 1, "valid": 1, "test": 1}} for method in ("canonical", "fa", "none")
    }

    task: str = "graph_regression"
    data: str | None = None
    split: Splitting = field(default_factory=Splitting)
    target: str = "y"
    backbone: GraphBackbone = field(default_factory=GraphBackbone)
    method: Literal["ps", "ga", "fa", "canonical", "none"] = "ps"
    distribution: GraphDistribution = field(default_factory=GraphDistribution)
    samples: Samples = field(default_factory=_samples)
    training: Training = field(default_factory=_training)


class Facts(NamedTuple):
    """What the data say of themselves. values: of the targets, (rows, T) or (rows,) int64."""

    sizes: Sizes
    values: Tensor


class Labelled(Dataset):
    """Graphs and targets; an index tensor gives (Graphs, target rows). A graph's key is its number over all splits."""

    def __init__(self, graphs: Sequence[Any], targets: Sequence[Tensor], first: int):
        self.graphs, self.targets, self.first = graphs, targets, first

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: Tensor) -> tuple[Graphs, Tensor]:
        some = index.tolist()
        batch = collate([self.graphs[k] for k in some]).to(torch.float32).replace(key=index + self.first)
        return batch, torch.cat([self.targets[k] for k in some])


class OwnGraphs(InTrials):
    """Base of the three tasks. Subclasses say what a target is, and its loss and measures.

    config: an `OwnGraphsConfig`. graphs: the data in place of `config.data`: lists of Data for "train", "valid" and "test",
    or one list that is split. The largest graph, the numbers of features and the number of outputs come from the data.
    """

    Config: ClassVar[type] = OwnGraphsConfig
    per_node: ClassVar[bool] = False
    whole_set_measures = True

    def __init__(self, config: Any, graphs: Mapping[str, Sequence[Any]] | Sequence[Any] | None = None):
        configuration.check(config, LIMITS)
        config.backbone.check(self.per_node)
        counts = {config.samples.train, config.samples.valid, config.samples.test}
        if config.method in ("canonical", "none") and counts != {1}:
            raise ValueError(f"config: method {config.method} takes 1 sample, got {config.samples}")
        self.config, self._given = config, graphs

    @abstractmethod
    def rows(self, graph: Any) -> Tensor:
        """The target rows of a graph."""

    @abstractmethod
    def outputs(self) -> int:
        """How many outputs the network has."""

    @property
    def about(self) -> str:
        counts = " + ".join(str(len(some)) for some in self.graphs.values())
        return f"{counts} graphs of up to {self.facts.sizes.nodes} nodes"

    @cached_property
    def graphs(self) -> Lists:
        """The Data of each split."""
        found = splits_of(self._given, self.config.data, self.config.split)
        if self.config.method == "fa":
            found = {name: [copy(graph) for graph in some] for name, some in found.items()}
            for some in found.values():
                add_frames(some)
        return found

    @cached_property
    def targets(self) -> dict[str, list[Tensor]]:
        return {name: [self.rows(graph) for graph in some] for name, some in self.graphs.items()}

    @cached_property
    def facts(self) -> Facts:
        every = collate([graph for some in self.graphs.values() for graph in some])
        features = every.x.shape[1], 1 if every.edge_attr is None else every.edge_attr.shape[1]
        values = torch.cat([row for some in self.targets.values() for row in some])
        return Facts(Sizes(int(every.num_nodes.max()), *features), values)

    def _field(self, graph: Any) -> Tensor:
        name = self.config.target
        value = getattr(graph, name, None)
        if not isinstance(value, Tensor):
            raise ValueError(f"data: {name} of every graph must be a Tensor, got {type(value).__name__}")
        return value

    def model(self, fresh: bool = True) -> Symmetrized:
        config, sizes = self.config, self.facts.sizes
        parts = config.backbone.build(sizes, self.outputs(), self.per_node, fresh)
        distribution = config.distribution.build(config.method, Symmetric(sizes.nodes), sizes.features, config.seed)
        return Symmetrized(parts[0], parts[1], self.readout(parts[2]), distribution, **config.samples.settings())

    def readout(self, readout: nn.Module) -> nn.Module:
        """The network's readout, or one around it."""
        return readout

    def dataset(self, split: str) -> Labelled:
        before = list(self.graphs)[: list(self.graphs).index(split)]
        return Labelled(self.graphs[split], self.targets[split], sum(len(self.graphs[name]) for name in before))
