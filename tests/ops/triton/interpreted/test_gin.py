"""gin: whole networks on graphs."""

import pytest
import torch

from probsym_fast.ops.reference._parts import FUNCTIONS
from tests.helpers.items import batch
from tests.helpers.networks import gin_weights
from tests.ops.triton.interpreted.checks import check


@pytest.mark.parametrize(
    ("sizes", "S", "W", "layers", "out", "act", "final", "keep", "most"),
    [
        ([2, 3, 1, 0], 3, 5, 3, 2, "gelu", True, True, 2**26),
        ([3, 1], 3, 8, 2, 3, "tanh", False, False, 1),
        ([3], 2, 8, 2, 3, "silu", True, True, 1),
        ([2, 1], 1, 70, 1, 3, "relu", False, True, 2**26),
        ([0, 0], 2, 3, 2, 2, "relu", True, True, 2**26),
        ([], 2, 3, 1, 2, "tanh", False, False, 2**26),
        ([2], 0, 3, 2, 2, "tanh", False, True, 2**26),
    ],
)
def test_gin(sizes, S, W, layers, out, act, final, keep, most, monkeypatch):
    """All samples, and one at a time; several blocks of features; graphs without nodes, no graphs, no samples."""
    monkeypatch.setattr("probsym_fast.ops.triton.gin.BYTES", most)
    nodes, ptr = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    edges = batch(sizes, max(sizes), edges=12).edges if nodes else torch.zeros(2, 0, dtype=torch.int64)
    x, row = torch.randn(nodes, S, W), gin_weights(W, layers, out).float()
    check("gin", [x, edges, ptr, row, layers, out, list(FUNCTIONS).index(act), final, keep], [0, 3])
