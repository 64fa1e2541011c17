"""Rows of weights for the ops that run a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
