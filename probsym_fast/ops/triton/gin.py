"""gin and its gradient: two launches a layer forward, four and the library backward, for some samples at a time.

    z_1 = sums(x) + b_1,   z_k = W_k sums(act(z_(k-1))) + b_k,   y = out(pool(act(z_n))),   sums(h)_v = own h_v + sum_u h_u
    d_z_(k-1) = act'(z_(k-1)) sums^T(W_k^T d_z_k)
Every launch applies the activation to what it reads, or its slope to what it writes: z is all that is kept. The neighbours of
all nodes are listed once a pass. The library computes the products of the weights' gradients. No sum of floats uses atomics;
those that list the neighbours decide the order of their sum, unless in deterministic mode (`_sort_by_key`).
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.gin import ACTIVATIONS, beyond_kernels, weights_of
from probsym_fast.ops.reference._parts import Parts
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_axes, check_counts, check_tensors, kernel, width_block
from probsym_fast.ops.triton.aggregate import lists, sum_rows, sum_rows_and_products
from probsym_fast.ops.triton.rows import activate, activation, learn, linear

BYTES = 2**28  # of states and gradients at a time


@kernel({"num_warps": 4})
def _pool(p_z, p_ptr, p_sums, nodes, width, ACT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr):
    """sums[graph] = the sum of act(z) over its nodes."""
    i_graph, o_e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_E)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    b_first = tl.maximum(tl.load(p_ptr + i_graph), 0)
    b_last = tl.minimum(tl.load(p_ptr + i_graph + 1), nodes)
    b_sum = tl.zeros((BLOCK_E, BLOCK_W), tl.float32)
    for k in range(b_first, b_last, BLOCK_E):
        m_z = (k + o_e < b_last)[:, None] & (o_w < width)[None, :]
        b_h, _ = activation(tl.load(p_z + (k + o_e)[:, None] * width + o_w[None, :], mask=m_z, other=0), ACT)
        b_sum += b_h
    tl.store(p_sums + i_graph * width + o_w, tl.sum(b_sum, 0), mask=o_w < width)


class Call:
    """The checked arguments, and what runs on some of the samples."""

    def __init__(self, x, edge_index, ptr, weights, layers, out_features, activation, final):
        (self.nodes, self.S, self.W), (_, E) = check_axes("x", x, 3), check_axes("edge_index", edge_index, 2)
        (offsets,) = check_axes("ptr", ptr, 1)
        if min(self.W, layers, out_features, offsets) < 1:
            got = self.W, layers, out_features, offsets
            raise Refused(ValueError, f"sizes must be at least 1, got width, layers, out_features and B + 1 = {got}")
        if offsets == 1 and self.nodes:
            raise Refused(ValueError, f"ptr must rise from 0 to the {self.nodes} nodes, got one number")
        if not 0 <= activation < len(ACTIVATIONS):
            raise Refused(ValueError, f"activation must be in 0..{len(ACTIVATIONS) - 1}, got {activation}")
        if (lacking := beyond_kernels(self.W, layers, out_features)) is not None:
            raise Refused(ValueError, lacking)
        row = (weights_of(self.W, layers, out_features),)
        check_tensors(x.device, edge_index=(edge_index, (2, E)), weights=(weights, row))
        check_tensors(x.device, ptr=(ptr, (offsets,)))
        check_counts(rows=self.nodes * self.S, features_of_a_node=self.S * self.W)
        self.x, self.edges, self.ptr = x.contiguous(), edge_index.contiguous(), ptr.contiguous()
        self.layers, self.out, self.graphs = layers, out_features, offsets - 1
        self.act, self.final = ACTIVATIONS[activation], final
        self.own, self.weights = 1 + weights[:layers], weights[layers:].clone()  # a copy begins at 16 bytes
        self.first, self.inner, self.last = self.parts_of(self.weights)

    def parts_of(self, row: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """The first bias, (weight, bias) of the other layers and of the output; of the weights or of their gradient."""
        part, W = Parts(row), self.W
        return part(W), [(part(W, W), part(W)) for _ in range(self.layers - 1)], (part(self.out, W), part(self.out))

    def samples(self) -> list[slice]:
        """As many at a time as all layers and four more planes of features allow: the same in both passes."""
        step = max(1, BYTES // (4 * (self.layers + 4) * max(1, self.nodes) * self.W))
        return [slice(first, min(self.S, first + step)) for first in range(0, self.S, step)]

    def places(self, kept: Tensor, some: slice) -> list[Tensor]:
        """Where kept has z of each layer, of some samples."""
        sample, s = self.layers * self.nodes * self.W, some.stop - some.start
        return list(kept.view(-1)[sample * some.start : sample * some.stop].view(self.layers, self.nodes, s, self.W))

    @cached_property
    def into(self) -> tuple[Tensor, Tensor]:
        """The nodes that a node sums."""
        return lists(self.edges, 0, self.nodes)

    @cached_property
    def out_of(self) -> tuple[Tensor, Tensor]:
        """The nodes that sum a node."""
        return lists(self.edges, 1, self.nodes)

    def sums(self, k: int, z: Tensor) -> Tensor:
        """Of layer k > 0, from z of the layer before."""
        return sum_rows(z, self.into, own=self.own[k], act=self.act)

    def states(self, x: Tensor, places: list[Tensor] | None) -> list[Tensor]:
        """z of every layer, in places if there are any, else only of the last."""
        place = None if places is None else places[0]
        found = [sum_rows(x, self.into, own=self.own[0], bias=self.first, y=place)]
        for k, (weight, bias) in enumerate(self.inner, 1):
            sums = self.sums(k, found[-1]).view(-1, self.W)
            z = torch.empty_like(x) if places is None else places[k]
            linear(sums, weight.t(), bias, y=z.view(-1, self.W))
            found = [z] if places is None else [*found, z]
        return found

    def end(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled rows (B s, W) of the last layer's z, and their output before its activation (B s, out)."""
        width = z.shape[1] * self.W
        pooled = torch.empty(self.graphs, z.shape[1], self.W, dtype=z.dtype, device=z.device)
        block, arguments = width_block(width, 256), (z, self.ptr, pooled, self.nodes, width)
        grid = self.graphs, cdiv(width, block)
        _pool(lambda settings: grid, *arguments, ACT=self.act, BLOCK_E=8, BLOCK_W=block)
        pooled, (weight, bias) = pooled.view(-1, self.W), self.last
        return pooled, linear(pooled, weight.t(), bias)

    def end_gradient(self, d_y: Tensor, z: Tensor, d: tuple[Tensor, Tensor] | None) -> Tensor:
        """d of the last layer's z (nodes, s, W); adds that of the output's weights to d."""
        pooled, ended = self.end(z)
        d_ended = activate(ended, self.act, d_y) if self.final else d_y
        if d is not None:
            learn(*d, d_ended, pooled)
        if not self.nodes:
            return torch.empty_like(z)
        graph = torch.searchsorted(self.ptr, torch.arange(self.nodes, device=z.device), right=True).sub_(1)
        d_pooled = linear(d_ended, self.last[0]).view(self.graphs, -1, self.W)
        return activate(z, self.act, d_pooled.index_select(0, graph.clamp_(0, self.graphs - 1)))

    def gradient(
        self, d_y: Tensor, x: Tensor, z: list[Tensor], d_own: Tensor, d: Tensor | None, needs_x: bool
    ) -> Tensor:
        """d of x (nodes, s, W), if it is needed; adds that of the weights to d_own and d, if there is a d."""
        first, inner, last = (None, [], None) if d is None else self.parts_of(d)
        d_z = self.end_gradient(d_y, z[-1], last)
        for k in reversed(range(1, self.layers)):
            rows, (weight, _), before = d_z.view(-1, self.W), self.inner[k - 1], z[k - 1]
            d_sums = linear(rows, weight).view_as(before)
            if d is not None:
                learn(*inner[k - 1], rows, self.sums(k, before).view(-1, self.W))
                d_z, own = sum_rows_and_products(d_sums, self.out_of, None, self.own[k], act=self.act, z=before)
                d_own[k] += own
            else:
                d_z = sum_rows(d_sums, self.out_of, own=self.own[k], act=self.act, z=before)
        if first is not None:
            first += d_z.view(-1, self.W).sum(0)
            if needs_x:
                d_x, own = sum_rows_and_products(d_z, self.out_of, None, self.own[0], other=x)
                d_own[0] += own
                return d_x
            d_own[0] += (x * d_z).sum()
        return sum_rows(d_z, self.out_of, own=self.own[0]) if needs_x else d_z


