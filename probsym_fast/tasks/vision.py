"""Vision transformers on graphs: PATTERN, Peptides-func, Peptides-struct and PCQM-Contact."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast.data import MolecularGraphs
from probsym_fast.groups import Graphs, Symmetric
from probsym_fast.models import (
    DiagonalReadout,
    GraphReadout,
    GraphTokens,
    PairReadout,
    Symmetrized,
    timm_backbone,
)
from probsym_fast.models.backbones.on_tokens import OnTokens
from probsym_fast.tasks import measures
from probsym_fast.tasks.graphs import GRAPH_LIMITS, GraphDistribution
from probsym_fast.tasks.trials import InTrials
from probsym_fast.tasks.vision_data import SETS, GraphSet, LabelledGraphs, Source
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, Limit
from probsym_fast.training.settings import SAMPLES_LIMITS, TRAINING_LIMITS, Monitor, Run, Samples, Training

Read = Literal["pooled", "tokens", "diagonal"]  # which tokens of the backbone are read
OWN = (
    "name",
    "pretrained",
    "weights",
    "grid",
    "tokens",
    "read",
    "patch_dropout",
    "patch_dropout_always",
    "checkpointing",
    "all_tokens",
)
BACKBONE_LIMITS = {
    "backbone.grid": COUNT,
    "backbone.patch_dropout": Limit("[low, high] with 0 <= low <= high < 1", lambda x: _is_range(x)),
    "backbone.arguments": Limit(f"timm's, without {', '.join(OWN)}", lambda x: not any(key in x for key in OWN)),
}
LIMITS = {
    **{f"distribution.{key}": limit for key, limit in GRAPH_LIMITS.items()},
    **SAMPLES_LIMITS,
    **{f"graphs.{key}": COUNT for key in ("train", "valid", "test")},
    "also_test": Limit(
        "numbers of samples >= 1, none twice", lambda x: all(s >= 1 for s in x) and len(x) == len(set(x))
    ),
    **BACKBONE_LIMITS,
    **TRAINING_LIMITS,
}


def _is_range(x: Any) -> bool:
    return len(x) == 2 and 0 <= x[0] <= x[1] < 1


@dataclass
class Backbone:
    """The vision transformer.

    Args:
        name: a ViT or BEiT of timm, with the tag of its weights.
        pretrained: start from timm's weights.
        weights: start from these weights: a .safetensors file, a checkpoint, or a run folder.
        grid: patches along each axis of the matrix.
        patch_dropout: [low, high], the range of the random share of patches dropped in training.
        patch_dropout_always: drop patches in validation and test too, as the public code does, to compare with the published
            Peptides figures.
        checkpointing: recompute blocks in the backward pass to save memory.
        arguments: arguments of timm.create_model, such as {depth: 6, embed_dim: 192, num_heads: 3}.
    """

    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool = True
    weights: str | None = None
    grid: int = 14
    patch_dropout: list[float] = field(default_factory=lambda: [0.0, 0.0])
    patch_dropout_always: bool = False
    checkpointing: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, read: Read, fresh: bool = True) -> OnTokens:
        """The backbone. fresh: False reads no weights."""
        settings: dict[str, Any] = {
            "pretrained": self.pretrained and fresh,
            "weights": self.weights if fresh else None,
            "grid": self.grid,
            "patch_dropout": tuple(self.patch_dropout),
            "patch_dropout_always": self.patch_dropout_always,
            "checkpointing": self.checkpointing,
        }
        return timm_backbone(self.name, read=read, **settings, **self.arguments)


@dataclass
class GraphCounts:
    """Numbers of graphs in generated sets.

    Args:
        train: training graphs; null: 10,000 for pattern, 1,024 random molecules.
        valid: validation graphs; null: 2,000 and 256.
        test: test graphs; null: 2,000 and 256.
    """

    train: int | None = None
    valid: int | None = None
    test: int | None = None


def _training() -> Training:
    return Training(
        epochs=1000,
        steps=25_000,
        batch=128,
        optimizer="adamw",
        lr=1e-5,
        weight_decay=0.01,
        warmup_steps=5000,
        decay="linear",
        patience=100,
        precision="bf16-mixed",
    )


@dataclass
class VisionConfig(Run):
    """A vision transformer on graphs, Kim et al. 2023, tables 3 to 6; differences from its code are in docs/differences.md.

    Args:
        task: "vision".
        dataset: "pattern" (our own draw, no download), "published_pattern", "peptides_func", "peptides_struct",
            "pcqm_contact" (`probsym data get`), or "random_..." molecules with random labels, for benchmarks.
        data: folder of the data files; null: the cache.
        graphs: numbers of graphs, for generated sets.
        backbone: the vision transformer.
        method: "ps" learned distribution, "ga" uniform, "fa" Laplacian frame, "canonical" learned without noise, one sample.
        nodes: put node features on the "diagonal" of the matrix, or add them to the "tokens" as one-dimensional patches.
        pad_mode: padding of the matrix to whole patches: "zeros", "replicate", "reflect" or "circular".
        centered: put half of the padding in front.
        distribution: settings of the learned distribution.
        samples: group elements per graph.
        also_test: more numbers of samples to test with, with as many trials; their figures end in _S<number>.
        training: optimiser, steps, devices.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {
        method: {"samples": {"train": 1, "valid": 1, "test": 1}, "also_test": []} for method in ("canonical", "fa")
    }

    task: Literal["vision"] = "vision"
    dataset: Literal[
        "pattern",
        "published_pattern",
        "peptides_func",
        "peptides_struct",
        "pcqm_contact",
        "random_peptides_func",
        "random_peptides_struct",
        "random_pcqm_contact",
    ] = "pattern"
    data: str | None = None
    graphs: GraphCounts = field(default_factory=GraphCounts)
    backbone: Backbone = field(default_factory=Backbone)
    method: Literal["ps", "ga", "fa", "canonical"] = "ps"
    nodes: Literal["diagonal", "tokens"] = "diagonal"
    pad_mode: Literal["zeros", "replicate", "reflect", "circular"] = "zeros"
    centered: bool = False
    seed: int = 42
    distribution: GraphDistribution = field(default_factory=lambda: GraphDistribution(dropout=0.1))
    samples: Samples = field(default_factory=lambda: Samples(train=1, valid=10, test=10, trials=1))
    also_test: list[int] = field(default_factory=list)
    training: Training = field(default_factory=_training)


