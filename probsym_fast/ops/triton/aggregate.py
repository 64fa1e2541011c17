"""aggregate: every row sums its neighbours' rows; the gradient does the same with the edges reversed."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_axes, check_tensors, fresh_like, kernel, width_block
from probsym_fast.ops.triton._sort_by_key import group

PART = 4096  # values that one program sums in the gradient of `own`


@kernel({"BLOCK_E": 8, "num_warps": 4}, {"BLOCK_E": 2, "num_warps": 2})
def _sum_rows(
    p_x,
    p_begin,
    p_entry,
    p_from,
    p_ptr,
    p_own,
    p_sums,
    nodes,
    graphs,
    width,
    STEPS,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """sums[i] = own x[i] + the x of i's list; a virtual node (i >= nodes) sums itself and the nodes of its graph."""
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < width
    b_weight = (i_row >= nodes).to(tl.float32)
    m_own = o_w < tl.where(i_row >= nodes, width, 0)
    if p_own is not None:
        b_weight += tl.load(p_own).to(tl.float32)
        m_own = m_w
    b_x = tl.load(p_x + i_row * width + o_w, mask=m_own, other=0).to(tl.float32) * b_weight
    b_sum = tl.zeros((BLOCK_E, BLOCK_W), tl.float32)
    o_e = tl.arange(0, BLOCK_E)
    if i_row < nodes:
        b_first = tl.load(p_begin + i_row).to(tl.int64)
        b_last = tl.load(p_begin + i_row + 1).to(tl.int64)
        for k in range(b_first, b_last, BLOCK_E):
            m_e = k + o_e < b_last
            b_entry = tl.load(p_entry + k + o_e, mask=m_e, other=0).to(tl.int64)
            b_from = tl.load(p_from + b_entry, mask=m_e, other=0)
            m_e = m_e & (b_from >= 0) & (b_from < nodes)
            b_sum += tl.load(
                p_x + b_from[:, None] * width + o_w[None, :], mask=m_e[:, None] & m_w[None, :], other=0
            ).to(tl.float32)
        if p_ptr is not None:
            b_low = i_row * 0
            b_high = b_low + graphs
            for _ in range(STEPS):  # the graph of the node: how many graphs end at or before it
                b_middle = (b_low + b_high) // 2
                b_before = (b_low < b_high) & (tl.load(p_ptr + tl.minimum(b_middle + 1, graphs)) <= i_row)
                b_low = tl.where(b_before, b_middle + 1, b_low)
                b_high = tl.where(b_before, b_high, b_middle)
            m_virtual = o_w < tl.where(b_low < graphs, width, 0)
            b_x += tl.load(p_x + (nodes + b_low) * width + o_w, mask=m_virtual, other=0).to(tl.float32)
    else:
        if p_ptr is not None:
            b_first = tl.maximum(tl.load(p_ptr + i_row - nodes), 0)
            b_last = tl.minimum(tl.load(p_ptr + i_row - nodes + 1), nodes)
            for k in range(b_first, b_last, BLOCK_E):
                m_e = k + o_e < b_last
                b_sum += tl.load(
                    p_x + (k + o_e)[:, None] * width + o_w[None, :], mask=m_e[:, None] & m_w[None, :], other=0
                ).to(tl.float32)
    tl.store(p_sums + i_row * width + o_w, (b_x + tl.sum(b_sum, 0)).to(p_sums.dtype.element_ty), mask=m_w)


@kernel({"num_warps": 4})
def _product(p_x, p_y, p_out, count, BLOCK: tl.constexpr):
    """out[part] = the sum of x y over a part."""
    i_part = tl.program_id(0).to(tl.int64)
    o_k = i_part * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_k, mask=o_k < count, other=0).to(tl.float32)
    b_y = tl.load(p_y + o_k, mask=o_k < count, other=0).to(tl.float32)
    tl.store(p_out + i_part, tl.sum(b_x * b_y, 0))


def _check(x: Tensor, edges: Tensor, ptr: Tensor | None, own: Tensor | None, d_sums: Tensor | None = None) -> None:
    rows, (_, E) = x.shape[0], check_axes("edge_index", edges, 2)
    offsets = 1 if ptr is None else check_axes("ptr", ptr, 1)[0]
    if not 1 <= offsets <= rows + 1:
        raise Refused(ValueError, f"ptr must be (B + 1,) with at most x's {rows} rows for B, got ({offsets},)")
    check_tensors(
        x.device, edge_index=(edges, (2, E)), ptr=(ptr, (offsets,)), own=(own, ()), d_sums=(d_sums, x.shape)
    )  # fmt: skip


def _sum_over(x: Tensor, edges: Tensor, ptr: Tensor | None, own: Tensor | None, from_axis: int) -> Tensor:
    x, edges = x.contiguous(), edges.contiguous()
    ptr = None if ptr is None else ptr.contiguous()
    sums = fresh_like(x)
    if not x.numel():
        return sums
    graphs = 0 if ptr is None else ptr.shape[0] - 1
    rows, width = x.shape[0], x.numel() // x.shape[0]
    begin, entry = group(edges[1 - from_axis], rows - graphs)
    block = width_block(width, 256)

    def grid(settings):
        return rows, cdiv(width, block)

    arguments = x, begin, entry, edges[from_axis], ptr, own, sums, rows - graphs, graphs, width
    sizes = rows, width, edges.shape[1] // rows
    _sum_rows(grid, *arguments, sizes=sizes, STEPS=graphs.bit_length(), BLOCK_W=block)
    return sums


def forward(x: Tensor, edge_index: Tensor, ptr: Tensor | None, own: Tensor | None) -> Tensor:
    _check(x, edge_index, ptr, own)
    return _sum_over(x, edge_index, ptr, own, 0)


def backward(
    d_sums: Tensor,
    x: Tensor,
    edge_index: Tensor,
    ptr: Tensor | None,
    own: Tensor | None,
    needs_x: bool,
    needs_own: bool,
) -> tuple[Tensor | None, Tensor | None]:
    _check(x, edge_index, ptr, own, d_sums)
    d_x = _sum_over(d_sums, edge_index, ptr, own, 1) if needs_x else None
    d_own = None
    if needs_own:
        assert own is not None  # its gradient is asked for
        x, d_sums = x.contiguous(), d_sums.contiguous()
        parts = torch.empty(cdiv(x.numel(), PART), dtype=torch.float32, device=x.device)
        _product(lambda settings: (parts.numel(),), x, d_sums, parts, x.numel(), BLOCK=PART)
        d_own = parts.sum().to(own.dtype)
    return d_x, d_own
