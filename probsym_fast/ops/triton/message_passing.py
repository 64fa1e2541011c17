"""message_passing and its gradient: three launches a layer forward, for some graphs at a time.

    p = [receiver, sender] h,   m as in messages.py,   h = end(silu(begin([h, m])));   y = out(silu(hidden(h))) at the end
Backward, p and m are computed again from each layer's input, which is kept or itself computed again. The library computes
the embedding and the products of the weights' gradients. No sum uses atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probsym_fast.ops._weights import kept_memory, kept_rows
from probsym_fast.ops.message_passing import beyond_kernels, weights_of
from probsym_fast.ops.reference._parts import Parts
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_counts, check_tensors
from probsym_fast.ops.triton.feedforward import Feedforward
from probsym_fast.ops.triton.messages import Messages
from probsym_fast.ops.triton.rows import learn, linear

BYTES = 2**28  # of states and gradients at a time


class Layer(NamedTuple):
    """The weights of one, or their gradients."""

    pair: Tensor
    pair_bias: Tensor
    message: Tensor
    message_bias: Tensor
    begin: Tensor
    begin_bias: Tensor
    end: Tensor
    end_bias: Tensor


class Row:
    """All parts of a row of weights, or of its gradient, as views."""

    def __init__(self, row: Tensor, features: int, C: int, width: int, layers: int, out: int):
        part, W = Parts(row), width

        def linear(into: int, features: int) -> tuple[Tensor, Tensor]:
            return part(features, into), part(features)

        self.embed = linear(features, W)
        self.layers = [
            Layer(*linear(2 * W + C, W), *linear(W, W), *linear(2 * W, W), *linear(W, W)) for _ in range(layers)
        ]
        self.end = *linear(W, W), *linear(W, out)


class Part(NamedTuple):
    """Some graphs: those of x, and those of edges, each for as many of x."""

    x: slice
    edges: slice
    samples: int


class Call:
    """The checked arguments, and what runs on some of the graphs."""

    def __init__(self, x: Tensor, edges: Tensor, weights: Tensor, width: int, layers: int, out: int):
        (M, n, features), (B, *_, C) = check_axes("x", x, 3), check_axes("edges", edges, 4)
        if min(n, features, width, layers, out) < 1:
            raise Refused(
                ValueError,
                "sizes must be at least 1, got n, features, width, layers and out_features = "
                f"{(n, features, width, layers, out)}",
            )
        if M % B if B else M:
            raise Refused(ValueError, f"M must be a multiple of edges' B = {B}, got {M}")
        if (lacking := beyond_kernels("cuda", features, C, width, layers, out)) is not None:
            raise Refused(ValueError, lacking)
        row = (weights_of(features, C, width, layers, out),)
        check_tensors(x.device, edges=(edges, (B, n, n, C)), weights=(weights, row))
        check_counts(pairs_of_all_graphs=M * n * n)
        self.M, self.n, self.C, self.W, self.layers, self.samples = M, n, C, width, layers, M // B if B else 1
        loops = torch.eye(n, dtype=torch.bool, device=x.device)[..., None]
        self.x, self.edges, self.weights = (
            x.contiguous(),
            edges.masked_fill(loops, 0).contiguous(),
            weights.contiguous(),
        )
        self.sizes = features, C, width, layers, out
        self.row = Row(self.weights, *self.sizes)
        self.both = [  # (2 W, W): of receivers, of senders
            layer.pair[:, : 2 * width].unflatten(1, (2, width)).transpose(0, 1).flatten(0, 1)
            for layer in self.row.layers
        ]
        self.messages = [Messages(*layer[:4]) for layer in self.row.layers]
        self.update = [Feedforward(*layer[4:], "silu") for layer in self.row.layers]
        self.end = Feedforward(*self.row.end, "silu")

    def parts(self, values: int) -> Iterator[Part]:
        """As many graphs at a time as `values` numbers each allow: all samples of some, or some samples of one."""
        S, step = self.samples, max(1, BYTES // (4 * values))
        step = step // S * S or step
        first = 0
        while first < self.M:
            last = min(self.M, first + step, self.M if step >= S else (first // S + 1) * S)
            edges = slice(first // S, (last - 1) // S + 1)
            yield Part(slice(first, last), edges, min(S, last - first))
            first = last

    def states(self, some: Part, places: Sequence[Tensor]) -> list[Tensor]:
        """The input of every layer and the output of the last, in places."""
        weight, bias = self.row.embed
        found = [torch.addmm(bias, self.x[some.x].flatten(0, 1), weight.t(), out=places[0])]
        for k in range(self.layers):
            found.append(self.update[k].forward(self.sums(k, found[k], some)[1], places[k + 1]))
        return found

    def sums(self, k: int, h: Tensor, some: Part) -> tuple[Tensor, Tensor]:
        """p and [h, m] of layer k, both (nodes, 2 W)."""
        p = linear(h, self.both[k].t())
        return p, self.messages[k].forward(h, p, self.edges[some.edges], some.samples)

    def places(self, kept: Tensor, some: Part) -> list[Tensor]:
        """Where kept has the states of some graphs, layer by layer."""
        count = (self.layers + 1) * self.M * self.n * self.W
        layers = kept.view(-1)[:count].view(self.layers + 1, self.M, self.n * self.W)
        return [x.view(-1, self.W) for x in layers[:, some.x]]

    def fresh(self, some: Part, own: bool) -> list[Tensor]:
        """Places for the states of some graphs: each layer's own, or two that take turns."""
        rows = (some.x.stop - some.x.start) * self.n
        memory = torch.empty(self.layers + 1 if own else 2, rows, self.W, dtype=self.x.dtype, device=self.x.device)
        return [memory[k if own else k % 2] for k in range(self.layers + 1)]

    def end_gradient(self, d_y: Tensor, h: Tensor, d: Row | None) -> Tensor:
        """d of the last layer's output; adds to d."""
        d_h, active, d_hidden, _ = self.end.backward(d_y, h)
        if d is not None:
            learn(*d.end[2:], d_y, active)
            learn(*d.end[:2], d_hidden, h)
        return d_h

    def layer_gradient(
        self, k: int, d_y: Tensor, h: Tensor, some: Part, d: Row | None, d_edges: Tensor | None
    ) -> Tensor:
        """d of layer k's input (nodes, W) from that of its output; adds to d and d_edges."""
        W, n, edges = self.W, self.n, self.edges[some.edges]
        p, sums = self.sums(k, h, some)
        d_sums, active, d_begin, _ = self.update[k].backward(d_y, sums)
        d_q, active_pairs, d_z = self.messages[k].backward(d_sums, p, edges, some.samples)
        d_p, pairs = torch.empty_like(p), d_z.view(-1, n, n, W)
        for part, axis in ((d_p[:, :W], 2), (d_p[:, W:], 1)):
            part.unflatten(0, (-1, n)).copy_(pairs.sum(axis))
        d_shared = pairs.view(-1, some.samples, n * n, W).sum(1).flatten(0, 1)  # (pairs of edges, W)
        if d_edges is not None:
            d_edges[some.edges] += (d_shared @ self.row.layers[k].pair[:, 2 * W :]).view_as(edges)
        if d is not None:
            own = d.layers[k]
            learn(own.end, own.end_bias, d_y, active)
            learn(own.begin, own.begin_bias, d_begin, sums)
            learn(own.message, own.message_bias, d_q, active_pairs)
            learn(own.pair[:, :W], own.pair_bias, d_p[:, :W], h)
            own.pair[:, W : 2 * W].addmm_(d_p[:, W:].t(), h)
            own.pair[:, 2 * W :].addmm_(d_shared.t(), edges.flatten(0, 2))
        return linear(d_p, self.both[k]).add_(d_sums[:, :W])


