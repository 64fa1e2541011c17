"""orthogonal_frame and act_orthogonal."""

import re

import pytest
import torch

from probsym_fast.ops import OPS, act_orthogonal, orthogonal_frame
from tests.conftest import GRADIENT, assert_near

BACKENDS = OPS["orthogonal_frame"].backends("cpu")


def kernels(device: torch.device, dtype: torch.dtype) -> str:
    """The kernels of the device; what they do not take goes to the reference."""
    there = dtype != torch.float64 or dtype in OPS["orthogonal_frame"].kernel_dtypes(device.type)
    return OPS["orthogonal_frame"].backends(device.type)[0] if there else "auto"


def off_orthogonal(q: torch.Tensor) -> float:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return (q.double().mT @ q.double() - eye).abs().max().item()


def nearly_singular(count: int, gap: float) -> torch.Tensor:
    a = torch.randn(count, 3, 3, dtype=torch.float64)
    a[..., 1] = a[..., 0] * torch.randn(count, 1).double() + gap * a[..., 1]
    a[..., 2] = a[..., 0] - a[..., 1] + gap * a[..., 2]
    return a.float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", [False, True])
def test_orthogonal_for_any_finite_input(backend, special):
    cases = {"random": torch.randn(100_000, 3, 3)}
    for gap in (1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9):
        cases[f"gap {gap}"] = nearly_singular(20_000, gap)
    rank_one = torch.randn(1000, 3, 1) * torch.randn(1000, 1, 3)
    cases |= {"rank 1": rank_one, "zero": torch.zeros(17, 3, 3), "ones": torch.ones(3, 3, 3)}
    cases |= {"huge": torch.randn(99, 3, 3) * 1e37, "tiny": torch.randn(99, 3, 3) * 1e-37}
    cases["mixed"] = torch.randn(99, 3, 3) * torch.tensor([1e-30, 1.0, 1e30])
    for name, a in cases.items():
        q = orthogonal_frame(a, special=special, backend=backend)
        assert off_orthogonal(q) < 1e-5, name
        if special:
            assert (torch.linalg.det(q.double()) - 1).abs().max() < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("special", [False, True])
def test_gram_schmidt(backend, d, special):
    a = torch.randn(50, d, d, dtype=torch.float64)
    q = orthogonal_frame(a, special=special, backend=backend)
    r = q.mT @ a
    assert r.tril(-1).abs().max() < 1e-10  # columns span the same flags
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    assert (diagonal[:, 1:] > 0).all()
    assert torch.equal(diagonal[:, 0] > 0, torch.linalg.det(a) > 0 if special else torch.ones(50, dtype=bool))
    h = orthogonal_frame(torch.randn(50, d, d, dtype=torch.float64), special=special)
    assert_near(orthogonal_frame(h @ a, special=special, backend=backend), h @ q)


def test_higher_dimensions_take_the_reference():
    a = torch.randn(8, 5, 5)
    q = orthogonal_frame(a, special=True)
    assert off_orthogonal(q) < 1e-5
    assert (torch.linalg.det(q.double()) > 0).all()
    if BACKENDS != ("reference",):
        with pytest.raises(ValueError, match=re.escape("backend 'cpu' takes d in (1, 2, 3), got d = 5")):
            orthogonal_frame(a, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 2, 2), (33, 3, 3), (2, 3, 4, 3, 3)])
