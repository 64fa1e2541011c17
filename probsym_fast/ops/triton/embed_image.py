"""embed_image and its gradient: images.py for matrices, whose places read four pixels each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel
from probsym_fast.ops.triton.images import BLOCK, Images, in_patches, place_in_patches

LANES = 128  # of a program that looks for the places of pixels
# What a matrix and its inverse round by is less than SLACK pixels, for inverses up to 1 / LEAST times as long.
LEAST = tl.constexpr(0.02)
SLACK = tl.constexpr(0.05)


@triton.jit
def source(p_frame, b_row, b_column, H, W):
    """(across, down): column and row of g p in the image, in the frame's dtype."""
    kind: tl.constexpr = p_frame.dtype.element_ty
    b_x, b_y = b_column.to(kind) - (W - 1) * 0.5, (H - 1) * 0.5 - b_row.to(kind)
    b_across = tl.load(p_frame) * b_x + tl.load(p_frame + 1) * b_y + (W - 1) * 0.5
    return b_across, (H - 1) * 0.5 - (tl.load(p_frame + 2) * b_x + tl.load(p_frame + 3) * b_y)


@triton.jit
def split(b_at, size, REPLICATE: tl.constexpr):
    """The pixel at or before a coordinate, and the share of the next one. Far outside, a pixel that is outside."""
    b_at = (
        tl.minimum(tl.maximum(b_at, 0.0), size - 1.0) if REPLICATE else tl.minimum(tl.maximum(b_at, -2.0), size + 1.0)
    )
    b_floor = tl.floor(b_at)
    return b_floor.to(tl.int32), (b_at - b_floor).to(tl.float32)


