"""mlp: whole networks on rows."""

import pytest
import torch

from probsym_fast.ops.reference._parts import FUNCTIONS
from probsym_fast.ops.triton import rows
from tests.helpers.networks import mlp_weights
from tests.ops.triton.interpreted.checks import check


@pytest.mark.parametrize(
    ("M", "widths", "act", "first", "last", "keep", "most"),
    [
        (7, [3, 6, 2], "gelu", True, False, True, 600),
        (33, [20, 9, 70, 5], "tanh", False, True, False, 2**26),
        (5, [4, 8, 12, 4, 8], "silu", True, True, True, 2**26),
        (0, [5, 3], "relu", False, False, True, 2**26),
    ],
)
def test_mlp(M, widths, act, first, last, keep, most, monkeypatch):
    """Some rows at a time; several blocks of rows and of hidden features; layers alone behind a wide one; no rows."""
    monkeypatch.setattr("probsym_fast.ops.triton.mlp.BYTES", most)
    monkeypatch.setattr("probsym_fast.ops.triton.mlp.WIDEST", 8)
    x, row = torch.randn(M, widths[0]), mlp_weights(widths).float()
    check("mlp", [x, row, widths, list(FUNCTIONS).index(act), first, last, keep, False], [0, 1])


@pytest.mark.parametrize("scale", [1e-4, 0.3, 3.0, 30.0])
def test_tanh_has_all_digits(scale):
    """Value and slope, near 0 and far from it."""
    x = torch.tensor([-1.1, -0.8, 0.0, 0.7, 1.0, torch.inf, torch.nan]) * scale
    value, slope = rows.activate(x, "tanh"), rows.activate(x, "tanh", torch.ones_like(x))
    exact = x.double()
    torch.testing.assert_close(value.double(), exact.tanh(), rtol=5e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(slope.double(), exact.cosh() ** -2, rtol=5e-6, atol=0, equal_nan=True)
