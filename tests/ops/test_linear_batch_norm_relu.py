"""linear_batch_norm_relu against torch's Linear, BatchNorm1d and ReLU, and the module that uses it."""

import re

import pytest
import torch

from probsym_fast._memory import peak_memory
from probsym_fast.distributions.gin import LinearBatchNormRelu
from probsym_fast.ops import OPS, linear_batch_norm_relu
from tests.helpers.items import DTYPES, bit_equal_on_any_threads, check

OP = "linear_batch_norm_relu"
BACKENDS = OPS[OP].backends("cpu")
built = pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")


def inputs(M, K, C, device="cpu"):
    x, linear = torch.randn(M, K, device=device).double() * 3 + 1, torch.randn(C, K, device=device).double()
    weight, bias = torch.randn(2, C, device=device).double()
    return [x, linear, weight, bias]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (9, 2, 1),
        (17, 5, 3),
        (511, 64, 64),
        (513, 64, 64),
        (1100, 70, 37),
        (600, 2, 65),
        (1100, 37, 70),
        (5, 3, 0),
        (5, 0, 3),
    ],
)
def test_value_and_gradients(device, shape, dtype):
    leaves = inputs(*shape, device)
    if 0 in shape:
        assert linear_batch_norm_relu(*leaves)[0].shape == (shape[0], shape[2])
        return
    check(OP, lambda b, *leaves: linear_batch_norm_relu(*leaves, backend=b)[0], leaves, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_statistics(backend):
    leaves = [t.requires_grad_() for t in inputs(6, 5, 4)]
    assert torch.autograd.gradcheck(lambda *t: linear_batch_norm_relu(*t, backend=backend)[0], leaves)
    _, mean, variance = linear_batch_norm_relu(*leaves, backend=backend)
    z = leaves[0] @ leaves[1].T
    assert torch.allclose(mean, z.mean(0)) and torch.allclose(variance, z.var(0, correction=0))
    assert not mean.requires_grad and not variance.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2, 3), (0, 3)])
def test_only_the_gradients_asked_for(backend, needed):
    leaves = inputs(20, 5, 4)
    for i in needed:
        leaves[i].requires_grad_()
    d_y = torch.randn(20, 4).double()
    both = [
        torch.autograd.grad(linear_batch_norm_relu(*leaves, backend=b)[0], [leaves[i] for i in needed], d_y)
        for b in (backend, "reference")
    ]
    assert all(torch.allclose(a, b) for a, b in zip(*both, strict=True))


def test_a_large_mean_leaves_the_variance_its_digits():
    """In float32: the moments of a block are taken about its mean."""
    x = torch.randn(3000, 1) + 3000
    for backend in BACKENDS:
        _, _, variance = linear_batch_norm_relu(x, torch.ones(1, 1), torch.ones(1), torch.zeros(1), backend=backend)
        assert torch.allclose(variance.double(), x.double().var(0, correction=0), rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_module_equals_torch(training):
    ours = LinearBatchNormRelu(7, 5).double().train(training)
    linear, norm = torch.nn.Linear(7, 5, bias=False).double(), torch.nn.BatchNorm1d(5).double().train(training)
    with torch.no_grad():
        linear.weight.copy_(ours.linear.weight)
        for p, q in ((ours.weight, norm.weight), (ours.bias, norm.bias)):
            p.copy_(q.copy_(torch.randn(5)))
        for module in (ours, norm):
            module.running_mean.fill_(0.3)
            module.running_var.fill_(1.7)
    for _ in range(3):
        x = torch.randn(40, 7).double() + 2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), norm(linear(b)).relu()
        weights = torch.randn_like(y)
        assert torch.allclose(y, z)
        assert torch.allclose(*(torch.autograd.grad((o * weights).sum(), i)[0] for o, i in ((y, a), (z, b))))
    assert torch.allclose(ours.running_mean, norm.running_mean)
    assert torch.allclose(ours.running_var, norm.running_var)


def test_nan_and_a_constant_channel():
    x = torch.randn(50, 3)
    x[:, 1] = 4.0
    weight, bias = torch.ones(3), torch.tensor([0.0, 0.5, 0.0])
    for backend in BACKENDS:
        y, _, _ = linear_batch_norm_relu(x, torch.eye(3), weight, bias, backend=backend)
        assert torch.allclose(y[:, 1], torch.tensor(0.5))
        bad = x.clone()
        bad[3] = torch.nan
        y, _, _ = linear_batch_norm_relu(bad, torch.eye(3), weight, bias, backend=backend)
        assert y.isnan().all()


