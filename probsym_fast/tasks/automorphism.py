"""Inner symmetry: a symmetrized random MLP gives the nodes of one orbit equal outputs; a canonicalized one does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from probsym_fast.draws import seeded
from probsym_fast.groups import Graphs, Symmetric
from probsym_fast.models import MLP, FlatGraph, SlotReadout, Symmetrized
from probsym_fast.tasks.graphs import GRAPH_LIMITS, GraphDistribution
from probsym_fast.tasks.plots import plot_graphs
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, at_least, between
from probsym_fast.training.settings import Run
from probsym_fast.training.task import Computation

SLOTS = 25
WIDTHS = [2048, 4096, 2048]
LIMITS = {
    "samples": COUNT,
    "trials": at_least(2),
    "seed": between(0, 2**32 - 1),
    **{f"distribution.{key}": limit for key, limit in GRAPH_LIMITS.items()},
}


@dataclass
class AutomorphismConfig(Run):
    """Outputs on the orbits of five small graphs, Kim et al. 2023; defaults: published settings (docs/differences.md).

    Args:
        task: "automorphism".
        method: "ps" learned distribution, "ga" uniform, "fa" Laplacian frame, "canonical" learned without noise, one sample.
        samples: permutations per graph (canonical: 1).
        trials: repetitions of the average, for its sampling error; figures and pictures show the first.
        seed: seed of weights and noise.
        distribution: settings of the learned distribution.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {"canonical": {"samples": 1}}

    task: Literal["automorphism"] = "automorphism"
    method: Literal["ps", "ga", "fa", "canonical"] = "ps"
    samples: int = 100
    trials: int = 10
    seed: int = 777
    distribution: GraphDistribution = field(default_factory=GraphDistribution)


def circle(n: int, radius: float = 1.0) -> Tensor:
    """(n, 2) points."""
    turn = 2 * torch.pi * torch.arange(n) / n
    return radius * torch.stack([turn.cos(), turn.sin()], 1)


def graphs() -> dict[str, tuple[list[tuple[int, int]], list[list[int]], Tensor]]:
    """The published graphs: name -> edges, orbits, positions (n, 2) in the picture."""
    asymmetric = [
        (0, 1),
        (0, 2),
        (1, 2),
        (1, 4),
        (2, 3),
        (2, 5),
        (4, 5),
        (5, 6),
    ]  # a square and a triangle that share an edge, two leaves
    star = [(0, leaf) for leaf in range(1, 7)]
    two_stars = [(0, 4), *((0, leaf) for leaf in (1, 2, 3)), *((4, leaf) for leaf in (5, 6))]
    cycle = [(i, (i + 1) % 7) for i in range(7)]
    grid = [(5 * i + j, 5 * i + k) for i in range(5) for j, k in pairwise(range(5))]
    grid += [(5 * j + i, 5 * k + i) for i in range(5) for j, k in pairwise(range(5))]
    distance = {5 * i + j: tuple(sorted((abs(i - 2), abs(j - 2)))) for i in range(5) for j in range(5)}
    orbits = [[u for u, d in distance.items() if d == key] for key in sorted(set(distance.values()))]
    centred = torch.cat([torch.zeros(1, 2), circle(6)])
    apart = torch.tensor([[0.5, 1.5], [0, 0.8], [1, 0.8], [2, 1.1], [0, 0], [1, 0], [2, -0.3]])
    left = torch.tensor([[-0.5, 0.0], [-0.9, 0.6], [-1.1, 0.0], [-0.9, -0.6]])
    pair = torch.cat([left, torch.tensor([[0.5, 0.0], [0.9, 0.6], [0.9, -0.6]])])
    return {
        "no symmetry": (asymmetric, [[u] for u in range(7)], apart),
        "star": (star, [[0], list(range(1, 7))], centred),
        "two stars": (two_stars, [[0], [1, 2, 3], [4], [5, 6]], pair),
        "7-cycle": (cycle, [list(range(7))], circle(7)),
        "5 x 5 grid": (grid, orbits, torch.tensor([[j, -i] for i in range(5) for j in range(5)]).float()),
    }


class Automorphism(Computation):
    """The largest difference within an orbit, against the sampling error and the differences between orbits."""

    def __init__(self, config: AutomorphismConfig):
        configuration.check(config, LIMITS)
        if config.method == "canonical" and config.samples != 1:
            raise ValueError(f"config: samples must be 1 for method canonical, got {config.samples}")
        self.config = config

    def model(self) -> Symmetrized:
        network = MLP(WIDTHS, last=True), FlatGraph(SLOTS, WIDTHS[0]), SlotReadout(SLOTS, WIDTHS[-1])
        return Symmetrized(*network, self.config.distribution.build(self.config.method, Symmetric(SLOTS), 1)).eval()

    @torch.no_grad()
    def run(self, folder: Path) -> dict[str, Any]:
        config = self.config
        torch.manual_seed(config.seed)
        model, results, pictures = self.model(), {}, []
        for name, (edges, orbits, positions) in graphs().items():
            u, v = torch.tensor(edges).T
            edge_index = torch.stack([torch.cat([u, v]), torch.cat([v, u])])
            nodes = len(positions)
            batch = Graphs(
                torch.zeros(nodes, 1), edge_index, torch.tensor([0, nodes])
            )  # features do not distinguish nodes
            trials = torch.stack(
                [
                    model(batch, config.samples, seeded(config.seed, f"automorphism {name}", k))[0][:, 0]
                    for k in range(config.trials)
                ]
            )
            first, error = trials[0], float(trials.std(0).mean())
            within = max(float(first[orbit].max() - first[orbit].min()) for orbit in orbits)
            centres = torch.stack([first[orbit].mean() for orbit in orbits])
            results[name] = {
                "within_orbits": within,
                "between_orbits": float(centres.max() - centres.min()),
                "sampling_error": error,
            }
            pictures.append((name, positions, edges, first))
        plot_graphs(folder / "plots" / "automorphism.png", pictures)
        return {"method": config.method, "samples": config.samples, "trials": config.trials, "graphs": results}

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        text = "within orbits {within_orbits:.2e}, between {between_orbits:.2e}, sampling error {sampling_error:.1e}"
        return [(name, text.format(**row)) for name, row in results["graphs"].items()]
