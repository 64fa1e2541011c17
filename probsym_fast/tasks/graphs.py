"""Shared by the experiments on graphs: data, networks, and the four methods."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._progress import announced
from probsym_fast.data import cache_dir, exp, graph8c, wl_pairs
from probsym_fast.data._graphs import geometric
from probsym_fast.data._store import load_arrays, save_arrays
from probsym_fast.distributions import GIN, Distribution, Frame, Identity, Learned, Uniform, UniformNoise
from probsym_fast.distributions.laplacian import laplacian_keys
from probsym_fast.groups import Graphs, Symmetric
from probsym_fast.models import MLP, FlatGraph, GINBackbone, IdentifiedNodes, MeanReadout
from probsym_fast.training.configuration import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, between

SIZES = {"exp": 1200, "wl_pairs": 1200, "graph8c": 11_117}
PUBLISHED = {"exp": "EXP", "wl_pairs": "our own pairs (not EXP)", "graph8c": "GRAPH8c"}

GRAPH_LIMITS = {
    "width": COUNT,
    "layers": COUNT,
    "dropout": SHARE,
    "noise": NOT_NEGATIVE,
    "tau": POSITIVE,
    "iterations": between(0, 10_000),
}


@dataclass
class GraphDistribution:
    """The learned distribution on graphs (method ps and canonical).

    Args:
        width: hidden width of the GIN.
        layers: message passing steps of the GIN.
        dropout: dropout of the GIN.
        noise: scale of the uniform noise on node features (canonical: 0).
        fixed: use the same noise for a graph in every epoch (an ablation).
        tau: temperature of the soft permutation.
        iterations: Sinkhorn iterations.
    """

    width: int = 64
    layers: int = 3
    dropout: float = 0.0
    noise: float = 1.0
    fixed: bool = False
    tau: float = 0.01
    iterations: int = 20

    def build(self, method: str, group: Symmetric, features: int, seed: int = 0) -> Distribution:
        """The distribution of a method: ps, ga, fa, canonical or none."""
        if method == "ga":
            return Uniform(group)
        if method == "fa":
            return Frame(group)
        if method == "none":
            return Identity(group)
        if method not in ("ps", "canonical"):
            raise ValueError(f"config: method must be one of ps, ga, fa, canonical, none, got {method!r}")
        network = GIN(features, self.width, self.layers, self.dropout)
        noise = UniformNoise(0.0 if method == "canonical" else self.noise, fixed=seed if self.fixed else None)
        return Learned(group, network, noise, self.tau, self.iterations)


def load_graphs(name: str, path: str | None = None) -> list[Any]:
    """The graphs of "graph8c", "exp" or "wl_pairs" as torch_geometric Data, each with its number as `key`.

    path: a .g6 file, or the published EXP pickle; None: enumerates GRAPH8c, reads EXP from the cache (`probsym data get exp`
    downloads it).
    """
    if name == "wl_pairs":
        if path is not None:
            raise ValueError(f"config: data must be null for the generated wl_pairs, got {path!r}")
        data = wl_pairs()
    elif name == "graph8c":
        data = graph8c(path=path)
    else:
        file = Path(path) if path else cache_dir() / "exp" / "GRAPHSAT.pkl"
        if not file.is_file():
            raise FileNotFoundError(
                f"exp: {file} must be the published file GRAPHSAT.pkl, found nothing; download it with "
                "`probsym data get exp`, pass a copy with --data, or use our own generated pairs with --dataset wl_pairs"
            )
        data = exp(path=file)
    if len(data) != SIZES[name]:
        raise ValueError(f"config: data must hold the {SIZES[name]} graphs of {name}, got {len(data)} in {path}")
    for number, graph in enumerate(data):
        graph.key = torch.tensor([number])
    return data


def frames(edges: Tensor, ptr: Tensor) -> list[Tensor]:
    """The classes (n,) of each graph's nodes by the Laplacian's eigenvectors, cached by the SHA-256 of the graphs.

    edges: (2, E) global node numbers. ptr: (B + 1,).
    """
    name = hashlib.sha256(ptr.numpy().tobytes() + edges.numpy().tobytes()).hexdigest()[:32]
    path, count = cache_dir() / "frames" / f"{name}.npz", len(ptr) - 1
    if not path.exists():
        with announced(f"frames: eigenvectors of {count} graphs", None):
            save_arrays(path, {"classes": laplacian_keys(edges, ptr).numpy()}, {"graphs": count})
    arrays, _ = load_arrays(path, {"classes": (int(ptr[-1]),)}, {"graphs": count})
    return list(torch.from_numpy(arrays["classes"]).split(ptr.diff().tolist()))


def add_frames(data: list[Any]) -> None:
    """Sets the attribute `frame` of every graph in the list."""
    ptr = torch.tensor([0] + [graph.num_nodes for graph in data]).cumsum(0)
    edges = torch.cat([graph.edge_index + offset for graph, offset in zip(data, ptr, strict=False)], 1)
    for graph, classes in zip(data, frames(edges, ptr), strict=True):
        graph.frame = classes


def collate(data: list[Any]) -> Graphs:
    """A batch of torch_geometric Data."""
    return Graphs.from_data(geometric().data.Batch.from_data_list(data))


def mlp(
    N: int, widths: list[int], features: int, activation: str, last: bool, soft: bool = False
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Backbone, embedding and readout of an MLP on the flattened permuted graph; widths: from the first hidden layer."""
    return MLP(widths, activation, last), FlatGraph(N, widths[0], features, soft=soft), MeanReadout()


def gin(
    N: int, widths: list[int], features: int, activation: str, last: bool
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """GIN-ID: 3 layers of width 64 on features and slot identifiers; widths: those of the layers after it."""
    backbone: nn.Module = GINBackbone(64, 3, widths[0], activation, final=last)
    if len(widths) > 1:
        backbone = Followed(backbone, MLP(widths))
    return backbone, IdentifiedNodes(N, 64, features), MeanReadout()


class Followed(nn.Module):
    """A network applied after another one that takes several inputs."""

    def __init__(self, first: nn.Module, then: nn.Module):
        super().__init__()
        self.first, self.then = first, then

    def forward(self, *inputs: Any) -> Tensor:
        return self.then(self.first(*inputs))
