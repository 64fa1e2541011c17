"""linear_batch_norm_relu: a layer in one pass."""

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from tests.ops.triton.interpreted.checks import DTYPES, check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:var\\(\\)")  # of no numbers, by torch
@pytest.mark.parametrize(("M", "C"), [(1, 3), (70, 1), (201, 20), (130, 150), (1100, 3), (4, 0)])
def test_linear_batch_norm_relu(M, C, dtype, monkeypatch):
    """One row, one channel, parts that are not full, more parts than are added at a time, several blocks of channels."""
    if M == 1100:
        monkeypatch.setattr("probsym_fast.ops.triton.linear_batch_norm_relu.LEAST", 16)
    x, linear = (
        (torch.randn(M, 4) * 3 + 1).to(dtype),
        torch.eye(4, dtype=dtype).repeat(C // 4 + 1, 1)[:C],
    )  # z has no rounding
    weight, bias = torch.randn(2, C)
    check("linear_batch_norm_relu", [x, linear, weight, bias, 0.1 if M == 1 else 1e-5], [0, 1, 2, 3])
    _, mean, variance = launcher("linear_batch_norm_relu", "forward")(x, linear, weight, bias, 1e-5)
    z = x @ linear.T
    assert mean.dtype == variance.dtype == torch.float32
    assert torch.allclose(mean.double(), z.double().mean(0), rtol=1e-5)
    assert torch.allclose(variance.double(), z.double().var(0, correction=0), rtol=1e-5)


def test_batch_norm_of_nan_and_of_a_large_mean():
    x, linear = torch.randn(50, 3) + torch.tensor([0.0, 3e4, 0.0]), torch.eye(3)
    exact = OPS["linear_batch_norm_relu"].reference(
        *(t.double() for t in (x, linear, torch.ones(3), torch.zeros(3))), 0.0
    )
    linear[2, 2] = torch.nan
    y, _, variance = launcher("linear_batch_norm_relu", "forward")(x, linear, torch.ones(3), torch.zeros(3), 0.0)
    assert y[:, 2].isnan().all() and not y[:, :2].isnan().any()
    assert (variance[:2].double() - exact[2][:2]).abs().max() < 1e-4
    assert (y[:, :2].double() - exact[0][:, :2]).abs().max() < 5e-3  # float32 has four digits behind 3e4
