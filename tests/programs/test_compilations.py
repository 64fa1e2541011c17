"""How often torch.compile compiles: twice in eval and three times in training at most, for six sizes along each axis.

The first compilation is for one size, the second for any (one more for `GraphTokens` by density). aot_eager traces as
Inductor does, and generates no code.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.programs.cases import cases_by_axis, cases_of_compilation, refused
from tests.programs.rows import SIZES, step

MOST = {False: 2, True: 3}  # training -> compilations


def check(row, axes: tuple[str, ...], training: bool) -> None:
    """Of sizes along one axis after another. With more graphs there are more edges, but clouds keep their number of points:
    that axis takes one more program."""
    torch._dynamo.reset()
    program, eager = row.program(training), row.program(training)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(program, backend=counter, fullgraph=True)
    most = MOST[training] + row.programs - 1
    for number, axis in enumerate(axes):
        for size in SIZES[axis]:
            found = step(run, row.sample(size, training), training)
            torch.testing.assert_close(found, step(eager, row.sample(size, training), training), rtol=1e-3, atol=1e-4)
        most += number > 0 and axis == "nodes"
        assert 1 <= counter.frame_count <= most
    for (name, p), q in zip(program.named_parameters(), eager.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-3 * q.grad.abs().max().clamp(min=1), name


@pytest.mark.parametrize("row", cases_of_compilation(True))
def test_in_training(row):
    check(row, row.axes, True)


@pytest.mark.parametrize("row", cases_of_compilation(False))
def test_in_eval(row):
    with refused(row):
        check(row, row.axes, False)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(("row", "axis"), cases_by_axis())
def test_along_one_axis(row, axis, training):
    """By hand: the programs for any size along this axis only."""
    if training and not row.trains:
        pytest.skip("nothing to train")
    with refused(row):
        check(row, (axis,), training)