class VisionTask(InTrials):
    """Base of the four experiments; `vision` makes the one for a set."""

    read: Read  # of the backbone

    def __init__(self, config: VisionConfig):
        configuration.check(config, LIMITS)
        counts = {config.samples.train, config.samples.valid, config.samples.test, *config.also_test}
        if config.method == "canonical" and counts != {1}:
            got = f"{config.samples} and also_test {config.also_test}"
            raise ValueError(f"config: method canonical takes 1 sample, got {got}")
        if config.nodes == "diagonal" and (config.pad_mode != "zeros" or config.centered):
            got = f"{config.pad_mode}, centered {config.centered}"
            raise ValueError(f"config: nodes on the diagonal take pad_mode zeros, not centered, got {got}")
        generated = config.dataset == "pattern" or config.dataset.startswith("random")
        if not generated and config.graphs != GraphCounts():
            raise ValueError(
                f"config: graphs must be null for {config.dataset}, which is published, got {config.graphs}"
            )
        if config.dataset.startswith("random") and config.data is not None:
            raise ValueError(f"config: data must be null for {config.dataset}, which is generated, got {config.data!r}")
        self.config = config
        self.figures += tuple(f"{name}_S{S}" for S in config.also_test for name in self.figures)
        self.also_test = tuple(config.also_test)
        self._sets: dict[str, LabelledGraphs] = {}

    @property
    def about(self) -> str:
        return self.graph_set.about

    @property
    def graph_set(self) -> GraphSet:
        return SETS[self.config.dataset]

    @abstractmethod
    def readout(self, width: int, grid: int) -> torch.nn.Module:
        """The module from the tokens to the prediction."""

    def model(self, fresh: bool = True) -> Symmetrized:
        config, graphs = self.config, self.graph_set
        backbone = config.backbone.build(self.read, fresh)  # first: a seed then gives it equal weights for every method
        grid, width = config.backbone.grid, backbone.width
        embed = GraphTokens(
            graphs.N,
            width,
            grid,
            graphs.node_channels,
            graphs.edge_channels,
            config.nodes,
            config.pad_mode,
            config.centered,
        )
        readout = self.readout(width, grid)
        group = Symmetric(graphs.N)
        distribution = config.distribution.build(config.method, group, graphs.node_channels, config.seed)
        return Symmetrized(backbone, embed, readout, distribution, **config.samples.settings())

    def dataset(self, split: str) -> LabelledGraphs:
        if split not in self._sets:
            config = self.config
            source = self.graph_set.load(
                split, getattr(config.graphs, split), config.data, config.seed if self._random() else 0
            )
            self.check_labels(source)
            self._sets[split] = LabelledGraphs(source, config.method == "fa")
        return self._sets[split]

    def check_labels(self, source: Source) -> None:
        """Raises ValueError for labels that the loss cannot use."""

    def _random(self) -> bool:
        return self.config.dataset.startswith("random")