def forward(x, edges, weights, width, layers, out_features, keep, allow_bf16=False) -> tuple[Tensor, Tensor]:
    call = Call(x, edges, weights, width, layers, out_features)
    M, n = call.M, call.n
    y = torch.empty(M, n, out_features, dtype=x.dtype, device=x.device)
    kept = kept_memory(kept_rows(M) if keep else 0, (layers + 1) * n * width, (layers + 1) * M * n * width, x)
    with torch.autocast(x.device.type, enabled=False):
        for some in call.parts(8 * n * width):
            places = call.places(kept, some) if keep else call.fresh(some, False)
            call.end.forward(call.states(some, places)[-1], y[some.x].view(-1, out_features))
    return y, kept


def backward(
    d_y, x, edges, weights, kept, width, layers, out_features, needs_x, needs_edges, needs_weights, allow_bf16=False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    call = Call(x, edges, weights, width, layers, out_features)
    M, n = call.M, call.n
    rows = check_axes("kept", kept, 2)[0]
    shape = kept_rows(M) if rows else 0, (layers + 1) * n * width
    check_tensors(x.device, d_y=(d_y, (M, n, out_features)), kept=(kept, shape))
    kept, d_y = kept.contiguous(), d_y.contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_edges = torch.zeros(edges.shape, dtype=x.dtype, device=x.device) if needs_edges else None
    d_weights = torch.zeros_like(call.weights) if needs_weights else None
    d = None if d_weights is None else Row(d_weights, *call.sizes)
    again = 0 if rows else layers * n * width
    with torch.autocast(x.device.type, enabled=False):
        for some in call.parts(again + (12 + 4 * n) * n * width):
            states = call.places(kept, some) if rows else call.states(some, call.fresh(some, True))
            d_h = call.end_gradient(d_y[some.x].flatten(0, 1), states[-1], d)
            for k in reversed(range(layers)):
                d_h = call.layer_gradient(k, d_h, states[k], some, d, d_edges)
            if d is not None:
                learn(*d.embed, d_h, call.x[some.x].flatten(0, 1))
            if d_x is not None:
                d_x[some.x] = (d_h @ call.row.embed[0]).view(-1, n, x.shape[-1])
    return d_x, d_edges, d_weights
