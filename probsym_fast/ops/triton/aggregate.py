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
from probsym_fast.ops.triton.graphs import MORE_ENDS, graph_of_few, halvings
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
def neighbour(p_entry, b_begin, b_count, k):
    """Entry k of each list; -1 beyond its end."""
    return tl.load(p_entry + b_begin + k, mask=k < b_count, other=-1).to(tl.int64)


@triton.jit
def row_of(p_x, b_row, o_w, width, p_z, ACT: tl.constexpr):
    """`read` of features o_w of rows; 0 of negative ones."""
    m_x = (b_row >= 0)[:, None] & (o_w < width)[None, :]
    return read(p_x + b_row[:, None] * width + o_w[None, :], m_x, p_z, ACT)


@triton.jit
def _of_graph(
    p_x, p_ptr, p_own, p_other, p_sums, i_graph, nodes, width, o_w, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """sums of a virtual node: (own + 1) x + the x of its graph's nodes; and the sum of its x times other."""
    o_r, o_x, m_w = tl.arange(0, BLOCK_R), (nodes + i_graph.to(tl.int64)) * width + o_w, o_w < width
    b_first = tl.maximum(tl.load(p_ptr + i_graph), 0)
    b_last = tl.minimum(tl.load(p_ptr + i_graph + 1), nodes)
    b_own, b_x = 1.0, tl.load(p_x + o_x, mask=m_w, other=0).to(tl.float32)
    if p_own is not None:
        b_own += tl.load(p_own).to(tl.float32)
    b_sum = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for k in range(b_first, b_last, AHEAD * BLOCK_R):
        for i in tl.static_range(AHEAD):
            o_k = k + i * BLOCK_R + o_r
            m_x = (o_k < b_last)[:, None] & m_w[None, :]
            b_sum += tl.load(p_x + o_k[:, None] * width + o_w[None, :], mask=m_x, other=0).to(tl.float32)
    tl.store(p_sums + o_x, (b_own * b_x + tl.sum(b_sum, 0)).to(p_sums.dtype.element_ty), mask=m_w)
    b_product = b_x
    if p_other is not None:
        b_product *= tl.load(p_other + o_x, mask=m_w, other=0).to(tl.float32)
    return tl.sum(b_product)


@kernel(
    {"TILE": 1024, "num_warps": 4},
    {"TILE": 512, "num_warps": 4, "maxnreg": 80},
    {"TILE": 512, "num_warps": 2},
    {"TILE": 2048, "num_warps": 8},
)
def _sum_rows(
    p_x, p_begin, p_entry, p_ptr, p_own, p_bias, p_z, p_other, p_sums, p_parts,
    nodes, graphs, width, features, programs, STEPS, ACT: tl.constexpr, TILE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A block of features of a virtual node; or a block of nodes: own x + the x of a node's list + that of the virtual node.

    ACT: x is act(x), or with z the sums are multiplied by act'(z); "": none. bias (features,) is added. `programs` take a
    block of nodes, each every so many blocks of features, so that lists are read once. Rows of the first entries of a list
    wait for nothing but these, which are the same for all features. parts: the program's sum of x times act(other), of
    act(z) without other, in the first place of those that programs of the smallest tile would have; 0 in the others.
    """
    BLOCK_R: tl.constexpr = TILE // BLOCK_W
    SHARE: tl.constexpr = TILE // LEAST_TILE
    blocks, i_program, i_first = tl.cdiv(width, BLOCK_W), tl.program_id(0), 0
    if p_ptr is not None:
        i_first = graphs * blocks
        if i_program < i_first:
            o_w = i_program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
            b_part = _of_graph(
                p_x, p_ptr, p_own, p_other, p_sums, i_program // blocks, nodes, width, o_w, BLOCK_R, BLOCK_W
            )
            if p_parts is not None:
                tl.store(p_parts + i_program, b_part)
    if i_program >= i_first:
        i_rows, i_column = (i_program - i_first) // programs, (i_program - i_first) % programs
        o_r = i_rows.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < nodes
        b_begin = tl.load(p_begin + o_r, mask=m_r, other=0)
        b_count = tl.load(p_begin + o_r + 1, mask=m_r, other=0) - b_begin
        b_own, b_row, b_virtual = 0.0, tl.where(m_r, o_r, -1), o_r
        if p_own is not None:
            b_own = tl.load(p_own).to(tl.float32)
        if p_ptr is not None:
            b_graph = graph_of_few(p_ptr, o_r, graphs, STEPS)
            b_virtual = tl.where(m_r & (b_graph < graphs), nodes + b_graph, -1)
        b_0, b_1 = neighbour(p_entry, b_begin, b_count, 0), neighbour(p_entry, b_begin, b_count, 1)
        b_2, b_3 = neighbour(p_entry, b_begin, b_count, 2), neighbour(p_entry, b_begin, b_count, 3)
        b_most = tl.max(b_count, 0)
        b_product = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
        for first in range(i_column * BLOCK_W, width, BLOCK_W * programs):
            o_w = first + tl.arange(0, BLOCK_W)
            b_sum = row_of(p_x, b_0, o_w, width, p_z, ACT) + row_of(p_x, b_1, o_w, width, p_z, ACT)
            b_sum += row_of(p_x, b_2, o_w, width, p_z, ACT) + row_of(p_x, b_3, o_w, width, p_z, ACT)
            if p_ptr is not None:
                b_sum += row_of(p_x, b_virtual, o_w, width, None, "")
            if p_own is not None:
                b_sum += b_own * row_of(p_x, b_row, o_w, width, p_z, ACT)
            for e in range(AHEAD, b_most, AHEAD):
                for k in tl.static_range(AHEAD):
                    b_sum += row_of(p_x, neighbour(p_entry, b_begin, b_count, e + k), o_w, width, p_z, ACT)
            if p_bias is not None:
                b_sum += tl.load(p_bias + o_w % features)[None, :]
            if p_z is not None:
                b_active, b_slope = activation(row_of(p_z, b_row, o_w, width, None, ""), ACT)
                b_sum *= b_slope
            o_x, m_x = o_r[:, None] * width + o_w[None, :], m_r[:, None] & (o_w < width)[None, :]
            tl.store(p_sums + o_x, b_sum.to(p_sums.dtype.element_ty), mask=m_x)
            if p_parts is not None:
                b_x = row_of(p_x, b_row, o_w, width, None, "")
                if p_other is not None:
                    b_product += b_x * row_of(p_other, b_row, o_w, width, None, ACT)
                else:
                    b_product += b_x * b_active
        if p_parts is not None:
            o_s = i_rows * SHARE + tl.arange(0, SHARE)
            b_part = tl.where(tl.arange(0, SHARE) == 0, tl.sum(b_product), 0.0)
            tl.store(
                p_parts + i_first + o_s * programs + i_column, b_part, mask=o_s < tl.cdiv(nodes, LEAST_TILE // BLOCK_W)
            )


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

    blocks, least = cdiv(width, block), cdiv(nodes, LEAST_TILE.value // block)
    programs = 1 if least >= MANY else blocks
    room = graphs * blocks + least * programs
    parts = torch.empty(room, dtype=torch.float32, device=x.device) if products else None

    def grid(settings):
        return (graphs * blocks + cdiv(nodes, settings["TILE"] // block) * programs,)

    lists = x, *adjacency, ptr, own, bias, z, other
    arguments = *lists, sums, parts, nodes, graphs, width, features, programs, halvings(graphs, MORE_ENDS)
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
