"""A pre-norm Transformer over short sequences, all layers in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from probsym_fast._checks import as_number, check_bool, check_count, check_counts, check_float, check_int, check_type
from probsym_fast.ops._op import Op
from probsym_fast.ops._weights import beyond, check_weights, kept_rows, needs_kept
from probsym_fast.ops.reference.transformer import check_values
from probsym_fast.ops.reference.transformer import transformer as reference

ACTIVATIONS = ("gelu", "relu")
MOST = {"tokens": 256, "features": 4096, "layers": 1024}  # of the kernels, as in csrc/cpu/transformer.cpp
MOST_ON_GPU = MOST | {"tokens": 64, "features of the width": 256, "features of a head": 32}  # up to 32 tokens: 64


def _shapes(x, weights, lengths, sizes, read, gelu, eps, keep, allow_bf16):
    _, width, layers, _, _, out_features = sizes
    M, L, _ = x.shape
    outputs = len(read) or L
    y = x.new_empty(M, outputs, out_features or width)
    return y, x.new_empty(kept_rows(M) if keep else 0, (layers * L + outputs) * width)


def _gradient_shapes(d_y, x, weights, kept, lengths, sizes, read, gelu, eps, needs_x, needs_weights, allow_bf16):
    return (
        x.new_empty(x.shape) if needs_x else None,
        weights.new_empty(weights.shape) if needs_weights else None,
    )


OP = Op(
    "transformer",
    "(Tensor x, Tensor weights, Tensor? lengths, int[] sizes, int[] read, bool gelu, float eps, bool keep,"
    " bool allow_bf16) -> (Tensor y, Tensor kept)",
    reference=reference,
    values=check_values,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor weights, Tensor kept, Tensor? lengths, int[] sizes, int[] read, bool gelu, float eps,"
    " bool needs_x, bool needs_weights, bool allow_bf16) -> (Tensor d_x, Tensor d_weights)",
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
    read: Sequence[int] | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    recompute: bool = False,
    allow_bf16: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A pre-norm Transformer: `layers` times `h = h + attention(norm(h))`, `h = h + down(act(up(norm(h))))`.

    With in_features, `h = embed(x) + positions` first; with out_features, `y = head(relu(hidden(relu(norm(h)))))` at the
    end. attention: `softmax(q k^T / sqrt(width / heads)) v` in every head, and a linear map. On a CPU a tile of sequences
    goes through all layers while it is in the cache; on a GPU each layer is three kernels.

    Args:
        x: (M, L, in_features or width). weights: (P,), one row of all parts, matrices as in Linear (out, in) row by row:
            embed.weight, embed.bias, positions (L, width); for every layer norm1.weight, norm1.bias, qkv.weight, qkv.bias,
            out.weight, out.bias, norm2.weight, norm2.bias, up.weight, up.bias, down.weight, down.bias; norm.weight,
            norm.bias, hidden.weight, hidden.bias, head.weight, head.bias. Parts of an absent embedding or head are left
            out.
        width: a multiple of heads. feedforward: features after `up`. lengths: (M,) int64, valid tokens of each sequence;
            later ones are not read, and give 0. read: the tokens to output, R of them, each in 0..L-1; None: all. Not
            with lengths. activation: "gelu" (with erf) or "relu". eps: of the norms, finite and >= 0.
        recompute: the backward pass computes the layers again, tile by tile, instead of reading each layer's input: a
            fifth slower on a CPU, and no memory per layer.
        allow_bf16: in float32 the matrices may multiply values rounded to bfloat16 (denormal ones to 0), also in the backward
            pass, where the kernel does so faster (a CPU with AMX). Sums and all that is no linear map stay in float32.
            Second derivatives are those of the exact products.
        backend: "auto", "cpu" (L at most 256, widths and features at most 4096), "triton" (L at most 64, width at most 256,
            width / heads at most 32, for L up to 32 at most 64) or "reference".

    Returns: (M, R or L, out_features or width) in the dtype of x; float16 and bfloat16 compute in float32.

    Gradients: x and weights. Saves the arguments and, unless `recompute`, the input of every layer. The gradient of the
    weights is summed over at most 16 parts of the batch, in their order for any number of threads; on a GPU by products of
    the library over parts of the batch, without atomics.
    Raises: TypeError (dtypes), ValueError (shapes, sizes, lengths, read, activation, eps), RuntimeError (devices, backend).
    Source: Vaswani et al. 2017 (arXiv 1706.03762), norms as in Xiong et al. 2020 (arXiv 2002.04745).
    """
    op = "transformer"
    check_float(op, x=x, weights=weights)
    width, layers, heads, feedforward = check_counts(
        op, width=width, layers=layers, heads=heads, feedforward=feedforward
    )
    in_features = check_count(op, "in_features", in_features, least=0)
    out_features = check_count(op, "out_features", out_features, least=0)
    recompute, allow_bf16 = check_bool(op, "recompute", recompute), check_bool(op, "allow_bf16", allow_bf16)
    if width % heads:
        raise ValueError(f"{op}: width must be a multiple of heads = {heads}, got {width}")
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != (in_features or width):
        raise ValueError(f"{op}: x must be (M, L, {in_features or width}) with L >= 1, got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if (small := as_number(eps)) is None:
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= small < math.inf:
        raise ValueError(f"{op}: eps must be finite and >= 0, got {small}")
    tokens = _checked_read(read, x.shape[1])
    if lengths is not None:
        _check_lengths(lengths, x, read)
    sizes = [in_features, width, layers, heads, feedforward, out_features]
    check_weights(op, weights, x, weights_of(sizes, x.shape[1]))
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    if (lacking := beyond_kernels(x.device.type, max(x.shape[1], len(tokens)), sizes)) is None:
        run = OP.select(backend, x.device, dtype)
    else:
        run = OP.without_kernel(backend, x.device, lacking)
    keep = needs_kept(recompute, x, weights)
    y, _ = run(
        x.to(dtype), weights.to(dtype), lengths, sizes, tokens, activation == "gelu", float(small), keep, allow_bf16
    )
    return y.to(x.dtype)


def beyond_kernels(device: str, tokens: int, sizes: Sequence[int]) -> str | None:
    """Why the kernels for a device type do not take these sizes; None: they do. tokens: of x, or of read if more."""
    _, width, layers, heads, _, _ = sizes
    found, most = {"tokens": tokens, "features": max(sizes), "layers": layers}, MOST
    if device == "cuda":
        found |= {"features of the width": width, "features of a head": width // heads}
        most = MOST_ON_GPU if tokens > 32 else MOST_ON_GPU | {"features of a head": 64}
    return beyond(found, most)


def weights_of(sizes: Sequence[int], tokens: int) -> int:
    """How many weights there are: sizes as in the op's schema."""
    in_features, width, layers, _, feedforward, out_features = sizes

    def linear(into: int, out: int) -> int:
        return (into + 1) * out

    embed = linear(in_features, width) + tokens * width if in_features else 0
    block = 4 * linear(width, width) + linear(width, feedforward) + linear(feedforward, width) + 4 * width
    head = 2 * width + linear(width, width) + linear(width, out_features) if out_features else 0
    return embed + layers * block + head


def _checked_read(read: Sequence[int] | None, tokens: int) -> list[int]:
    if read is None:
        return []
    check_type("transformer", "read", read, Iterable, "a sequence of token numbers or None")
    given = [check_int("transformer", "each of read", token) for token in read]
    if not given or not all(0 <= token < tokens for token in given):
        raise ValueError(f"transformer: read must hold one token or more, each in 0..{tokens - 1}, got {given}")
    return given


def _check_lengths(lengths: Tensor, x: Tensor, read: Sequence[int] | None) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        raise TypeError(f"transformer: lengths must be int64, got {getattr(lengths, 'dtype', type(lengths).__name__)}")
    if tuple(lengths.shape) != (x.shape[0],):
        raise ValueError(f"transformer: lengths must be (M,) = ({x.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.device != x.device:
        raise RuntimeError(f"transformer: lengths must be on {x.device}, got {lengths.device}")
    if read is not None:
        raise ValueError("transformer: read must be None where lengths are given, got both")
