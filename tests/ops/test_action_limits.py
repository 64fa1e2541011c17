"""act_orthogonal at its edges, each gradient on its own."""

import re

import pytest
import torch

from probsym_fast.ops import OPS, act_orthogonal, orthogonal_frame
from tests.conftest import GRADIENT, VALUE, assert_near, implementations, kernels_of

actions_in_float64 = pytest.mark.parametrize(("device", "backend"), implementations("act_orthogonal", torch.float64))
action_kernels_in_float64 = pytest.mark.parametrize(("device", "backend"), kernels_of("act_orthogonal", torch.float64))
actions_everywhere = pytest.mark.parametrize(("device", "backend"), implementations("act_orthogonal"))
action_kernels = pytest.mark.parametrize(("device", "backend"), kernels_of("act_orthogonal"))
ROUNDED = {**GRADIENT, **VALUE, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # results of act_orthogonal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 1), (2, 1, 5, 3, 4), (3, 4, 1, 2, 1), (2, 3, 4, 5, 2)])
@actions_everywhere
def test_action_is_the_sum(device, backend, shape, dtype):
    if (
        backend != "reference"
        and dtype == torch.float64
        and dtype not in OPS["act_orthogonal"].kernel_dtypes(device.type)
    ):
        pytest.skip(f"{backend} does not take {dtype}")
    B, S, n, d, C = shape
    for shared in (False, True):
        v = torch.randn((B, n, d, C) if shared else shape, device=device).to(dtype)
        g = torch.randn(B, S, d, d, device=device).to(dtype)
        each = (v[:, None].expand(shape) if shared else v).double()
        exact = torch.einsum("bsij,bsmjc->bsmic", g.double(), each)
        inverse = torch.einsum("bsji,bsmjc->bsmic", g.double(), each)
        for expected, flags in ((exact, {}), (inverse, {"inverse": True})):
            out = act_orthogonal(v, g, backend=backend, **flags)
            assert out.dtype == dtype and out.shape == shape
            assert_near(out, expected, ROUNDED)
            mean = act_orthogonal(v, g, mean=True, backend=backend, **flags)
            assert mean.dtype == dtype and mean.shape == (B, n, d, C)
            assert_near(mean, expected.mean(1), ROUNDED)


@actions_in_float64
def test_inverse_undoes(device, backend):
    q = orthogonal_frame(torch.randn(2, 3, 3, 3, dtype=torch.float64, device=device))
    v = torch.randn(2, 3, 5, 3, 2, dtype=torch.float64, device=device)
    there = act_orthogonal(v, q, inverse=True, backend=backend)
    assert (there - v).abs().max() > 0.1
    assert_near(act_orthogonal(there, q, backend=backend), v)


@pytest.mark.parametrize("only", ["vectors", "frames"])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@action_kernels_in_float64
def test_gradient_to_one_input_only(device, backend, only, mean, shared):
    v = torch.randn((2, 5, 3, 2) if shared else (2, 4, 5, 3, 2), dtype=torch.float64, device=device)
    g = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=device)
    x = (v if only == "vectors" else g).requires_grad_()
    for inverse in (False, True):
        found, expected = (
            torch.autograd.grad(act_orthogonal(v, g, inverse=inverse, mean=mean, backend=b).pow(3).sum(), x)[0]
            for b in (backend, "reference")
        )
        assert_near(found, expected, GRADIENT)


@actions_everywhere
def test_frames_follow_the_dtype_of_the_vectors(device, backend):
    g = torch.randn(2, 3, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    v = torch.randn(2, 4, 3, 1, device=device)
    out = act_orthogonal(v, g, backend=backend)
    assert out.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.sum(), g)
    assert gradient.dtype == torch.float64
    assert_near(gradient.float(), v.sum((1, 3))[:, None, None].expand(2, 3, 3, 3), GRADIENT)


