"""soft_permutation at its edges: ties, padding, extremes, memory layouts, each output's gradient alone."""

import math

import pytest
import torch

from probsym_fast.distributions import Learned
from probsym_fast.groups import Symmetric
from probsym_fast.ops import SoftPermutation, permutation_entropy, soft_permutation
from tests.conftest import GRADIENT, VALUE, assert_near, implementations, kernels_of

everywhere = pytest.mark.parametrize(("device", "backend"), implementations("soft_permutation"))
kernels = pytest.mark.parametrize(("device", "backend"), kernels_of("soft_permutation"))
CASES = {  # shape, num_nodes, options
    "ragged": ((3, 7, 20), [20, 1, 13], {"tau": 0.05}),
    "long": ((2, 3, 70), None, {"tau": 0.1}),
    "raw": ((5, 1, 33), [33, 2, 17, 32, 5], {"tau": 0.5, "iterations": 3, "normalize": False}),
    "warm": ((1, 17, 8), None, {"tau": 1.0, "iterations": 1}),
}


def log_definition(scores, tau, iterations):
    """log P of one sample (n,), rows nodes, columns slots: rows, then columns divided by their sum."""
    log_p = -(scores[:, None] - scores.sort(descending=True).values).abs() / tau
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_p = log_p - log_p.logsumexp(0, keepdim=True)
    return log_p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@everywhere
def test_each_output_and_its_gradient(device, backend, case, dtype):
    shape, counts, options = CASES[case]
    num_nodes = None if counts is None else torch.tensor(counts, device=device)
    scores = torch.randn(shape, device=device).to(dtype).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    p = soft_permutation(scores, num_nodes, backend=backend, **options)
    q = soft_permutation(exact, num_nodes, backend="reference", **options)
    for name in ("scores", "log_r", "log_c"):
        x, y, weight = getattr(p, name), getattr(q, name), torch.randn(shape, device=device)
        assert x.dtype == torch.float32
        assert_near(x, y, VALUE)
        (found,) = torch.autograd.grad((x * weight).sum(), scores, retain_graph=True)
        (expected,) = torch.autograd.grad((y * weight).sum(), exact, retain_graph=True)
        assert found.dtype == dtype
        assert_near(found, expected, GRADIENT)


@kernels
def test_each_output_and_its_gradient_in_float64(device, backend):
    for shape, counts, options in CASES.values():
        num_nodes = None if counts is None else torch.tensor(counts, device=device)
        scores = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        p, q = (soft_permutation(scores, num_nodes, backend=b, **options) for b in (backend, "reference"))
        for name in ("scores", "log_r", "log_c"):
            weight = torch.randn(shape, dtype=torch.float64, device=device)
            found, expected = (
                torch.autograd.grad((getattr(x, name) * weight).sum(), scores, retain_graph=True)[0] for x in (p, q)
            )
            assert_near(found, expected, GRADIENT)


@everywhere
def test_rows_first_and_columns_last(device, backend):
    scores, one = torch.randn(2, 3, 9, dtype=torch.float64, device=device), torch.ones(2, 3, 9)
    num_nodes = torch.tensor([9, 4], device=device)
    few = soft_permutation(scores, num_nodes, tau=0.3, iterations=2, backend=backend).soft()
    assert_near(few.sum(-2), one)
    assert (few.sum(-1).cpu() - one).abs().max() > 1e-4
    many = soft_permutation(scores, num_nodes, tau=0.3, iterations=400, backend=backend).soft()
    assert_near(many.sum(-2), one)
    assert_near(many.sum(-1), one, {torch.float64: 1e-9})


