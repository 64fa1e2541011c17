"""A linear map of rows, batch normalisation and ReLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probsym_fast._autocast import promoted
from probsym_fast._checks import as_number, check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops.reference.linear_batch_norm_relu import linear_batch_norm_relu as reference


def _shapes(x, linear, weight, bias, eps):
    return x.new_empty(x.shape[0], linear.shape[0]), *(weight.new_empty(weight.shape) for _ in range(2))


def _gradient_shapes(d_y, x, linear, weight, bias, mean, variance, eps, needs_x, needs_linear):
    return (
        x.new_empty(x.shape) if needs_x else None,
        linear.new_empty(linear.shape) if needs_linear else None,
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


OP = Op(
    "linear_batch_norm_relu",
    "(Tensor x, Tensor linear, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor variance)",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor linear, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps,"
    " bool needs_x, bool needs_linear) -> (Tensor d_x, Tensor d_linear, Tensor d_weight, Tensor d_bias)",
    shapes=_gradient_shapes,
)


def linear_batch_norm_relu(
    x: Tensor, linear: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = relu(weight (z - mean) / sqrt(variance + eps) + bias)`, `z = x linear^T`, mean and variance over the rows of z.

    Args:
        x: (M, K), M >= 1 rows. linear: (C, K), as in Linear (a bias would cancel). weight, bias: (C,).
        eps: finite and >= 0. backend: "auto", "cpu", "triton" or "reference".

    Returns: y (M, C) in the dtype of x; mean and (biased) variance (C,) without a gradient, for running statistics. float16
    and bfloat16 compute, and return statistics, in float32.

    Gradients: x (through the statistics too), linear, weight, bias. Saves the arguments, mean and variance, and computes z
    again. Cost: reads x and writes z once, then reads z and writes y; backward reads x and the gradient twice. Everything
    else stays in cache.
    Raises: TypeError (dtypes), ValueError (shapes, eps), RuntimeError (devices, backend).
    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """
    op = "linear_batch_norm_relu"
    check_float(op, x=x, linear=linear, weight=weight, bias=bias)
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"{op}: x must be (M, K) with M >= 1, got {tuple(x.shape)}")
    if linear.ndim != 2 or linear.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: linear must be (C, K) = (*, {x.shape[1]}), got {tuple(linear.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if tuple(value.shape) != (linear.shape[0],):
            raise ValueError(f"{op}: {name} must be (C,) = ({linear.shape[0]},), got {tuple(value.shape)}")
    for name, value in (("linear", linear), ("weight", weight), ("bias", bias)):
        if value.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on {x.device}, got {value.device}")
    if (small := as_number(eps)) is None:
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= small < math.inf:
        raise ValueError(f"{op}: eps must be finite and >= 0, got {small}")
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    weight, bias = (t.to(promoted(dtype, torch.float32)) for t in (weight, bias))
    run = OP.select(backend, x.device, dtype)
    y, mean, variance = run(x.to(dtype), linear.to(dtype), weight, bias, float(small))
    return y.to(x.dtype), mean.detach(), variance.detach()
