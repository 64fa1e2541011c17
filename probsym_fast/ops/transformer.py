"""A pre-norm Transformer over short sequences, all layers in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from probsym_fast._checks import check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops.reference.transformer import transformer as reference

PADDING = 16  # kept states are for sequences in multiples of it, as in csrc/cpu/transformer.cpp


def _shapes(x, weights, lengths, sizes, read, gelu, eps, keep):
    in_features, width, layers, heads, feedforward, out_features = sizes
    M, L, _ = x.shape
    outputs = len(read) or L
    rows = (M + PADDING - 1) // PADDING * PADDING if keep else 0
    y = x.new_empty(M, outputs, out_features or width)
    return y, x.new_empty(rows, (layers * L + outputs) * width)


def _gradient_shapes(d_y, x, weights, kept, lengths, sizes, read, gelu, eps, needs_x, needs_weights):
    return (
        x.new_empty(x.shape) if needs_x else None,
        weights.new_empty(weights.shape) if needs_weights else None,
    )


OP = Op(
    "transformer",
    "(Tensor x, Tensor weights, Tensor? lengths, int[] sizes, int[] read, bool gelu, float eps, bool keep)"
    " -> (Tensor y, Tensor kept)",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor weights, Tensor kept, Tensor? lengths, int[] sizes, int[] read, bool gelu, float eps,"
    " bool needs_x, bool needs_weights) -> (Tensor d_x, Tensor d_weights)",
    shapes=_gradient_shapes,
    others={"keep": lambda known: False},
)


def transformer(
    x: Tensor,
    weights: Tensor,
    *,
    width: int,
    layers: int,
    heads: int,
    feedforward: int,
    in_features: int = 0,
    out_features: int = 0,
    lengths: Tensor | None = None,
    read: Sequence[int] = (),
    activation: str = "gelu",
    eps: float = 1e-5,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    sizes = [in_features, width, layers, heads, feedforward, out_features]
    check_float("transformer", x=x, weights=weights)
    keep = not recompute and torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    run = OP.select(backend, x.device, x.dtype)
    return run(x, weights, lengths, sizes, list(read), activation == "gelu", eps, keep)[0]
