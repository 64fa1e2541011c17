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
LEAST_TILE: tl.constexpr = tl.constexpr(512)  # of the configurations of `_sum_rows`
MANY = 1024  # programs, beyond which each takes whole rows


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
    p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_sums, o_r, b_begin, b_count, b_own, nodes, graphs, width, features,
    STEPS, o_w, m_w, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """sums of several nodes: own x + the x of each one's list + that of the virtual node.

    ACT: x is act(x), or with z the sums are multiplied by act'(z); "": none. bias (features,) is added.
    """
    m_r = o_r < nodes
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


@triton.jit
def _of_rows(p_x, p_other, o_r, m_r, width, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """The sum of x times other, or x times act(other), over the program's features of rows that caches hold."""
    b_product = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for first in range(tl.program_id(1) * BLOCK_W, width, BLOCK_W * tl.num_programs(1)):
        o_w = first + tl.arange(0, BLOCK_W)
        o_x, m_x = o_r[:, None] * width + o_w[None, :], m_r[:, None] & (o_w < width)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0).to(tl.float32)
        b_product += b_x * read(p_other + o_x, m_x, None, ACT)
    return tl.sum(b_product)


@kernel(
    {"TILE": 1024, "num_warps": 4, "maxnreg": 96},
    {"TILE": 512, "num_warps": 4, "maxnreg": 48},
    {"TILE": 512, "num_warps": 2, "maxnreg": 96},
    {"TILE": 2048, "num_warps": 8, "maxnreg": 96},
)
def _sum_rows(
    p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_other, p_sums, p_parts, nodes, graphs, width, features, STEPS,
    ACT: tl.constexpr, TILE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The virtual node of a graph, of which there are `graphs`; then a block of nodes.

    A program has every so many blocks of features, so that lists are read once. parts: the program's sum of x times
    act(other), in the first place of those that programs of the smallest tile would have; 0 in the others.
    """
    BLOCK_R: tl.constexpr = TILE // BLOCK_W
    i_block = tl.program_id(0)
    b_own = 0.0
    if p_own is not None:
        b_own = tl.load(p_own).to(tl.float32)
    o_r = (i_block - graphs).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = (o_r >= 0) & (o_r < nodes)
    if p_ptr is not None:
        if i_block < graphs:
            for first in range(tl.program_id(1) * BLOCK_W, width, BLOCK_W * tl.num_programs(1)):
                o_w = first + tl.arange(0, BLOCK_W)
                _of_graph(p_x, p_ptr, p_sums, i_block, b_own, nodes, width, o_w, o_w < width, BLOCK_R, BLOCK_W)
            o_r = nodes + i_block + tl.arange(0, BLOCK_R).to(tl.int64)
            m_r = tl.arange(0, BLOCK_R) == 0
    if i_block >= graphs:
        b_begin = tl.load(p_begin + o_r, mask=m_r, other=0)
        b_count = tl.load(p_begin + o_r + 1, mask=m_r, other=0) - b_begin
        for first in range(tl.program_id(1) * BLOCK_W, width, BLOCK_W * tl.num_programs(1)):
            o_w = first + tl.arange(0, BLOCK_W)
            _of_nodes(
                p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_sums, o_r, b_begin, b_count, b_own, nodes, graphs,
                width, features, STEPS, o_w, o_w < width, ACT, BLOCK_R, BLOCK_W,
            )  # fmt: skip
    if p_parts is not None:
        SHARE: tl.constexpr = TILE // LEAST_TILE
        o_s = tl.arange(0, SHARE)
        parts = graphs + tl.cdiv(nodes, LEAST_TILE // BLOCK_W)
        i_part = tl.where(i_block < graphs, i_block, graphs + (i_block - graphs) * SHARE)
        m_s = tl.where(i_block < graphs, o_s == 0, i_part + o_s < parts)
        b_part = _of_rows(p_x, p_other, o_r, m_r, width, ACT, BLOCK_R, BLOCK_W)
        tl.store(p_parts + tl.program_id(1) * parts + i_part + o_s, tl.where(o_s == 0, b_part, 0.0), mask=m_s)


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
    return _sum_rows_of(x, adjacency, ptr, own, bias, act, z, None, fresh_like(x) if y is None else y, False)[0]


def sum_rows_and_products(
    x: Tensor,
    adjacency: tuple[Tensor, Tensor],
    ptr: Tensor | None,
    own: Tensor,
    *,
    other: Tensor | None = None,
    act: str = "",
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sum_rows`, and the sum of all x other, or x act(z), () float32, in the same pass over x."""
    sums, parts = _sum_rows_of(x, adjacency, ptr, own, None, act, z, other, fresh_like(x), True)
    assert parts is not None
    return sums, parts.sum()


def _sum_rows_of(x, adjacency, ptr, own, bias, act, z, other, sums, products) -> tuple[Tensor, Tensor | None]:
    if not x.numel():
        return sums, x.new_zeros(1, dtype=torch.float32) if products else None
    graphs = 0 if ptr is None else ptr.shape[0] - 1
    rows, width = x.shape[0], x.numel() // x.shape[0]
    nodes, block, features = rows - graphs, width_block(width, 256), width if bias is None else len(bias)

    blocks, least = cdiv(width, block), graphs + cdiv(nodes, LEAST_TILE.value // block)
    columns = 1 if least >= MANY else blocks
    parts = torch.empty(columns * least, dtype=torch.float32, device=x.device) if products else None

    def grid(settings):
        return graphs + cdiv(nodes, settings["TILE"] // block), columns

    lists = x, *adjacency, ptr, own, bias, z, z if other is None else other
    arguments = *lists, sums, parts, nodes, graphs, width, features, graphs.bit_length()
    _sum_rows(grid, *arguments, sizes=(rows, width, adjacency[1].shape[0] // rows), ACT=act, BLOCK_W=block)
    return sums, parts


def _adjacency(x: Tensor, edges: Tensor, ptr: Tensor | None, from_axis: int) -> tuple[Tensor, Tensor]:
    return lists(edges.contiguous(), from_axis, x.shape[0] - (0 if ptr is None else ptr.shape[0] - 1))


def forward(x: Tensor, edge_index: Tensor, ptr: Tensor | None, own: Tensor | None) -> Tensor:
    _check(x, edge_index, ptr, own)
    return sum_rows(x.contiguous(), _adjacency(x, edge_index, ptr, 0), None if ptr is None else ptr.contiguous(), own)


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
    d_sums, ptr = d_sums.contiguous(), None if ptr is None else ptr.contiguous()
    if not needs_own:
        return sum_rows(d_sums, _adjacency(x, edge_index, ptr, 1), ptr, own) if needs_x else None, None
    assert own is not None  # its gradient is asked for
    if not needs_x:
        return None, (x.float() * d_sums).sum().to(own.dtype)
    adjacency = _adjacency(x, edge_index, ptr, 1)
    d_x, d_own = sum_rows_and_products(d_sums, adjacency, ptr, own, other=x.contiguous())
    return d_x, d_own.to(own.dtype)