def forward(x, edge_index, ptr, weights, layers, out_features, activation, final, keep) -> tuple[Tensor, Tensor]:
    call = Call(x, edge_index, ptr, weights, layers, out_features, activation, final)
    y = torch.empty(call.graphs, call.S, out_features, dtype=x.dtype, device=x.device)
    kept = torch.empty(layers if keep else 0, *x.shape, dtype=x.dtype, device=x.device)
    for some in call.samples():
        z = call.states(call.x[:, some].contiguous(), call.places(kept, some) if keep else None)[-1]
        _, ended = call.end(z)
        y[:, some] = (activate(ended, call.act) if final else ended).view_as(y[:, some])
    return y, kept


def backward(
    d_y, x, edge_index, ptr, weights, kept, layers, out_features, activation, final, needs_x, needs_weights
) -> tuple[Tensor | None, Tensor | None]:
    call = Call(x, edge_index, ptr, weights, layers, out_features, activation, final)
    rows = check_axes("kept", kept, 4)[0]
    shapes = {"d_y": (d_y, (call.graphs, call.S, out_features)), "kept": (kept, (layers if rows else 0, *x.shape))}
    check_tensors(x.device, **shapes)
    kept = kept.contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_own, d = torch.zeros_like(call.own), torch.zeros_like(call.weights) if needs_weights else None
    with torch.autocast(x.device.type, enabled=False):
        for some in call.samples():
            own = call.x[:, some].contiguous()
            memory = kept if rows else torch.empty(layers * call.nodes, *own.shape[1:], dtype=x.dtype, device=x.device)
            z = call.places(memory, some if rows else slice(0, own.shape[1]))
            if not rows:
                call.states(own, z)
            found = call.gradient(d_y[:, some].flatten(0, 1).contiguous(), own, z, d_own, d, needs_x)
            if d_x is not None:
                d_x[:, some] = found
    return d_x, None if d is None else torch.cat([d_own, d])
