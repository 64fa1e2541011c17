"""soft_permutation and permutation_entropy on a GPU: what only a GPU shows. Values and gradients: the other files, too."""

import pytest
import torch

from probsym_fast.ops import OPS, permutation_entropy, soft_permutation, triton
from tests.conftest import GRADIENT, VALUE, assert_near

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
built = pytest.mark.skipif(OPS["soft_permutation"].backends("cuda")[0] != "cuda", reason="no CUDA kernels")
DEVICE = "cuda"
SHAPES = [(700, 3, 5), (8, 10, 188), (2, 3, 257), (2, 1, 700), (1, 2, 1024), (1, 2, 1025), (1, 1, 2500)]


def step(scores, num_nodes=None, backend="cuda", **settings):
    """Outputs, entropy, gradient."""
    scores = scores.detach().requires_grad_()
    p = soft_permutation(scores, num_nodes, backend=backend, **settings)
    entropy = permutation_entropy(p, backend)
    (gradient,) = torch.autograd.grad(entropy + (p.log_r * p.scores).sum() + p.log_c.square().sum(), scores)
    return p.order, p.rank, p.scores, p.log_r, p.log_c, entropy, gradient


@built
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_against_the_kernels_of_the_cpu(shape, dtype):
    """Its launchers, which the dispatcher has only where nvcc compiled nothing."""
    pytest.importorskip("triton")
    if not (OPS["soft_permutation"].has_kernel("cpu") and triton.runs_on_gpu(0)):
        pytest.skip("no CPU kernels, or a GPU that triton's do not serve")
    num_nodes = torch.randint(1, shape[-1] + 1, shape[:1])
    num_nodes[0] = shape[-1]
    ops, settings = torch.ops.probsym_fast, (0.05, 20, True)
    for counts in (None, num_nodes):
        there = None if counts is None else counts.to(DEVICE)
        scores, *weights = torch.randn(4, *shape, dtype=dtype)
        *soft, order, rank = triton._lazy("soft_permutation", "forward")(scores.to(DEVICE), there, *settings, False)
        *exact, exact_order, exact_rank = ops.soft_permutation(scores.double(), counts, *settings, False)
        if not torch.equal(order.cpu(), exact_order):  # float32 cannot tell two scores apart
            assert dtype == torch.float32
            continue
        assert torch.equal(rank.cpu(), exact_rank)
        known = *(w.to(DEVICE) for w in weights), scores.to(DEVICE), order, soft[0], there
        found = [*soft, triton._lazy("soft_permutation", "backward")(*known, *settings)]
        known = *(w.double() for w in weights), scores.double(), exact_order, exact[0], counts
        expected = [*exact, ops.soft_permutation_backward(*known, *settings)]
        d, tau = torch.tensor(1.5, dtype=dtype), settings[0]
        found.append(triton._lazy("permutation_entropy", "forward")(*soft, there, tau))
        found += triton._lazy("permutation_entropy", "backward")(d.to(DEVICE), *soft, there, tau)
        expected.append(ops.permutation_entropy(*exact, counts, tau))
        expected += ops.permutation_entropy_backward(d.double(), *exact, counts, tau)
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_near(x, y, VALUE if i in (0, 1, 2, 4) else GRADIENT)


@built
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


@built
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


@built
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_of_the_scores_is_used():
    scores = torch.randn(2, 3, 40)
    with torch.cuda.device(0):
        found = step(scores.to("cuda:1"))
    assert all(x.device == torch.device("cuda", 1) for x in found)
    assert_near(found[-1], step(scores, backend="reference")[-1], GRADIENT)


@built
def test_tensors_of_two_devices_are_refused():
    op = torch.ops.probsym_fast.soft_permutation
    with pytest.raises(
        RuntimeError, match="soft_permutation: num_nodes must be a dense tensor on cuda:0, got one on cpu"
    ):
        op(torch.randn(1, 1, 3, device="cuda"), torch.tensor([3]), 0.1, 20, True, False)