@built
def test_nothing_but_the_arguments_and_the_statistics_is_kept():
    leaves, kept = [t.requires_grad_() for t in inputs(700, 5, 4)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, mean, variance = linear_batch_norm_relu(*leaves, backend="cpu")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (*leaves, mean, variance)}


@built
@pytest.mark.parametrize("K", [64, 16])
def test_peak_memory(K):
    """Forward: y. Backward: y, d_x, and the gradients of `linear` by block of 512 rows; no z, whether or not d_x holds it."""
    M, C = 20_000, 64
    leaves, d_y = [t.float().requires_grad_() for t in inputs(M, K, C)], torch.randn(M, C)
    call = lambda: linear_batch_norm_relu(*leaves, backend="cpu")[0]  # noqa: E731
    torch.autograd.grad(call(), leaves, d_y)  # the threads' scratch memory stays
    assert peak_memory(call, "cpu") < 1.1 * 4 * M * C
    assert peak_memory(lambda: torch.autograd.grad(call(), leaves, d_y), "cpu") < 4 * M * (1.1 * C + K + C * K / 512)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1500, 4, 3), (1500, 64, 64), (1500, 9, 70)])
def test_the_gradient_passes_where_y_is_positive(shape, dtype):
    """A third of the rows are one another's copies, and there only rounding decides: z must be computed again to the bit."""
    x, linear, weight, bias = (t.to(dtype) for t in inputs(*shape))
    x[::3] = x[0]
    z = x @ linear.T
    bias = (weight * (z.mean(0) - z[0]) / (z.var(0, correction=0) + 1e-5).sqrt()).requires_grad_()
    for needed in ([bias], [bias, x.requires_grad_()]):  # z in scratch memory; in that of d_x, where it fits
        y, _, _ = linear_batch_norm_relu(x, linear, weight, bias, backend="cpu")
        d_bias, *_ = torch.autograd.grad(y, needed, torch.ones_like(y))
        assert torch.equal(d_bias, (y > 0).sum(0).to(dtype))
    assert y[0].abs().max() < 1e-3 * y.max()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_on_any_threads(dtype):
    leaves = [t.to(dtype) for t in inputs(3000, 64, 64)]
    bit_equal_on_any_threads(lambda *t: linear_batch_norm_relu(*t, backend="cpu")[0], leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    x, linear, one = torch.randn(4, 3), torch.randn(2, 3), torch.ones(2)
    for arguments, message in (
        ((x[0], linear, one, one), "x must be (M, K) with M >= 1, got (3,)"),
        ((x[:0], linear, one, one), "x must be (M, K) with M >= 1, got (0, 3)"),
        ((x, linear.T, one, one), "linear must be (C, K) = (*, 3), got (3, 2)"),
        ((x, linear[0], one, one), "linear must be (C, K) = (*, 3), got (3,)"),
        ((x, linear, one[:1], one), "weight must be (C,) = (2,), got (1,)"),
        ((x, linear, one, one[:, None]), "bias must be (C,) = (2,), got (2, 1)"),
    ):
        with pytest.raises(ValueError, match=f"^{OP}: {re.escape(message)}$"):
            linear_batch_norm_relu(*arguments, backend=backend)
    for eps in (-1e-5, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"^{OP}: eps must be finite and >= 0, got {eps}$"):
            linear_batch_norm_relu(x, linear, one, one, eps, backend=backend)
    for eps in ("1e-5", True, None):
        with pytest.raises(TypeError, match=f"^{OP}: eps must be a number, got {type(eps).__name__}$"):
            linear_batch_norm_relu(x, linear, one, one, eps, backend=backend)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        linear_batch_norm_relu(x.long(), linear, one, one, backend=backend)
    with pytest.raises(RuntimeError, match=f"^{OP}: linear must be on cpu, got meta$"):
        linear_batch_norm_relu(x, linear.to("meta"), one, one, backend=backend)
    with pytest.raises(ValueError, match="at least 2 rows in training"):
        LinearBatchNormRelu(3, 2)(x[:1])
