"""aggregate: every row sums its neighbours' rows; the gradient does the same with the edges reversed.

Between layers of a network the sums apply its activation to what they read, or its slope to what they write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_tensors, fresh_like, kernel, width_block
from probsym_fast.ops.triton._sort_by_key import group
from probsym_fast.ops.triton.rows import activation

PART = 4096  # values that one program sums in the gradient of `own`


@triton.jit
def read(p_x, m_x, p_z, ACT: tl.constexpr):
    """x, or act(x) unless z is given, in float32; 0 where it is masked."""
    b_x = tl.load(p_x, mask=m_x, other=0).to(tl.float32)
    if ACT != "" and p_z is None:
        b_x, _ = activation(b_x, ACT)
    return b_x


@kernel({"BLOCK_E": 8, "num_warps": 4}, {"BLOCK_E": 2, "num_warps": 2})
def _sum_rows(
    p_x,
    p_begin,
    p_entry,
    p_from,
    p_ptr,
    p_own,
    p_bias,
    p_z,
    p_sums,
    nodes,
    graphs,
    width,
    features,
    STEPS,
    ACT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """sums[i] = own x[i] + the x of i's list; a virtual node (i >= nodes) sums itself and the nodes of its graph.

    ACT: x is act(x), or with z the sums are multiplied by act'(z); "": none. bias (features,) is added to all.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < width
    b_weight = (i_row >= nodes).to(tl.float32)
    m_own = o_w < tl.where(i_row >= nodes, width, 0)
    if p_own is not None:
        b_weight += tl.load(p_own).to(tl.float32)
        m_own = m_w
    b_x = read(p_x + i_row * width + o_w, m_own, p_z, ACT) * b_weight
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
            b_sum += read(p_x + b_from[:, None] * width + o_w[None, :], m_e[:, None] & m_w[None, :], p_z, ACT)
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
    b_x += tl.sum(b_sum, 0)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_w % features)
    if p_z is not None:
        _, b_slope = activation(tl.load(p_z + i_row * width + o_w, mask=m_w, other=0), ACT)
        b_x *= b_slope
    tl.store(p_sums + i_row * width + o_w, b_x.to(p_sums.dtype.element_ty), mask=m_w)


@kernel({"num_warps": 4})
def _product(p_x, p_y, p_out, count, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """out[part] = the sum of x y, or act(x) y, over a part."""
    i_part = tl.program_id(0).to(tl.int64)
    o_k = i_part * BLOCK + tl.arange(0, BLOCK)
    b_x = read(p_x + o_k, o_k < count, None, ACT)
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


def lists(edges: Tensor, from_axis: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each node sums over, for `sum_rows`: where its list begins, edges, and the nodes that these come from."""
    return *group(edges[1 - from_axis], nodes), edges[from_axis]


def sum_rows(
    x: Tensor,
    adjacency: tuple[Tensor, Tensor, Tensor],
    ptr: Tensor | None = None,
    own: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    act: str = "",
    z: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """own x + sums of x over the lists, of act(x) if it is named; bias added; with z times act'(z). All contiguous; y: where
    it goes."""
    sums = fresh_like(x) if y is None else y
    if not x.numel():
        return sums
    graphs = 0 if ptr is None else ptr.shape[0] - 1
    rows, width = x.shape[0], x.numel() // x.shape[0]
    block, features = width_block(width, 256), width if bias is None else len(bias)

    def grid(settings):
        return rows, triton.cdiv(width, block)

    arguments = x, *adjacency, ptr, own, bias, z, sums, rows - graphs, graphs, width, features
    sizes = rows, width, adjacency[1].shape[0] // rows
    _sum_rows(grid, *arguments, sizes=sizes, STEPS=graphs.bit_length(), ACT=act, BLOCK_W=block)
    return sums


def sum_of_products(x: Tensor, y: Tensor, act: str = "") -> Tensor:
    """() float32, of all x y, or act(x) y; both contiguous."""
    parts = torch.empty(triton.cdiv(x.numel(), PART), dtype=torch.float32, device=x.device)
    _product(lambda settings: (parts.numel(),), x, y, parts, x.numel(), ACT=act, BLOCK=PART)
    return parts.sum()


def _sum_over(x: Tensor, edges: Tensor, ptr: Tensor | None, own: Tensor | None, from_axis: int) -> Tensor:
    x, edges = x.contiguous(), edges.contiguous()
    ptr = None if ptr is None else ptr.contiguous()
    nodes = x.shape[0] - (0 if ptr is None else ptr.shape[0] - 1)
    return sum_rows(x, lists(edges, from_axis, nodes), ptr, own)


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
        d_own = sum_of_products(x.contiguous(), d_sums.contiguous()).to(own.dtype)
    return d_x, d_own
