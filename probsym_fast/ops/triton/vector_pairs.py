"""Pairs of nodes in clouds of vector features, and their gradients: nothing of a pair's size is in memory.

    p_ij = maps[0]_j + maps[2]_i,   q_ij = maps[1]_j + maps[3]_i,   y_ij = s p_ij - c q_ij
maps (d n M, 4 W): a row for each component, node and cloud; of p and q, as a neighbour and as a center. A program takes one
node of a block of clouds and a block of channels, and loops over the other nodes. Tiles are (d, clouds, channels), with d
padded to a power of two, so that inner products are sums within a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel, precision, width_block
from probsym_fast.ops.triton.rows import matrix, values

ROWS = 64  # of a program: components, padded to a power of two, times clouds


@triton.jit
def place(n, M, blocks, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's node, clouds, which of them there are, channels, and number without the channels."""
    part = tl.program_id(0) // blocks
    o_m = part // n * BLOCK_M + tl.arange(0, BLOCK_M)
    return part % n, o_m, o_m < M, tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C), part


@triton.jit
def vectors(p_maps, number, b_node, o_a, o_m, m_m, o_c, d, n, M, W, parts):
    """Of map `number` of nodes b_node, which broadcasts to (clouds, channels); 0 beyond."""
    o_row = (o_a[:, None, None] * n + b_node) * M + o_m[None, :, None]
    m_x = (o_a < d)[:, None, None] & m_m[None, :, None] & (o_c < W)[None, None, :]
    return tl.load(p_maps + o_row * (parts * W) + number * W + o_c[None, None, :], mask=m_x, other=0)


@triton.jit
def pair(p_maps, i, b_j, o_a, o_m, m_m, o_c, d, n, M, W):
    """p and q of center i and neighbours b_j."""
    b_p = vectors(p_maps, 0, b_j, o_a, o_m, m_m, o_c, d, n, M, W, 4)
    b_q = vectors(p_maps, 1, b_j, o_a, o_m, m_m, o_c, d, n, M, W, 4)
    b_p += vectors(p_maps, 2, i, o_a, o_m, m_m, o_c, d, n, M, W, 4)
    b_q += vectors(p_maps, 3, i, o_a, o_m, m_m, o_c, d, n, M, W, 4)
    return b_p, b_q


@triton.jit
def chosen_pair(p_maps, p_taken, i, o_a, o_m, m_m, o_c, m_c, d, n, M, W):
    """p and q of center i and the neighbour that each cloud and channel took, whatever number that is."""
    b_taken = tl.load(p_taken + (o_c[None, :] * n + i) * M + o_m[:, None], mask=m_c, other=0).to(tl.int32)
    return pair(p_maps, i, tl.minimum(b_taken, n - 1)[None, :, :], o_a, o_m, m_m, o_c, d, n, M, W)


@triton.jit
def norm(b_p):
    return tl.sqrt_rn(tl.sum(b_p * b_p, 0) + 1e-12)


@triton.jit
def factors(b_p, b_q, p_scaling, o_c, W):
    """scale, shift (1, C), 1 / |p|, s, <p, q>, <q, q> and c (M, C). |p| becomes scale |p| + shift."""
    b_scale, b_shift = values(p_scaling, o_c, W), values(p_scaling + W, o_c, W)
    b_inverse = 1.0 / norm(b_p)
    b_s = b_scale + b_shift * b_inverse
    b_pq, b_qq = tl.sum(b_p * b_q, 0), tl.sum(b_q * b_q, 0) + 1e-6
    b_along = b_s * b_pq
    return b_shift, b_inverse, b_s, b_pq, b_qq, tl.where(b_along > 0, 0.0, b_along) * 0.8 / b_qq


@triton.jit
def activated(b_p, b_q, p_scaling, o_c, W):
    """y of pairs."""
    _, _, b_s, _, _, b_c = factors(b_p, b_q, p_scaling, o_c, W)
    return b_s[None, :, :] * b_p - b_c[None, :, :] * b_q


@triton.jit
def is_near(p_near, i, j, o_m, m_m, n, M):
    """Whether j is near to i, in each cloud (M,)."""
    b_near = m_m
    if p_near is not None:
        b_near = tl.load(p_near + (i * n + j) * M + o_m, mask=m_m, other=0) != 0
    return b_near


