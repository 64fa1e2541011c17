"""Graph separation: how many pairs of different graphs a random, untrained network does not separate."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

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
from probsym_fast.tasks.plots import plot_grid
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, NOT_NEGATIVE, between, one_of
from probsym_fast.training.settings import Run
from probsym_fast.training.task import Computation

NETWORKS = {  # data: slots, widths of the MLP, node features the MLP reads
    "graph8c": (8, [128, 64, 10], 0),
    "exp": (64, [2048, 4096, 2048, 10], 2),
    "wl_pairs": (64, [2048, 4096, 2048, 10], 2),
}
FEATURES = 2  # node features: the given one (GRAPH8c: 1) and the degree
LIMITS = {
    "samples": COUNT,
    "seeds": COUNT,
    "batch": COUNT,
    "seed": between(0, 2**32 - 1),
    "threshold": NOT_NEGATIVE,
    "device": one_of("cpu", "cuda"),
    **{f"distribution.{key}": limit for key, limit in GRAPH_LIMITS.items()},
}
FEW = 2_000_000  # pairs; at most this many are kept as a list


@dataclass
class SeparationConfig(Run):
    """Separation of graphs by random networks, Kim et al. 2023, table 1; defaults: published settings (docs/differences.md).

    Args:
        task: "separation".
        dataset: "graph8c" all connected graphs of 8 nodes, "exp" the published pairs, "wl_pairs" our own similar pairs.
        data: a .g6 file, or the published EXP pickle; null: enumerated, or read from the cache.
        backbone: "mlp" or "gin" (with node identifiers).
        method: "ps" learned distribution, "ga" uniform, "fa" Laplacian frame, "canonical" learned without noise, one sample.
        samples: permutations per graph (canonical: 1).
        seeds: number of random initialisations.
        seed: seed of the first one.
        threshold: largest L1 distance at which two embeddings count as equal.
        batch: graphs per batch.
        stop: stop when no pair is left.
        device: "cpu" or "cuda".
        progress: show a progress bar.
        distribution: settings of the learned distribution.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {"canonical": {"samples": 1}}

    task: Literal["separation"] = "separation"
    dataset: Literal["graph8c", "exp", "wl_pairs"] = "graph8c"
    data: str | None = None
    backbone: Literal["mlp", "gin"] = "mlp"
    method: Literal["ps", "ga", "fa", "canonical"] = "ps"
    samples: int = 10
    seeds: int = 100
    seed: int = 0
    threshold: float = 1e-3
    batch: int = 200
    stop: bool = True
    device: str = "cpu"
    progress: bool = True
    distribution: GraphDistribution = field(default_factory=GraphDistribution)


