"""Random graphs with the shapes of the experiments, for benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def molecule(nodes: int, extra: int = 5) -> Tensor:
    """(2, E) edges, in both directions, of a random tree with a few rings: as sparse as a peptide."""
    u = torch.arange(1, nodes)
    v = (torch.rand(nodes - 1) * u).long()
    edges = torch.cat([torch.stack([u, v]), torch.randint(0, nodes, (2, extra))], 1)
    return torch.cat([edges, edges.flip(0)], 1)


def molecules(sizes: list[int], extra: int = 5) -> tuple[Tensor, Tensor]:
    """edge_index and ptr of a ragged batch."""
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat([molecule(n, extra) + offset for n, offset in zip(sizes, ptr, strict=False)], 1), ptr


def one_hot(count: int, classes: int) -> Tensor:
    """(count, classes) float32, a random class per row."""
    return torch.nn.functional.one_hot(torch.randint(0, classes, (count,)), classes).float()


def dense_graphs(sizes: list[int], N: int, channels: int, density: float) -> Tensor:
    """(B, N, N, C) symmetric 0/1 matrices of this density on the first `size` nodes, 0 elsewhere."""
    out = torch.zeros(len(sizes), N, N, channels)
    for matrix, n in zip(out, sizes, strict=True):
        ones = (torch.rand(n, n, channels) < density).float() * torch.ones(n, n).triu()[..., None]
        matrix[:n, :n] = torch.maximum(ones, ones.transpose(0, 1))
    return out


def peptides_like(device: str) -> tuple[list[int], int, Tensor, Tensor]:
    """Sizes of graphs, samples, edge_index and ptr: one graph of mean size on a CPU, a batch on a GPU."""
    torch.manual_seed(0)
    sizes, samples = ([151], 8) if device == "cpu" else (torch.randint(30, 273, (32,)).tolist(), 10)
    return sizes, samples, *molecules(sizes)


def pattern_like(device: str) -> tuple[list[int], int]:
    """Sizes of graphs of mean 118, as the data set has, and samples."""
    sizes = [60, 118, 176, 118]
    return (sizes, 2) if device == "cpu" else (sizes * 8, 10)


def read_like(where: str, device: str) -> tuple[list[int], int, int]:
    """Sizes of graphs, samples and slots: PATTERN reads every node, PCQM-Contact pairs of nodes."""
    torch.manual_seed(0)
    N, samples, count = (188, 10, 32) if where == "nodes" else (53, 10, 128)
    return torch.randint(N // 4, N + 1, (count if device == "cuda" else 4,)).tolist(), samples, N


def messages_like(device: str) -> tuple[list[int], Tensor, Tensor]:
    """Sizes, edge_index and ptr of the graphs of a GIN."""
    torch.manual_seed(0)
    sizes = torch.randint(80, 222, (128 if device == "cuda" else 8,)).tolist()
    return sizes, *molecules(sizes)


def images_like(device: str) -> tuple[int, int, int, int, int]:
    """Images, samples, side, patch and width of tokens: a ViT-S/16 at 224."""
    return (16 if device == "cpu" else 64), 8, 224, 16, 384