@kernel({"num_warps": 4})
def _nearest(p_x, p_near, numbers, n, M, neighbors, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr):
    """near (i, j, M) for one i: fewer than `neighbors` nodes are closer to i than j. x (numbers, n, M)."""
    i, o_j = tl.program_id(0) % n, tl.arange(0, BLOCK_J)
    o_m = tl.program_id(0) // n * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, m_x = o_m < M, (o_j < n)[:, None] & (o_m < M)[None, :]
    b_square = tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
    for f in range(numbers):
        b_own = tl.load(p_x + (f * n + i) * M + o_m, mask=m_m, other=0)
        b_away = tl.load(p_x + (f * n + o_j[:, None]) * M + o_m[None, :], mask=m_x, other=0) - b_own[None, :]
        b_square += b_away * b_away
    b_distance = tl.sqrt_rn(b_square)
    b_closer = tl.zeros((BLOCK_J, BLOCK_M), tl.int32)
    for k in range(n):
        b_other = tl.sum(tl.where((o_j == k)[:, None], b_distance, 0.0), 0)
        b_closer += (b_other[None, :] < b_distance).to(tl.int32)
    b_near = (b_closer < neighbors) & (b_distance == b_distance)
    tl.store(p_near + (i * n + o_j[:, None]) * M + o_m[None, :], b_near.to(tl.uint8), mask=m_x)


