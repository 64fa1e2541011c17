"""The rows name every public op and module."""

import inspect

import pytest
from torch import nn

from probsym_fast import distributions, models, ops
from tests.programs.matrix import PAGE, page
from tests.programs.rows import ROWS, SIZES

WITHOUT = {
    "energy_and_forces",  # refuses to be recorded, tested with it
    "laplacian_keys",  # reads values
    "debug",
    "using_backend",
    "Discrete",
    "Distribution",
    "Noise",
    "OnePass",
}  # settings of a process, and abstract classes


def public() -> list[str]:
    """Ops are functions. Of models and distributions the classes count that are modules or noise, and what makes modules."""
    names = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
    for room in (models, distributions):
        for name in room.__all__:
            x = getattr(room, name)
            if inspect.isfunction(x) or issubclass(x, (nn.Module, distributions.Noise)):
                names.append(name)
    return sorted(set(names) - WITHOUT)


def test_every_public_name_has_a_row():
    assert sorted({name for row in ROWS.values() for name in row.covers}) == public()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_inputs_differ_along_every_axis(row):
    """What the other tests call an axis is one of this row."""
    for axis in row.axes:
        assert len(set(SIZES[axis])) == 6
        shapes = [[x.shape for x in row.leaves(size)] for size in SIZES[axis]]
        assert all(some != shapes[0] for some in shapes[1:])


def test_the_page_is_up_to_date():
    """Else run python -m tests.programs.matrix."""
    assert PAGE.read_text(encoding="utf-8") == page()
