"""permutation_entropy on its own: any three vectors, known values, each gradient."""

import math

import pytest
import torch

from probsym_fast.ops import OPS, Permutation, SoftPermutation, permutation_entropy, soft_permutation
from tests.conftest import GRADIENT, VALUE, assert_near, implementations, kernels_of

everywhere = pytest.mark.parametrize(("device", "backend"), implementations("permutation_entropy"))
kernels = pytest.mark.parametrize(("device", "backend"), kernels_of("permutation_entropy"))
TAU = 0.3
COUNTS = [[9, 1, 4], None]


def vectors(B, S, N, dtype, device):
    """Sorted t, and log_r, log_c that belong to no Sinkhorn iteration."""
    t, log_r, log_c = (torch.randn(B, S, N, dtype=torch.float64) for _ in range(3))
    t = t.sort(dim=-1, descending=True).values
    return [x.to(device, dtype).requires_grad_() for x in (t, log_r, log_c)]


def permutation(t, log_r, log_c, num_nodes=None, tau=TAU):
    slots = torch.arange(t.shape[-1], device=t.device).expand(t.shape)
    return SoftPermutation(slots, num_nodes, slots, t, log_r, log_c, tau)


def dense_entropy(t, log_r, log_c, counts, tau=TAU):
    """The docstring's formula, graph by graph."""
    total = 0
    for b, n in enumerate(counts or [t.shape[-1]] * t.shape[0]):
        x, u, v = t[b, :, :n], log_r[b, :, :n], log_c[b, :, :n]
        P = (u[:, :, None] + v[:, None] - (x[:, :, None] - x[:, None]).abs() / tau).exp()
        for dim in (-1, -2):
            p = P / P.sum(dim, keepdim=True)
            total = total - (p * p.log()).sum((-1, -2)).mean() / n
    return total / t.shape[0]


@pytest.mark.parametrize("counts", COUNTS)
@everywhere
def test_equals_the_formula(device, backend, counts):
    inputs = vectors(3, 4, 9, torch.float64, device)
    num_nodes = None if counts is None else torch.tensor(counts, device=device)
    found = permutation_entropy(permutation(*inputs, num_nodes), backend)
    expected = dense_entropy(*inputs, counts)
    assert found.shape == () and found.dtype == torch.float64
    assert_near(found, expected)
    for x in inputs:
        assert_near(*(torch.autograd.grad(y, x, retain_graph=True)[0] for y in (found, expected)), GRADIENT)


