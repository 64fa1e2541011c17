"""batch_norm_relu against torch's BatchNorm1d and ReLU, and the module that uses it."""

import re

import pytest
import torch

from probsym_fast.distributions.gin import BatchNormRelu
from probsym_fast.ops import OPS, batch_norm_relu
from tests.ops.graphs import DTYPES, bit_equal_on_any_threads, check

BACKENDS = OPS["batch_norm_relu"].backends("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 1), (17, 3), (255, 64), (257, 64), (1000, 70), (5, 0)])
def test_value_and_gradients(device, shape, dtype):
    x = torch.randn(shape, device=device).double() * 3 + 1
    weight, bias = torch.randn(2, shape[1], device=device).double()
    if not x.numel():
        assert batch_norm_relu(x, weight, bias)[0].shape == shape
        return
    check("batch_norm_relu", lambda b, *leaves: batch_norm_relu(*leaves, backend=b)[0], [x, weight, bias], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_statistics(backend):
    x, (weight, bias) = torch.randn(6, 4).double(), torch.randn(2, 4).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: batch_norm_relu(*t, backend=backend)[0], leaves)
    _, mean, variance = batch_norm_relu(*leaves, backend=backend)
    assert torch.allclose(mean, x.mean(0)) and torch.allclose(variance, x.var(0, correction=0))
    assert not mean.requires_grad and not variance.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_module_equals_torch(training):
    ours, theirs = BatchNormRelu(5).double().train(training), torch.nn.BatchNorm1d(5).double().train(training)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(q.copy_(torch.randn(5)))
        for module in (ours, theirs):
            module.running_mean.fill_(0.3)
            module.running_var.fill_(1.7)
    for _ in range(3):
        x = torch.randn(40, 5).double() + 2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b).relu()
        weights = torch.randn_like(y)
        assert torch.allclose(y, z)
        assert torch.allclose(*(torch.autograd.grad((o * weights).sum(), i)[0] for o, i in ((y, a), (z, b))))
    assert torch.allclose(ours.running_mean, theirs.running_mean)
    assert torch.allclose(ours.running_var, theirs.running_var)


def test_nan_and_a_constant_channel():
    x = torch.randn(50, 3)
    x[:, 1] = 4.0
    weight, bias = torch.ones(3), torch.tensor([0.0, 0.5, 0.0])
    for backend in BACKENDS:
        y, _, _ = batch_norm_relu(x, weight, bias, backend=backend)
        assert torch.allclose(y[:, 1], torch.tensor(0.5))
        bad = x.clone()
        bad[3, 0] = torch.nan
        y, _, _ = batch_norm_relu(bad, weight, bias, backend=backend)
        assert y[:, 0].isnan().all() and not y[:, 1:].isnan().any()


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_on_any_threads(dtype):
    x, (weight, bias) = torch.randn(3000, 64, dtype=dtype), torch.randn(2, 64, dtype=dtype)
    bit_equal_on_any_threads(lambda *t: batch_norm_relu(*t, backend="cpu")[0], [x, weight, bias])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    x, one = torch.randn(4, 3), torch.ones(3)
    for arguments, message in (
        ((x[0], one, one), "x must be (M, C) with M >= 1, got (3,)"),
        ((x[:0], one, one), "x must be (M, C) with M >= 1, got (0, 3)"),
        ((x, one[:2], one), "weight must be (C,) = (3,), got (2,)"),
        ((x, one, one[:, None]), "bias must be (C,) = (3,), got (3, 1)"),
    ):
        with pytest.raises(ValueError, match=f"^batch_norm_relu: {re.escape(message)}$"):
            batch_norm_relu(*arguments, backend=backend)
    for eps in (-1e-5, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"^batch_norm_relu: eps must be finite and >= 0, got {eps}$"):
            batch_norm_relu(x, one, one, eps, backend=backend)
    for eps in ("1e-5", True, None):
        with pytest.raises(TypeError, match=f"^batch_norm_relu: eps must be a number, got {type(eps).__name__}$"):
            batch_norm_relu(x, one, one, eps, backend=backend)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        batch_norm_relu(x.long(), one, one, backend=backend)
    with pytest.raises(ValueError, match="at least 2 rows in training"):
        BatchNormRelu(3)(x[:1])
