"""message_passing: whole networks on small graphs with all edges."""

import pytest
import torch

from probsym_fast.ops.triton import _lazy as launcher
from tests.helpers.networks import message_weights
from tests.ops.triton.interpreted.checks import check


@pytest.mark.parametrize(
    ("B", "S", "n", "features", "C", "width", "layers", "out", "keep"),
    [
        (2, 2, 4, 3, 2, 5, 2, 2, True),
        (1, 2, 3, 6, 0, 70, 1, 3, False),
        (2, 1, 1, 5, 3, 9, 1, 33, True),
        (0, 1, 3, 2, 1, 4, 1, 2, False),
    ],
)
def test_message_passing(B, S, n, features, C, width, layers, out, keep):
    """Several blocks of features; no edge features, one node, no graphs. Loops are not read, nor counted."""
    row = message_weights(features, C, width, layers, out).float()
    x, edges = torch.randn(B * S, n, features), torch.randn(B, n, n, C)
    edges.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    check("message_passing", [x, edges, row, width, layers, out, keep, False], [0, 1, 2])


def test_message_passing_of_some_graphs_at_a_time(monkeypatch):
    """Some samples of a graph, and several graphs; what is computed again is the same to the bit; NaN stays in its graph."""
    row = message_weights(3, 2, 6, 1, 2).float()
    x, edges = torch.randn(6, 3, 3), torch.randn(2, 3, 3, 2)
    for bytes_ in (4 * 5 * 470, 2 * 4 * 470):  # of 3 samples and more, of 2
        monkeypatch.setattr("probsym_fast.ops.triton.message_passing.BYTES", bytes_)
        check("message_passing", [x, edges, row, 6, 1, 2, True, False], [0, 1, 2])
    monkeypatch.setattr("probsym_fast.ops.triton.message_passing.BYTES", 2**26)
    x[4, 1] = torch.nan
    found = []
    for keep in (True, False):
        y, kept = launcher("message_passing", "forward")(x, edges, row, 6, 1, 2, keep)
        settings = 6, 1, 2, True, False, False
        found.append(
            (y, launcher("message_passing", "backward")(torch.ones_like(y), x, edges, row, kept, *settings)[0])
        )
    for kept, again in zip(*found, strict=True):
        assert kept.flatten(1).isnan().any(1).tolist() == [m == 4 for m in range(6)]
        torch.testing.assert_close(again, kept, rtol=0, atol=0, equal_nan=True)
