"""A user's script over the whole face of the package, for the type checker (`make types`); the tests run it, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import probsym_fast as psf
from probsym_fast.distributions import GIN, Learned, UniformNoise, VectorNeurons
from probsym_fast.groups import Euclidean, Symmetric


@dataclass(eq=False)
class Sequences(psf.Batch):
    x: Tensor  # (B, 4, 2)
    num_nodes: Tensor | None = None

    layouts: ClassVar = {"x": "nc"}


class Flat(torch.nn.Module):
    def forward(self, batch: Sequences, group: psf.groups.Group, g: psf.Permutation) -> Tensor:
        return group.act(g, batch.x, "nc", inverse=True).flatten(2)


def of_sequences() -> tuple[psf.Symmetrized, Sequences]:
    readout = psf.models.ScoredReadout(psf.models.MeanReadout(), torch.nn.Linear(3, 1))
    uniform = psf.distributions.Uniform(Symmetric(4))
    model = psf.Symmetrized(torch.nn.Linear(8, 3), Flat(), readout, uniform, reduce="weighted", score="score")
    return model, Sequences(torch.randn(2, 4, 2), torch.tensor([3, 4])).to(torch.float32)


def of_graphs() -> tuple[psf.Symmetrized, psf.Graphs]:
    edges = torch.tensor([[0, 1, 3, 4], [1, 0, 4, 3]])
    graphs: psf.Graphs = psf.Graphs(torch.randn(5, 2), edges, torch.tensor([0, 3, 5])).to(torch.float32)
    graphs.check()
    embed = psf.models.FlatGraph(N=4, width=8, node_features=2)
    distribution = Learned(Symmetric(4), GIN(2, width=8), UniformNoise())
    return psf.Symmetrized(psf.models.MLP([8, 3]), embed, psf.models.MeanReadout(), distribution), graphs


def of_clouds() -> tuple[psf.Symmetrized, psf.PointClouds]:
    clouds = psf.PointClouds(torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 5, 2))
    group = Symmetric(5) * Euclidean(3)
    backbone = psf.models.Transformer(width=8, layers=1, heads=2, feedforward=8, read=range(0, 25, 6))
    parts = backbone, psf.models.PairTokens(), psf.models.NodeReadout(displacement=True)
    return psf.Symmetrized(*parts, Learned(group, VectorNeurons(width=6), tau=0.1), draws="antithetic", chunk=2), clouds


def of_images() -> Tensor:
    group = psf.groups.Symmetric(2) * psf.groups.Dihedral(4)
    images: psf.Images = psf.Images(torch.randn(2, 3, 4, 4), mask=torch.ones(2, 4, 4)).to(torch.float64)
    g = group.uniform(images, 1, psf.Draws(seed=1))
    plane: Tensor = psf.groups.plane_of(group, g)
    moved: psf.Images = images.moved(psf.groups.Dihedral(4), plane)
    return psf.groups.move_images(moved.pixels, plane, inverse=True, pad_mode="replicate")


def ops() -> Tensor:
    p: psf.SoftPermutation = psf.ops.soft_permutation(torch.randn(2, 3, 6), tau=0.1)
    hard: psf.Permutation = psf.Permutation(p.order)
    entropy: Tensor = psf.ops.permutation_entropy(p)
    with psf.debug(), psf.ops.using_backend("reference"):
        frames: Tensor = psf.ops.orthogonal_frame(torch.randn(2, 3, 3))
    return entropy + frames.sum() + hard.rank.sum()


def main(folder: Path) -> None:
    model, graphs = of_graphs()
    prediction, penalties = model(graphs, samples=4, seed=3)
    loss: Tensor = prediction.square().mean() + 0.1 * penalties["entropy"]
    loss.backward()
    model.chunks = psf.Chunks("auto", memory=10**9)
    estimate: psf.Estimate = model.eval().estimate(graphs, 16, tolerance=1.0)
    error: float = psf.equivariance_error(model, graphs, samples=4)
    profile: psf.Profile = psf.profile(model, graphs, samples=[1, 2], seconds=0.001)
    profile.save(folder / "profile.json")
    profile.plot(folder / "profile.png")
    psf.profiling.trace(model, graphs, path=folder / "trace.json")
    points, clouds = of_clouds()
    moved: psf.PointClouds = clouds.moved(Euclidean(3), Euclidean(3).uniform(clouds, 1, psf.Draws(seed=1)))
    positions: Tensor = points(moved, samples=2)[0]
    scored, sequences = of_sequences()
    each: Tensor = scored(sequences, samples=2)[0]["prediction"]
    best: Tensor = scored(sequences, samples=2, reduce="best")[0]["prediction"]
    print(each.shape == best.shape, sequences.replace(num_nodes=None).size)
    print(of_images().shape)
    task = psf.tasks.load("nbody/demo", ["--training.epochs", "1"])
    print(model, estimate.samples, error, positions.shape, task.config.name, ops(), sorted(psf.info()))


if __name__ == "__main__":
    main(Path("."))