@everywhere
def test_dense_passes_the_gradient_of_soft(device, backend):
    scores = torch.randn(2, 3, 9, dtype=torch.float64, device=device, requires_grad=True)
    p = soft_permutation(scores, torch.tensor([9, 4], device=device), tau=0.2, backend=backend)
    weight = torch.randn(2, 3, 9, 9, dtype=torch.float64, device=device)
    dense, soft = (torch.autograd.grad((x * weight).sum(), scores, retain_graph=True)[0] for x in (p.dense(), p.soft()))
    assert soft[:, 0].abs().max() > 1e-3
    assert torch.equal(dense, soft)


@everywhere
def test_gradient_at_ties_is_the_limit_of_lower_index_first(device, backend):
    tied = torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    weight = torch.randn(6, 6, dtype=torch.float64)
    scores = tied.to(device).view(1, 1, 6).requires_grad_()
    soft = soft_permutation(scores, tau=0.4, normalize=False, backend=backend).soft()
    (found,) = torch.autograd.grad((soft * weight.to(device)).sum(), scores)

    apart = (tied - 1e-8 * torch.arange(6)).requires_grad_()
    (limit,) = torch.autograd.grad((log_definition(apart, 0.4, 20).exp() * weight).sum(), apart)
    assert_near(found.flatten(), limit, {torch.float64: 1e-6})


@everywhere
def test_ties_keep_their_order_in_long_rows(device, backend):
    scores = torch.randint(0, 3, (4, 5, 200), device=device).float()
    scores[0, 0, ::2] = -0.0  # equal to 0.0
    p = soft_permutation(scores, backend=backend)
    assert torch.equal(p.order, scores.argsort(dim=-1, descending=True, stable=True))
    assert torch.equal(p.order.gather(-1, p.rank), torch.arange(200, device=device).expand(4, 5, 200))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@everywhere
def test_equal_scores_are_uniform_over_the_valid_nodes(device, backend, value):
    scores = torch.full((2, 3, 7), value, dtype=torch.float64, device=device, requires_grad=True)
    p = soft_permutation(scores, torch.tensor([7, 4], device=device), backend=backend)
    assert torch.equal(p.order.cpu(), torch.arange(7).expand(2, 3, 7))
    expected = torch.block_diag(torch.full((4, 4), 1 / 4), torch.eye(3)).double()
    assert_near(p.soft()[0], torch.full((3, 7, 7), 1 / 7, dtype=torch.float64))
    assert_near(p.soft()[1], expected.expand(3, 7, 7))
    leaf = scores.detach().requires_grad_()
    q = soft_permutation(leaf, p.num_nodes, backend="reference")
    weight = torch.randn(p.shape, dtype=torch.float64, device=device)
    (found,) = torch.autograd.grad((p.log_r * weight).sum(), scores)
    (expected,) = torch.autograd.grad((q.log_r * weight).sum(), leaf)
    assert expected.abs().max() > 1
    assert_near(found, expected, GRADIENT)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@everywhere