@pytest.mark.parametrize("special", [False, True])
def test_frame_value_and_gradient(device, dtype, shape, special):
    a = torch.randn(shape, device=device).to(dtype)
    out = []
    for x, backend in ((a, kernels(device, dtype)), (a.double(), "reference")):
        x = x.detach().requires_grad_()
        q = orthogonal_frame(x, special=special, backend=backend)
        w = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(q)
        out.append((q, *torch.autograd.grad((q * w).sum(), x)))
    assert out[0][0].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert_near(out[0][0], out[1][0], {torch.float32: 1e-4, torch.float64: 1e-10})
    if shape[-1] > 1:
        assert_near(out[0][1], out[1][1], {**GRADIENT, torch.float32: 1e-3}, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frame_gradcheck_and_rank_deficient_gradient(backend):
    for d in (2, 3):
        a = torch.randn(4, d, d, dtype=torch.float64, requires_grad=True)
        for special in (False, True):
            assert torch.autograd.gradcheck(lambda x, s=special: orthogonal_frame(x, special=s, backend=backend), a)
    a = torch.randn(5, 3, 3)
    a[0] = 0
    a[1, :, 1] = 2 * a[1, :, 0]
    a[2, :, 2] = a[2, :, 0] - a[2, :, 1]
    a.requires_grad_()
    (d_a,) = torch.autograd.grad((orthogonal_frame(a, backend=backend) * torch.randn(5, 3, 3)).sum(), a)
    assert d_a.isfinite().all()
    assert (d_a[0] == 0).all() and (d_a[1, :, 1] == 0).all() and (d_a[2, :, 2] == 0).all()
    assert (d_a[1, :, 0] != 0).any() and (d_a[3:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_action_value_and_gradient(device, dtype, d, inverse, mean, shared):
    vectors = torch.randn((3, 7, d, 2) if shared else (3, 4, 7, d, 2), device=device).to(dtype)
    frames = torch.randn(3, 4, d, d, device=device).to(dtype)
    out = []
    for v, g, backend in ((vectors, frames, kernels(device, dtype)), (vectors.double(), frames.double(), "reference")):
        v, g = v.detach().requires_grad_(), g.detach().requires_grad_()
        y = act_orthogonal(v, g, inverse=inverse, mean=mean, backend=backend)
        w = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
        out.append((y, *torch.autograd.grad((y * w).sum(), (v, g))))
    g = frames.double().mT if inverse else frames.double()
    v = vectors.double()[:, None] if shared else vectors.double()
    direct = torch.einsum("bsij,bsmjc->bsmic", g, v.expand(3, 4, 7, d, 2))
    half = {torch.float16: 2e-3}
    assert_near(out[1][0], direct.mean(1) if mean else direct)
    assert_near(out[0][0], out[1][0], {torch.float64: 1e-13, torch.float32: 1e-6, **half})
    for found, expected in zip(out[0][1:], out[1][1:], strict=True):
        assert_near(found, expected, {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3})


@pytest.mark.parametrize("backend", BACKENDS)
def test_action_gradcheck(backend):
    v = torch.randn(2, 3, 3, 1, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for flags in ({}, {"inverse": True}, {"mean": True}):
        assert torch.autograd.gradcheck(lambda v, g, f=flags: act_orthogonal(v, g, backend=backend, **f), (v, g))


def test_strided_inputs():
    a = torch.randn(6, 3, 8, 3).transpose(1, 2)[::2]  # (3, 8, 3, 3)
    assert torch.equal(orthogonal_frame(a), orthogonal_frame(a.contiguous()))
    assert torch.equal(orthogonal_frame(a.mT), orthogonal_frame(a.mT.contiguous()))
    v = torch.randn(3, 2, 3, 5).permute(0, 3, 2, 1)  # (3, 5, 3, 2)
    assert torch.equal(act_orthogonal(v, a), act_orthogonal(v.contiguous(), a.contiguous()))


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
def test_opcheck_and_compile():
    library = torch.ops.probsym_fast
    a = torch.randn(2, 4, 3, 3, requires_grad=True)
    v = torch.randn(2, 5, 3, 1, requires_grad=True)
    torch.library.opcheck(library.orthogonal_frame.default, (a, True))
    q = orthogonal_frame(a.detach())
    torch.library.opcheck(library.orthogonal_frame_backward.default, (torch.randn_like(q), q, a.detach()))
    for mean in (False, True):
        torch.library.opcheck(library.act_orthogonal.default, (v, a, True, mean))
        y = act_orthogonal(v, a, mean=mean).detach()
        arguments = (torch.randn_like(y), v.detach(), a.detach(), False, mean, True, True)
        torch.library.opcheck(library.act_orthogonal_backward.default, arguments)

    def f(a, v):
        return act_orthogonal(v, orthogonal_frame(a, special=True), inverse=True, mean=True).square().sum()

    expected = torch.autograd.grad(f(a, v), (a, v))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(a, v), (a, v)), expected, strict=True):
        assert_near(x, y, GRADIENT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    for a, error, message in (
        (torch.zeros(2, 3), ValueError, "matrices must be (..., d, d), got (2, 3)"),
        (torch.zeros(3), ValueError, "matrices must be (..., d, d), got (3,)"),
        (torch.zeros(3, 3).int(), TypeError, "matrices must be floating point, got torch.int32"),
        (torch.full((2, 3, 3), torch.nan), ValueError, "matrices must be finite, got NaN or infinity"),
        (torch.full((2, 3, 3), torch.inf), ValueError, "matrices must be finite, got NaN or infinity"),
    ):
        with pytest.raises(error, match=f"^orthogonal_frame: {re.escape(message)}$"):
            orthogonal_frame(a, backend=backend)
    g, v = torch.zeros(2, 4, 3, 3), torch.zeros(2, 5, 3, 1)
    expected = "vectors must be (B, [S,] n, d, C) = (2, [4,] *, 3, *), got"
    for arguments, error, message in (
        ((v, g[0]), ValueError, "frames must be (B, S, d, d), got (4, 3, 3)"),
        ((v[0], g), ValueError, f"{expected} (5, 3, 1)"),
        ((v[:1], g), ValueError, f"{expected} (1, 5, 3, 1)"),
        ((v.transpose(1, 2), g), ValueError, f"{expected} (2, 3, 5, 1)"),
        ((v[:, None], g), ValueError, f"{expected} (2, 1, 5, 3, 1)"),
        ((v.long(), g), TypeError, "vectors must be floating point, got torch.int64"),
        ((v, g.to("meta")), RuntimeError, "frames must be on cpu, got meta"),
    ):
        with pytest.raises(error, match=f"^act_orthogonal: {re.escape(message)}$"):
            act_orthogonal(*arguments, backend=backend)
