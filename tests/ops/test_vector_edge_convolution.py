"""vector_edge_convolution: the edge convolution of Vector Neurons, against its float64 reference and the module by steps."""

import re

import pytest
import torch

from probsym_fast._memory import peak_memory
from probsym_fast.distributions.vector_layers import EdgeConvolution
from probsym_fast.ops import OPS, using_backend, vector_edge_convolution
from probsym_fast.ops.vector_edge_convolution import beyond_kernels
from tests.conftest import assert_near
from tests.helpers.items import DTYPES, bit_equal_on_any_threads, check

BACKENDS = OPS["vector_edge_convolution"].backends("cpu")
built = pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
# channels, d, nodes, clouds, width, neighbors: n-body's, odd sizes, one node, one cloud, all nodes near, many nodes
SHAPES = {
    "n-body, first": (2, 3, 5, 40, 21, 4),
    "n-body, second": (21, 3, 5, 40, 21, 4),
    "plane": (3, 2, 6, 17, 7, 3),
    "four dimensions": (2, 4, 3, 9, 5, 2),
    "one node": (4, 3, 1, 35, 6, 4),
    "one cloud": (2, 3, 7, 1, 9, 2),
    "all near": (5, 3, 4, 18, 33, 4),
    "many nodes": (2, 3, 40, 18, 3, 5),
}


def leaves_of(C, d, n, M, w, device="cpu"):
    """x, feature, direction, gain, bias; and the direction of pooling and running statistics, without gradients."""
    shapes = (C, d, n, M), (w, 2 * C), (w, 2 * C), (w,), (w,), (w, w), (w,), (w,)
    leaves = [torch.randn(shape, device=device).double() for shape in shapes]
    leaves[3], leaves[6], leaves[7] = (leaves[k].abs() + 0.5 for k in (3, 6, 7))
    return leaves[:5], leaves[5], tuple(leaves[6:])


def calls(shape, running, device="cpu"):
    """The op as a function of its leaves, and the leaves."""
    *sizes, neighbors = SHAPES[shape]
    leaves, pool, seen = leaves_of(*sizes, device)

    def call(backend, x, feature, direction, gain, bias):
        given = tuple(t.to(x) for t in seen) if running else None
        weights = feature, direction, pool.to(x), gain, bias
        return vector_edge_convolution(x, *weights, given, neighbors=neighbors, backend=backend)[0]

    return call, leaves


either_statistics = pytest.mark.parametrize("running", [False, True], ids=["batch", "running"])


