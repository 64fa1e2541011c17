"""Lists of entries by key: a counting sort with integer atomics, or a stable sort in deterministic mode."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import cdiv, kernel

BLOCK = 256


@kernel({"num_warps": 4})  # one configuration: it adds to its output, so it must not be measured
def _count(p_key, p_count, p_place, E, keys, BLOCK: tl.constexpr):
    """count[key + 1] += 1; place[e]: the number of entries of e's key counted before e."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_key = tl.load(p_key + o_e, mask=o_e < E, other=-1)
    m_e = (b_key >= 0) & (b_key < keys)
    b_place = tl.atomic_add(p_count + b_key + 1, 1, mask=m_e, sem="relaxed")
    tl.store(p_place + o_e, b_place, mask=m_e)


@kernel({"num_warps": 4})
def _fill(p_key, p_from, p_begin, p_place, p_entry, E, keys, BLOCK: tl.constexpr):
    """entry[begin[key] + place] = e, or from[e]."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_key = tl.load(p_key + o_e, mask=o_e < E, other=-1)
    m_e = (b_key >= 0) & (b_key < keys)
    b_at = tl.load(p_begin + b_key, mask=m_e, other=0) + tl.load(p_place + o_e, mask=m_e, other=0)
    b_entry = o_e
    if p_from is not None:
        b_entry = tl.load(p_from + o_e, mask=m_e, other=-1)
        b_entry = tl.where((b_entry >= 0) & (b_entry < keys), b_entry, -1)
    tl.store(p_entry + b_at, b_entry, mask=m_e)


def group(key: Tensor, keys: int, origin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """key (E,) -> begin (keys + 1,), entry (E,): entry[begin[k] : begin[k + 1]] are the e with key[e] = k.

    Keys outside 0..keys - 1 are in no list. Lists ascend in deterministic mode; otherwise the atomics decide their order.
    origin (E,): the lists hold origin[e] in place of e, -1 where it is outside 0..keys - 1.
    """
    E = key.shape[0]
    index = torch.int32 if max(E, keys) < 2**31 else torch.int64
    if torch.are_deterministic_algorithms_enabled():
        ordered, entry = torch.where((key >= 0) & (key < keys), key, keys).sort(stable=True)
        begin = torch.searchsorted(ordered, torch.arange(keys + 1, device=key.device, dtype=key.dtype))
        if origin is not None:
            entry = torch.where((origin >= 0) & (origin < keys), origin, -1)[entry]
        return begin.to(index), entry.to(index)
    count = torch.zeros(keys + 1, dtype=index, device=key.device)
    place, entry = (torch.empty(E, dtype=index, device=key.device) for _ in range(2))

    def grid(settings):
        return (cdiv(E, BLOCK),)

    _count(grid, key, count, place, E, keys, BLOCK=BLOCK)
    begin = count.cumsum(0, dtype=index)
    _fill(grid, key, origin, begin, place, entry, E, keys, BLOCK=BLOCK)
    return begin, entry