def test_padding_does_not_change_a_bit(device, backend, garbage):
    num_nodes = torch.tensor([6, 20, 1], device=device)
    clean = torch.randn(3, 2, 20, device=device)
    padding = torch.arange(20, device=device) >= num_nodes[:, None, None]
    results = []
    for scores in (clean, clean.masked_fill(padding, garbage)):
        leaf = scores.clone().requires_grad_()
        p = soft_permutation(leaf, num_nodes, tau=0.1, backend=backend)
        loss = p.log_r.square().sum() + p.scores.pow(3).sum() + permutation_entropy(p, backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((p.order, p.rank, p.scores, p.log_r, p.log_c, p.soft(), gradient))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (gradient.masked_select(padding) == 0).all() and (gradient[1] != 0).all()


@everywhere
def test_each_graph_as_if_it_were_alone(device, backend):
    counts = [6, 20, 1, 13, 20]
    scores = torch.randn(5, 3, 20, device=device)

    def run(scores, counts):
        leaf = scores.clone().requires_grad_()
        p = soft_permutation(leaf, torch.tensor(counts, device=device), tau=0.1, backend=backend)
        (gradient,) = torch.autograd.grad(p.log_r.square().sum() + p.log_c.pow(3).sum(), leaf)
        return p.order, p.scores.detach(), p.log_r.detach(), p.log_c.detach(), gradient

    together = run(scores, counts)
    for b, n in enumerate(counts):
        for whole, alone in zip(together, run(scores[b : b + 1, :, :n], [n]), strict=True):
            bound = 0 if backend in ("cpu", "cuda") else 1e-5  # triton adds in an order that depends on N
            torch.testing.assert_close(whole[b : b + 1, :, :n], alone, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@everywhere
def test_counts_of_any_integer_dtype_and_stride(device, backend, dtype):
    scores = torch.randn(2, 3, 6, device=device)
    counts = torch.tensor([6, 1, 4, 1], dtype=dtype, device=device)[::2]
    p = soft_permutation(scores, counts, backend=backend)
    assert p.num_nodes.dtype == torch.int64 and p.num_nodes.tolist() == [6, 4]
    assert (p.log_r[1, :, 4:] == 0).all() and (p.order[1, :, 4:].cpu() == torch.tensor([4, 5])).all()
    assert torch.equal(p.log_r[0], soft_permutation(scores[:1], backend=backend).log_r[0])


@everywhere
def test_strided_gradient(device, backend):
    scores = torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
    p = soft_permutation(scores, tau=0.1, backend=backend)
    weight = torch.randn(6, 3, 2, dtype=torch.float64, device=device).permute(2, 1, 0)
    strided, contiguous = (
        torch.autograd.grad(p.log_r, scores, w, retain_graph=True)[0] for w in (weight, weight.contiguous())
    )
    assert strided.any() and torch.equal(strided, contiguous)


@everywhere
def test_one_node(device, backend):
    scores = torch.tensor([3.0, -0.5], device=device).view(2, 1, 1).requires_grad_()
    p = soft_permutation(scores, backend=backend)
    assert (p.order == 0).all() and (p.rank == 0).all() and (p.soft() == 1).all()
    assert p.scores.flatten().tolist() == [1.0, -1.0]
    assert permutation_entropy(p, backend) == 0
    (gradient,) = torch.autograd.grad(p.scores.sum() + p.log_r.sum() + p.log_c.sum(), scores)
    assert (gradient == 0).all()  # the normalised score of one node is its sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", ["cold", "far apart", "one outlier", "tiny"])
@everywhere
def test_extremes_stay_finite(device, backend, problem, dtype):
    scores, options = torch.randn(2, 3, 50, dtype=dtype, device=device), {"tau": 1e-4}
    if problem == "far apart":
        scores, options = scores * 1e30, {"normalize": False}
    elif problem == "one outlier":
        scores[..., 5] = 1e15
    elif problem == "tiny":
        scores = scores * 1e-15
    leaf = scores.clone().requires_grad_()
    p = soft_permutation(leaf, backend=backend, **options)
    entropy = permutation_entropy(p, backend)
    (gradient,) = torch.autograd.grad(entropy + p.log_r.sum() + p.scores.sum(), leaf)
    for x in (p.scores, p.log_r, p.log_c, entropy, gradient):
        assert x.isfinite().all()
    if problem == "one outlier":
        assert (p.order[..., 0] == 5).all()
    else:
        assert torch.equal(p.order, scores.argsort(dim=-1, descending=True, stable=True))
    if problem == "far apart":
        assert torch.equal(p.soft(), p.hard())
        assert 0 <= entropy < 1e-30
        assert (gradient == 1).all()


@everywhere
def test_large_scores_are_normalised_without_overflow(device, backend):
    scores = torch.tensor([[[1e30, 3e30, 2e30]]], device=device)
    assert soft_permutation(scores, backend=backend).order.tolist() == [[[1, 2, 0]]]


@everywhere
def test_smallest_temperature(device, backend):
    p = soft_permutation(torch.tensor([[[1.0, 1.0, 2.0]]], device=device), tau=1e-30, backend=backend)
    assert_near(p.log_r.exp(), torch.tensor([[[1, 0.5, 0.5]]]))
    with pytest.raises(ValueError, match="soft_permutation: tau must be at least 1e-30, got 1e-40"):
        soft_permutation(torch.ones(1, 1, 3, device=device), tau=1e-40, backend=backend)


@everywhere
def test_no_iterations(device, backend):
    scores = torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
    p = soft_permutation(scores, tau=0.5, iterations=0, backend=backend)
    assert (p.log_r == 0).all() and (p.log_c == 0).all()
    t = scores / scores.norm(dim=-1, keepdim=True)
    kernel = (-(t[..., :, None] - t.sort(descending=True).values[..., None, :]).abs() / 0.5).exp()
    assert_near(p.soft(), kernel)
    weight = torch.randn(kernel.shape, dtype=torch.float64, device=device)
    found, expected = (torch.autograd.grad((x * weight).sum(), scores)[0] for x in (p.soft(), kernel))
    assert_near(found, expected, GRADIENT)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("iterations", [1, 2])
@everywhere
def test_few_iterations_are_those_of_the_definition(device, backend, iterations, normalize):
    scores = torch.randn(1, 1, 12, dtype=torch.float64, device=device)
    s = scores[0, 0] / scores.norm() if normalize else scores[0, 0]
    p = soft_permutation(scores, tau=0.2, iterations=iterations, normalize=normalize, backend=backend)
    assert_near(p.soft()[0, 0], log_definition(s, 0.2, iterations).exp())
    assert_near(p.scores[0, 0], s.sort(descending=True).values)


@everywhere
def test_short_scores_are_divided_by_the_least_norm(device, backend):
    scores = (torch.randn(1, 2, 5, dtype=torch.float64, device=device) * 1e-9).requires_grad_()
    p = soft_permutation(scores, tau=0.5, backend=backend)
    assert_near(p.scores, scores.sort(descending=True).values * 1e6)
    (gradient,) = torch.autograd.grad(p.scores.sum(), scores)
    assert_near(gradient, torch.full((1, 2, 5), 1e6), GRADIENT)  # no part through the norm, which is a constant here


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5)])
@everywhere
def test_empty_batches(device, backend, shape):
    scores = torch.randn(shape, device=device, requires_grad=True)
    p = soft_permutation(scores, torch.ones(shape[0], dtype=torch.int64, device=device), backend=backend)
    assert type(p) is SoftPermutation
    assert p.order.shape == p.rank.shape == p.scores.shape == shape
    assert torch.autograd.grad(p.log_r.sum(), scores)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 5, 60, 119])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_score_anywhere_is_found(place, dtype, bad):
    scores = torch.randn(4, 5, 6, dtype=dtype)
    scores.view(-1)[place] = bad
    for case in implementations("soft_permutation"):
        if case.values[0].type == "cpu":
            with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity among the valid nodes"):
                soft_permutation(scores, backend=case.values[1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tau": "0.1"}, TypeError, "tau must be a number, got str"),
        ({"tau": None}, TypeError, "tau must be a number, got NoneType"),
        ({"tau": True}, TypeError, "tau must be a number, got bool"),
        ({"tau": math.inf}, ValueError, "tau must be finite and > 0, got inf"),
        ({"tau": math.nan}, ValueError, "tau must be finite and > 0, got nan"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got float"),
        ({"iterations": True}, TypeError, "iterations must be an int, got bool"),
        ({"iterations": -1}, ValueError, "iterations must be in 0..10000, got -1"),
        ({"iterations": 10_001}, ValueError, "iterations must be in 0..10000, got 10001"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=f"^soft_permutation: {message}$"):
        soft_permutation(torch.randn(1, 1, 3), **settings)
    with pytest.raises(error, match=f"^Learned: {message}$"):
        Learned(Symmetric(3), torch.nn.Identity(), **settings)