class NodeClassification(VisionTask):
    """PATTERN: class-weighted cross-entropy; mean accuracy per class over batches of 128 graphs."""

    measure, read = "cross_entropy", "diagonal"
    figures = ("test_accuracy",)

    def readout(self, width: int, grid: int) -> torch.nn.Module:
        return DiagonalReadout(self.graph_set.N, width, grid, self.graph_set.outputs)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return measures.weighted_cross_entropy(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": measures.class_accuracy(prediction, target)}

    def evaluate(self, model: Symmetrized, split: str, samples: int, trial: int) -> dict[str, float]:
        predictions, targets, graphs = zip(*self.predictions(model, split, samples, trial), strict=True)
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), *(x.num_nodes for x in graphs)]).cumsum(0)
        return {"accuracy": measures.batched_class_accuracy(torch.cat(predictions), torch.cat(targets), ptr).item()}


class GraphClassification(VisionTask):
    """Peptides-func: binary cross-entropy of known labels; average precision, which also picks the checkpoint."""

    measure, read, whole_set_measures = "bce", "pooled", True
    monitor = Monitor("average_precision", "max")
    figures = ("test_average_precision",)

    def readout(self, width: int, grid: int) -> torch.nn.Module:
        return GraphReadout(width, self.graph_set.outputs)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return binary_loss(prediction, target)

    def check_labels(self, source: Source) -> None:
        assert isinstance(source, MolecularGraphs) and source.y is not None
        check_binary(self.config.dataset, source.y)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"average_precision": measures.average_precision(prediction, target)}


class GraphRegression(VisionTask):
    """Peptides-struct: L1 loss; mean absolute error and R^2."""

    measure, read, whole_set_measures = "l1", "pooled", True
    figures = "test_mae", "test_r2"

    def readout(self, width: int, grid: int) -> torch.nn.Module:
        return GraphReadout(width, self.graph_set.outputs)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"mae": measures.mae(prediction, target), "r2": measures.r2(prediction, target)}


class LinkPrediction(VisionTask):
    """PCQM-Contact: binary cross-entropy of labelled pairs; Hits@1, 3, 10 and MRR of all pairs, only in the test."""

    measure, read = "bce", "tokens"
    figures = tuple(
        f"test_{name}{ending}"
        for name in (*(f"hits@{m}" for m in measures.HITS), "mrr")
        for ending in ("", "_filtered", "_filtered_noself")
    )

    def readout(self, width: int, grid: int) -> torch.nn.Module:
        return PairReadout(self.graph_set.N, width, grid, self.graph_set.outputs)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return binary_loss(prediction, target)

    def check_labels(self, source: Source) -> None:
        assert isinstance(source, MolecularGraphs)
        check_binary(self.config.dataset, source.edge_label)

    def for_test(self, graphs: Graphs) -> Graphs:
        return graphs.replace(pairs=measures.all_pairs(graphs.ptr))

    def evaluate(self, model: Symmetrized, split: str, samples: int, trial: int) -> dict[str, float]:
        found: dict[str, list[Tensor]] = {}
        for scores, target, graphs in self.predictions(model, split, samples, trial):
            assert graphs.pairs is not None  # PCQM-Contact always has them
            for name, values in measures.contact_measures(scores[:, 0], graphs.ptr, graphs.pairs, target[:, 0]).items():
                found.setdefault(name, []).append(values)
        return {name: torch.cat(values).mean().item() for name, values in found.items()}


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of the labels that are not NaN; 0, with gradient 0, if there are none."""
    given = ~labels.isnan()  # of fixed shape: a GPU is not waited for
    logits, labels = logits.where(given, 0), labels.where(given, 0)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.where(given, 0).sum() / given.sum().clamp(min=1)


def check_binary(name: str, labels: Tensor) -> None:
    """Raises ValueError for the first label that is not 0, 1 or NaN."""
    wrong = labels[(labels != 0) & (labels != 1) & (labels == labels)]
    if len(wrong):
        raise ValueError(f"{name}: labels must be 0, 1 or NaN (missing), got {wrong[0].item()}")


KINDS: dict[str, Callable[[VisionConfig], VisionTask]] = {
    "pattern": NodeClassification,
    "peptides_func": GraphClassification,
    "peptides_struct": GraphRegression,
    "pcqm_contact": LinkPrediction,
}


def vision(config: VisionConfig) -> VisionTask:
    """The experiment for the configured set."""
    return KINDS[config.dataset.removeprefix("random_").removeprefix("published_")](config)
