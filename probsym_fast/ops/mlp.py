"""A multilayer perceptron, all layers in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from probsym_fast._checks import check_bool, check_float, check_int, check_type
from probsym_fast.ops._op import Op
from probsym_fast.ops._weights import beyond, check_weights, kept_rows, needs_kept
from probsym_fast.ops.reference._parts import FUNCTIONS
from probsym_fast.ops.reference.mlp import ROWS, values_kept
from probsym_fast.ops.reference.mlp import mlp as reference

ACTIVATIONS = tuple(FUNCTIONS)
MOST = {"features": 4096, "layers": 1024}  # of the kernels, as in csrc/cpu/mlp.cpp


def _shapes(x, weights, widths, activation, first, last, keep, allow_bf16):
    sequences = (x.shape[0] + ROWS - 1) // ROWS
    rows = kept_rows(sequences) if keep else 0
    return x.new_empty(x.shape[0], widths[-1]), x.new_empty(rows, values_kept(widths, last))


def _gradient_shapes(d_y, x, weights, kept, widths, activation, first, last, needs_x, needs_weights, allow_bf16):
    return (
        x.new_empty(x.shape) if needs_x else None,
        weights.new_empty(weights.shape) if needs_weights else None,
    )


OP = Op(
    "mlp",
    "(Tensor x, Tensor weights, int[] widths, int activation, bool first, bool last, bool keep,"
    " bool allow_bf16) -> (Tensor y, Tensor kept)",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor weights, Tensor kept, int[] widths, int activation, bool first, bool last,"
    " bool needs_x, bool needs_weights, bool allow_bf16) -> (Tensor d_x, Tensor d_weights)",
    shapes=_gradient_shapes,
    others={"keep": lambda known: False},
)


def mlp(
    x: Tensor,
    weights: Tensor,
    *,
    widths: Sequence[int],
    activation: str = "relu",
    first: bool = False,
    last: bool = False,
    recompute: bool = False,
    allow_bf16: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A multilayer perceptron of n layers: `z_k = W_k a_k + b_k` with `a_1 = x`, `a_(k+1) = act(z_k)`, and `y = z_n`.

    With `first`, `a_1 = act(x)`; with `last`, `y = act(z_n)`. On a CPU a tile of rows goes through all layers while it is in
    the cache; on a GPU two layers are one kernel, up to a width of 256 after the second.

    Args:
        x: (M, widths[0]). weights: (P,), one row of all parts: for every layer weight (widths[k], widths[k - 1]) row by row
            as in Linear, and bias (widths[k],).
        widths: of the input and of every layer, two or more. activation: "tanh", "relu", "gelu" (with erf) or "silu".
        recompute: the backward pass computes the layers again, tile by tile, instead of reading what each layer gave.
        allow_bf16: in float32 the matrices may multiply values rounded to bfloat16 (denormal ones to 0), also in the backward
            pass, where the kernel does so faster (a CPU with AMX). Sums and all that is no linear map stay in float32.
            Second derivatives are those of the exact products.
        backend: "auto", "cpu", "triton" (widths at most 4096, layers 1024) or "reference".

    Returns: (M, widths[-1]) in the dtype of x; float16 and bfloat16 compute in float32.

    Gradients: x and weights. Saves the arguments and, unless `recompute`, what goes into the activations after the layers.
    The gradient of the weights is summed over at most 16 parts of the batch, in their order for any number of threads; on
    a GPU by products of the library over parts of the batch, without atomics.
    Raises: TypeError (dtypes), ValueError (shapes, widths, activation), RuntimeError (devices, backend).
    """
    op = "mlp"
    check_float(op, x=x, weights=weights)
    check_type(op, "widths", widths, Iterable, "a sequence of ints")
    sizes = [check_int(op, "each of widths", width) for width in widths]
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"{op}: widths must be two or more, each at least 1, got {sizes}")
    flags = {"first": first, "last": last, "recompute": recompute, "allow_bf16": allow_bf16}
    first, last, recompute, allow_bf16 = (check_bool(op, name, value) for name, value in flags.items())
    if x.ndim != 2 or x.shape[1] != sizes[0]:
        raise ValueError(f"{op}: x must be (M, widths[0]) = (*, {sizes[0]}), got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_weights(op, weights, x, weights_of(sizes))
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    if (lacking := beyond_kernels(sizes)) is None:
        run = OP.select(backend, x.device, dtype)
    else:
        run = OP.without_kernel(backend, x.device, lacking)
    which, keep = ACTIVATIONS.index(activation), needs_kept(recompute, x, weights)
    y, _ = run(x.to(dtype), weights.to(dtype), sizes, which, first, last, keep, allow_bf16)
    return y.to(x.dtype)


def beyond_kernels(widths: Sequence[int]) -> str | None:
    """Why the kernels do not take these widths; None: they do."""
    return beyond({"features": max(widths), "layers": len(widths) - 1}, MOST)


def weights_of(widths: Sequence[int]) -> int:
    """How many weights there are."""
    return sum((into + 1) * out for into, out in pairwise(widths))
