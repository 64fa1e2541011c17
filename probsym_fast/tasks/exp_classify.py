"""EXP-classify: satisfiable or not, for pairs of graphs that the 1-WL test cannot distinguish."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from probsym_fast.draws import seeded
from probsym_fast.groups import Graphs, Symmetric
from probsym_fast.models import Symmetrized
from probsym_fast.tasks.graphs import (
    GRAPH_LIMITS,
    PUBLISHED,
    GraphDistribution,
    add_frames,
    collate,
    gin,
    load_graphs,
    mlp,
)
from probsym_fast.training import configuration
from probsym_fast.training.settings import SAMPLES_LIMITS, TRAINING_LIMITS, Run, Samples, Training
from probsym_fast.training.task import Task

N, FEATURES = 64, 2
SPLITS = {"valid": slice(0, 200), "test": slice(200, 400), "train": slice(400, 1200)}
LIMITS = {
    **{f"distribution.{key}": limit for key, limit in GRAPH_LIMITS.items()},
    **SAMPLES_LIMITS,
    **TRAINING_LIMITS,
}
WIDTHS = {"mlp": [2048, 4096, 2048, 10, 1], "gin": [10, 1]}


def _samples() -> Samples:
    return Samples(train=10, valid=10, test=10, trials=5)


def _training() -> Training:
    return Training(epochs=2000, batch=100, lr=1e-3, weight_decay=0.0, warmup=200, clip=0.1)


@dataclass
class ExpClassifyConfig(Run):
    """EXP-classify of Kim et al. 2023, table 1; defaults: published settings (docs/differences.md), data without download.

    Args:
        task: "exp_classify".
        dataset: "wl_pairs", our own similar pairs (not EXP), or "exp", the published set.
        data: the published pickle; null: the one in the cache, from `probsym data get exp`.
        backbone: "mlp" or "gin" (with node identifiers).
        method: "ps" learned distribution, "ga" uniform, "fa" Laplacian frame, "canonical" learned without noise, one sample.
        soft: permute with the soft permutation (mlp with ps or canonical; an ablation).
        distribution: settings of the learned distribution.
        samples: group elements per graph.
        training: optimiser, epochs, devices.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {
        "canonical": {"samples": {"train": 1, "valid": 1, "test": 1, "trials": 1}}
    }

    task: Literal["exp_classify"] = "exp_classify"
    dataset: Literal["wl_pairs", "exp"] = "wl_pairs"
    data: str | None = None
    backbone: Literal["mlp", "gin"] = "mlp"
    method: Literal["ps", "ga", "fa", "canonical"] = "ps"
    soft: bool = False
    distribution: GraphDistribution = field(default_factory=GraphDistribution)
    samples: Samples = field(default_factory=_samples)
    training: Training = field(default_factory=_training)


class GraphLabels(Dataset):
    """Graphs with binary labels; an index tensor gives (Graphs, labels (B, 1) float)."""

    def __init__(self, data: list[Any]):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> tuple[Graphs, Tensor]:
        some = [self.data[i] for i in index.tolist()]
        return collate(some), torch.cat([graph.y for graph in some])[:, None].float()


class ExpClassify(Task):
    """Trains with binary cross-entropy and reports the accuracy."""

    measure = "bce"
    figures = ("test_accuracy", "valid_accuracy")

    def __init__(self, config: ExpClassifyConfig):
        configuration.check(config, LIMITS)
        if config.soft and (config.backbone != "mlp" or config.method not in ("ps", "canonical")):
            raise ValueError(
                f"config: soft takes backbone mlp and method ps, got {config.backbone} and {config.method}"
            )
        if config.method == "canonical" and {config.samples.train, config.samples.valid, config.samples.test} != {1}:
            raise ValueError(f"config: method canonical takes 1 sample, got {config.samples}")
        self.config = config
        self._data: list[Any] | None = None

    def model(self, fresh: bool = True) -> Symmetrized:
        config = self.config
        if config.backbone == "gin":  # backbone first: a seed then gives it equal weights for every method
            network = gin(N, WIDTHS["gin"], FEATURES, "relu", last=False)
        else:
            network = mlp(N, WIDTHS["mlp"], FEATURES, "relu", last=False, soft=config.soft)
        distribution = config.distribution.build(config.method, Symmetric(N), FEATURES, config.seed)
        return Symmetrized(*network, distribution, **config.samples.settings())

    def dataset(self, split: str) -> GraphLabels:
        if self._data is None:
            self._data = load_graphs(self.config.dataset, self.config.data)
            if self.config.method == "fa":
                add_frames(self._data)
        return GraphLabels(self._data[SPLITS[split]])

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": ((prediction > 0) == (target > 0.5)).double().mean()}

    @torch.no_grad()
    def accuracy(self, model: Symmetrized, samples: int, trial: int, split: str = "test") -> float:
        device = next(model.parameters()).device
        right, count = 0, 0
        for k, (graphs, target) in enumerate(self.loader(split)):
            graphs, target = graphs.to(device), target.to(device)
            prediction, _ = model(graphs, samples, seeded(self.config.seed, f"{split} {k}", trial))
            right += int(((prediction > 0) == (target > 0.5)).sum())
            count += len(target)
        return right / count

    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        config = self.config
        trials = torch.tensor([self.accuracy(model, config.samples.test, k) for k in range(config.samples.trials)])
        return {
            "data": PUBLISHED[config.dataset],
            "test_accuracy": trials.mean().item(),
            "test_accuracy_std": trials.std(correction=0).item(),
            "samples": config.samples.test,
            "trials": config.samples.trials,
            "valid_accuracy": self.accuracy(model, config.samples.test, 0, "valid"),
        }

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        return [
            ("data", results["data"]),
            (
                f"test accuracy, {results['samples']} samples",
                f"{results['test_accuracy']:.1%} +- {results['test_accuracy_std']:.1%} over {results['trials']} trials",
            ),
            ("validation accuracy", f"{results['valid_accuracy']:.1%}"),
        ]
