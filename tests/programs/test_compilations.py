"""How often torch.compile compiles: twice in eval and three times in training at most, for six sizes along each axis.

The first compilation is for one size, the second for any (one more for `GraphTokens` by density). aot_eager traces as
Inductor does, and generates no code.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.programs.cases import cases_by_axis, refused
from tests.programs.rows import SIZES, step

MOST = {False: 2, True: 3}  # training -> compilations


def check(row, axis: str, training: bool) -> None:
    torch._dynamo.reset()
    program, eager = row.program(training), row.program(training)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(program, backend=counter, fullgraph=True)
    for size in SIZES[axis]:
        found = step(run, row.sample(size, training), training)
        torch.testing.assert_close(found, step(eager, row.sample(size, training), training), rtol=1e-3, atol=1e-4)
    assert 1 <= counter.frame_count <= MOST[training] + row.programs - 1
    for (name, p), q in zip(program.named_parameters(), eager.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-3 * q.grad.abs().max().clamp(min=1), name


@pytest.mark.parametrize(("row", "axis"), cases_by_axis(False))
def test_in_eval(row, axis):
    with refused(row):
        check(row, axis, False)


@pytest.mark.parametrize(("row", "axis"), cases_by_axis(True))
def test_in_training(row, axis):
    check(row, axis, True)
