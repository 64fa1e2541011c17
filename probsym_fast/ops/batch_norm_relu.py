"""Batch normalisation and ReLU of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probsym_fast.ops._op import Op, check_float
from probsym_fast.ops.reference.batch_norm_relu import batch_norm_relu as reference


def _shapes(x, weight, bias, eps):
    return x.new_empty(x.shape), weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


OP = Op(
    "batch_norm_relu",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor variance)",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    shapes=lambda d_y, x, weight, *_: _shapes(x, weight, None, None),
)


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = relu(weight (x - mean) / sqrt(variance + eps) + bias)` with the mean and variance of the batch.

    Args:
        x: (M, C), M >= 1 rows. weight, bias: (C,). eps: finite and >= 0.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: y (M, C) in the dtype of x, mean and (biased) variance (C,) without a gradient, for running statistics (float16
    and bfloat16 are computed in float32, and have statistics of that).

    Gradients: x (through the statistics too), weight, bias. Cost: three passes over x (triton: two), two in backward
    (torch: seven).
    Raises: TypeError (dtypes), ValueError (shapes, eps), RuntimeError (devices, backend).
    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """
    check_float("batch_norm_relu", x=x, weight=weight, bias=bias)
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"batch_norm_relu: x must be (M, C) with M >= 1, got {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if tuple(value.shape) != (x.shape[1],):
            raise ValueError(f"batch_norm_relu: {name} must be (C,) = ({x.shape[1]},), got {tuple(value.shape)}")
        if value.device != x.device:
            raise RuntimeError(f"batch_norm_relu: {name} must be on {x.device}, got {value.device}")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"batch_norm_relu: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"batch_norm_relu: eps must be finite and >= 0, got {eps}")
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    weight, bias = (z.to(torch.promote_types(dtype, torch.float32)) for z in (weight, bias))
    y, mean, variance = OP.select(backend, x.device, dtype)(x.to(dtype), weight, bias, float(eps))
    return y.to(x.dtype), mean.detach(), variance.detach()
