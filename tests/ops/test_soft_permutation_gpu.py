"""soft_permutation and permutation_entropy on a GPU: what only a GPU shows. Values and gradients: the other files, too."""

import pytest
import torch

from probsym_fast.ops import OPS, permutation_entropy, soft_permutation
from tests.conftest import GRADIENT, VALUE, assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or OPS["soft_permutation"].backends("cuda")[0] != "cuda", reason="no CUDA kernels"
    ),
]
SHAPES = [(700, 3, 5), (8, 10, 188), (2, 3, 257), (2, 1, 700), (1, 2, 1024), (1, 2, 1025), (1, 1, 2500)]


def step(scores, num_nodes=None, backend="cuda", **settings):
    """Outputs, entropy, gradient."""
    scores = scores.detach().requires_grad_()
    p = soft_permutation(scores, num_nodes, backend=backend, **settings)
    entropy = permutation_entropy(p, backend)
    (gradient,) = torch.autograd.grad(entropy + (p.log_r * p.scores).sum() + p.log_c.square().sum(), scores)
    return p.order, p.rank, p.scores, p.log_r, p.log_c, entropy, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_kernels_of_the_cpu(shape, dtype):
    """Those are checked against the definition, which would need too much memory here."""
    if not OPS["soft_permutation"].has_kernel("cpu"):
        pytest.skip("no CPU kernels")
    num_nodes = torch.randint(1, shape[-1] + 1, shape[:1])
    num_nodes[0] = shape[-1]
    for counts in (None, num_nodes):
        scores = torch.randn(shape, dtype=dtype)
        found = step(scores.cuda(), None if counts is None else counts.cuda(), tau=0.05)
        expected = step(scores, counts, "cpu", tau=0.05)
        exact = step(scores.double(), counts, "cpu", tau=0.05)
        if torch.equal(expected[0], exact[0]):  # else float32 cannot tell two scores apart
            assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])
            for x, y in zip(found[2:6], exact[2:6], strict=True):
                assert_near(x, y, VALUE)
            assert_near(found[6], exact[6], GRADIENT)


@pytest.mark.parametrize("shape", [(4, 10, 188), (2, 2, 400), (1, 2, 1100)])
def test_captured_without_synchronisation(shape):
    scores, other = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")
    num_nodes = torch.full(shape[:1], shape[-1] - 3, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(scores, num_nodes)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(scores, num_nodes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(scores, num_nodes)
    scores.copy_(other)
    graph.replay()
    for x, y in zip(found, step(other, num_nodes), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(40, 10, 188), (3, 2, 700), (1000, 2, 1100)])
def test_runs_repeat_bit_by_bit(shape):
    """No float atomics; the last shape takes several rows a block."""
    scores = torch.randn(shape, device="cuda")
    first = step(scores)
    for x, y in zip(first, step(scores), strict=True):
        assert torch.equal(x, y)
    alone = step(scores[:1])
    for x, y in zip(first[:5], alone[:5], strict=True):
        assert torch.equal(x[:1], y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_of_the_scores_is_used():
    scores = torch.randn(2, 3, 40)
    with torch.cuda.device(0):
        found = step(scores.to("cuda:1"))
    assert all(x.device == torch.device("cuda", 1) for x in found)
    assert_near(found[-1], step(scores, backend="reference")[-1], GRADIENT)


def test_tensors_of_two_devices_are_refused():
    op = torch.ops.probsym_fast.soft_permutation
    with pytest.raises(RuntimeError, match="soft_permutation: num_nodes must be on cuda:0, got cpu"):
        op(torch.randn(1, 1, 3, device="cuda"), torch.tensor([3]), 0.1, 20, True)
