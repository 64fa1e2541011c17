"""aggregate: every row sums its neighbours' rows; the gradient does the same with the edges reversed.

Between layers of a network the sums apply its activation to what they read, or its slope to what they write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_axes, check_tensors, fresh_like, kernel, width_block
from probsym_fast.ops.triton._sort_by_key import group
from probsym_fast.ops.triton.items import graph_of
from probsym_fast.ops.triton.rows import activation

AHEAD: tl.constexpr = tl.constexpr(4)  # entries of a list whose loads do not wait for each other
PART = 4096  # values that one program sums in the gradient of `own`


@triton.jit
def read(p_x, m_x, p_z, ACT: tl.constexpr):
    """x, or act(x) unless z is given, in float32; 0 where it is masked."""
    b_x = tl.load(p_x, mask=m_x, other=0).to(tl.float32)
    if ACT != "" and p_z is None:
        b_x, _ = activation(b_x, ACT)
    return b_x


@triton.jit
def _of_graph(p_x, p_ptr, p_sums, i_graph, b_own, nodes, width, o_w, m_w, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """sums of a virtual node: (own + 1) x + the x of its graph's nodes, several at a time."""
    o_r, i_row = tl.arange(0, BLOCK_R), nodes + i_graph.to(tl.int64)
    b_first = tl.maximum(tl.load(p_ptr + i_graph), 0)
    b_last = tl.minimum(tl.load(p_ptr + i_graph + 1), nodes)
    b_sum = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for k in range(b_first, b_last, BLOCK_R):
        m_x = (k + o_r < b_last)[:, None] & m_w[None, :]
        b_sum += tl.load(p_x + (k + o_r)[:, None] * width + o_w[None, :], mask=m_x, other=0).to(tl.float32)
    b_x = tl.load(p_x + i_row * width + o_w, mask=m_w, other=0).to(tl.float32) * (b_own + 1.0)
    tl.store(p_sums + i_row * width + o_w, (b_x + tl.sum(b_sum, 0)).to(p_sums.dtype.element_ty), mask=m_w)


@triton.jit
def _of_nodes(
    p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_sums, i_block, b_own, nodes, graphs, width, features, STEPS, o_w,
    m_w, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """sums of several nodes: own x + the x of each one's list + that of the virtual node.

    ACT: x is act(x), or with z the sums are multiplied by act'(z); "": none. bias (features,) is added.
    """
    o_r = i_block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < nodes
    b_begin = tl.load(p_begin + o_r, mask=m_r, other=0)
    b_count = tl.load(p_begin + o_r + 1, mask=m_r, other=0) - b_begin
    b_sum = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    o_x, m_x = o_r[:, None] * width + o_w[None, :], m_r[:, None] & m_w[None, :]
    if p_own is not None:
        b_sum = b_own * read(p_x + o_x, m_x, p_z, ACT)
    if p_ptr is not None:
        b_graph = graph_of(p_ptr, o_r, graphs, STEPS)
        m_virtual = (m_r & (b_graph < graphs))[:, None] & m_w[None, :]
        p_virtual = p_x + (nodes + b_graph)[:, None] * width + o_w[None, :]
        b_sum += tl.load(p_virtual, mask=m_virtual, other=0).to(tl.float32)
    for e in range(0, tl.max(b_count, 0), AHEAD):
        for k in tl.static_range(AHEAD):
            b_from = tl.load(p_entry + b_begin + e + k, mask=e + k < b_count, other=-1).to(tl.int64)
            m_from = (b_from >= 0)[:, None] & m_w[None, :]
            b_sum += read(p_x + b_from[:, None] * width + o_w[None, :], m_from, p_z, ACT)
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_w % features)[None, :]
    if p_z is not None:
        _, b_slope = activation(tl.load(p_z + o_x, mask=m_x, other=0), ACT)
        b_sum *= b_slope
    tl.store(p_sums + o_x, b_sum.to(p_sums.dtype.element_ty), mask=m_x)


@kernel({"TILE": 1024, "num_warps": 4}, {"TILE": 2048, "num_warps": 8}, {"TILE": 512, "num_warps": 2})
def _sum_rows(
    p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_sums, nodes, graphs, width, features, STEPS, ACT: tl.constexpr,
    TILE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The virtual node of a graph, of which there are `graphs`; then a block of nodes."""
    BLOCK_R: tl.constexpr = TILE // BLOCK_W
    i_block = tl.program_id(0)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < width
    b_own = 0.0
    if p_own is not None:
        b_own = tl.load(p_own).to(tl.float32)
    if p_ptr is not None:
        if i_block < graphs:
            _of_graph(p_x, p_ptr, p_sums, i_block, b_own, nodes, width, o_w, m_w, BLOCK_R, BLOCK_W)
    if i_block >= graphs:
        _of_nodes(
            p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_sums, i_block - graphs, b_own, nodes, graphs, width,
            features, STEPS, o_w, m_w, ACT, BLOCK_R, BLOCK_W,
        )  # fmt: skip


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


def lists(edges: Tensor, from_axis: int, nodes: int) -> tuple[Tensor, Tensor]:
    """The nodes that each node sums over, for `sum_rows`: where its list begins, and the lists."""
    return group(edges[1 - from_axis], nodes, edges[from_axis])


def sum_rows(
    x: Tensor,
    adjacency: tuple[Tensor, Tensor],
    ptr: Tensor | None = None,
    own: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    act: str = "",
    z: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """own x + sums of x over the lists, of act(x) if it is named; bias added; with z times act'(z).

    All contiguous; y: where it goes. Virtual nodes, which ptr asks for, have neither act, bias nor z.
    """
    sums = fresh_like(x) if y is None else y
    if not x.numel():
        return sums
    graphs = 0 if ptr is None else ptr.shape[0] - 1
    rows, width = x.shape[0], x.numel() // x.shape[0]
    nodes, block, features = rows - graphs, width_block(width, 256), width if bias is None else len(bias)

    def grid(settings):
        return graphs + cdiv(nodes, settings["TILE"] // block), cdiv(width, block)

    arguments = x, *adjacency, ptr, own, bias, z, sums, nodes, graphs, width, features, graphs.bit_length()
    _sum_rows(grid, *arguments, sizes=(rows, width, adjacency[1].shape[0] // rows), ACT=act, BLOCK_W=block)
    return sums


def sum_of_products(x: Tensor, y: Tensor, act: str = "") -> Tensor:
    """() float32, of all x y, or act(x) y; both contiguous."""
    parts = torch.empty(cdiv(x.numel(), PART), dtype=torch.float32, device=x.device)
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
