"""orthogonal_frame at its edges, and its gradient."""

import importlib
import itertools
import re

import pytest
import torch

from probsym_fast.ops import OPS, orthogonal_frame
from tests.conftest import GRADIENT, assert_near, implementations, kernels_of

reference_module = importlib.import_module("probsym_fast.ops.reference.orthogonal_frame")
frames_everywhere = pytest.mark.parametrize(("device", "backend"), implementations("orthogonal_frame"))
frame_kernels = pytest.mark.parametrize(("device", "backend"), kernels_of("orthogonal_frame"))
frames_in_float64 = pytest.mark.parametrize(("device", "backend"), implementations("orthogonal_frame", torch.float64))
frame_kernels_in_float64 = pytest.mark.parametrize(("device", "backend"), kernels_of("orthogonal_frame", torch.float64))


def off_orthogonal(q):
    return (q.double().mT @ q.double() - torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)).abs().max()


def available(backend, d):
    return backend if d <= 3 else "auto"


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("d", [2, 3])
@frames_everywhere
def test_columns_that_differ_by_little(device, backend, d, gap):
    a = torch.randn(4000, d, 1, device=device) * (1 + gap * torch.randn(4000, d, d, device=device))
    for special in (False, True):
        q = orthogonal_frame(a, special=special, backend=backend)
        assert off_orthogonal(q) < 1e-5
        determinant = torch.linalg.det(q.double())
        assert (determinant.abs() - 1).abs().max() < 1e-5
        assert (determinant > 0).all() or not special


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@frames_in_float64
def test_scale_does_not_change_the_frame(device, backend, scale):
    a = torch.randn(50, 3, 3, dtype=torch.float64, device=device)
    q = orthogonal_frame(a, backend=backend)
    assert_near(orthogonal_frame(a * scale, backend=backend), q, {torch.float64: 1e-11})
    assert_near(orthogonal_frame((a * scale).float(), backend=backend), q, {torch.float32: 1e-4})


@frames_everywhere
def test_gradient_scales_inversely(device, backend):
    a, w = torch.randn(4, 3, 3, device=device), torch.randn(4, 3, 3, device=device)

    def gradient(scale):
        x = (a * scale).requires_grad_()
        return torch.autograd.grad((orthogonal_frame(x, backend=backend) * w).sum(), x)[0] * scale

    for scale in (1e-20, 1e20):
        assert_near(gradient(scale), gradient(1.0), {torch.float32: 1e-4})


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@frames_in_float64
def test_equivariance(device, backend, d):
    a = torch.randn(20, d, d, dtype=torch.float64, device=device)
    h = torch.linalg.qr(torch.randn(20, d, d, dtype=torch.float64, device=device)).Q
    h[::2, :, 0] *= -1  # both signs of the determinant
    rotation = torch.cat([h[..., :1] * torch.linalg.det(h)[:, None, None], h[..., 1:]], dim=-1)
    backend = available(backend, d)
    bound = {torch.float64: 1e-9}
    assert_near(orthogonal_frame(h @ a, backend=backend), h @ orthogonal_frame(a, backend=backend), bound)
    whole, part = (orthogonal_frame(x, special=True, backend=backend) for x in (rotation @ a, a))
    assert_near(whole, rotation @ part, bound)
    assert_near(torch.linalg.det(part), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@frames_everywhere
def test_special_changes_the_first_column_only(device, backend, d):
    a = torch.randn(30, d, d, device=device)
    q, r = (orthogonal_frame(a, special=special, backend=available(backend, d)) for special in (False, True))
    sign = torch.linalg.det(q.double()).sign().float()
    assert (sign < 0).any() or d == 1 or (a > 0).all()
    assert torch.equal(r[..., 0], q[..., 0] * sign[:, None])
    assert torch.equal(r[..., 1:], q[..., 1:])


@frames_everywhere
def test_dependent_columns_become_the_farthest_axis(device, backend):
    zero = orthogonal_frame(torch.zeros(2, 3, 3, device=device), backend=backend)
    assert torch.equal(zero.cpu(), torch.eye(3).expand(2, 3, 3))
    a = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [2.0, -4.0, 0.0]], device=device)  # columns 2z, -4z, x
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.equal(orthogonal_frame(a, backend=backend).cpu(), expected)  # z, the axis x, then y in the place of x


