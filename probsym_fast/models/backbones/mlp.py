"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast._checks import check_bool, check_int, check_type
from probsym_fast.models.backbones.fused import OnePass, row

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
WIDTH, ROWS = 128, 1000  # up to this width and from so many rows on, two layers or more run in one pass


class Layers(OnePass):
    """Linear maps with one activation between them, as `layers`; `first`, `last`: also before and after them."""

    op = "mlp"
    layers: nn.Sequential
    widths: list[int]
    activation: str
    first: bool
    last: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.why_modules(x) is not None:
            return self.layers(x)
        y = ops.mlp(
            x.reshape(-1, self.widths[0]),
            row(part for part in self.layers if isinstance(part, nn.Linear)),
            widths=self.widths,
            activation=self.activation,
            first=self.first,
            last=self.last,
            recompute=self.recompute,
        )
        return y.reshape(*x.shape[:-1], self.widths[-1])

    def unfit(self, x: Tensor) -> str | None:
        if not x.ndim or x.shape[-1] != self.widths[0]:  # a linear map says so
            return f"{x.shape[-1] if x.ndim else 'no'} features, not {self.widths[0]}"
        return self.too_few(x.shape[:-1], "rows")

    def fewest(self) -> int:
        return ROWS

    def faster_than_half(self, bf16: bool) -> bool:
        return False  # nearly all of it are products, which processors have in bfloat16

    def too_large(self) -> str | None:
        if len(self.widths) < 3:
            return "fewer than two linear maps"
        return f"width {max(self.widths)}" if max(self.widths) > WIDTH else None


class MLP(Layers):
    """Alternating activations and linear maps after an embedding, which is the first linear map: (..., widths[0]) ->
    (..., widths[-1]).

    widths: of the embedding and of every later layer. activation: "tanh", "relu" or "gelu", before every linear map,
    and with `last` after the last one too.

    Up to width 128 and from 1000 rows on, two linear maps or more run as one op, `ops.mlp`, where it has a kernel and
    nothing has to happen between them: no autocast, hook or replaced part (`why_modules` names what does). The numbers are
    those of the modules up to rounding. recompute: see `OnePass`.
    """

    def __init__(self, widths: Sequence[int], activation: str = "relu", last: bool = False, recompute: bool = False):
        super().__init__("MLP", recompute)
        check_type("MLP", "widths", widths, Iterable, "a sequence of ints")
        widths = [check_int("MLP", "each of widths", width) for width in widths]
        if len(widths) < 1 or min(widths) < 1:
            raise ValueError(f"MLP: widths must be at least 1 each, got {widths}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        last = check_bool("MLP", "last", last)
        self.widths, self.activation, self.first, self.last = widths, activation, True, last
        self.layers = nn.Sequential()
        for size, out in pairwise(widths):
            self.layers.extend([ACTIVATIONS[activation](), nn.Linear(size, out)])
        if last:
            self.layers.append(ACTIVATIONS[activation]())
        self.built()
