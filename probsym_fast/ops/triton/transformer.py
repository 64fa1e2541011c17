"""transformer and its gradient: forward three launches a block, backward seven and the library, for some sequences at a time.

    attended = heads(norm(h)),   middle = h + out(attended),   h = middle + down(act(up(norm(middle))))
The last block goes on with the tokens that are read. Backward, `attended` and `middle` are computed again from each block's
input, which is kept or itself computed again. The library computes both ends and the products of the weights' gradients: of
a map after a norm it is G = d^T normal, of the rows before gain and shift, from which the others follow for all layers at
once: d_weight = G gain + d_bias shift^T, d_gain = sum_out weight G, d_shift = weight^T d_bias. No sum uses atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast.ops._weights import kept_memory, kept_rows
from probsym_fast.ops.reference._parts import Parts
from probsym_fast.ops.transformer import beyond_kernels, weights_of
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_counts, check_tensors
from probsym_fast.ops.triton.attention import Attention
from probsym_fast.ops.triton.feedforward import Feedforward
from probsym_fast.ops.triton.rows import learn, linear

BYTES = 2**28  # of states and gradients at a time


class Block(NamedTuple):
    """The weights of one, or their gradients."""

    gain1: Tensor
    shift1: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    gain2: Tensor
    shift2: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


class Row:
    """All parts of a row of weights, or of its gradient, as views."""

    def __init__(self, row: Tensor, sizes: Sequence[int], L: int):
        E, W, layers, _, hidden, out = sizes
        part = Parts(row)

        def linear(into: int, features: int) -> tuple[Tensor, Tensor]:
            return part(features, into), part(features)

        self.embed = (*linear(E, W), part(L, W)) if E else None  # with the positions
        self.blocks = [
            Block(
                part(W),
                part(W),
                *linear(W, 3 * W),
                *linear(W, W),
                part(W),
                part(W),
                *linear(W, hidden),
                *linear(hidden, W),
            )
            for _ in range(layers)
        ]
        self.head = (part(W), part(W), *linear(W, W), *linear(W, out)) if out else None


class Call:
    """The checked arguments, and what runs on some of the sequences."""

    def __init__(self, x, weights, lengths, sizes, read, gelu, eps):
        (M, L, features), self.sizes, self.eps = check_axes("x", x, 3), tuple(sizes), eps
        valid = len(sizes) == 6 and min(sizes) >= 0 and min(sizes[1:5]) >= 1 and sizes[1] % sizes[3] == 0
        if not valid or L < 1 or features != (sizes[0] or sizes[1]):
            raise Refused(ValueError, f"sizes must fit x {tuple(x.shape)}, got {list(sizes)}")
        self.E, self.W, self.layers, heads, self.hidden, self.out = self.sizes
        if lengths is not None and len(read):
            raise Refused(ValueError, f"read must be empty where lengths are given, got {len(read)} tokens")
        if not all(0 <= token < L for token in read):
            raise Refused(ValueError, f"each of read must be in 0..{L - 1}, got {list(read)}")
        if (lacking := beyond_kernels("cuda", max(L, len(read)), self.sizes)) is not None:
            raise Refused(ValueError, lacking)
        check_tensors(x.device, weights=(weights, (weights_of(self.sizes, L),)), lengths=(lengths, (M,)))
        check_counts(values_of_all_sequences=M * L)
        self.M, self.L, self.read, self.act = M, L, list(read), "gelu" if gelu else "relu"
        self.outputs = len(self.read) or L
        self.x, self.weights = x.contiguous(), weights.contiguous()
        self.lengths = None if lengths is None else lengths.contiguous()
        self.row = Row(self.weights, self.sizes, L)
        self.attention = [Attention(*b[:4], heads, eps) for b in self.row.blocks]
        self.mlp = [Feedforward(*b[8:], self.act, (b.gain2, b.shift2), eps) for b in self.row.blocks]

    def parts(self, values: int) -> list[slice]:
        """The sequences, as many at a time as `values` numbers a token each allow."""
        step = max(1, BYTES // (4 * values * self.L))
        return [slice(first, min(self.M, first + step)) for first in range(0, self.M, step)]

    def inputs(self, some: slice) -> tuple[Tensor, Tensor | None]:
        """x (m L, E) of some sequences, after the end of one its last token again, whose norm is finite; the lengths."""
        x, lengths = self.x[some], None
        if self.lengths is not None:
            lengths = self.lengths[some]
            last = torch.minimum(torch.arange(self.L, device=x.device), lengths[:, None] - 1).clamp(min=0)
            x = x.gather(1, last[..., None].expand(x.shape))
        return x.flatten(0, 1), lengths

    def begin(self, x: Tensor, state: Tensor) -> Tensor:
        """The input of the first block, in `state`."""
        if self.row.embed is None:
            return state.copy_(x)
        weight, bias, positions = self.row.embed
        torch.addmm(bias, x, weight.t(), out=state)
        state.view(-1, self.L, self.W).add_(positions)
        return state

    def chosen(self, k: int, x: Tensor) -> Tensor:
        """The rows that block k goes on with, of all its rows (m L, ...)."""
        if not self.read or k + 1 < self.layers:
            return x
        rows = x.view(-1, self.L, x.shape[-1])
        return torch.stack([rows[:, token] for token in self.read], 1).flatten(0, 1)  # an index would wait for the GPU

    def middle(self, k: int, state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """`attended` and `middle` of block k, of the rows that it goes on with."""
        block, rows = self.row.blocks[k], state.view(-1, self.L, self.W)
        attended = self.chosen(k, self.attention[k].forward(rows, lengths).view(-1, self.W))
        return attended, linear(attended, block.out.t(), block.out_bias, self.chosen(k, state))

    def states(self, x: Tensor, lengths: Tensor | None, places: Sequence[Tensor]) -> list[Tensor]:
        """The input of every block and the output of the last, in places."""
        found = [self.begin(x, places[0])]
        for k in range(self.layers):
            found.append(self.mlp[k].forward(self.middle(k, found[k], lengths)[1], places[k + 1]))
        return found

    def places(self, kept: Tensor, some: slice) -> list[Tensor]:
        """Where kept has the states of some sequences, layer by layer."""
        memory, L, W = kept.view(-1), self.L, self.W
        inner = memory[: self.layers * self.M * L * W].view(self.layers, self.M, L * W)[:, some]
        last = memory[self.layers * self.M * L * W :][: self.M * self.outputs * W].view(self.M, -1)[some]
        return [*(x.view(-1, W) for x in inner), last.view(-1, W)]

    def fresh(self, m: int, own: bool) -> list[Tensor]:
        """Places for states of m sequences: each layer's own, or two that take turns."""
        rows = torch.empty(self.layers if own else 2, m * self.L, self.W, dtype=self.x.dtype, device=self.x.device)
        last = torch.empty(m * self.outputs, self.W, dtype=self.x.dtype, device=self.x.device)
        return [*(rows[k if own else k % 2] for k in range(self.layers)), last]

    def end(self, last: Tensor) -> tuple[Tensor, ...]:
        """y of the last block's output (rows, W); with a head its hidden row, the norm, its mean and 1 / deviation."""
        if self.row.head is None:
            return (last,)
        gain, shift, hidden, hidden_bias, head, head_bias = self.row.head
        norm, mean, inverse = torch.native_layer_norm(last, (self.W,), gain, shift, self.eps)
        active = F.linear(norm.relu(), hidden, hidden_bias).relu()
        return F.linear(active, head, head_bias), active, norm, mean, inverse

    def end_gradient(self, d_y: Tensor, last: Tensor, d: Row | None) -> Tensor:
        """d of the last block's output; adds the gradients of the head's weights to d."""
        if self.row.head is None:
            return d_y
        gain, shift, hidden, _, head, _ = self.row.head
        _, active, norm, mean, inverse = self.end(last)
        d_active = torch.where(active <= 0, 0.0, d_y @ head)
        d_norm = torch.where(norm <= 0, 0.0, d_active @ hidden)
        backward = torch.ops.aten.native_layer_norm_backward
        d_last, d_gain, d_shift = backward(d_norm, last, (self.W,), mean, inverse, gain, shift, (True, True, True))
        if d is not None and d.head is not None:
            learn(*d.head[2:4], d_active, norm.relu())
            learn(*d.head[4:], d_y, active)
            d.head[0].add_(d_gain)
            d.head[1].add_(d_shift)
        return d_last

    def block_gradient(self, k: int, d_y: Tensor, x: Tensor, lengths: Tensor | None, d: Row | None) -> Tensor:
        """d of block k's input x (m L, W) from that of its output; adds to d."""
        attended, middle = self.middle(k, x, lengths)
        d_middle, active, d_up, normal2 = self.mlp[k].backward(d_y, middle)
        d_attended = self.spread(k, linear(d_middle, self.row.blocks[k].out))
        shape = x.shape[0] // self.L, self.L, self.W
        d_qkv = self.attention[k].backward(d_attended.view(shape), x.view(shape), lengths).flatten(0, 1)
        d_x, normal1 = self.attention[k].input_gradient(d_qkv, x, self.spread(k, d_middle))
        if d is not None:
            own = d.blocks[k]
            learn(own.down, own.down_bias, d_y, active)
            learn(own.up, own.up_bias, d_up, normal2)
            learn(own.out, own.out_bias, d_middle, attended)
            learn(own.qkv, own.qkv_bias, d_qkv, normal1)
        return d_x

    def spread(self, k: int, d: Tensor) -> Tensor:
        """From the rows that block k goes on with to all."""
        if not self.read or k + 1 < self.layers:
            return d
        rows = d.view(-1, self.outputs, d.shape[-1])
        found = d.new_zeros(rows.shape[0], self.L, d.shape[-1])
        for r, token in enumerate(self.read):  # in their order: a token may be read twice
            found[:, token] += rows[:, r]
        return found.flatten(0, 1)

    def begin_gradient(self, d_state: Tensor, x: Tensor, d: Row | None, needs_x: bool) -> Tensor | None:
        """d of x (m L, E); adds to d."""
        if self.row.embed is None:
            return d_state
        if d is not None and d.embed is not None:
            learn(*d.embed[:2], d_state, x)
            d.embed[2].add_(d_state.view(-1, self.L, self.W).sum(0))
        return d_state @ self.row.embed[0] if needs_x else None

    def finish(self, gradient: Tensor) -> None:
        """The gradients of the norms and of the maps after them, of all layers at once, from G, which they replace."""
        size = sum(x.numel() for x in self.row.blocks[0])
        begin = (self.E + 1 + self.L) * self.W if self.E else 0
        of, d = (
            Block(*self._layers(row[begin:][: self.layers * size].view(self.layers, size)))
            for row in (self.weights, gradient)
        )
        for gain, shift, d_gain, d_shift, weight, G, d_bias in (
            (of.gain1, of.shift1, d.gain1, d.shift1, of.qkv, d.qkv, d.qkv_bias),
            (of.gain2, of.shift2, d.gain2, d.shift2, of.up, d.up, d.up_bias),
        ):
            d_gain.copy_((weight * G).sum(1))
            d_shift.copy_((weight * d_bias[:, :, None]).sum(1))
            G.mul_(gain[:, None]).addcmul_(d_bias[:, :, None], shift[:, None])

    def _layers(self, rows: Tensor) -> list[Tensor]:
        """The parts of all layers, (layers, ...)."""
        shapes = [x.shape for x in self.row.blocks[0]]
        pieces = rows.split([shape.numel() for shape in shapes], 1)
        return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def forward(x, weights, lengths, sizes, read, gelu, eps, keep, allow_bf16=False) -> tuple[Tensor, Tensor]:
    call = Call(x, weights, lengths, sizes, read, gelu, eps)
    M, outputs, features = call.M, call.outputs, call.out or call.W
    y = torch.empty(M, outputs, features, dtype=x.dtype, device=x.device)
    width = (call.layers * call.L + outputs) * call.W
    kept = kept_memory(kept_rows(M) if keep else 0, width, M * width, x)
    with torch.autocast(x.device.type, enabled=False):
        for some in call.parts(8 * call.W + call.hidden):
            own, lengths = call.inputs(some)
            places = call.places(kept, some) if keep else call.fresh(own.shape[0] // call.L, False)
            y[some] = call.end(call.states(own, lengths, places)[-1])[0].view(-1, outputs, features)
    if call.lengths is not None:
        y.masked_fill_(after(call.lengths, call.L), 0)
    return y, kept


def backward(
    d_y, x, weights, kept, lengths, sizes, read, gelu, eps, needs_x, needs_weights, allow_bf16=False
) -> tuple[Tensor | None, Tensor | None]:
    call = Call(x, weights, lengths, sizes, read, gelu, eps)
    M, features = call.M, call.out or call.W
    width = (call.layers * call.L + call.outputs) * call.W
    rows = check_axes("kept", kept, 2)[0]
    shape = kept_rows(M) if rows else 0, width
    check_tensors(x.device, d_y=(d_y, (M, call.outputs, features)), kept=(kept, shape))
    kept, d_y = kept.contiguous(), d_y.contiguous()
    if call.lengths is not None:
        d_y = d_y.masked_fill(after(call.lengths, call.L), 0)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_weights = torch.zeros_like(call.weights) if needs_weights else None
    d = None if d_weights is None else Row(d_weights, call.sizes, call.L)
    again = 0 if rows else call.layers * call.W
    with torch.autocast(x.device.type, enabled=False):
        for some in call.parts(again + 12 * call.W + 2 * call.hidden):
            own, some_lengths = call.inputs(some)
            if rows:
                states = call.places(kept, some)
            else:
                states = call.states(own, some_lengths, call.fresh(own.shape[0] // call.L, True))
            d_state = call.end_gradient(d_y[some].reshape(-1, features), states[-1], d)
            for k in reversed(range(call.layers)):
                d_state = call.block_gradient(k, d_state, states[k], some_lengths, d)
            d_own = call.begin_gradient(d_state, own, d, needs_x)
            if d_x is not None and d_own is not None:
                d_x[some] = d_own.view(-1, *x.shape[1:])
        if d_weights is not None:
            call.finish(d_weights)
    return d_x, d_weights


def after(lengths: Tensor, L: int) -> Tensor:
    """(M, L, 1): the tokens after the end of each sequence."""
    return (torch.arange(L, device=lengths.device) >= lengths[:, None])[..., None]
