"""The gradient of the pairs of `vector_pairs`: of the chosen ones, and of the statistics of all near ones."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import kernel
from probsym_fast.ops.triton.rows import values
from probsym_fast.ops.triton.vector_pairs import ROWS, Pairs, chosen_pair, factors, is_near, norm, place, vectors


@kernel({"ROWS": ROWS, "num_warps": 4, "maxnreg": 255})
def _chosen_gradient(
    p_d, p_maps, p_taken, p_scaling, p_d_pairs, p_sums, n, M, d, W, channels,
    UNIT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """d of p and q of a node's chosen pairs, (d n M, 2 W); and of scale and shift, summed over some clouds."""
    BLOCK_M: tl.constexpr = ROWS // BLOCK_A
    W *= UNIT
    i, o_m, m_m, o_c, part = place(n, M, tl.cdiv(W, BLOCK_C), BLOCK_M, BLOCK_C)
    o_a, m_c = tl.arange(0, BLOCK_A), m_m[:, None] & (o_c < channels)[None, :]
    b_p, b_q = chosen_pair(p_maps, p_taken, i, o_a, o_m, m_m, o_c, m_c, d, n, M, W)
    o_d = ((o_c[None, None, :] * d + o_a[:, None, None]) * n + i) * M + o_m[None, :, None]
    b_d = tl.load(p_d + o_d, mask=(o_a < d)[:, None, None] & m_c[None, :, :], other=0)
    b_shift, b_inverse, b_s, b_pq, b_qq, b_c = factors(b_p, b_q, p_scaling, o_c, W)
    b_e = tl.where(b_c < 0, -tl.sum(b_d * b_q, 0) / b_qq, 0.0)  # d_c / <q, q> on the leaky side
    b_d_s, b_d_pq = tl.sum(b_d * b_p, 0) + 0.8 * b_e * b_pq, 0.8 * b_e * b_s
    b_d_inverse = b_d_s * b_inverse
    b_radial = -b_shift * b_d_inverse * b_inverse * b_inverse
    b_d_p = b_d * b_s[None, :, :] + b_q * b_d_pq[None, :, :] + b_p * b_radial[None, :, :]
    b_d_q = b_p * b_d_pq[None, :, :] - b_d * b_c[None, :, :] - b_q * (2.0 * b_e * b_c)[None, :, :]
    o_row = (o_a[:, None, None] * n + i) * M + o_m[None, :, None]
    p_out = p_d_pairs + o_row * (2 * W) + o_c[None, None, :]
    m_out = (o_a < d)[:, None, None] & m_m[None, :, None] & (o_c < W)[None, None, :]
    tl.store(p_out, b_d_p, mask=m_out)
    tl.store(p_out + W, b_d_q, mask=m_out)
    tl.store(p_sums + part * (2 * W) + o_c, tl.sum(b_d_s, 0), mask=o_c < W)
    tl.store(p_sums + part * (2 * W) + W + o_c, tl.sum(b_d_inverse, 0), mask=o_c < W)


@kernel({"ROWS": ROWS, "num_warps": 4, "maxnreg": 255})
def _maps_gradient(
    p_d_pairs, p_maps, p_taken, p_near, p_slopes, p_d_maps, n, M, d, W, channels,
    UNIT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """d of the maps of a node: of the pairs that chose it, of its own, and of all its near ones through their norms.

    slopes (2, W): d of a norm is the first, and the second times the norm; None: the statistics are given.
    """
    BLOCK_M: tl.constexpr = ROWS // BLOCK_A
    W *= UNIT
    v, o_m, m_m, o_c, _ = place(n, M, tl.cdiv(W, BLOCK_C), BLOCK_M, BLOCK_C)
    o_a, m_c = tl.arange(0, BLOCK_A), m_m[:, None] & (o_c < channels)[None, :]
    o_x = (o_a[:, None, None] * n + v) * M + o_m[None, :, None]
    m_x = (o_a < d)[:, None, None] & m_m[None, :, None] & (o_c < W)[None, None, :]
    b_d_p = vectors(p_d_pairs, 0, v, o_a, o_m, m_m, o_c, d, n, M, W, 2)  # as a center
    b_d_q = vectors(p_d_pairs, 1, v, o_a, o_m, m_m, o_c, d, n, M, W, 2)
    p_out = p_d_maps + o_x * (4 * W) + o_c[None, None, :]
    tl.store(p_out + 3 * W, b_d_q, mask=m_x)
    b_near_p = tl.zeros((BLOCK_A, BLOCK_M, BLOCK_C), tl.float32)  # as a neighbour
    b_near_q = tl.zeros((BLOCK_A, BLOCK_M, BLOCK_C), tl.float32)
    if p_slopes is not None:
        b_offset, b_slope = values(p_slopes, o_c, W), values(p_slopes + W, o_c, W)
        b_neighbor = vectors(p_maps, 0, v, o_a, o_m, m_m, o_c, d, n, M, W, 4)
        b_center = vectors(p_maps, 2, v, o_a, o_m, m_m, o_c, d, n, M, W, 4)
    for u in range(n):
        b_taken = tl.load(p_taken + (o_c[None, :] * n + u) * M + o_m[:, None], mask=m_c, other=255).to(tl.int32)
        m_taken = ((b_taken == v) & m_c)[None, :, :] & (o_a < d)[:, None, None]
        p_in = p_d_pairs + ((o_a[:, None, None] * n + u) * M + o_m[None, :, None]) * (2 * W) + o_c[None, None, :]
        b_near_p += tl.load(p_in, mask=m_taken, other=0)
        b_near_q += tl.load(p_in + W, mask=m_taken, other=0)
        if p_slopes is not None:
            b_p = b_neighbor + vectors(p_maps, 2, u, o_a, o_m, m_m, o_c, d, n, M, W, 4)
            b_ratio = tl.where(is_near(p_near, u, v, o_m, m_m, n, M)[:, None], b_offset / norm(b_p) + b_slope, 0.0)
            b_near_p += b_ratio[None, :, :] * b_p
            b_p = b_center + vectors(p_maps, 0, u, o_a, o_m, m_m, o_c, d, n, M, W, 4)
            b_ratio = tl.where(is_near(p_near, v, u, o_m, m_m, n, M)[:, None], b_offset / norm(b_p) + b_slope, 0.0)
            b_d_p += b_ratio[None, :, :] * b_p
    tl.store(p_out, b_near_p, mask=m_x)
    tl.store(p_out + W, b_near_q, mask=m_x)
    tl.store(p_out + 2 * W, b_d_p, mask=m_x)


def chosen_gradient(some: Pairs, d_y: Tensor, taken: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """d_y (channels, d, n, M) -> d of the chosen pairs' p and q (d n M, 2 W); of scale and shift by part (P, 2, W)."""
    d_pairs, sums = some.maps.new_empty(len(some.maps), 2 * some.W), some.maps.new_empty(some.parts(), 2, some.W)
    arguments = d_y, some.maps, taken, scaling, d_pairs, sums
    some.launch(_chosen_gradient, *arguments, channels=(len(taken),))
    return d_pairs, sums


def maps_gradient(some: Pairs, d_pairs: Tensor, taken: Tensor, slopes: Tensor | None) -> Tensor:
    """d of the maps (d n M, 4 W)."""
    d_maps = torch.empty_like(some.maps)
    arguments = d_pairs, some.maps, taken, some.near, slopes, d_maps
    some.launch(_maps_gradient, *arguments, channels=(len(taken),))
    return d_maps
