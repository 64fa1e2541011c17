"""mlp and its gradient: a launch for two layers forward, one a layer and the library backward, for some rows at a time.

    z_k = W_k act(z_(k-1)) + b_k;   backward d_z_(k-1) = (d_z_k W_k) act'(z_(k-1))
Each launch applies the activation to what it reads. The features between its two layers stay on chip, or go to memory once
for the backward pass. The library computes the products of the weights' gradients. No sum uses atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from probsym_fast.ops._weights import kept_memory, kept_rows
from probsym_fast.ops.mlp import ACTIVATIONS, beyond_kernels, weights_of
from probsym_fast.ops.reference._parts import Parts
from probsym_fast.ops.reference.mlp import ROWS, values_kept
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_counts, check_tensors
from probsym_fast.ops.triton.feedforward import Feedforward
from probsym_fast.ops.triton.rows import activate, learn, linear, linear_gradient

BYTES = 2**28  # of features and gradients at a time
WIDEST = 256  # output of two layers at once, which a program holds


class Call:
    """The checked arguments, and what runs on some of the rows."""

    def __init__(self, x: Tensor, weights: Tensor, widths: Sequence[int], activation: int, first: bool, last: bool):
        (self.M, features), self.widths = check_axes("x", x, 2), list(widths)
        if len(self.widths) < 2 or min(self.widths) < 1 or self.widths[0] != features:
            raise Refused(ValueError, f"widths must fit x {tuple(x.shape)}, got {self.widths}")
        if not 0 <= activation < len(ACTIVATIONS):
            raise Refused(ValueError, f"activation must be in 0..{len(ACTIVATIONS) - 1}, got {activation}")
        if (lacking := beyond_kernels(self.widths)) is not None:
            raise Refused(ValueError, lacking)
        check_tensors(x.device, weights=(weights, (weights_of(self.widths),)))
        check_counts(rows=self.M)
        self.x, self.weights, self.act = x.contiguous(), weights.contiguous(), ACTIVATIONS[activation]
        self.first, self.last, self.count = first, last, len(self.widths) - 1
        self.layers = self.parts_of(self.weights)
        ends = accumulate(self.widths[1:])  # where the features of each layer end in a kept row
        self.kept = {k: end for k, end in enumerate(ends, 1) if k < self.count or last}

    def parts_of(self, row: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every layer, of the weights or of their gradient."""
        part = Parts(row)
        return [(part(out, into), part(out)) for into, out in pairwise(self.widths)]

    def some(self, values: int) -> list[slice]:
        """The rows, as many at a time as `values` numbers each allow."""
        step = max(1, BYTES // (4 * values))
        return [slice(first, min(self.M, first + step)) for first in range(0, self.M, step)]

    def places(self, kept: Tensor, some: slice) -> dict[int, Tensor]:
        """Where kept has z of each layer, of some rows."""
        memory, found = kept.view(-1), {}
        for k, end in self.kept.items():
            layer = memory[self.M * (end - self.widths[k]) : self.M * end]
            found[k] = layer.view(self.M, self.widths[k])[some]
        return found

    def fresh(self, some: slice) -> dict[int, Tensor]:
        """Places of z of each layer that a backward pass reads."""
        rows, x = some.stop - some.start, self.x
        return {k: torch.empty(rows, self.widths[k], dtype=x.dtype, device=x.device) for k in self.kept}

    def run(self, some: slice, places: dict[int, Tensor], y: Tensor | None) -> None:
        """y, and z of the layers that have a place; without y what `places` has is all there is to compute."""
        x, first, k = self.x[some], self.first, 0
        last = self.count if y is not None or self.last else self.count - 1
        while k < last:
            layers = 2 if k + 2 <= last and self.widths[k + 2] <= WIDEST else 1
            end = k + layers
            out = places.get(end, y if end == self.count and not self.last else None)
            if out is None:
                out = torch.empty(x.shape[0], self.widths[end], dtype=x.dtype, device=x.device)
            if layers == 2:
                two = Feedforward(*self.layers[k], *self.layers[k + 1], self.act)
                x = two.forward(x, out, first, places.get(k + 1))
            else:
                weight, bias = self.layers[k]
                x = linear(x, weight.t(), bias, act=self.act if first else "", y=out)
            first, k = True, end
        if y is not None and self.last:
            activate(x, self.act, y=y)

    def gradient(self, d: Tensor, some: slice, z: dict[int, Tensor], d_weights: Tensor | None, needs_x: bool) -> Tensor:
        """d of x from that of y, both of some rows; adds that of the weights to d_weights."""
        of_layers = None if d_weights is None else self.parts_of(d_weights)
        z = z | {0: self.x[some]}
        if self.last:
            d = activate(z[self.count], self.act, d)
        for k in reversed(range(self.count)):
            weight, activated = self.layers[k][0], bool(k) or self.first
            if not k and not needs_x:
                d_before, before = d, activate(z[0], self.act) if activated and of_layers else z[0]
            elif activated:
                d_before, before = linear_gradient(d, weight, z[k], self.act)
            else:
                d_before, before = linear(d, weight), z[k]
            if of_layers is not None:
                learn(*of_layers[k], d, before)
            d = d_before
        return d


def forward(x, weights, widths, activation, first, last, keep, allow_bf16=False) -> tuple[Tensor, Tensor]:
    call = Call(x, weights, widths, activation, first, last)
    y = torch.empty(call.M, call.widths[-1], dtype=x.dtype, device=x.device)
    width = values_kept(widths, last)
    kept = kept_memory(_kept_rows(call.M) if keep else 0, width, call.M * max(call.kept.values(), default=0), x)
    for some in call.some(2 * max(call.widths)):
        call.run(some, call.places(kept, some) if keep else {}, y[some])
    return y, kept


def backward(
    d_y, x, weights, kept, widths, activation, first, last, needs_x, needs_weights, allow_bf16=False
) -> tuple[Tensor | None, Tensor | None]:
    call = Call(x, weights, widths, activation, first, last)
    rows = check_axes("kept", kept, 2)[0]
    shape = _kept_rows(call.M) if rows else 0, values_kept(widths, last)
    check_tensors(x.device, d_y=(d_y, (call.M, call.widths[-1])), kept=(kept, shape))
    kept, d_y = kept.contiguous(), d_y.contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_weights = torch.zeros_like(call.weights) if needs_weights else None
    again = 0 if rows else sum(call.widths)
    with torch.autocast(x.device.type, enabled=False):
        for some in call.some(again + 4 * max(call.widths)):
            z = call.places(kept, some) if rows else call.fresh(some)
            if not rows:
                call.run(some, z, None)
            d = call.gradient(d_y[some], some, z, d_weights, needs_x)
            if d_x is not None:
                d_x[some] = d
    return d_x, d_weights


def _kept_rows(M: int) -> int:
    return kept_rows((M + ROWS - 1) // ROWS)