class Separation(Computation):
    """Counts the pairs whose embeddings stay within the threshold for every initialisation so far.

    GRAPH8c: all pairs of graphs; EXP: each graph and its partner.
    """

    def __init__(self, config: SeparationConfig):
        configuration.check(config, LIMITS)
        if config.method == "canonical" and config.samples != 1:
            raise ValueError(f"config: samples must be 1 for method canonical, got {config.samples}")
        self.config = config

    def model(self) -> Symmetrized:
        """A random network, in eval mode."""
        config = self.config
        N, widths, features = NETWORKS[config.dataset]
        if config.backbone == "mlp":  # backbone first: a seed then gives it equal weights for every method
            network = mlp(N, widths, features, "tanh", last=True)
        else:
            network = gin(N, widths[-1:], FEATURES, "tanh", last=True)
        model = Symmetrized(*network, config.distribution.build(config.method, Symmetric(N), FEATURES, config.seed))
        return model.eval().to(config.device)

    def batches(self) -> list[Graphs]:
        data = load_graphs(self.config.dataset, self.config.data)
        if self.config.method == "fa":
            add_frames(data)
        return [collate(data[i : i + self.config.batch]) for i in range(0, len(data), self.config.batch)]

    @torch.no_grad()
    def embeddings(self, batches: list[Graphs], seed: int) -> Tensor:
        """(graphs, 10) embeddings of the network with this seed; noise by (seed, batch)."""
        torch.manual_seed(seed)
        model, device = self.model(), self.config.device
        out = []
        for k, batch in enumerate(batches):
            batch = batch.to(device)
            out.append(model(batch, self.config.samples, seeded(seed, "separation", k))[0].cpu())
        embeddings = torch.cat(out)
        if not embeddings.isfinite().all():
            raise ValueError(f"separation: embeddings must be finite, got NaN or infinity at initialisation {seed}")
        return embeddings

    def run(self, folder: Path) -> dict[str, Any]:
        config, batches = self.config, self.batches()
        graphs = sum(batch.size for batch in batches)
        pairs = (
            AllPairs(graphs, config.threshold) if config.dataset == "graph8c" else Partners(graphs, config.threshold)
        )
        left, seconds = [], []
        seeds = range(config.seed, config.seed + config.seeds)
        quiet = not config.progress or not sys.stderr.isatty()
        for seed in track(seeds, f"{config.name}: initialisations", disable=quiet, console=Console(stderr=True)):
            start = time.perf_counter()
            left.append(pairs.update(self.embeddings(batches, seed)))
            seconds.append(time.perf_counter() - start)
            if config.progress and not sys.stderr.isatty() and (len(left) % 10 == 0 or (config.stop and left[-1] == 0)):
                print(f"initialisation {len(left)}: {left[-1]} pairs left", file=sys.stderr, flush=True)
            if config.stop and left[-1] == 0:
                break
        curve = {f"{config.backbone} {config.method}": (list(range(1, len(left) + 1)), left)}
        panel = ("pairs not separated", "initialisations", curve, "linear", "symlog")
        plot_grid(folder / "plots" / "pairs.png", [panel])
        return {
            "data": PUBLISHED[config.dataset],
            "graphs": graphs,
            "pairs": pairs.count,
            "pairs_left": left[-1],
            "initialisations": len(left),
            "pairs_left_after": left,
            "median_seconds": sorted(seconds)[len(seconds) // 2],
            "peak_memory_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        after = results["pairs_left_after"]
        return [
            ("data", f"{results['data']}: {results['graphs']} graphs, {results['pairs']} pairs"),
            (
                "pairs left",
                f"{results['pairs_left']} after {results['initialisations']} initialisations (first: {after[0]})",
            ),
            ("seconds per initialisation", f"{results['median_seconds']:.2f} (median)"),
            ("peak memory", f"{results['peak_memory_MB']} MB of the whole process"),
        ]


class Partners:
    """The pairs of graphs 2 k and 2 k + 1."""

    def __init__(self, graphs: int, threshold: float):
        self.count, self.threshold = graphs // 2, threshold
        self.alive = torch.ones(self.count, dtype=torch.bool)

    def update(self, embeddings: Tensor) -> int:
        """Number of pairs within the threshold in this and every earlier call."""
        self.alive &= (embeddings[::2] - embeddings[1::2]).abs().sum(1) <= self.threshold
        return int(self.alive.sum())


class AllPairs:
    """All pairs of graphs, as one bool per pair, or as a list once few are left."""

    def __init__(self, graphs: int, threshold: float):
        self.graphs, self.count, self.threshold = graphs, graphs * (graphs - 1) // 2, threshold
        self.alive = torch.ones(graphs, graphs, dtype=torch.bool).triu_(1)
        self.few: Tensor | None = None  # (2, pairs)

    def update(self, embeddings: Tensor) -> int:
        """Number of pairs within the threshold in this and every earlier call."""
        if self.few is not None:
            first, second = self.few
            near = (embeddings[first] - embeddings[second]).abs().sum(1) <= self.threshold
            self.few = self.few[:, near]
            return self.few.shape[1]
        for rows in torch.arange(self.graphs).split(512):
            self.alive[rows] &= torch.cdist(embeddings[rows], embeddings, p=1) <= self.threshold
        left = int(torch.count_nonzero(self.alive))
        if left <= FEW:
            self.few = self.alive.nonzero().T.contiguous()
            self.alive = torch.empty(0)
        return left
