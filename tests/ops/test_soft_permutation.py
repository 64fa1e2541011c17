"""soft_permutation and permutation_entropy against the dense definition."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probsym_fast import ops
from probsym_fast.ops import OPS, Permutation, permutation_entropy, soft_permutation
from tests.conftest import GRADIENT, assert_near, implementations

CPU_BACKENDS = OPS["soft_permutation"].backends("cpu")
SHAPES = [(1, 1, 1), (3, 1, 2), (2, 3, 5), (5, 7, 17), (2, 2, 64), (1, 4, 188)]


def kernels(device: torch.device) -> str:
    return OPS["soft_permutation"].backends(device.type)[0]


def weights(shape, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]


def run(scores, num_nodes=None, backend="auto", entropy=True, seed=1, **settings):
    """Permutation, entropy, and the gradients of a random combination of the outputs and of the entropy."""
    scores = scores.detach().requires_grad_()
    p = soft_permutation(scores, num_nodes, backend=backend, **settings)
    e = permutation_entropy(p, backend=backend)
    valid = torch.ones_like(p.scores) if num_nodes is None else ops.permutation.valid_slots(num_nodes, scores.shape[-1])
    parts = zip((p.scores, p.log_r, p.log_c), weights(p.scores.shape, p.scores.dtype, scores.device, seed), strict=True)
    loss = sum((x * w * valid).sum() for x, w in parts)
    (by_parts,) = torch.autograd.grad(loss, scores, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(e, scores)
    return p, e, by_parts, by_entropy


def published(scores, tau, iterations=20):
    """The definition in logarithms, rows nodes, columns slots: soft permutation and entropy with no clamp."""
    s = torch.nn.functional.normalize(scores, dim=-1)
    t = s.sort(dim=-1, descending=True).values
    log_p = -(s[..., :, None] - t[..., None, :]).abs() / tau
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
        log_p = log_p - log_p.logsumexp(-2, keepdim=True)
    rows, columns = log_p.softmax(-1), log_p.softmax(-2)
    entropy = -(rows * log_p.log_softmax(-1)).sum(-1) - (columns * log_p.log_softmax(-2)).sum(-2)
    return log_p.exp(), (entropy.mean(1).mean(-1)).mean()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_equals_the_published_definition(backend, tau, n):
    scores = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    p = soft_permutation(scores, tau=tau, backend=backend)
    soft, entropy = published(scores, tau)
    assert_near(p.soft(), soft)
    assert (permutation_entropy(p, backend=backend) - entropy).abs() < 1e-12 * n
    assert_near(p.soft().sum(-2), torch.ones(2, 3, n))  # columns are normalised last
    G = torch.randn(2, 3, n, n, dtype=torch.float64)
    (expected,) = torch.autograd.grad((soft * G).sum(), scores)
    (found,) = torch.autograd.grad((p.dense() * G).sum(), scores)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1)
    hard = p.hard()
    assert torch.equal(p.dense().detach(), hard)
    sorted_scores = (hard.mT @ scores.detach()[..., None])[..., 0]
    assert (sorted_scores.diff() <= 0).all()
    assert torch.equal(hard.sum(-1), torch.ones(2, 3, n, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_against_the_reference(device, shape, dtype):
    scores = torch.randn(shape, device=device).to(dtype)
    found = run(scores, backend=kernels(device), tau=0.05)
    expected = run(scores.double(), backend="reference", tau=0.05)
    assert torch.equal(found[0].order, expected[0].order)
    assert torch.equal(found[0].rank, expected[0].rank)
    for name in ("scores", "log_r", "log_c"):
        assert_near(getattr(found[0], name), getattr(expected[0], name))
    assert found[0].scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(found[1], expected[1])
    if shape[-1] > 1:
        assert_near(found[2], expected[2], GRADIENT)
        assert_near(found[3], expected[3], GRADIENT)


def test_ragged_batches_ignore_the_padding(device):
    num_nodes = torch.tensor([17, 1, 5, 16], device=device)
    scores = torch.randn(4, 6, 17, dtype=torch.float64, device=device)
    beyond = ~ops.permutation.valid_slots(num_nodes, 17).expand(scores.shape)
    found = run(scores.masked_fill(beyond, torch.nan), num_nodes, kernels(device), tau=0.1)
    expected = run(scores, num_nodes, "reference", tau=0.1)
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert_near(x, y, GRADIENT)
    slots = torch.arange(17, device=device).expand(scores.shape)
    for q in (found[0], expected[0]):
        assert torch.equal(q.order[beyond], slots[beyond])
        assert torch.equal(q.rank[beyond], slots[beyond])
        assert (q.scores[beyond] == 0).all() and (q.log_r[beyond] == 0).all() and (q.log_c[beyond] == 0).all()
        assert_near(q.soft(), expected[0].soft())
        assert_near(q.soft().sum(-2), torch.ones(4, 6, 17))
    assert (found[2][beyond] == 0).all()
    for b, n in enumerate(num_nodes.tolist()):  # each graph as if it were alone, without padding
        alone = soft_permutation(scores[b : b + 1, :, :n], tau=0.1, backend="reference")
        assert torch.equal(found[0].order[b, :, :n], alone.order[0])
        assert_near(found[0].log_r[b, :, :n], alone.log_r[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend):
    scores = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    num_nodes = torch.tensor([6, 4])

    def outputs(s):
        p = soft_permutation(s, num_nodes, tau=0.3, backend=backend)
        return p.scores, p.log_r, p.log_c, permutation_entropy(p, backend=backend)

    assert torch.autograd.gradcheck(outputs, scores)
    t, log_r, log_c = (x.detach().requires_grad_() for x in outputs(scores)[:3])
    entropy = OPS["permutation_entropy"].select(backend, t.device, t.dtype)
    inside = ops.permutation.valid_slots(num_nodes, 6)
    masked = lambda *x: entropy(*(y * inside for y in x), num_nodes, 0.3)  # noqa: E731
    assert torch.autograd.gradcheck(masked, (t, log_r, log_c))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ties_go_by_index_and_keep_a_gradient(backend):
    scores = torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0]]], dtype=torch.float64)
    p, _, by_parts, by_entropy = run(scores, backend=backend, tau=0.1)
    assert p.order.tolist() == [[[1, 3, 0, 2, 4]]]
    expected = run(scores, backend="reference", tau=0.1)
    assert_near(by_parts, expected[2], GRADIENT)
    assert_near(by_entropy, expected[3], GRADIENT)
    same = run(torch.ones(1, 2, 40, dtype=torch.float64), backend=backend)
    assert torch.equal(same[0].order[0, 0], torch.arange(40))
    assert_near(same[0].soft(), torch.full((1, 2, 40, 40), 1 / 40, dtype=torch.float64))
    assert all(x.isfinite().all() for x in same[1:])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    tau=st.sampled_from([1e-4, 0.01, 10.0]),
    spread=st.sampled_from([0.0, 1e-8, 1.0, 1e6]),
    iterations=st.sampled_from([0, 1, 20]),
    normalize=st.booleans(),
)
def test_extremes_stay_finite_and_equal(n, tau, spread, iterations, normalize):
    """Underflowing gaps, zero scores (a clamped norm), no iterations at all."""
    scores = (torch.randn(1, 3, n, dtype=torch.float64) * spread).float()
    arguments = {"tau": tau, "iterations": iterations, "normalize": normalize}
    for dtype in (torch.float32, torch.float64):
        found = run(scores.to(dtype), backend=CPU_BACKENDS[0], **arguments)
        expected = run(scores.double(), backend="reference", **arguments)
        assert torch.equal(found[0].order, expected[0].order)
        assert all(x.isfinite().all() for x in found[1:])
        if dtype == torch.float64:
            bound = {torch.float64: 1e-8}
            assert_near(found[0].soft(), expected[0].soft(), bound)
            if n > 1 and tau >= 0.01:
                assert_near(found[2], expected[2], bound)


def bits(p, leaf):
    """What a permutation holds, and the gradients of its parts and of its entropy."""
    vectors = p.scores, p.log_r, p.log_c
    drawn = weights(p.shape, p.scores.dtype, p.device)
    loss = sum((x * w).sum() for x, w in zip(vectors, drawn, strict=True)) + permutation_entropy(p)
    return *vectors, p.order, p.rank, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("device", "backend"), implementations("soft_permutation"))
@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 2, 2), (3, 2, 17), (2, 3, 188), (2, 1, 2100)])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("normalize", [True, False])
def test_sorted_in_one_dtype_and_relaxed_in_another(device, shape, dtypes, normalize, backend):
    """Bit by bit: the scores sorted, then what they are in the other dtype sorted again and relaxed."""
    by, dtype = dtypes
    if backend == "reference" and shape[-1] > 188:
        shape = (1, 1, 600)
    num_nodes = torch.randint(1, shape[-1] + 1, shape[:1]).to(device)
    scores = torch.randn(shape, dtype=by).round(decimals=1)  # ties, which float32 cannot tell apart
    leaf = (scores + 1e-9 * torch.rand(shape, dtype=by)).to(device).requires_grad_()
    found = soft_permutation(leaf, num_nodes, 0.05, 7, normalize, backend, dtype=dtype)
    hard = soft_permutation(leaf, num_nodes, iterations=0, normalize=normalize, backend=backend)
    soft = soft_permutation(hard.scores.to(dtype), num_nodes, 0.05, 7, False, backend)
    expected = replace(soft, order=hard.order, rank=hard.rank, checked=True)
    assert found.scores.dtype == found.log_r.dtype == dtype and found.tau == 0.05
    for x, y in zip(bits(found, leaf), bits(expected, leaf), strict=True):
        assert torch.equal(x, y)
    same = soft_permutation(leaf, num_nodes, 0.05, 7, normalize, backend, dtype=by)
    for x, y in zip(
        bits(same, leaf), bits(soft_permutation(leaf, num_nodes, 0.05, 7, normalize, backend), leaf), strict=True
    ):
        assert torch.equal(x, y)


def test_presorted_scores_are_not_sorted():
    """Not even where they do not descend, of which the kernels know nothing; the reference is as the kernels."""
    scores = torch.tensor([[[1.0, 3.0, 2.0, 9.0]]])
    for num_nodes in (None, torch.tensor([3])):
        for select in CPU_BACKENDS:
            run = OPS["soft_permutation"].select(select, scores.device, scores.dtype)
            t, _, _, order, rank = run(scores, num_nodes, 0.1, 0, False, True)
            assert torch.equal(order, torch.arange(4).expand(1, 1, 4)) and torch.equal(rank, order)
            assert t.flatten().tolist() == [1.0, 3.0, 2.0, 9.0 if num_nodes is None else 0.0]


def test_strided_inputs(device):
    base = torch.randn(4, 6, 20, device=device)
    for view in (base[::2, 1:4, 3:12], base.permute(2, 1, 0)[:5], base[:, :1].expand(4, 3, 20)):
        found = run(view, backend=kernels(device))
        expected = run(view.clone(memory_format=torch.contiguous_format), backend=kernels(device))
        assert torch.equal(found[0].order, expected[0].order)
        assert torch.equal(found[2], expected[2])
        assert torch.equal(found[3], expected[3])


def test_samples_do_not_depend_on_their_neighbours():
    """Neither the other graphs of the batch nor the number of threads change a bit."""
    scores = torch.randn(9, 5, 33)
    num_nodes = torch.randint(1, 34, (9,))
    whole = run(scores, num_nodes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = run(scores, num_nodes)
    finally:
        torch.set_num_threads(threads)
    for x, y in zip((whole[0].log_r, *whole[1:]), (single[0].log_r, *single[1:]), strict=True):
        assert torch.equal(x, y)
    for b in (0, 3, 8):
        alone = soft_permutation(scores[b : b + 1], num_nodes[b : b + 1])
        assert torch.equal(alone.order[0], whole[0].order[b])
        assert torch.equal(alone.log_c[0], whole[0].log_c[b])


@pytest.mark.skipif(CPU_BACKENDS == ("reference",), reason="the kernels are not built")
def test_opcheck():
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    library = torch.ops.probsym_fast
    for num_nodes in (None, torch.tensor([5, 2])):
        for presorted in (False, True):
            torch.library.opcheck(library.soft_permutation.default, (scores, num_nodes, 0.1, 20, True, presorted))
        t, log_r, log_c, order, _ = library.soft_permutation(scores.detach(), num_nodes, 0.1, 20, True, False)
        d = [torch.randn_like(t) for _ in range(3)]
        arguments = (*d, scores.detach(), order, t, num_nodes, 0.1, 20, True)
        torch.library.opcheck(library.soft_permutation_backward.default, arguments)
        parts = [x.requires_grad_() for x in (t, log_r, log_c)]
        torch.library.opcheck(library.permutation_entropy.default, (*parts, num_nodes, 0.1))
        parts = [x.detach() for x in parts]
        torch.library.opcheck(
            library.permutation_entropy_backward.default, (torch.ones((), dtype=t.dtype), *parts, num_nodes, 0.1)
        )


def test_compiles_without_a_break():
    def loss(scores, num_nodes):
        p = soft_permutation(scores, num_nodes, tau=0.1)
        return permutation_entropy(p) + (p.log_r * p.scores).sum(), p.order

    for num_nodes in (None, torch.tensor([4, 7])):
        scores = torch.randn(2, 3, 7, requires_grad=True)
        value, order = torch.compile(loss, fullgraph=True, backend="aot_eager")(scores, num_nodes)
        (found,) = torch.autograd.grad(value, scores)
        expected_value, expected_order = loss(scores, num_nodes)
        (expected,) = torch.autograd.grad(expected_value, scores)
        assert torch.equal(order, expected_order)
        assert_near(value, expected_value)
        assert_near(found, expected, GRADIENT)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(())}, ValueError, "scores must be (..., N) with N >= 1, got ()"),
        ({"scores": torch.zeros(2, 3, 0)}, ValueError, "scores must be (..., N) with N >= 1, got (2, 3, 0)"),
        ({"scores": torch.zeros(2, 3, 4).long()}, TypeError, "scores must be floating point, got torch.int64"),
        ({"scores": [1.0]}, TypeError, "scores must be a Tensor, got list"),
        ({"tau": 0.0}, ValueError, "tau must be finite and > 0, got 0.0"),
        ({"tau": -1.0}, ValueError, "tau must be finite and > 0, got -1.0"),
        ({"tau": float("nan")}, ValueError, "tau must be finite and > 0, got nan"),
        ({"tau": float("inf")}, ValueError, "tau must be finite and > 0, got inf"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float32, float64 or None, got torch.int64"),
        ({"dtype": torch.float16}, TypeError, "dtype must be float32, float64 or None, got torch.float16"),
        ({"dtype": "float32"}, TypeError, "dtype must be float32, float64 or None, got 'float32'"),
        ({"iterations": -1}, ValueError, "iterations must be in 0..10000, got -1"),
        ({"num_nodes": torch.tensor([4])}, ValueError, "num_nodes must be (B,) = (2,), got (1,)"),
        ({"num_nodes": torch.tensor([4, 0])}, ValueError, "num_nodes must be between 1 and N = 4, got 0 for graph 1"),
        ({"num_nodes": torch.tensor([5, 4])}, ValueError, "num_nodes must be between 1 and N = 4, got 5 for graph 0"),
        ({"num_nodes": torch.tensor([1.0, 2.0])}, TypeError, "num_nodes must be an integer Tensor, got torch.float32"),
        ({"num_nodes": [4, 4]}, TypeError, "num_nodes must be an integer Tensor, got list"),
        (
            {"num_nodes": torch.ones(2, dtype=torch.int64, device="meta")},
            RuntimeError,
            "num_nodes must be on cpu, got meta",
        ),
        *(
            (
                {"scores": torch.tensor([[[0.0, bad, 1.0]]])},
                ValueError,
                "scores must be finite, got NaN or infinity among the valid nodes",
            )
            for bad in (float("nan"), float("inf"), -float("inf"))
        ),
    ],
)
def test_bad_input(backend, change, error, message):
    arguments = {"scores": torch.randn(2, 3, 4), "backend": backend, **change}
    with pytest.raises(error, match=f"^soft_permutation: {re.escape(message)}$"):
        soft_permutation(**arguments)


def test_absent_backend_and_wrong_permutation():
    there = ("auto", *CPU_BACKENDS)
    with pytest.raises(RuntimeError, match=re.escape(f"backend must be one of {there} on cpu, got 'tpu'")):
        soft_permutation(torch.randn(1, 1, 3), backend="tpu")
    message = "permutation_entropy: permutation must be a SoftPermutation, got Permutation"
    with pytest.raises(TypeError, match=message):
        permutation_entropy(Permutation(torch.arange(3).expand(1, 1, 3)))


def test_permutations_by_hand():
    order = torch.stack([torch.randperm(6) for _ in range(4)]).view(2, 2, 6)
    p = Permutation(order)
    x = torch.randn(2, 2, 6)
    y = x.gather(-1, p.order)
    assert torch.equal(y.gather(-1, p.rank), x)
    assert torch.equal((p.hard().mT @ x[..., None])[..., 0], y)
    assert torch.equal(p.inverse().order, p.rank)
    bad = torch.tensor([[[0, 1, 1]]])
    with pytest.raises(ValueError, match=re.escape("order[0, 0] must hold each of 0..2 once, got [0, 1, 1]")):
        Permutation(bad)
    with pytest.raises(TypeError, match=r"order must be an int64 Tensor, got torch\.float32"):
        Permutation(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match=re.escape("order must be (..., N), got ()")):
        Permutation(torch.tensor(0))


PEAK = """
import torch
from probsym_fast import ops
def peak():  # of the resident set since the last reset, in kB (Linux)
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
def step(B, S, N):
    scores = torch.randn(B, S, N, requires_grad=True)
    p = ops.soft_permutation(scores, backend="cpu")
    (ops.permutation_entropy(p, backend="cpu") + p.log_r.sum()).backward()
