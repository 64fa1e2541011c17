"""The parts of a row of weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# activations by name, in the order of csrc/cpu/network.h
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Parts:
    """Gives the row's values from left to right, as views."""

    def __init__(self, row: Tensor):
        self.row, self.start = row, 0

    def __call__(self, *shape: int) -> Tensor:
        self.start += (count := math.prod(shape))
        return self.row[self.start - count : self.start].view(shape)

    def linear(self, into: int, out: int) -> Callable[[Tensor], Tensor]:
        weight, bias = self(out, into), self(out)
        return lambda x: F.linear(x, weight, bias)