@pytest.mark.parametrize("rank", [0, 1, 2])
@frames_everywhere
def test_every_rank(device, backend, rank):
    a = (torch.randn(500, 3, rank) @ torch.randn(500, rank, 3)).to(device).requires_grad_()
    q = orthogonal_frame(a, special=True, backend=backend)
    assert off_orthogonal(q) < 1e-5
    assert (torch.linalg.det(q.double()) - 1).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(q.sum(), a)
    assert gradient.isfinite().all()
    assert rank or (gradient == 0).all()


@frames_in_float64
def test_replaced_column_passes_nothing_and_takes_nothing(device, backend):
    """The gradient of the other columns is that of the matrix without the dependent one."""
    a = torch.randn(1, 3, 3, dtype=torch.float64, device=device)
    a[..., 1] = -2 * a[..., 0]
    a.requires_grad_()
    w = torch.randn(3, device=device, dtype=torch.float64)
    q = orthogonal_frame(a, backend=backend)
    (gradient,) = torch.autograd.grad((q[..., 0] * w).sum(), a, retain_graph=True)
    unit = (a[..., 0] / a[..., 0].norm()).detach()
    assert_near(gradient[..., 0], (w - unit * (unit @ w)) / a[..., 0].detach().norm(), GRADIENT)
    assert (gradient[..., 1:] == 0).all()
    (gradient,) = torch.autograd.grad((q[..., 1] * w).sum(), a)
    assert (gradient == 0).all()


# --- columns that depend on others, and scales ---

KINDS = {
    "zero": lambda other, across, share: 0 * other,
    "equal": lambda other, across, share: other,
    "opposite": lambda other, across, share: -2 * other,
    "within": lambda other, across, share: other + share / 3 * other.norm() * across,
    "outside": lambda other, across, share: other + 3 * share * other.norm() * across,
}


def with_dependent_column(d: int, column: int, kind: str, share: float) -> torch.Tensor:
    """A (d, d) matrix, well conditioned but for one column, which is some multiple of another or zero.

    within, outside: at an angle to it of a third of `share`, of three times as much.
    """
    a = torch.eye(d, dtype=torch.float64) * 2 + torch.randn(d, d, dtype=torch.float64).clamp(-1, 1) / d
    other = a[:, 0 if column else -1]
    across = torch.randn(d, dtype=torch.float64)
    across = across - other * (across @ other) / (other @ other)
    a[:, column] = KINDS[kind](other, across / across.norm(), share)
    return a


def frame_and_gradient(a, w, special, backend):
    x = a.detach().requires_grad_()
    q = orthogonal_frame(x, special=special, backend=backend)
    return q.detach(), torch.autograd.grad((q * w.to(q)).sum(), x)[0]


def by_formula(a, q, w, replaced, special):
    """The gradient in the docstring, column by column with explicit projections: float64 (d, d)."""
    d = len(a)
    g, d_a, eye = w.clone(), torch.zeros_like(a), torch.eye(d, dtype=a.dtype)
    for k in reversed(range(d)):
        if k == replaced:
            continue
        projection = eye - q[:, :k] @ q[:, :k].mT
        u = projection @ a[:, k]
        mirrored = special and k == 0 and q[:, 0] @ u < 0
        d_u = (-1 if mirrored else 1) * (g[:, k] - q[:, k] * (q[:, k] @ g[:, k])) / u.norm()
        d_a[:, k] = projection @ d_u
        for j in range(k):
            g[:, j] -= (q[:, j] @ d_u) * u + (q[:, j] @ a[:, k]) * d_a[:, k]
    return d_a


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
@frames_everywhere
def test_one_gradient_where_a_column_depends(device, backend, d, kind):
    """That of the formula in the docstring, each column of d, in O(d) and SO(d), float64 and float32."""
    if d > 3 and backend != "reference":
        pytest.skip("d > 3 is the reference's")
    if d == 1 and kind != "zero":
        pytest.skip("one column depends on no other")
    for dtype in (torch.float64, torch.float32):
        if backend != "reference" and dtype not in OPS["orthogonal_frame"].kernel_dtypes(device.type):
            continue
        for column, special in itertools.product(range(d), (False, True)):
            share = reference_module.DEPENDENT[dtype]
            a, w = with_dependent_column(d, column, kind, share).to(dtype), torch.randn(d, d, dtype=torch.float64)
            q, gradient = (x.cpu().double() for x in frame_and_gradient(a.to(device), w, special, backend))
            assert off_orthogonal(q) < 1e-5
            replaced = column if column or kind == "zero" else d - 1  # of two alike the second
            if (
                kind == "outside"
            ):  # a gradient as long as 1 / share, but for the last column, which has one direction left
                assert gradient.isfinite().all()
                assert replaced == d - 1 or gradient[:, replaced].abs().max() > 1e-2 / share
                continue
            expected = by_formula(a.double(), q, w, replaced, special)
            assert (gradient - expected).abs().max() < (1e-10 if dtype == torch.float64 else 1e-4)
            assert (gradient[:, replaced] == 0).all()


