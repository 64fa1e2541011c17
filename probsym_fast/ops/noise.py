"""Counter-based random numbers, opaque to compilers: C++ does not define integer products that wrap."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from probsym_fast._checks import check_count
from probsym_fast._compilers import constant_in_programs
from probsym_fast.ops._op import Op
from probsym_fast.ops.reference.noise import GOLDEN, mix_int, signed
from probsym_fast.ops.reference.noise import noise as reference

# lists are never empty: AOTInductor passes an empty one as None
OP = Op(
    "noise",
    "(Tensor seed, Tensor? rows, SymInt[] shape, SymInt first, int[]? forks, int[] streams, int block, bool mirrored)"
    " -> Tensor numbers",
    reference=reference,
    shapes=lambda seed, rows, shape, *_: seed.new_empty(shape, dtype=torch.float64),
    dtypes=(torch.float64,),
    opaque=True,
)


def noise(
    seed: Tensor,
    shape: Sequence[int],
    stream: str,
    *,
    normal: bool = False,
    rows: Tensor | None = None,
    first: int = 0,
    forks: Sequence[int] = (),
    block: int = 1,
    mirrored: bool = False,
    backend: str = "auto",
) -> Tensor:
    """U[0, 1) with 32 random bits, or N(0, 1), each a function of (seed, forks, stream, row, sample, place) only.

    With `mix` the finalizer of SplitMix64, G = 0x9E3779B97F4A7C15 and integers modulo 2^64:
    `seed <- mix(seed + (k + 1) G) / 4` for every k of forks, `key = mix(mix(seed ^ stream) + row G)`,
    `key <- mix(key + (sample // block) G)`, `u = (mix(key + (place + 1) G) >> 32) / 2^32`. A normal number is
    `sqrt(-2 log(1 - u)) cos(2 pi v)` with u and v of the streams stream/radius and stream/angle.

    Args:
        seed: () int64, on the device of the result.
        shape: (rows, S, ...): row, sample, and places counted over the other axes.
        stream: name of the purpose; another name gives other numbers.
        rows: (shape[0],) int64 keys of the rows in place of 0, 1, ... .
        first: number of the first sample.
        forks: numbers of the forks that lead to this draw, each >= 0.
        block: number of consecutive samples that share their numbers.
        mirrored: odd samples get 1 - 2^-32 - u, or -z.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: `shape`, float64. Compiled, exported and eager programs give the same bits on one backend and device; backends
    agree to 1e-12. No gradient. Cost: one write.

    Raises: TypeError (dtypes, counts), ValueError (shapes, negative counts), RuntimeError (devices, backend).
    Source: counter-based generators (Salmon et al. 2011), the mix of Steele et al. 2014.
    """
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"noise: seed must be an int64 Tensor, got {getattr(seed, 'dtype', type(seed).__name__)}")
    if seed.ndim != 0:
        raise ValueError(f"noise: seed must be (), got {tuple(seed.shape)}")
    if len(shape) < 2:
        raise ValueError(f"noise: shape must be (rows, S, ...), got {tuple(shape)}")
    for name, least, value in (("block", 1, block), ("first", 0, first), *(("forks", 0, k) for k in forks)):
        check_count("noise", name, value, least)
    if rows is not None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            raise TypeError(f"noise: rows must be an int64 Tensor, got {getattr(rows, 'dtype', type(rows).__name__)}")
        if rows.ndim != 1 or rows.shape[0] != shape[0]:
            raise ValueError(f"noise: rows must be ({shape[0]},) as shape says, got {tuple(rows.shape)}")
        if rows.device != seed.device:
            raise RuntimeError(f"noise: rows must be on {seed.device} as seed is, got {rows.device}")
    streams = [_purpose(f"{stream}/radius"), _purpose(f"{stream}/angle")] if normal else [_purpose(stream)]
    run = OP.select(backend, seed.device, torch.float64)
    return run(seed, rows, list(shape), first, list(forks) or None, streams, block, mirrored)


@constant_in_programs
def _purpose(stream: str) -> int:
    return signed(mix_int(zlib.crc32(stream.encode()) * GOLDEN))