@actions_everywhere
def test_strided_vectors_frames_and_gradients(device, backend):
    v = torch.randn(2, 3, 5, 4, 2, device=device).permute(0, 4, 2, 1, 3)[..., ::2]  # (2, 2, 5, 3, 2)
    g = torch.randn(3, 2, 4, 3, device=device).permute(1, 2, 0, 3)[:, ::2]  # (2, 2, 3, 3)
    w = torch.randn(2, 2, 5, 2, 3, device=device).mT
    results = []
    for f in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        x, y = f(v).detach().requires_grad_(), f(g).detach().requires_grad_()
        out = act_orthogonal(x, y, inverse=True, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, (x, y), f(w))))
    for strided, contiguous in zip(*results, strict=True):
        assert_near(strided, contiguous, VALUE)


@action_kernels
def test_actions_of_many_threads_and_few(device, backend):
    v = torch.randn(40, 30, 3, 4, device=device, requires_grad=True)
    g = torch.randn(40, 5, 3, 3, device=device, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            out = act_orthogonal(v, g, mean=True, backend=backend)
            results.append((out, *torch.autograd.grad(out.pow(3).sum(), (v, g))))
    finally:
        torch.set_num_threads(before)
    for one, more in zip(*results, strict=True):
        assert torch.equal(one, more)


@actions_everywhere
def test_action_on_nothing(device, backend):
    for v, g in (((0, 4, 3, 1), (0, 2, 3, 3)), ((2, 0, 3, 1), (2, 2, 3, 3)), ((2, 4, 3, 0), (2, 2, 3, 3))):
        v, g = (
            torch.randn(v, device=device, requires_grad=True),
            torch.randn(g, device=device, requires_grad=True),
        )
        out = act_orthogonal(v, g, mean=True, backend=backend)
        assert out.shape == v.shape
        d_v, d_g = torch.autograd.grad(out.sum(), (v, g))
        assert d_v.shape == v.shape and (d_g == 0).all()


@actions_everywhere
def test_no_samples_are_refused(device, backend):
    v, g = torch.zeros(2, 4, 3, 1, device=device), torch.zeros(2, 0, 3, 3, device=device)
    message = "act_orthogonal: frames must have at least one sample S, got (2, 0, 3, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        act_orthogonal(v, g, backend=backend)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("d", [2, 5])
@action_kernels_in_float64
def test_action_gradcheck(device, backend, d, mean, inverse):
    v = torch.randn(2, 2, 3, d, 1, dtype=torch.float64, device=device, requires_grad=True)
    g = torch.randn(2, 2, d, d, dtype=torch.float64, device=device, requires_grad=True)
    flags = {"inverse": inverse, "mean": mean, "backend": backend}
    assert torch.autograd.gradcheck(lambda *x: act_orthogonal(*x, **flags), (v, g))


@pytest.mark.parametrize(
    ("v", "g", "error", "message"),
    [
        ([1.0], torch.zeros(1, 1, 3, 3), TypeError, "vectors must be a Tensor, got list"),
        (torch.zeros(1, 2, 3, 1), [1.0], TypeError, "frames must be a Tensor, got list"),
        (
            torch.zeros(1, 2, 3, 1),
            torch.zeros(1, 1, 3, 3).int(),
            TypeError,
            "frames must be floating point, got torch.int32",
        ),
        (
            torch.zeros(1, 2, 3, 1),
            torch.zeros(1, 1, 3, 2),
            ValueError,
            "frames must be (B, S, d, d), got (1, 1, 3, 2)",
        ),
        (
            torch.zeros(1, 2, 2, 1),
            torch.zeros(1, 4, 3, 3),
            ValueError,
            "vectors must be (B, [S,] n, d, C) = (1, [4,] *, 3, *), got (1, 2, 2, 1)",
        ),
        (
            torch.zeros(1, 1, 4, 2, 3, 1),
            torch.zeros(1, 4, 3, 3),
            ValueError,
            "vectors must be (B, [S,] n, d, C) = (1, [4,] *, 3, *), got (1, 1, 4, 2, 3, 1)",
        ),
    ],
)
@pytest.mark.parametrize("backend", OPS["act_orthogonal"].backends("cpu"))
def test_action_errors(backend, v, g, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'act_orthogonal: {message}')}$"):
        act_orthogonal(v, g, backend=backend)