@pytest.mark.parametrize("counts", COUNTS)
@everywhere
def test_float32_against_float64(device, backend, counts):
    inputs = vectors(3, 7, 9, torch.float32, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    num_nodes = None if counts is None else torch.tensor(counts, device=device)
    found = permutation_entropy(permutation(*inputs, num_nodes), backend)
    expected = permutation_entropy(permutation(*exact, num_nodes), "reference")
    assert found.dtype == torch.float32
    assert_near(found, expected, VALUE)
    for x, y in zip(inputs, exact, strict=True):
        (a,), (b,) = (torch.autograd.grad(e, z, retain_graph=True) for e, z in ((found, x), (expected, y)))
        assert_near(a, b, GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@everywhere
def test_half_scores_come_through(device, backend, dtype):
    scores = torch.randn(3, 7, 20, device=device).to(dtype).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    found = permutation_entropy(soft_permutation(scores, tau=0.1, backend=backend), backend)
    expected = permutation_entropy(soft_permutation(exact, tau=0.1, backend="reference"), "reference")
    assert found.dtype == torch.float32
    assert_near(found, expected, VALUE)
    (a,), (b,) = torch.autograd.grad(found, scores), torch.autograd.grad(expected, exact)
    assert a.dtype == dtype
    assert_near(a, b, GRADIENT)


@pytest.mark.parametrize("counts", [[5, 2], None])
@kernels
def test_gradcheck(device, backend, counts):
    inputs = vectors(2, 2, 5, torch.float64, device)
    num_nodes = None if counts is None else torch.tensor(counts, device=device)
    assert torch.autograd.gradcheck(lambda *x: permutation_entropy(permutation(*x, num_nodes), backend), inputs)


@pytest.mark.parametrize("only", [0, 1, 2])
@kernels
def test_gradient_to_one_input_only(device, backend, only):
    inputs = [x.detach() for x in vectors(2, 3, 5, torch.float64, device)]
    inputs[only].requires_grad_()
    found, expected = (
        torch.autograd.grad(permutation_entropy(permutation(*inputs), b), inputs[only])[0]
        for b in (backend, "reference")
    )
    assert_near(found, expected, GRADIENT)


@everywhere
def test_uniform_permutation_has_twice_the_logarithm(device, backend):
    scores = torch.ones(2, 3, 7, dtype=torch.float64, device=device)
    num_nodes = torch.tensor([7, 4], device=device)
    entropy = permutation_entropy(soft_permutation(scores, num_nodes, backend=backend), backend)
    assert_near(entropy, torch.tensor(math.log(7) + math.log(4), dtype=torch.float64))


@everywhere
def test_hard_permutation_has_none(device, backend):
    scores = torch.arange(40.0, device=device).expand(2, 3, 40).clone().requires_grad_()
    p = soft_permutation(scores, tau=1e-3, normalize=False, backend=backend)
    entropy = permutation_entropy(p, backend)
    assert 0 <= entropy < 1e-30
    assert (torch.autograd.grad(entropy, scores)[0] == 0).all()


@everywhere
def test_graphs_and_samples_are_averaged(device, backend):
    inputs = vectors(2, 3, 6, torch.float64, device)
    num_nodes = torch.tensor([6, 3], device=device)
    whole = permutation_entropy(permutation(*inputs, num_nodes), backend)
    parts = [
        permutation_entropy(permutation(*(x[b : b + 1, s : s + 1, :n] for x in inputs)), backend)
        for b, n in enumerate((6, 3))
        for s in range(3)
    ]
    assert_near(whole, torch.stack(parts).mean())


@everywhere
def test_padding_does_not_change_a_bit(device, backend):
    inputs = vectors(2, 3, 6, torch.float32, device)
    num_nodes = torch.tensor([6, 2], device=device)
    results = []
    for garbage in (0.0, math.nan):
        leaves = [x.detach().clone() for x in inputs]
        for x in leaves:
            x[1, :, 2:] = garbage
            x.requires_grad_()
        entropy = permutation_entropy(permutation(*leaves, num_nodes), backend)
        results.append((entropy, *torch.autograd.grad(entropy, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for gradient in results[1][1:]:
        assert (gradient[1, :, 2:] == 0).all() and (gradient[0] != 0).all()


@everywhere
def test_strided_vectors(device, backend):
    t, log_r, log_c = (x.detach() for x in vectors(6, 4, 3, torch.float32, device))
    t = t.sort(dim=0, descending=True).values.permute(2, 1, 0)  # (3, 4, 6)
    strided = t, log_r.permute(2, 1, 0), log_c.permute(2, 1, 0)[:, :1].expand(3, 4, 6)
    results = []
    for inputs in (strided, [x.clone(memory_format=torch.contiguous_format) for x in strided]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        entropy = permutation_entropy(permutation(*leaves), backend)
        results.append((entropy, *torch.autograd.grad(entropy, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@kernels
def test_vectors_of_different_shapes_are_refused(device, backend):
    t, log_r, log_c = vectors(3, 4, 6, torch.float32, device)
    with pytest.raises(ValueError, match="log_c"):
        permutation_entropy(permutation(t, log_r, log_c[:, :1]), backend)


@kernels
def test_scale_of_the_incoming_gradient(device, backend):
    inputs = vectors(2, 3, 6, torch.float64, device)
    entropy = permutation_entropy(permutation(*inputs), backend)
    once = torch.autograd.grad(entropy, inputs, retain_graph=True)
    for x, y in zip(torch.autograd.grad(-3 * entropy, inputs), once, strict=True):
        assert_near(x, -3 * y, GRADIENT)


@kernels
def test_threads_do_not_change_a_bit(device, backend):
    inputs = vectors(23, 10, 40, torch.float32, device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            entropy = permutation_entropy(permutation(*inputs), backend)
            results.append((entropy, *torch.autograd.grad(entropy, inputs)))
    finally:
        torch.set_num_threads(before)
    for one, more in zip(*results, strict=True):
        assert torch.equal(one, more)


@kernels
def test_opcheck(device, backend):
    op = OPS["permutation_entropy"].kernel
    backward = torch.ops.probsym_fast.permutation_entropy_backward.default
    inputs = vectors(2, 3, 5, torch.float32, device)
    for num_nodes in (None, torch.tensor([5, 2], device=device)):
        torch.library.opcheck(op, (*inputs, num_nodes, TAU))
        plain = [x.detach() for x in inputs]
        torch.library.opcheck(backward, (torch.ones((), device=device), *plain, num_nodes, TAU))


@everywhere
def test_other_arguments_are_refused(device, backend):
    order = torch.arange(3, device=device).expand(1, 1, 3)
    for wrong in (Permutation(order), order, None):
        message = f"permutation_entropy: permutation must be a SoftPermutation, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=f"^{message}$"):
            permutation_entropy(wrong, backend)