@pytest.mark.parametrize(("column", "moved"), [(0, (1, 2)), (1, (2,)), (2, (0, 1))])
@frames_everywhere
def test_gradient_beside_a_replaced_column_is_that_of_finite_differences(device, backend, column, moved):
    """For the columns that do not turn the replaced one, or turn it where nothing is asked of it."""
    if backend != "reference" and torch.float64 not in OPS["orthogonal_frame"].kernel_dtypes(device.type):
        pytest.skip("no kernels for float64")
    a = torch.randn(3, 3, dtype=torch.float64, device=device)
    a[:, column] = 0
    w, step = torch.randn(3, 3, dtype=torch.float64, device=device), 1e-6
    w[:, column] = 0
    _, gradient = frame_and_gradient(a, w, False, backend)
    for i, k in itertools.product(range(3), moved):
        e = torch.zeros_like(a)
        e[i, k] = step
        up, down = (orthogonal_frame(a + s * e, backend=backend) for s in (1, -1))
        assert abs(((up - down) * w).sum() / (2 * step) - gradient[i, k]) < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@frames_everywhere
def test_decision_of_the_backward_pass_is_the_forwards(device, backend, dtype):
    """Angles around the threshold: a column was replaced where, and only where, it has no gradient."""
    if backend != "reference" and dtype not in OPS["orthogonal_frame"].kernel_dtypes(device.type):
        pytest.skip(f"no kernels for {dtype}")
    share, count = reference_module.DEPENDENT[dtype], 4000
    a = torch.randn(count, 3, 3, dtype=torch.float64)
    first = a[..., 0] / a[..., 0].norm(dim=-1, keepdim=True)
    across = torch.linalg.cross(first, a[..., 1])
    across = across / across.norm(dim=-1, keepdim=True)
    a[..., 1] = first + (0.5 + torch.rand(count, 1, dtype=torch.float64)) * share * across
    a = a.to(device, dtype)
    w = torch.zeros(3, 3)
    w[:, 1] = torch.randn(3)
    q, gradient = frame_and_gradient(a, w, False, backend)
    along = (q[..., 1].double().cpu() * across).sum(-1).abs()
    axis = 1 - first.square()
    axis = torch.nn.functional.one_hot((axis >= 0.999 * axis.amax(-1, keepdim=True)).int().argmax(-1), 3).double()
    axis = axis - first * (first * axis).sum(-1, keepdim=True)
    replaced = ((q[..., 1].double().cpu() * torch.nn.functional.normalize(axis, dim=-1)).sum(-1) - 1).abs() < 1e-3
    none = (gradient[..., 1] == 0).all(-1).cpu()
    clear = ~replaced | (along < 0.9)  # else the residual itself may point along the axis
    assert replaced.any() and (~replaced).any()
    assert torch.equal(none[clear], replaced[clear])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
