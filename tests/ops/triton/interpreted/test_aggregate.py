"""aggregate: sums over the edges of graphs."""

import pytest
import torch

from tests.helpers.items import batch
from tests.ops.triton.interpreted.checks import DTYPES, check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (330,)])
@pytest.mark.parametrize("virtual", [False, True])
def test_aggregate(shape, dtype, virtual):
    """More edges at a node than are read at a time, a graph of one node and one of none; several blocks of the width and of
    the nodes, of all and of one graph."""
    data = batch([2, 10, 1, 0], 10, edges=40)
    assert data.edges[1].bincount().max() > 4
    x = torch.randn(13 + 4 * virtual, *shape).to(dtype)
    check("aggregate", [x, data.edges, data.ptr if virtual else None, torch.tensor(1.3)], [0, 3])
    check("aggregate", [x, data.edges, data.ptr if virtual else None, None], [0])


@pytest.mark.parametrize("virtual", [False, True])
def test_programs_take_whole_rows(virtual, monkeypatch):
    """As of many nodes: all blocks of the width after one another. More graphs than a search compares at once."""
    monkeypatch.setattr("probsym_fast.ops.triton.aggregate.MANY", 1)
    data = batch([3, 0, *[1] * 66, 8], 8, edges=30)
    x = torch.randn(77 + 69 * virtual, 330)
    check("aggregate", [x, data.edges, data.ptr if virtual else None, torch.tensor(1.3)], [0, 3])


@pytest.mark.parametrize("nodes", [0, 4])
def test_aggregate_of_nothing(nodes):
    x = torch.randn(nodes, 3)
    check("aggregate", [x, torch.zeros(2, 0, dtype=torch.int64), None, torch.tensor(0.5)], [0, 3])
