"""noise: one value per lane, from its counter. Formulas as in csrc/cpu/noise.kernel.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.reference.noise import GOLDEN, MASK
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_counts, check_tensors, kernel

BLOCK = 512


@triton.jit
def mix(x):
    """The finalizer of SplitMix64, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def random_bits(seed, stream, row, sample, place):
    """32 random bits as uint64, from uint64 row, sample and place."""
    b_key = mix(mix(mix(seed ^ stream) + row * 0x9E3779B97F4A7C15) + sample * 0x9E3779B97F4A7C15)
    return mix(b_key + (place + 1) * 0x9E3779B97F4A7C15) >> 32


@triton.jit
def cosine_of_turn(bits):
    """cos(2 pi bits / 2^32): subtracts the nearest quarter turn exactly, then uses the series of cos and sin."""
    b_quarter = (bits + 0x20000000) >> 30
    b_rest = bits.to(tl.float64) - (b_quarter << 30).to(tl.float64)
    b_x = b_rest * tl.full((1,), 1.4629180792671596e-09, tl.float64)  # 2 pi / 2^32
    b_z = b_x * b_x
    b_cosine = tl.zeros_like(b_z) + 1.0
    b_sine = tl.zeros_like(b_z) + 1.0
    for i in tl.static_range(8, 0, -1):
        b_cosine = 1.0 - b_cosine * b_z / ((2 * i - 1) * (2 * i) * 1.0)
        b_sine = 1.0 - b_sine * b_z / (2 * i * (2 * i + 1) * 1.0)
    b_value = tl.where((b_quarter & 1) != 0, b_x * b_sine, b_cosine)  # cos(y + pi/2) = -sin y
    return tl.where(((b_quarter + 1) & 2) != 0, -b_value, b_value)


@kernel({"num_warps": 4})
def _numbers(
    p_seed,
    p_rows,
    p_out,
    count,
    samples,
    places,
    first,
    first_stream,
    second_stream,
    FORKS: tl.constexpr,
    REPEATED: tl.constexpr,
    MIRRORED: tl.constexpr,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row, sample, place]: U[0, 1), or N(0, 1) from two streams. REPEATED: consecutive samples with equal values."""
    o_k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < count
    b_pair = o_k // places
    b_row = b_pair // samples
    b_sample = first + b_pair % samples
    b_name = b_row if p_rows is None else tl.load(p_rows + b_row, mask=m_k, other=0)
    b_seed = tl.load(p_seed).to(tl.uint64)
    for k in tl.static_range(len(FORKS)):
        b_seed = mix(b_seed + FORKS[k]) >> 2
    b_place = (o_k % places).to(tl.uint64)
    b_name, b_turn = b_name.to(tl.uint64), (b_sample // REPEATED).to(tl.uint64)
    b_bits = random_bits(b_seed, first_stream.to(tl.uint64), b_name, b_turn, b_place)
    m_odd = b_sample % 2 != 0
    if NORMAL:
        b_left = (0x100000000 - b_bits).to(tl.float64) * 2.0**-32  # 1 - u, exact
        b_angle = random_bits(b_seed, second_stream.to(tl.uint64), b_name, b_turn, b_place)
        b_number = tl.sqrt(tl.log(b_left) * -2.0) * cosine_of_turn(b_angle)
        if MIRRORED:
            b_number = tl.where(m_odd, -b_number, b_number)
    else:
        if MIRRORED:
            b_bits = tl.where(m_odd, 0xFFFFFFFF - b_bits, b_bits)
        b_number = b_bits.to(tl.float64) * 2.0**-32
    tl.store(p_out + o_k, b_number, mask=m_k)


def forward(
    seed: Tensor,
    rows: Tensor | None,
    shape: Sequence[int],
    first: int,
    forks: Sequence[int] | None,
    streams: Sequence[int],
    block: int,
    mirrored: bool,
) -> Tensor:
    if len(shape) < 2:
        raise Refused(ValueError, f"shape must be (rows, S, ...), got {tuple(shape)}")
    check_tensors(seed.device, seed=(seed, ()), rows=(rows, (shape[0],)))
    out = torch.empty(shape, dtype=torch.float64, device=seed.device)
    check_counts(programs=cdiv(out.numel(), BLOCK))
    samples, places = max(1, shape[1]), max(1, math.prod(shape[2:]))
    _numbers(
        lambda settings: (cdiv(out.numel(), BLOCK),),
        seed,
        None if rows is None else rows.contiguous(),
        out,
        out.numel(),
        samples,
        places,
        first,
        streams[0],
        streams[-1],
        FORKS=tuple(GOLDEN * (number + 1) & MASK for number in forks or ()),
        REPEATED=block,
        MIRRORED=mirrored,
        NORMAL=len(streams) == 2,
        BLOCK=BLOCK,
    )
    return out
