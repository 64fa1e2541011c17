"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from probsym_fast._checks import check_int, check_type

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class MLP(nn.Module):
    """Alternating activations and linear maps after an embedding, which is the first linear map: (..., widths[0]) ->
    (..., widths[-1]).

    widths: of the embedding and of every later layer. activation: "tanh", "relu" or "gelu", before every linear map,
    and with `last` after the last one too.
    """

    def __init__(self, widths: Sequence[int], activation: str = "relu", last: bool = False):
        super().__init__()
        check_type("MLP", "widths", widths, Iterable, "a sequence of ints")
        widths = [check_int("MLP", "each of widths", width) for width in widths]
        if len(widths) < 1 or min(widths) < 1:
            raise ValueError(f"MLP: widths must be at least 1 each, got {widths}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        self.layers = nn.Sequential()
        for size, out in pairwise(widths):
            self.layers.extend([ACTIVATIONS[activation](), nn.Linear(size, out)])
        if last:
            self.layers.append(ACTIVATIONS[activation]())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
