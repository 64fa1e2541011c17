"""Small inputs and rows of weights for the ops that run a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from probsym_fast.ops import gin, message_passing, mlp, transformer
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count


def transformer_weights(settings: Mapping, tokens: int, device="cpu") -> Tensor:
    """float64, of a size for values of order 1."""
    names = "in_features", "width", "layers", "heads", "feedforward", "out_features"
    count = transformer_count([settings[name] for name in names], tokens)
    return torch.randn(count, device=device).double() / math.sqrt(settings["width"])


def message_weights(features: int, edge_features: int, width: int, layers: int, out: int, device="cpu") -> Tensor:
    count = message_count(features, edge_features, width, layers, out)
    return torch.randn(count, device=device).double() / math.sqrt(width)


def gin_weights(width: int, layers: int, out: int, device="cpu") -> Tensor:
    return torch.randn(gin_count(width, layers, out), device=device).double() / math.sqrt(width)


def mlp_weights(widths: Sequence[int], device="cpu") -> Tensor:
    return torch.randn(mlp_count(widths), device=device).double() / math.sqrt(max(widths))


def repeated(x: Tensor, count: int) -> Tensor:
    """The numbers of x again and again."""
    return x.flatten().repeat(-(-count // x.numel()))[:count]


SMALL = {"in_features": 3, "width": 6, "layers": 2, "heads": 2, "feedforward": 5, "out_features": 2}


def sequences(M, L, settings, device="cpu"):
    settings = SMALL | settings
    x = torch.randn(M, L, settings["in_features"] or settings["width"], device=device).double()
    return settings, [x, transformer_weights(settings, L, device)]


def networks(M=20):
    """name -> the op as a function of its leaves, and the leaves."""
    settings, leaves = sequences(M, 5, {})
    graphs = [torch.randn(M, 4, 3).double(), torch.randn(M // 2, 4, 4, 2).double(), message_weights(3, 2, 6, 2, 2)]
    return {
        "transformer": (lambda *t, **more: transformer(*t, **settings, **more), leaves),
        "message_passing": (
            lambda *t, **more: message_passing(*t, width=6, layers=2, out_features=2, **more),
            graphs,
        ),
        "gin": (
            lambda x, w, **more: gin(x, *ring(len(x) // 4), w, layers=2, out_features=2, activation="tanh", **more),
            [torch.randn(4 * (M // 4), 3, 6).double(), gin_weights(6, 2, 2)],
        ),
        "mlp": (
            lambda *t, **more: mlp(*t, widths=[6, 6, 6, 2], activation="gelu", first=True, **more),
            [torch.randn(5 * M, 6).double(), mlp_weights([6, 6, 6, 2])],
        ),
    }


def ring(graphs: int):
    """Edges and offsets of graphs of four nodes in a ring."""
    one = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return (one[:, None] + 4 * torch.arange(graphs)[:, None]).flatten(1), 4 * torch.arange(graphs + 1)