@frames_everywhere
def test_gradients_are_finite_at_every_scale(device, backend, d, special):
    """From the smallest to the largest numbers; what is beyond the range becomes the largest number of it."""
    if d > 3 and backend != "reference":
        pytest.skip("d > 3 is the reference's")
    base = torch.randn(40, d, d, dtype=torch.float64).clamp(-1, 1)
    base[1], base[2], base[3, 0] = 0, 1, 0
    w = torch.arange(float(d * d)).view(d, d)
    for dtype, scales in (
        (torch.float32, (1e-45, 1e-40, 1e-37, 1e-30, 1e30, 1e37, 1e38, 3e38)),
        (torch.float64, (5e-324, 1e-310, 1e-305, 1e-200, 1e200, 1e305, 1.7e308)),
    ):
        if backend != "reference" and dtype not in OPS["orthogonal_frame"].kernel_dtypes(device.type):
            continue
        _, wanted = frame_and_gradient(base.to(device, dtype), w, special, backend)
        for scale in scales:
            exact = (base * scale).to(device, dtype)
            q, gradient = frame_and_gradient(exact, w, special, backend)
            assert off_orthogonal(q) < 1e-5
            assert gradient.isfinite().all()
            normal = torch.finfo(dtype).tiny < scale
            if not normal:
                continue
            expected = wanted.double().cpu() / scale
            within = expected.abs() < torch.finfo(dtype).max
            found = torch.where(within, gradient.double().cpu() * scale, 0)
            assert_near(found, torch.where(within, wanted.double().cpu(), 0), {torch.float64: 1e-3})
            assert (gradient.cpu()[~within].abs() == torch.finfo(dtype).max).all()
            assert (gradient.cpu()[~within].sign() == wanted.cpu()[~within].sign()).all()


@pytest.mark.parametrize("column", [0, 1, 2])
@frame_kernels_in_float64
def test_each_column_has_its_gradient(device, backend, column):
    for special in (False, True):
        a = torch.randn(40, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
        w = torch.randn(40, 3, dtype=torch.float64, device=device)
        found, expected = (
            torch.autograd.grad((orthogonal_frame(a, special=special, backend=b)[..., column] * w).sum(), a)[0]
            for b in (backend, "reference")
        )
        assert_near(found, expected, {torch.float64: 1e-9})


@frame_kernels
def test_frames_of_many_threads_and_few(device, backend):
    a = torch.randn(5000, 3, 3, device=device, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            q = orthogonal_frame(a, special=True, backend=backend)
            results.append((q, torch.autograd.grad(q.square().sum() + q.sum(), a)[0]))
    finally:
        torch.set_num_threads(before)
    for one, more in zip(*results, strict=True):
        assert torch.equal(one, more)
    one_by_one = torch.stack([orthogonal_frame(x, special=True, backend=backend) for x in a[-40:].detach()])
    assert torch.equal(results[0][0][-40:], one_by_one)


@frames_everywhere
def test_frames_of_nothing(device, backend):
    for shape in ((0, 3, 3), (2, 0, 2, 2)):
        a = torch.randn(shape, device=device, requires_grad=True)
        q = orthogonal_frame(a, backend=backend)
        assert q.shape == shape
        assert torch.autograd.grad(q.sum(), a)[0].shape == shape


@frames_everywhere
def test_strided_matrices_and_gradients(device, backend):
    wide = torch.randn(4, 7, 3, 6, device=device)
    for view in (wide[..., ::2], wide[::2, 1:4, :, 3:].mT, wide[:1, :, :, :3].expand(5, 7, 3, 3)):
        plain, w = view.clone(memory_format=torch.contiguous_format), torch.randn(3, 3, device=device).mT
        results = []
        for a in (view, plain):
            leaf = a.detach().requires_grad_()
            q = orthogonal_frame(leaf, backend=backend)
            results.append((q.detach(), torch.autograd.grad(q, leaf, w.expand(q.shape))[0]))
        for strided, contiguous in zip(*results, strict=True):
            assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (4, 3, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_anywhere_is_found(shape, bad):
    for place in (0, -1):
        a = torch.randn(shape)
        a.view(-1)[place] = bad
        for case in implementations("orthogonal_frame"):
            if case.values[0].type == "cpu":
                message = "orthogonal_frame: matrices must be finite, got NaN or infinity"
                with pytest.raises(ValueError, match=f"^{message}$"):
                    orthogonal_frame(a, backend=case.values[1])


@frames_everywhere
def test_frame_errors(device, backend):
    with pytest.raises(TypeError, match=r"^orthogonal_frame: matrices must be a Tensor, got list$"):
        orthogonal_frame([[1.0]], backend=backend)
    with pytest.raises(ValueError, match=re.escape("matrices must be (..., d, d), got (2, 0, 0)")):
        orthogonal_frame(torch.zeros(2, 0, 0, device=device), backend=backend)
    if backend != "reference":
        message = f"orthogonal_frame: backend {backend!r} takes d in (1, 2, 3), got d = 4"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            orthogonal_frame(torch.zeros(4, 4, device=device), backend=backend)
