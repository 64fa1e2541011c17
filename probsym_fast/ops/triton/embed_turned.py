"""embed_turned and its gradient: images.py for quarter turns, which read one pixel for each place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import kernel
from probsym_fast.ops.triton.images import BLOCK, Images, in_patches, place_in_patches


@triton.jit
def turned(b_turn, b_row, b_column, H, W, INVERSE: tl.constexpr):
    """Row and column of g p for the element numbered b_turn, as `TURNS` of the reference; of g^-1 p if INVERSE."""
    b_k, b_sign = b_turn % 4, tl.where(b_turn < 4, 1, -1)
    b_cos = (b_k == 0).to(tl.int32) - (b_k == 2).to(tl.int32)
    b_sin = (b_k == 1).to(tl.int32) - (b_k == 3).to(tl.int32)
    b_x, b_y = 2 * b_column - (W - 1), (H - 1) - 2 * b_row  # twice the coordinates: whole
    if INVERSE:
        b_across, b_up = b_cos * b_x + b_sin * b_y, b_sign * (b_cos * b_y - b_sin * b_x)
    else:
        b_y *= b_sign
        b_across, b_up = b_cos * b_x - b_sin * b_y, b_sin * b_x + b_cos * b_y
    return ((H - 1) - b_up) // 2, (b_across + (W - 1)) // 2


@kernel({"num_warps": 4})
def _cut_turned(
    p_pixels, p_turns, p_out, first, S, blocks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token, c, p, q] of the samples from `first`: the pixels that a block of places reads."""
    i_z = (tl.program_id(0) // blocks).to(tl.int64)
    o_x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b_row, b_column = place_in_patches(o_x, W, P, Q)
    b_turn = tl.load(p_turns + first + i_z).to(tl.int32)
    b_from, b_at = turned(b_turn, b_row, b_column, H, W, False)
    m_x = (o_x < H * W) & (b_from >= 0) & (b_from < H) & (b_at >= 0) & (b_at < W)
    p_from = p_pixels + (first + i_z) // S * (C * H * W) + b_from * W + b_at
    p_to = p_out + i_z * (C * H * W) + o_x // (P * Q) * (C * P * Q) + o_x % (P * Q)
    STEP: tl.constexpr = C if C <= 4 else 1
    for i_c in range(0, C, STEP):
        for k in tl.static_range(STEP):
            b_pixel = tl.load(p_from + (i_c + k) * H * W, mask=m_x, other=0)
            tl.store(p_to + (i_c + k) * (P * Q), b_pixel, mask=o_x < H * W)


@kernel({"num_warps": 4})  # one configuration: it adds to its output, so it must not be measured
def _pull_turned(
    p_d, p_turns, p_out, first, last, S, blocks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[image, c, pixel] += the sum over its samples in first..last - 1 of d at the place that reads the pixel."""
    i_image, i_c = first // S + tl.program_id(0) // blocks, tl.program_id(1)
    o_x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < H * W
    p_to = p_out + (i_image.to(tl.int64) * C + i_c) * (H * W) + o_x
    b_sum = tl.load(p_to, mask=m_x, other=0)
    for i_sample in range(tl.maximum(i_image * S, first), tl.minimum((i_image + 1) * S, last)):
        b_turn = tl.load(p_turns + i_sample).to(tl.int32)
        b_row, b_column = turned(b_turn, o_x // W, o_x % W, H, W, True)
        m_d = m_x & (b_row >= 0) & (b_row < H) & (b_column >= 0) & (b_column < W)
        p_from = p_d + (i_sample - first).to(tl.int64) * (C * H * W) + i_c * (P * Q)
        b_sum += tl.load(p_from + in_patches(b_row, b_column, C, W, P, Q), mask=m_d, other=0)
    tl.store(p_to, b_sum, mask=m_x)


class Turned(Images):
    """plane: (B, S) numbers of quarter turns."""

    def cut(self, first, last, patches, d_patches, slopes):
        _cut_turned(
            lambda settings: ((last - first) * self.blocks,), self.pixels, self.plane, patches, first, self.S,
            self.blocks, **self.sizes, BLOCK=BLOCK,
        )  # fmt: skip

    def pull(self, first, last, d_patches, d_pixels):
        images = (last - 1) // self.S - first // self.S + 1
        _pull_turned(
            lambda settings: (images * self.blocks, self.C), d_patches, self.plane, d_pixels, first, last, self.S,
            self.blocks, **self.sizes, BLOCK=BLOCK,
        )  # fmt: skip


def forward(pixels, turns, weight, bias) -> Tensor:
    return Turned(pixels, turns, weight, bias=bias).forward(bias)


def backward(d_tokens, pixels, turns, weight, needs_pixels, needs_weight, needs_bias) -> tuple[Tensor | None, ...]:
    found = Turned(pixels, turns, weight, tokens=d_tokens).backward(d_tokens, needs_pixels, False, needs_weight)
    return found[0], found[2], d_tokens.sum((0, 1, 2)) if needs_bias else None