@kernel({"num_warps": 4})
def _cut_moved(
    p_pixels, p_frames, p_out, p_d, p_slopes, first, S, blocks,
    REPLICATE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token, c, p, q] of the samples from `first`: what a block of places reads, between four pixels.

    slopes[sample, (k, l), block] = the sum of d (d value / d coordinate k of g p) (coordinate l of p) over the block.
    """
    i_z = (tl.program_id(0) // blocks).to(tl.int64)
    o_x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < H * W
    b_row, b_column = place_in_patches(o_x, W, P, Q)
    b_across, b_down = source(p_frames + (first + i_z) * 4, b_row, b_column, H, W)
    b_left, b_fx = split(b_across, W, REPLICATE)
    b_top, b_fy = split(b_down, H, REPLICATE)
    m_0, m_1 = m_x & (b_top >= 0) & (b_top < H), m_x & (b_top >= -1) & (b_top < H - 1)
    m_left, m_right = (b_left >= 0) & (b_left < W), (b_left >= -1) & (b_left < W - 1)
    p_0 = p_pixels + (first + i_z) // S * (C * H * W) + (b_top * W + b_left)
    p_to = i_z * (C * H * W) + o_x // (P * Q) * (C * P * Q) + o_x % (P * Q)
    b_next, b_below = 1, W
    if REPLICATE:  # beyond the last pixel its own value again: the share there is 0
        b_next, b_below = m_right.to(tl.int32), tl.where(m_1, W, 0)
        m_1, m_right = m_0, m_left
    if p_slopes is not None:
        b_d_x, b_d_y = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    STEP: tl.constexpr = C if C <= 4 else 1
    for i_c in range(0, C, STEP):
        for k in tl.static_range(STEP):
            p_c = p_0 + (i_c + k) * H * W
            b_00 = tl.load(p_c, mask=m_0 & m_left, other=0).to(tl.float32)
            b_01 = tl.load(p_c + b_next, mask=m_0 & m_right, other=0).to(tl.float32)
            b_10 = tl.load(p_c + b_below, mask=m_1 & m_left, other=0).to(tl.float32)
            b_11 = tl.load(p_c + (b_below + b_next), mask=m_1 & m_right, other=0).to(tl.float32)
            b_upper, b_lower = b_01 - b_00, b_11 - b_10  # to the next column
            b_above = b_00 + b_fx * b_upper
            b_fall = b_10 + b_fx * b_lower - b_above  # to the next row
            p_at = p_to + (i_c + k) * (P * Q)
            if p_out is not None:
                tl.store(p_out + p_at, (b_above + b_fy * b_fall).to(p_out.dtype.element_ty), mask=m_x)
            if p_slopes is not None:
                b_d = tl.load(p_d + p_at, mask=m_x, other=0).to(tl.float32)
                b_d_x += b_d * (b_upper + b_fy * (b_lower - b_upper))
                b_d_y -= b_d * b_fall
    if p_slopes is not None:
        if REPLICATE:
            b_d_x = tl.where((b_across >= 0) & (b_across <= W - 1), b_d_x, 0)
            b_d_y = tl.where((b_down >= 0) & (b_down <= H - 1), b_d_y, 0)
        b_x, b_y = b_column - (W - 1) * 0.5, (H - 1) * 0.5 - b_row
        p_slope = p_slopes + (first + i_z) * 4 * blocks + tl.program_id(0) % blocks
        tl.store(p_slope, tl.sum(b_d_x * b_x, 0))
        tl.store(p_slope + blocks, tl.sum(b_d_x * b_y, 0))
        tl.store(p_slope + 2 * blocks, tl.sum(b_d_y * b_x, 0))
        tl.store(p_slope + 3 * blocks, tl.sum(b_d_y * b_y, 0))


@triton.jit
def square(b_at, b_first, b_last, size, BORDER: tl.constexpr):
    """Middle and half the width of the coordinates that read pixel b_at; beyond the border all from b_first to b_last."""
    if BORDER:
        b_low = tl.where(b_at == 0, tl.minimum(b_first, -1.0), b_at - 1.0)
        b_high = tl.where(b_at == size - 1, tl.maximum(b_last, size * 1.0), b_at + 1.0)
        return (b_low + b_high) * 0.5, (b_high - b_low) * 0.5
    else:
        return b_at * 1.0, 1.0


@triton.jit
def around(b_middle, b_reach, size, ok, BORDER: tl.constexpr):
    """First whole number of 0..size - 1 within reach of b_middle, and how many there may be; all of them if not ok."""
    b_reach = b_reach * 1.01 + SLACK
    b_first = tl.where(ok, tl.minimum(tl.maximum(tl.ceil(b_middle - b_reach), 0.0), size * 1.0), 0.0)
    b_count = tl.where(ok, tl.minimum(tl.floor(2 * b_reach) + 1, size * 1.0), size * 1.0)
    return b_first.to(tl.int32), (tl.max(b_count, 0) if BORDER else b_count).to(tl.int32)


@kernel({"num_warps": 4})  # one configuration: it adds to its output, so it must not be measured
def _pull_moved(
    p_d, p_frames, p_out, first, last, S, top, left, count, width, blocks,
    REPLICATE: tl.constexpr, BORDER: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[image, c, pixel] += the sum of d over the places that read the pixel, times its share there, over the image's
    samples in first..last - 1: `count` pixels, rows of `width` from (top, left). BORDER: they are read from beyond the image.

    Pixel q is read at places p with |g p - q| < 1 in both coordinates: all are within the reach of g^-1 of that square. A
    lane has one of BLOCK_X pixels, and takes every BLOCK_N-th of its places.
    """
    i_image, i_x = first // S + (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_X
    o_lane, o_c = tl.arange(0, BLOCK_X * BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_x = i_x + o_lane // BLOCK_N
    b_i, b_j = top + o_x // width, left + o_x % width
    b_sum = tl.zeros((BLOCK_X * BLOCK_N, BLOCK_C), tl.float32)
    for i_sample in range(tl.maximum(i_image * S, first), tl.minimum((i_image + 1) * S, last)):
        p_frame, p_sample = p_frames + i_sample * 4, p_d + (i_sample - first) * (C * H * W)
        b_a, b_b = tl.load(p_frame).to(tl.float32), tl.load(p_frame + 1).to(tl.float32)
        b_c, b_d = tl.load(p_frame + 2).to(tl.float32), tl.load(p_frame + 3).to(tl.float32)
        b_square, b_det = b_a * b_a + b_b * b_b + b_c * b_c + b_d * b_d, b_a * b_d - b_b * b_c
        ok = (tl.abs(b_det) > b_square * LEAST) & (b_square > 1e-30) & (b_square < 1e30)  # else every place may read q
        b_det = tl.where(ok, b_det, 1.0)
        b_x, b_y = (W - 1) * 0.5, (H - 1) * 0.5
        b_wide, b_high = tl.abs(b_a) * b_x + tl.abs(b_b) * b_y, tl.abs(b_c) * b_x + tl.abs(b_d) * b_y
        b_across, b_right = square(b_j, b_x - b_wide, b_x + b_wide, W, BORDER)
        b_down, b_under = square(b_i, b_y - b_high, b_y + b_high, H, BORDER)
        b_u, b_v = (b_across - b_x) / b_det, (b_y - b_down) / b_det
        b_reach_x = (tl.abs(b_d) * b_right + tl.abs(b_b) * b_under) / tl.abs(b_det)
        b_reach_y = (tl.abs(b_c) * b_right + tl.abs(b_a) * b_under) / tl.abs(b_det)
        b_column, b_columns = around(b_x + (b_d * b_u - b_b * b_v), b_reach_x, W, ok, BORDER)
        b_row, b_rows = around(b_y - (b_a * b_v - b_c * b_u), b_reach_y, H, ok, BORDER)
        for n in range(0, b_rows * b_columns, BLOCK_N):
            b_n = n + o_lane % BLOCK_N
            b_p, b_q = b_row + b_n // b_columns, b_column + b_n % b_columns
            m_n = (o_x < count) & (b_n < b_rows * b_columns) & (b_p < H) & (b_q < W)
            b_from_x, b_from_y = source(p_frame, b_p, b_q, H, W)
            b_0, b_fx = split(b_from_x, W, REPLICATE)
            b_1, b_fy = split(b_from_y, H, REPLICATE)
            b_share = tl.where(b_0 == b_j, 1 - b_fx, tl.where(b_0 + 1 == b_j, b_fx, 0.0))
            b_share *= tl.where(b_1 == b_i, 1 - b_fy, tl.where(b_1 + 1 == b_i, b_fy, 0.0))
            m_c = (m_n & (b_share > 0))[:, None] & (o_c < C)[None, :]
            p_from = p_sample + in_patches(b_p, b_q, C, W, P, Q)[:, None] + (o_c * (P * Q))[None, :]
            b_sum += b_share[:, None] * tl.load(p_from, mask=m_c, other=0).to(tl.float32)
    b_sum = tl.sum(tl.reshape(b_sum, (BLOCK_X, BLOCK_N, BLOCK_C)), 1)
    o_x = i_x + tl.arange(0, BLOCK_X)
    b_at = (top + o_x // width) * W + left + o_x % width
    p_to = p_out + i_image * (C * H * W) + b_at[:, None] + (o_c * (H * W))[None, :]
    m_to = (o_x < count)[:, None] & (o_c < C)[None, :]
    tl.store(p_to, tl.load(p_to, mask=m_to, other=0) + b_sum, mask=m_to)


class Moved(Images):
    """plane: (B, S, 2, 2) matrices, not read to values: those that are not finite read nothing beyond the images."""

    replicate = False

    def cut(self, first, last, patches, d_patches, slopes):
        _cut_moved(
            lambda settings: ((last - first) * self.blocks,), self.pixels, self.plane, patches, d_patches, slopes, first,
            self.S, self.blocks, REPLICATE=self.replicate, **self.sizes, BLOCK=BLOCK,
        )  # fmt: skip

    def pull(self, first, last, d_patches, d_pixels):
        H, W, c = self.H, self.W, min(4, bucket(self.C))
        images = (last - 1) // self.S - first // self.S + 1
        whole, inner = [(0, 0, H, W)], [(1, 1, H - 2, W - 2)]
        border = [(i, 0, 1, W) for i in {0, H - 1}] + [(1, j, H - 2, 1) for j in {0, W - 1}]
        parts = [(x, False) for x in (inner if self.replicate else whole)] + [
            (x, True) for x in border * self.replicate
        ]
        for (top, left, height, width), at_border in parts:
            count, block = max(0, height) * max(0, width), 4 if at_border else LANES
            blocks = cdiv(count, block)
            _pull_moved(
                lambda settings, blocks=blocks: (images * blocks, cdiv(self.C, c)), d_patches, self.plane, d_pixels,
                first, last, self.S, top, left, count, width, blocks, REPLICATE=self.replicate, BORDER=at_border,
                **self.sizes, BLOCK_X=block, BLOCK_N=LANES // block, BLOCK_C=c,
            )  # fmt: skip


def _moved(pixels, frames, weight, replicate: bool, **others) -> Moved:
    found = Moved(pixels, frames, weight, 2, 2, **others)
    found.replicate = replicate
    return found


def forward(pixels, frames, weight, bias, replicate) -> Tensor:
    return _moved(pixels, frames, weight, replicate, bias=bias).forward(bias)


def backward(
    d_tokens, pixels, frames, weight, replicate, needs_pixels, needs_frames, needs_weight, needs_bias
) -> tuple[Tensor | None, ...]:
    x = _moved(pixels, frames, weight, replicate, tokens=d_tokens)
    found = x.backward(d_tokens, needs_pixels, needs_frames, needs_weight)
    return *found, d_tokens.sum((0, 1, 2)) if needs_bias else None
