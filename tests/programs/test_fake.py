"""FakeTensorMode: forward and backward passes without values give the shapes and dtypes of those with values."""

import pytest
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.programs.cases import cases, refused
from tests.programs.rows import SIZES, step

SIZE = SIZES["batch"][1]


def check(row, training: bool) -> None:
    real = step(row.program(training), row.sample(SIZE, training), training)
    program, inputs, mode = row.program(training), row.sample(SIZE, training), FakeTensorMode()
    for module in program.modules():
        module._parameters.update({name: parameter(mode, p) for name, p in module._parameters.items()})
        module._buffers.update({name: mode.from_tensor(x) for name, x in module._buffers.items()})
    inputs = tree_map(lambda x: parameter(mode, x) if x.requires_grad else mode.from_tensor(x), inputs)
    with mode:
        fake = step(program, inputs, training)
    assert all(isinstance(x, FakeTensor) for x in fake)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
    leaves = [x for x in (*program.parameters(), *tree_leaves(inputs)) if x.requires_grad]
    assert not training or any(x.grad is not None for x in leaves)


def parameter(mode: FakeTensorMode, p: Tensor | None) -> nn.Parameter | None:
    return None if p is None else nn.Parameter(mode.from_tensor(p.detach()))


@pytest.mark.parametrize("row", cases())
def test_forward(row):
    with refused(row):
        check(row, False)


@pytest.mark.parametrize("row", cases(lambda row: row.trains))
def test_forward_and_backward(row):
    check(row, True)
