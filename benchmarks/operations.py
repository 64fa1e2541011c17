"""Operations (multiplications and additions) of a call: those of its matrix products and attentions, fused ones included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

OPS = torch.ops.probsym_fast


def linear_batch_norm_relu(x: Sequence[int], linear: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * linear[0] * linear[1]


def linear_batch_norm_relu_backward(
    d_y: Any, x: Any, linear: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float, *needs: bool, **_: Any
) -> int:
    return sum(needs) * linear_batch_norm_relu(x, linear)


def vector_edge_convolution(x: Sequence[int], feature: Sequence[int], *_: Any, **__: Any) -> int:
    """The four maps of every node, and the pool's map of every pair."""
    C, d, n, M = x
    w = feature[0]
    return 2 * M * d * n * (4 * w * C + n * w * w)


def vector_edge_convolution_backward(d_y: Any, x: Sequence[int], feature: Sequence[int], *rest: Any, **_: Any) -> int:
    """Of the maps of nodes: to the weights and, where asked for, to x."""
    C, d, n, M = x
    return (1 + rest[-1]) * 2 * M * d * n * 4 * feature[0] * C


FORMULAS = {
    OPS.linear_batch_norm_relu: linear_batch_norm_relu,
    OPS.linear_batch_norm_relu_backward: linear_batch_norm_relu_backward,
    OPS.vector_edge_convolution: vector_edge_convolution,
    OPS.vector_edge_convolution_backward: vector_edge_convolution_backward,
}


def operations_of(function: Callable) -> int:
    """Operations of one call, including the backward pass. A model must be `countable`."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function()
    return counter.get_total_flops()


def countable(model: nn.Module) -> nn.Module:
    """The model, whose backbones now run by modules: their products are counted, those within an op are not."""
    for part in model.modules():
        if hasattr(part, "why_modules"):
            part.one_pass = False
    return model
