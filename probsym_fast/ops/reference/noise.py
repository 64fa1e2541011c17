"""noise: the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # odd, without a bit pattern
MASK = 2**64 - 1


def noise(
    seed: Tensor,
    rows: Tensor | None,
    shape: Sequence[int],
    first: int,
    forks: Sequence[int] | None,
    streams: Sequence[int],
    block: int,
    mirrored: bool,
) -> Tensor:
    """(rows, S, ...) float64; see `probsym_fast.ops.noise`."""
    count, samples, *rest = shape
    sample = torch.arange(first, first + samples, device=seed.device)
    bits = [_bits(_forked(seed, forks) ^ stream, rows, sample // block, count, math.prod(rest)) for stream in streams]
    odd = (sample % 2).bool()[:, None]
    if len(bits) == 1:
        u = torch.where(odd, 2**32 - 1 - bits[0], bits[0]) if mirrored else bits[0]
        return u.double().mul_(2.0**-32).reshape(shape)
    radius, angle = (x.double().mul_(2.0**-32) for x in bits)
    z = radius.neg_().log1p_().mul_(-2).sqrt_().mul_(angle.mul_(2 * math.pi).cos_())
    if mirrored:
        z = torch.where(odd, -z, z)
    return z.reshape(shape)


def _forked(seed: Tensor, forks: Sequence[int] | None) -> Tensor:
    for number in forks or ():
        seed = shift(mix(seed + signed(GOLDEN * (number + 1))), 2)
    return seed


def _bits(start: Tensor, rows: Tensor | None, sample: Tensor, count: int, places: int) -> Tensor:
    """(count, S, places) int64 of 32 random bits."""
    row = torch.arange(count, device=start.device) if rows is None else rows
    key = mix(mix(mix(start) + row * signed(GOLDEN))[:, None] + sample * signed(GOLDEN))
    place = torch.arange(1, places + 1, device=start.device) * signed(GOLDEN)
    return shift(mix(key[..., None] + place), 32)


def mix(x: Tensor) -> Tensor:
    """`mix_int` for int64 tensors; products wrap."""
    x = shift(x, 30).bitwise_xor_(x).mul_(signed(0xBF58476D1CE4E5B9))  # in place: memory traffic dominates
    x = x.bitwise_xor_(shift(x, 27)).mul_(signed(0x94D049BB133111EB))
    return x.bitwise_xor_(shift(x, 31))


def shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits as unsigned integers."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def mix_int(x: int) -> int:
    """Every bit of the result depends on every bit of x (the finalizer of SplitMix64, Steele et al. 2014)."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def signed(x: int) -> int:
    """The int64 with the same bits."""
    x &= MASK
    return x - 2**64 if x >= 2**63 else x