step(1, 1, 4)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
step(16, 10, 444)
print(peak() - before)
"""


@pytest.mark.skipif(CPU_BACKENDS == ("reference",), reason="the kernels are not built")
def test_memory_is_linear():
    """(16, 10, 444): one dense matrix a sample would be 126 MB, its 40 iterates 5 GB."""
    few = os.environ | {"OMP_NUM_THREADS": "2"}  # each thread has memory of its own
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=few)
    assert 2 < int(done.stdout) / 1024 < 30  # the outputs alone are 3 MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_sort_like_the_reference(dtype):
    """From 2048 nodes on the CPU kernel sorts by radix: ties, both zeros, tiny scores, few valid nodes."""
    N = 2051
    scores = torch.randn(3, 2, N, dtype=dtype)
    scores[..., ::7] = scores[..., 1:2]
    scores[..., 5], scores[..., 9] = 0.0, -0.0
    scores[1] *= 1e-30
    num_nodes = torch.tensor([N, N - 3, 17])
    p, q = (soft_permutation(scores, num_nodes, 0.1, 2, backend=name) for name in ("auto", "reference"))
    assert torch.equal(p.order, q.order) and torch.equal(p.rank, q.rank)
    torch.testing.assert_close(p.scores, q.scores)
    torch.testing.assert_close(p.log_r, q.log_r, rtol=1e-4, atol=1e-4)
