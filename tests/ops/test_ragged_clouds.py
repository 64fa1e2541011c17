"""vector_edge_convolution with num_nodes: clouds of different sizes, padded."""

import re

import pytest
import torch

from probsym_fast.distributions.vector_layers import EdgeConvolution
from probsym_fast.ops import OPS, using_backend, vector_edge_convolution
from probsym_fast.ops.reference import vector_edge_second
from probsym_fast.ops.reference.vector_edge_convolution import norm_moments, pairs
from probsym_fast.ops.reference.vector_edge_second import known_moments
from tests.conftest import assert_near
from tests.helpers.items import DTYPES, bit_equal_on_any_threads, check
from tests.ops.test_vector_edge_convolution import SHAPES, built, either_statistics, leaves_of

BACKENDS = OPS["vector_edge_convolution"].backends("cpu")
RAGGED = ["n-body, second", "plane", "one node", "all near", "many nodes"]


def counts_of(n: int, M: int, device="cpu") -> torch.Tensor:
    """From 0 to n, in no order."""
    counts = torch.randint(0, n + 1, (M,), device=device)
    counts[0], counts[-1] = 0, n
    return counts


def inside(num_nodes, n):
    return torch.arange(n, device=num_nodes.device)[:, None] < num_nodes


def call_of(shape, running, device="cpu", num_nodes=None):
    *sizes, neighbors = SHAPES[shape]
    leaves, pool, seen = leaves_of(*sizes, device)
    num_nodes = counts_of(sizes[2], sizes[3], device) if num_nodes is None else num_nodes

    def call(backend, x, feature, direction, gain, bias, num_nodes=num_nodes, neighbors=neighbors):
        given = tuple(t.to(x) for t in seen) if running else None
        weights = feature, direction, pool.to(x), gain, bias
        settings = {"neighbors": neighbors, "num_nodes": num_nodes, "backend": backend}
        return vector_edge_convolution(x, *weights, given, **settings)[0]

    return call, leaves, num_nodes


@pytest.mark.parametrize("dtype", DTYPES)
@either_statistics
@pytest.mark.parametrize("shape", RAGGED)
def test_values_and_gradients(device, shape, running, dtype):
    call, leaves, _ = call_of(shape, running, device)
    check("vector_edge_convolution", call, leaves, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", RAGGED)
def test_each_cloud_is_as_if_alone(shape, backend):
    """And what is in its padding, NaN too, is not read."""
    call, (x, *others), counts = call_of(shape, True)
    x.masked_fill_(~inside(counts, x.shape[2]), torch.nan).requires_grad_()
    y = call(backend, x, *others)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    for m in (0, 1, len(counts) // 2, len(counts) - 1):
        n = int(counts[m])
        assert not y[:, :, n:, m].any() and not grad[:, :, n:, m].any()
        if n:
            alone = x[:, :, :n, m : m + 1].detach().requires_grad_()
            expected = call(backend, alone, *others, num_nodes=None)
            assert_near(y[:, :, :n, m], expected[..., 0])
            assert_near(grad[:, :, :n, m], torch.autograd.grad(expected.square().sum(), alone)[0][..., 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", [2, 9])
def test_statistics_are_of_the_valid_pairs(backend, neighbors):
    (x, feature, direction, gain, bias), pool, _ = leaves_of(2, 3, 5, 37, 4)
    weights, counts = (feature, direction, pool, gain, bias), counts_of(5, 37)
    settings = {"neighbors": neighbors, "backend": backend}
    _, mean, variance, count = vector_edge_convolution(x, *weights, num_nodes=counts, **settings)
    parts = [
        vector_edge_convolution(x[:, :, :n, m : m + 1], *weights, **settings)[1:]
        for m, n in enumerate(counts.tolist())
        if n
    ]
    means, variances, numbers = (torch.stack(some, -1).double() for some in zip(*parts, strict=True))
    assert count == numbers.sum()
    expected = means @ numbers / count
    assert_near(mean, expected)
    assert_near(variance, (variances + (means - expected[:, None]).square()) @ numbers / count)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@either_statistics
def test_the_module_gives_the_same_by_steps(running, dtype):
    C, d, n, M, w, neighbors = SHAPES["n-body, first"]
    conv = EdgeConvolution(C, w, neighbors).to(dtype).train(not running)
    counts, found = counts_of(n, M), []
    x, weights = torch.randn(C, d, n, M).to(dtype).requires_grad_(), torch.randn(w, d, n, M).to(dtype)
    for backend in ("auto", "reference"):
        conv.norm.running_mean.fill_(0.3)
        conv.norm.running_var.fill_(1.5)
        with using_backend(backend):
            y = conv(x, counts)
        gradients = torch.autograd.grad(y, [x, *conv.parameters()], weights)
        found.append([y, *gradients, *(t.clone() for t in conv.norm.buffers())])
    for one, other in zip(*found, strict=True):
        assert_near(one, other, {torch.float64: 1e-10, torch.float32: 5e-5})


@built
def test_bit_equal_on_any_threads():
    counts = counts_of(5, 700).sort(descending=True).values
    (x, *others), pool, _ = leaves_of(3, 3, 5, 700, 9)

    def call(x, feature, direction, gain, bias):
        weights = feature, direction, pool.to(x), gain, bias
        return vector_edge_convolution(x, *weights, neighbors=4, num_nodes=counts)[0]

    bit_equal_on_any_threads(call, [t.float() for t in (x, *others)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_clouds_without_nodes(backend):
    call, leaves, _ = call_of("plane", False, num_nodes=torch.zeros(17, dtype=torch.int64))
    leaves = [x.requires_grad_() for x in leaves]
    y = call(backend, *leaves)
    assert not y.any()
    x = torch.autograd.grad(y.sum(), leaves)[0]
    assert not x.nan_to_num().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_counts(backend):
    call, leaves, counts = call_of("plane", True)
    for kind, message, given in (
        (TypeError, "num_nodes must be int64, got torch.int32", counts.int()),
        (TypeError, "num_nodes must be int64, got list", counts.tolist()),
        (ValueError, "num_nodes must be (M,) = (17,), got (16,)", counts[1:]),
        (RuntimeError, "num_nodes must be on cpu, got meta", counts.to("meta")),
        (ValueError, "each of num_nodes must be in 0..6, got 7", counts.clamp(max=5) + 2),
        (ValueError, "each of num_nodes must be in 0..6, got -1", counts - 1),
    ):
        with pytest.raises(kind, match=f"^{re.escape(f'vector_edge_convolution: {message}')}$"):
            call(backend, *leaves, num_nodes=given)


def test_statistics_whose_values_are_known_have_every_derivative(monkeypatch):
    """Of the second derivatives' steps, a few clouds at a time, against plain torch, up to the third."""
    monkeypatch.setattr(vector_edge_second, "AT_ONCE", 4 * 2 * 3 * 4 * 4)
    near = torch.rand(4, 4, 9) > 0.4
    leaves = [torch.randn(2, 3, 4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mean, variance = (x.detach() for x in norm_moments(pairs(*leaves), near))
    found = []
    for f in (
        lambda *x: known_moments(*x, near, mean, variance, near.sum()),
        lambda *x: norm_moments(pairs(*x), near),
    ):
        y, derivatives = f(*leaves), []
        for _ in range(3):
            loss = sum((x.sin() * torch.linspace(0.5, 1, x.numel()).view_as(x)).sum() for x in y)
            y = torch.autograd.grad(loss, leaves, create_graph=True)
            derivatives += y
        found.append(derivatives)
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, {torch.float64: 1e-10})
