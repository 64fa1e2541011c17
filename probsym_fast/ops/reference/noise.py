"""noise: the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GOLDEN = 0x9E3779B97F4A7C15  # odd, without a bit pattern
MASK, HALF = 2**64 - 1, 2**32 - 1


def noise(
    seed: Tensor,
    rows: Tensor | None,
    shape: Sequence[int],
    first: int,
    forks: Sequence[int] | None,
    streams: Sequence[int],
    block: int,
    mirrored: bool,
    times: Callable[[Tensor, int], Tensor] = Tensor.mul_,
) -> Tensor:
    """(rows, S, ...) float64; see `probsym_fast.ops.noise`. times: the product modulo 2^64, may overwrite its Tensor."""
    count, samples, *rest = shape
    sample = torch.arange(first, first + samples, device=seed.device)
    blocks, places = sample // block, math.prod(rest)
    bits = [_bits(_forked(seed, forks, times) ^ stream, rows, blocks, count, places, times) for stream in streams]
    odd = (sample % 2).bool()[:, None]
    if len(bits) == 1:
        u = torch.where(odd, 2**32 - 1 - bits[0], bits[0]) if mirrored else bits[0]
        return u.double().mul_(2.0**-32).reshape(shape)
    radius, angle = (x.double().mul_(2.0**-32) for x in bits)
    z = radius.neg_().log1p_().mul_(-2).sqrt_().mul_(angle.mul_(2 * math.pi).cos_())
    if mirrored:
        z = torch.where(odd, -z, z)
    return z.reshape(shape)


def without_overflow(*arguments: Any) -> Tensor:
    """The same numbers for programs in C++ or ONNX, which do not define products that overflow; nothing is overwritten."""
    definition: Callable = noise
    with _OutOfPlace():
        return definition(*arguments, times=split_product)


class _OutOfPlace(TorchFunctionMode):
    """Within it `mul_` is `mul`, and so on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        func = getattr(Tensor, name[:-1]) if name.endswith("_") and not name.endswith("__") else func
        return func(*args, **(kwargs or {}))


def split_product(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2^64, by parts whose products stay below 2^51."""
    low, high = x & HALF, shift(x, 32)
    a, b, c, d = (low * (factor >> 16 * k & 0xFFFF) for k in range(4))
    first = a + ((b & 0xFFFF) << 16)
    upper = high * (factor & 0xFFFF) + ((high * (factor >> 16 & 0xFFFF) & 0xFFFF) << 16)
    second = ((b >> 16) + c + ((d & 0xFFFF) << 16) + upper + (first >> 32)) & HALF
    return (second - ((second & 2**31) << 1)) * 2**32 + (first & HALF)


def _forked(seed: Tensor, forks: Sequence[int] | None, times: Callable[[Tensor, int], Tensor]) -> Tensor:
    for number in forks or ():
        seed = shift(mix(seed + signed(GOLDEN * (number + 1)), times), 2)
    return seed


def _bits(
    start: Tensor,
    rows: Tensor | None,
    sample: Tensor,
    count: int,
    places: int,
    times: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """(count, S, places) int64 of 32 random bits."""
    golden = signed(GOLDEN)
    row = torch.arange(count, device=start.device) if rows is None else rows.clone()
    key = mix(mix(mix(start, times) + times(row, golden), times)[:, None] + times(sample.clone(), golden), times)
    place = times(torch.arange(1, places + 1, device=start.device), golden)
    return shift(mix(key[..., None] + place, times), 32)


def mix(x: Tensor, times: Callable[[Tensor, int], Tensor] = Tensor.mul_) -> Tensor:
    """`mix_int` for int64 tensors; products wrap."""
    x = times(shift(x, 30).bitwise_xor_(x), signed(0xBF58476D1CE4E5B9))  # in place: memory traffic dominates
    x = times(x.bitwise_xor_(shift(x, 27)), signed(0x94D049BB133111EB))
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
