"""act_orthogonal and orthogonal_frame: matrices and what they act on."""

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from tests.conftest import assert_near
from tests.ops.triton.interpreted.checks import check, in_dtypes


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("dtype", "n", "d", "C"), in_dtypes((5, 3, 1), (60, 2, 9), (2, 5, 2)))
def test_act_orthogonal(n, d, C, mean, per_sample, dtype):
    vectors = torch.randn(2, *[3] * per_sample, n, d, C).to(dtype)
    for inverse in (False, True) if d == 3 else (True,):
        check("act_orthogonal", [vectors, torch.randn(2, 3, d, d), inverse, mean], [0, 1])


@pytest.mark.parametrize("shape", [(0, 3, 1, 3, 3), (2, 3, 0, 3, 1), (2, 3, 4, 3, 0)])
def test_act_orthogonal_of_nothing(shape):
    B, S, n, d, C = shape
    for mean in (False, True):
        check("act_orthogonal", [torch.randn(B, n, d, C), torch.randn(B, S, d, d), False, mean], [0, 1])


@pytest.mark.parametrize("shape", [(1, 1), (7, 1, 1), (5, 2, 2), (150, 3, 3), (2, 3, 3, 3), (0, 3, 3)])
@pytest.mark.parametrize("special", [False, True])
def test_orthogonal_frame(shape, special):
    matrices = torch.randn(shape)
    if matrices.shape[-1] > 1:  # no matrix whose columns nearly depend: there float32 has fewer digits
        matrices = matrices + 3 * torch.eye(shape[-1]).flip(0)
    check("orthogonal_frame", [matrices, special], [0])


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in divide"
)  # of numpy; the kernel brings it back into the range
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_dependent_columns_are_filled(d, special):
    """As the reference fills them, with its gradient: each column zero, equal to another, opposite to it; ties of axes."""
    a = torch.randn(3 * d + 2, d, d) + 3 * torch.eye(d).flip(0)
    for column in range(d):
        other = a[3 * column : 3 * column + 3, :, 0 if column else -1]
        a[3 * column : 3 * column + 3, :, column] = torch.tensor([[0.0], [1.0], [-2.0]]) * other
    a[-2], a[-1] = 0, 1
    q = launcher("orthogonal_frame", "forward")(a, special)
    assert (q.mT @ q - torch.eye(d)).abs().max() < 1e-5
    check("orthogonal_frame", [a, special], [0])
    d_q = torch.randn_like(q)
    gradient = launcher("orthogonal_frame", "backward")(d_q, q, a)
    for column in range(d):
        assert (gradient[3 * column, :, column] == 0).all()
    for scale in (1e-44, 1e-37, 3e38):
        scaled = a.clamp(-1, 1) * scale
        x = scaled.clone().requires_grad_()
        expected = OPS["orthogonal_frame"].reference(x, special)
        q = launcher("orthogonal_frame", "forward")(scaled, special)
        assert_near(q, expected)
        found = launcher("orthogonal_frame", "backward")(d_q, q, scaled)
        assert found.isfinite().all()
        if scale > 1e-38:  # below, rounding is beyond the range, too
            (expected,) = torch.autograd.grad(expected, x, d_q)
            assert (found.double() - expected.double()).abs().max() * scale < 1e-4