@kernel({"ROWS": ROWS, "num_warps": 4, "maxnreg": 255})
def _norm_moments(
    p_maps, p_near, p_count, p_mean, p_square, n, M, d, W,
    UNIT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of |p| of a node's near pairs in some clouds: how many, mean, and the sum of squares about it (Welford 1962)."""
    BLOCK_M: tl.constexpr = ROWS // BLOCK_A
    W *= UNIT
    i, o_m, m_m, o_c, part = place(n, M, tl.cdiv(W, BLOCK_C), BLOCK_M, BLOCK_C)
    o_a = tl.arange(0, BLOCK_A)
    b_center = vectors(p_maps, 2, i, o_a, o_m, m_m, o_c, d, n, M, W, 4)
    b_count = tl.zeros((BLOCK_M,), tl.float32)
    b_mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_square = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for j in range(n):
        b_norm = norm(vectors(p_maps, 0, j, o_a, o_m, m_m, o_c, d, n, M, W, 4) + b_center)
        b_near = is_near(p_near, i, j, o_m, m_m, n, M)
        b_count += b_near.to(tl.float32)
        b_away = tl.where(b_near[:, None], b_norm - b_mean, 0.0)
        b_mean += b_away / tl.maximum(b_count, 1.0)[:, None]
        b_square += b_away * tl.where(b_near[:, None], b_norm - b_mean, 0.0)
    b_all = tl.sum(b_count, 0)
    b_middle = tl.sum(b_mean * b_count[:, None], 0) / tl.maximum(b_all, 1.0)  # of all clouds (Chan et al. 1979)
    b_away = b_mean - b_middle[None, :]
    tl.store(p_mean + part * W + o_c, b_middle, mask=o_c < W)
    tl.store(p_square + part * W + o_c, tl.sum(b_square + b_away * b_away * b_count[:, None], 0), mask=o_c < W)
    tl.store(p_count + part, b_all, mask=tl.program_id(0) % tl.cdiv(W, BLOCK_C) == 0)


@kernel(
    {"ROWS": ROWS // 2, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"ROWS": ROWS // 2, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255},),
)
def _choose(
    p_maps, p_pool, p_scaling, p_near, p_taken, n, M, d, W, channels,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a node, for each channel: the near j with the largest <y_ij, pool y_ij>, of equal ones the last."""
    BLOCK_M: tl.constexpr = ROWS // BLOCK_A
    W *= UNIT
    i, o_m, m_m, o_c, _ = place(n, M, tl.cdiv(W, BLOCK_C), BLOCK_M, BLOCK_C)
    o_a = tl.arange(0, BLOCK_A)
    b_most = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    b_taken = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)  # -1 once a height is no number; then the first node is taken
    for j in range(n):
        b_turned = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for k in range(0, W, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            b_p, b_q = pair(p_maps, i, j, o_a, o_m, m_m, o_k, d, n, M, W)
            b_y = tl.reshape(activated(b_p, b_q, p_scaling, o_k, W), (ROWS, BLOCK_K))
            b_turned = tl.dot(b_y, matrix(p_pool, o_k, W, o_c, W, 1, W), b_turned, input_precision=PRECISION)
        b_p, b_q = pair(p_maps, i, j, o_a, o_m, m_m, o_c, d, n, M, W)
        b_y = activated(b_p, b_q, p_scaling, o_c, W)
        b_height = tl.sum(b_y * tl.reshape(b_turned, (BLOCK_A, BLOCK_M, BLOCK_C)), 0)
        b_height = tl.where(is_near(p_near, i, j, o_m, m_m, n, M)[:, None], b_height, float("-inf"))
        b_higher = (b_height >= b_most) & (b_taken >= 0)
        b_most = tl.where(b_higher, b_height, b_most)
        b_taken = tl.where(b_height != b_height, -1, tl.where(b_higher, j, b_taken))
    p_out = p_taken + (o_c[None, :] * n + i) * M + o_m[:, None]
    tl.store(p_out, tl.maximum(b_taken, 0).to(tl.uint8), mask=m_m[:, None] & (o_c < channels)[None, :])


@kernel({"ROWS": ROWS, "num_warps": 4, "maxnreg": 255})
def _chosen(
    p_maps, p_scaling, p_taken, p_y, n, M, d, W, channels,
    UNIT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y (channels, d, n, M) of a node's chosen pairs."""
    BLOCK_M: tl.constexpr = ROWS // BLOCK_A
    W *= UNIT
    i, o_m, m_m, o_c, _ = place(n, M, tl.cdiv(W, BLOCK_C), BLOCK_M, BLOCK_C)
    o_a, m_c = tl.arange(0, BLOCK_A), m_m[:, None] & (o_c < channels)[None, :]
    b_p, b_q = chosen_pair(p_maps, p_taken, i, o_a, o_m, m_m, o_c, m_c, d, n, M, W)
    o_y = ((o_c[None, None, :] * d + o_a[:, None, None]) * n + i) * M + o_m[None, :, None]
    b_y = activated(b_p, b_q, p_scaling, o_c, W)
    tl.store(p_y + o_y, b_y, mask=(o_a < d)[:, None, None] & m_c[None, :, :])


class Pairs(NamedTuple):
    """Of some clouds: maps (d n M, 4 W), near (n, n, M) or None if all are, and scaling (2, W): scale and shift."""

    maps: Tensor
    near: Tensor | None
    n: int
    M: int
    d: int
    W: int

    def launch(self, run: Callable, *arguments: object, channels: tuple[int, ...] = (), **more: object) -> None:
        """arguments: what comes before the sizes; channels: what comes after them."""
        block, axes = min(32, width_block(self.W, 64)), bucket(self.d)
        blocks = {"BLOCK_A": axes, "BLOCK_C": block, "UNIT": 4}

        def grid(settings):
            return (self.parts(settings["ROWS"]) * cdiv(self.W, block),)

        sizes = self.n, self.M, self.d, self.W // 4
        run(grid, *arguments, *sizes, *channels, sizes=(self.n, self.M, self.W), **blocks, **more)

    def parts(self, rows: int = ROWS) -> int:
        """Programs without the blocks of channels."""
        return self.n * cdiv(self.M, rows // bucket(self.d))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count (P,), mean (P, W) and sum of squares (P, W) of the norms of near pairs, by part."""
        count, of_channel = self.maps.new_empty(self.parts()), (self.parts(), self.W)
        mean, square = self.maps.new_empty(of_channel), self.maps.new_empty(of_channel)
        self.launch(_norm_moments, self.maps, self.near, count, mean, square)
        return count, mean, square

    def convolution(self, pool: Tensor, scaling: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """pool (W, W) -> y (channels, d, n, M), taken (channels, n, M)."""
        y = self.maps.new_empty(channels, self.d, self.n, self.M)
        taken = torch.empty(channels, self.n, self.M, dtype=torch.uint8, device=y.device)
        arguments = self.maps, pool, scaling, self.near, taken
        self.launch(_choose, *arguments, channels=(channels,), PRECISION=precision(y.dtype))
        self.launch(_chosen, self.maps, scaling, taken, y, channels=(channels,))
        return y, taken


def nearest(x: Tensor, neighbors: int, inside: Tensor | None = None) -> Tensor | None:
    """x (C, d, n, M), contiguous, inside (n, M) valid nodes -> near (n, n, M) uint8, of i and j; None: all are."""
    n, M = x.shape[2:]
    if inside is not None:  # other nodes are further than any; as far from each other as no number
        near = nearest(x.masked_fill(~inside, torch.inf), neighbors)
        both = inside & inside[:, None]
        return both.to(torch.uint8) if near is None else near.mul_(both)
    if neighbors >= n:
        return None
    near, block = torch.empty(n, n, M, dtype=torch.uint8, device=x.device), bucket(n)
    clouds = max(16, min(128, 2048 // block))
    arguments = x, near, x.shape[0] * x.shape[1], n, M, neighbors
    _nearest(lambda settings: (n * cdiv(M, clouds),), *arguments, BLOCK_J=block, BLOCK_M=clouds)
    return near
