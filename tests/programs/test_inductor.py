"""Inductor's own code, of one graph without a break, in float64: the eager numbers.

All rows of a kind are one program, which takes a fraction of the time of many. Whole models are programs of their own.
"""

import pytest
import torch
from torch import nn

from tests.programs.rows import ROWS, SIZES, Row, Size, step

KINDS = {kind: [row for row in ROWS.values() if row.kind == kind] for kind in {row.kind: 0 for row in ROWS.values()}}


class All(nn.Module):
    """Several programs as one, of a tuple of their inputs."""

    def __init__(self, programs: list[nn.Module]):
        super().__init__()
        self.programs = nn.ModuleList(programs)

    def forward(self, inputs: tuple) -> list:
        return [program(some) for program, some in zip(self.programs, inputs, strict=True)]


def check(rows: list[Row], training: bool, dynamic: bool) -> None:
    """Of one size, or of any."""
    torch._dynamo.reset()
    rows = [row for row in rows if not row.refuses and (row.trains or not training)]
    eager, compiled = (All([row.program(training) for row in rows]).double() for _ in range(2))
    run = torch.compile(compiled, fullgraph=True, dynamic=dynamic)
    for size in SIZES["batch"][: 3 if dynamic else 1]:
        found, expected = (step(x, inputs(rows, size, training), training) for x in (run, eager))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-7 * q.grad.abs().max().clamp(min=1)


def inputs(rows: list[Row], size: Size, training: bool) -> tuple:
    return tuple(row.sample(size, training, torch.float64) for row in rows)


modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
sizes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@sizes
@modes
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_kind(kind, training, dynamic):
    check(KINDS[kind], training, dynamic)
