"""Inductor's own code, of one graph without a break, in float64: the eager numbers.

Except for whole models all rows of a kind are one program, which compiles in a fraction of the time of many.
"""

import pytest
import torch
from torch import nn

from tests.programs.cases import BY_HAND
from tests.programs.rows import ROWS, SIZES, Row, Size, step

PROGRAMS: dict[str, list[Row]] = {}  # kind or whole model -> rows
for name, row in ROWS.items():
    PROGRAMS.setdefault(name if row.whole else row.kind, []).append(row)
OFTEN = {  # the others take minutes
    ("readouts", True, True),
    ("flat mlp", False, False),
    ("points gnn", True, False),
}


class All(nn.Module):
    """Several programs as one, of a tuple of their inputs."""

    def __init__(self, programs: list[nn.Module]):
        super().__init__()
        self.programs = nn.ModuleList(programs)

    def forward(self, inputs: tuple) -> list:
        return [program(some) for program, some in zip(self.programs, inputs, strict=True)]


def inputs(rows: list[Row], size: Size, training: bool) -> tuple:
    return tuple(row.sample(size, training, torch.float64) for row in rows)


def combinations() -> list:
    """Of a program, training or eval, one size or any."""
    found = []
    for name in PROGRAMS:
        for training in (False, True):
            for dynamic in (False, True):
                marks = [pytest.mark.slow] if (name, training, dynamic) in OFTEN else BY_HAND
                case = f"{name}-{'train' if training else 'eval'}-{'dynamic' if dynamic else 'static'}"
                found.append(pytest.param(PROGRAMS[name], training, dynamic, id=case, marks=marks))
    return found


@pytest.mark.parametrize(("rows", "training", "dynamic"), combinations())
def test_values_and_gradients(rows, training, dynamic):
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
