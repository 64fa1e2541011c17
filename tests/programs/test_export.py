"""torch.export, strict or not: one program for every number of graphs, nodes and edges, against eager at other sizes."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.programs.cases import cases_of_export, refused
from tests.programs.rows import SIZES, varying


@pytest.mark.parametrize(("row", "strict"), cases_of_export())
def test_one_program_for_all_sizes(row, strict):
    torch._dynamo.reset()
    program, shapes = row.program(False), varying(row, *row.axes)
    with torch.no_grad(), refused(row):
        inputs = (row.sample(SIZES["batch"][0], False),)
        run = torch.export.export(program, inputs, dynamic_shapes={"inputs": shapes}, strict=strict).module()
        for size in [size for axis in row.axes for size in SIZES[axis][2:]]:
            found, expected = (tree_leaves(x(row.sample(size, False))) for x in (run, program))
            torch.testing.assert_close(found, expected)
