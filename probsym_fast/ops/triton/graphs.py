"""The graph of a node: how many graphs end at or before it.

A search by halves waits for one load after the other. So the ends of some graphs, evenly spread, are loaded and compared at
once, and halves search only between two of them: `halvings` of the number of graphs and of ends says how often.
"""

from __future__ import annotations

import triton
import triton.language as tl

ENDS, MORE_ENDS = 16, 32  # compared at once with each of many nodes, and of few


@triton.jit
def graph_of(p_ptr, b_node, graphs, STEPS, ENDS: tl.constexpr = 16):
    """The graph of each node of a block, of about as many nodes as threads."""
    step = tl.cdiv(graphs, ENDS)
    b_low = b_node * 0
    for k in tl.static_range(ENDS):
        b_end = tl.load(p_ptr + tl.minimum((k + 1) * step, graphs))
        b_low += tl.where(b_end <= b_node, step, 0)
    return between(p_ptr, b_node, b_low, step, graphs, STEPS)


@triton.jit
def graph_of_few(p_ptr, b_node, graphs, STEPS, ENDS: tl.constexpr = 32):
    """`graph_of` for few nodes a warp, whose threads take an end each."""
    step = tl.cdiv(graphs, ENDS)
    b_end = tl.load(p_ptr + tl.minimum((tl.arange(0, ENDS) + 1) * step, graphs))
    b_low = tl.sum((b_end[None, :] <= b_node[:, None]).to(tl.int32), 1) * step
    return between(p_ptr, b_node, b_low.to(tl.int64), step, graphs, STEPS)


@triton.jit
def between(p_ptr, b_node, b_low, step, graphs, STEPS):
    """Of the `step` graphs from b_low, the one that has the node."""
    b_low = tl.minimum(b_low, graphs)
    b_high = tl.minimum(b_low + step - 1, graphs)
    for _ in range(STEPS):
        b_middle = (b_low + b_high) // 2
        b_ends = tl.load(p_ptr + tl.minimum(b_middle + 1, graphs))
        b_before = (b_low < b_high) & (b_ends <= b_node)
        b_low = tl.where(b_before, b_middle + 1, b_low)
        b_high = tl.where(b_before, b_high, b_middle)
    return b_low


def halvings(graphs: int, ends: int = ENDS) -> int:
    """STEPS of the searches above."""
    return (-(-graphs // ends) - 1).bit_length() if graphs else 0
