"""Two linear maps with an activation between, on rows: the hidden features stay on chip.

    y = down(act(up(x))),   with a norm:   y = x + down(act(up(norm(x)))),   with `first`:   y = down(act(up(act(x))))
A program holds a block of rows of y, and loops over blocks of the hidden features: for each it loops over those of x, which
the caches hold. The gradient computes act(up) again and writes it with d_up; the library multiplies them for the weights.
Or what goes into act(up) is kept: then each map's gradient is `rows.linear_gradient`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel, precision, width_block
from probsym_fast.ops.triton.rows import (
    activation,
    features,
    in_units,
    linear,
    matrix,
    moments,
    norm_gradient,
    normalised,
    tile,
    values,
)


@kernel(
    {"BLOCK_F": 32, "BLOCK_K": 32, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_F": 32, "BLOCK_K": 16, "num_stages": 2, "maxnreg": 255},),
)
def _feedforward(
    p_x, p_gain, p_shift, p_up, p_up_bias, p_down, p_down_bias, p_z, p_y, rows, K, F, N, eps,
    UNIT: tl.constexpr, UNIT_N: tl.constexpr, FIRST: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y of a block of rows; z, if there is room for it, is what goes into act(up)."""
    K, F, N = K * UNIT, F * UNIT, N * UNIT_N
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n, m_r = tl.arange(0, BLOCK_N), o_r < rows
    b_y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if p_gain is not None:
        b_y = features(p_x, o_r, m_r, o_n, N)
        b_mean, b_inverse = moments(b_y, m_r, o_n, N, eps)
    b_y += values(p_down_bias, o_n, N)
    for f in range(0, F, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        b_u = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for k in range(0, K, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            if p_gain is None:
                b_x = features(p_x, o_r, m_r, o_k, K)
            else:
                b_x = normalised(p_x, o_r, m_r, o_k, K, b_mean, b_inverse, p_gain, p_shift)
            if FIRST:
                b_x, _ = activation(b_x, ACT)
            b_u = tl.dot(b_x, matrix(p_up, o_k, K, o_f, F, 1, K), b_u, input_precision=PRECISION)
        b_u += values(p_up_bias, o_f, F)
        if p_z is not None:
            tl.store(p_z + o_r[:, None] * F + o_f[None, :], b_u, mask=m_r[:, None] & (o_f < F)[None, :])
        b_active, _ = activation(b_u, ACT)
        b_y = tl.dot(b_active, matrix(p_down, o_f, F, o_n, N, 1, F), b_y, input_precision=PRECISION)
    tl.store(p_y + o_r[:, None] * N + o_n[None, :], b_y, mask=m_r[:, None] & (o_n < N)[None, :])


@kernel(
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255},),
)
def _hidden_gradient(
    p_d, p_x, p_gain, p_shift, p_up, p_up_bias, p_down, p_active, p_d_up, rows, K, F, N, eps,
    UNIT: tl.constexpr, UNIT_N: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(up) and d_up of a block of rows and of hidden features."""
    K, F, N = K * UNIT, F * UNIT, N * UNIT_N
    blocks = tl.cdiv(F, BLOCK_F)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r = o_r < rows
    if p_gain is not None:
        o_w = tl.arange(0, BLOCK_W)
        b_mean, b_inverse = moments(features(p_x, o_r, m_r, o_w, K), m_r, o_w, K, eps)
    b_u = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        if p_gain is None:
            b_x = features(p_x, o_r, m_r, o_k, K)
        else:
            b_x = normalised(p_x, o_r, m_r, o_k, K, b_mean, b_inverse, p_gain, p_shift)
        b_u = tl.dot(b_x, matrix(p_up, o_k, K, o_f, F, 1, K), b_u, input_precision=PRECISION)
    b_d = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for k in range(0, N, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_w = matrix(p_down, o_k, N, o_f, F, F, 1)
        b_d = tl.dot(features(p_d, o_r, m_r, o_k, N), b_w, b_d, input_precision=PRECISION)
    b_active, b_slope = activation(b_u + values(p_up_bias, o_f, F), ACT)
    m_f, o_out = m_r[:, None] & (o_f < F)[None, :], o_r[:, None] * F + o_f[None, :]
    tl.store(p_active + o_out, b_active, mask=m_f)
    tl.store(p_d_up + o_out, b_d * b_slope, mask=m_f)


class Feedforward:
    """The weights of one: up (F, K), down (N, F), their biases, and (gain, shift) of the norm if there is one."""

    def __init__(
        self,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        act: str,
        norm: tuple[Tensor, Tensor] | None = None,
        eps: float = 0.0,
    ):
        self.up, self.down, self.norm = (up, up_bias), (down, down_bias), norm or (None, None)
        self.act, self.eps, self.sizes = act, eps, (*up.shape[::-1], down.shape[0])  # K, F, N
        (K, F), unit = in_units(*self.sizes[:2])
        (N,), unit_n = in_units(self.sizes[2])
        self.in_units, self.units = (K, F, N), {"UNIT": unit, "UNIT_N": unit_n}

    def _constants(self, x: Tensor) -> dict:
        return self.units | {"ACT": self.act, "PRECISION": precision(x.dtype), "sizes": (x.shape[0], *self.sizes)}

    def forward(self, x: Tensor, y: Tensor, first: bool = False, z: Tensor | None = None) -> Tensor:
        """x (rows, K) -> y (rows, N), which is returned; z (rows, F): what goes into act(up). All contiguous."""
        rows, block = x.shape[0], max(16, bucket(self.sizes[-1]))

        def grid(settings):
            return (cdiv(rows, settings["BLOCK_R"]),)

        arguments = x, *self.norm, *self.up, *self.down, z, y, rows, *self.in_units, self.eps
        constants = tile(block, min(self.units.values())) | self._constants(x) | {"FIRST": first}
        _feedforward(grid, *arguments, BLOCK_N=block, **constants)
        return y

    def backward(self, d_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d_x, act(up) (rows, F), its d_up (rows, F), and x before gain and shift."""
        rows, (K, F, _) = x.shape[0], self.sizes
        block = width_block(F, 64)
        active, d_up = (torch.empty(rows, F, dtype=x.dtype, device=x.device) for _ in range(2))

        def grid(settings):
            return (cdiv(rows, settings["BLOCK_R"]) * cdiv(F, block),)

        arguments = d_y, x, *self.norm, *self.up, self.down[0], active, d_up, rows, *self.in_units, self.eps
        blocks = {"BLOCK_R": 32, "BLOCK_F": block, "BLOCK_W": max(16, bucket(K)) if self.norm[0] is not None else 16}
        _hidden_gradient(grid, *arguments, **blocks, **self._constants(x))
        if self.norm[0] is None:
            return linear(d_up, self.up[0]), active, d_up, x
        d_x, normal = norm_gradient(d_up, self.up[0], x, self.norm[0], d_y, self.eps)
        return d_x, active, d_up, normal