@pytest.mark.parametrize("dtype", DTYPES)
@either_statistics
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device, shape, running, dtype):
    call, leaves = calls(shape, running, device)
    check("vector_edge_convolution", call, leaves, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@either_statistics
def test_gradcheck(running, backend):
    call, leaves = calls("plane", running)
    leaves = [t[..., :2] if t.ndim == 4 else t for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: call(backend, *t), [t.requires_grad_() for t in leaves])


@built
@pytest.mark.parametrize("dtype", DTYPES)
@either_statistics
@pytest.mark.parametrize("shape", SHAPES)
def test_the_module_gives_the_same_by_steps(shape, running, dtype):
    """And moves its running statistics alike."""
    C, d, n, M, w, neighbors = SHAPES[shape]
    conv = EdgeConvolution(C, w, neighbors).to(dtype).train(not running)
    x, weights, found = torch.randn(C, d, n, M).to(dtype).requires_grad_(), torch.randn(w, d, n, M).to(dtype), []
    assert "one pass" in str(conv)
    for backend in ("auto", "reference"):
        conv.norm.running_mean.fill_(0.3)
        conv.norm.running_var.fill_(1.5)
        with using_backend(backend):
            y = conv(x)
        gradients = torch.autograd.grad(y, [x, *conv.parameters()], weights)
        found.append([y, *gradients, *(t.clone() for t in conv.norm.buffers())])
    tolerance = {torch.float64: 1e-10, torch.float32: 5e-5}  # both sides round
    for one, other in zip(*found, strict=True):
        assert_near(one, other, tolerance)
    with using_backend("reference"):
        assert "by steps" in str(conv)


@pytest.mark.skipif("triton" not in OPS["vector_edge_convolution"].backends("cuda"), reason="no triton")
def test_the_module_takes_the_op_on_a_gpu():
    conv, gpu = EdgeConvolution(2, 3, 4), torch.device("cuda")
    assert conv.takes_op(gpu, torch.float32) and not conv.takes_op(gpu, torch.float64)
    conv.detached_statistics = True
    assert not conv.takes_op(gpu, torch.float32) and conv.eval().takes_op(gpu, torch.float32)
    conv.one_pass = False
    assert not any(conv.takes_op(device, torch.float32) for device in (gpu, torch.device("cpu")))
    assert "by steps" in str(conv)


@pytest.mark.parametrize("sizes", [(2, 17, 5, 4), (2, 3, 257, 4)])
def test_sizes_that_kernels_of_a_gpu_do_not_take(sizes):
    lacking = {17: "16 components, got 17", 3: "256 nodes, got 257"}[sizes[1]]
    assert beyond_kernels("cuda", sizes, 3) == f"its kernels take at most {lacking}"
    assert beyond_kernels("cpu", (2, 17, 5, 4), 3) is beyond_kernels("cuda", (2, 16, 5, 4), 3) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend):
    leaves, pool, _ = leaves_of(2, 3, 5, 30, 4)
    x, feature, direction, gain, bias = leaves
    weights = feature, direction, pool, gain, bias
    y, mean, variance, count = vector_edge_convolution(x, *weights, neighbors=5, backend=backend)
    edges = torch.cat(torch.broadcast_tensors(x[:, :, None] - x[:, :, :, None], x[:, :, :, None]))  # (2 C, d, i, j, M)
    norms = torch.einsum("oc,cdijm->odijm", feature, edges).norm(dim=1).flatten(1)
    assert count == 25 * 30
    torch.testing.assert_close(mean, norms.mean(1))
    torch.testing.assert_close(variance, norms.var(1, correction=0))
    again, *given, none = vector_edge_convolution(x, *weights, (mean, variance), neighbors=5, backend=backend)
    torch.testing.assert_close(again, y)
    assert all(torch.equal(a, b) for a, b in zip(given, (mean, variance), strict=True)) and none == 0
    assert not any(t.requires_grad for t in (mean, variance, *given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotations_and_permutations(backend):
    leaves, pool, _ = leaves_of(2, 3, 6, 4, 5)
    x, feature, direction, gain, bias = leaves
    call = lambda x: vector_edge_convolution(x, feature, direction, pool, gain, bias, neighbors=3, backend=backend)[0]  # noqa: E731
    y = call(x)
    h, order = torch.linalg.qr(torch.randn(3, 3).double()).Q, torch.randperm(6)
    rotate = lambda t: torch.einsum("ab,cbnm->canm", h, t)  # noqa: E731
    torch.testing.assert_close(call(rotate(x)), rotate(y))
    torch.testing.assert_close(call(x[:, :, order]), y[:, :, order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nodes_as_far_as_the_last_neighbour_are_near_too(backend):
    """A square: two corners are next to each."""
    square = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).double()
    _, pool, _ = leaves_of(1, 2, 4, 1, 2)
    maps = torch.randn(2, 2).double()
    x, one = square.t()[None, ..., None], torch.ones(2).double()
    count = lambda k: vector_edge_convolution(x, maps, maps, pool, one, one, neighbors=k, backend=backend)[3]  # noqa: E731
    assert [int(count(k)) for k in (1, 2, 3, 4, 9)] == [4, 12, 12, 16, 16]


@built
@pytest.mark.parametrize("dtype", DTYPES)
@either_statistics
def test_bit_equal_on_any_threads(running, dtype):
    (x, *others), pool, seen = leaves_of(3, 3, 5, 700, 9)

    def call(x, feature, direction, gain, bias):
        given = tuple(t.to(x) for t in seen) if running else None
        return vector_edge_convolution(x, feature, direction, pool.to(x), gain, bias, given, neighbors=4)[0]

    bit_equal_on_any_threads(call, [t.to(dtype) for t in (x, *others)])


@built
def test_a_cloud_does_not_depend_on_the_others_with_running_statistics():
    call, (x, *others) = calls("n-body, first", True)
    whole = call("cpu", x, *others)
    assert torch.equal(call("cpu", x[..., :7].contiguous(), *others), whole[..., :7])


@built
def test_memory():
    """Nothing of pair size at any time, but for the threads' scratch memory, which stays."""
    C, n, M, w = 4, 5, 20_000, 21
    leaves, pool, _ = leaves_of(C, 3, n, M, w)
    x, *others = (t.float().requires_grad_() for t in leaves)

    def step():
        weights = others[0], others[1], pool.float(), *others[2:]
        y = vector_edge_convolution(x, *weights, neighbors=4)[0]
        torch.autograd.grad(y.sum(), [x, *others])

    step()
    node = 4 * 3 * n * M  # bytes a channel
    assert peak_memory(step, "cpu") < (2 * w + C) * node + w * n * M + 300_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_cloud(backend):
    leaves, pool, running = leaves_of(2, 3, 4, 0, 3)
    x, feature, direction, gain, bias = (t.requires_grad_() for t in leaves)
    weights = feature, direction, pool, gain, bias
    y, *_ = vector_edge_convolution(x, *weights, running, neighbors=2, backend=backend)
    assert y.shape == (3, 3, 4, 0)
    for t, d in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert d.shape == t.shape and not d.any()
    with pytest.raises(ValueError, match=r"^vector_edge_convolution: x must have M >= 1 clouds without running"):
        vector_edge_convolution(x, *weights, neighbors=2, backend=backend)


def test_half_is_computed_in_float32():
    leaves, pool, _ = leaves_of(2, 3, 5, 9, 4)
    x, f, q, gain, bias = (t.bfloat16() for t in leaves)
    call = lambda *t: vector_edge_convolution(*t, neighbors=3)  # noqa: E731
    found, mean, *_ = call(x, f, q, pool.bfloat16(), gain, bias)
    expected = call(*(t.float() for t in (x, f, q, pool.bfloat16(), gain, bias)))[0]
    assert found.dtype == torch.bfloat16 and mean.dtype == torch.float32
    assert torch.equal(found, expected.bfloat16())


@built
def test_more_nodes_than_the_kernel_takes():
    call, (x, *others) = calls("many nodes", True)
    x = torch.randn(2, 3, 300, 1).double()
    assert torch.equal(call("cpu", x, *others), call("reference", x, *others))


def test_invalid_calls():
    (x, f, q, gain, bias), pool, (mean, variance) = leaves_of(2, 3, 5, 4, 6)

    def refused(kind, message, running=None, neighbors=2, **changed):
        given = {"x": x, "feature": f, "direction": q, "pool": pool, "gain": gain, "bias": bias} | changed
        with pytest.raises(kind, match=f"^{re.escape('vector_edge_convolution: ' + message)}"):
            vector_edge_convolution(**given, running=running, neighbors=neighbors)

    refused(TypeError, "x must be floating point, got torch.int64", x=x.long())
    refused(TypeError, "running must be (mean, variance) or None, got int", running=3)
    refused(TypeError, "running must be (mean, variance) or None, got tuple", running=(mean, None))
    refused(ValueError, "x must be (C, d, n, M) with C, d, n >= 1, got (2, 3, 5)", x=x[..., 0])
    refused(ValueError, "x must be (C, d, n, M) with C, d, n >= 1, got (2, 3, 0, 4)", x=x[:, :, :0])
    refused(ValueError, "gain must be (w,) with w >= 1, got ()", gain=gain.sum())
    refused(ValueError, "bias must be (w,) = (6,), got (5,)", bias=bias[:5])
    refused(ValueError, "feature must be (w, 2 C) = (6, 4), got (6, 3)", feature=f[:, :3])
    refused(ValueError, "direction must be (w, 2 C) = (6, 4), got (1, 4)", direction=q[:1])
    refused(ValueError, "pool must be (w, w) = (6, 6), got (6, 5)", pool=pool[:, :5])
    refused(ValueError, "variance must be (w,) = (6,), got (1,)", running=(mean, variance[:1]))
    refused(TypeError, "pool must be torch.float64 as x is, got torch.float32", pool=pool.float())
    refused(ValueError, "neighbors must be at least 1, got 0", neighbors=0)
    refused(TypeError, "neighbors must be an int, got float", neighbors=2.0)
    refused(RuntimeError, "bias must be on cpu, got meta", bias=bias.to("meta"))


@built
@pytest.mark.parametrize("scale", [1e-20, 1e18, 3e19, 1e30])
def test_numbers_that_leave_the_range_do_so_alike(scale):
    """In float32 their squares are 0 or infinite; which results are then no numbers also depends on the compiler."""
    conv, x = EdgeConvolution(3, 7, 3).eval(), scale * torch.randn(3, 3, 5, 33)
    found = conv(x)
    with using_backend("reference"):
        expected = conv(x)
    assert found.isfinite().all() == expected.isfinite().all()
    both = found.isfinite() & expected.isfinite()
    torch.testing.assert_close(found[both], expected[both], rtol=1e-4, atol=1e-5 * scale)
