"""The ops of csrc/cuda/*.torch.cpp on the host: arguments, workspace, grid and stream as they are passed on a GPU.

They are called through torch's dispatcher as ops of another namespace, with tensors on the CPU; the kernels are launched on
the CUDA runtime of tests/cuda_host, which knows the memory that a launch has asked of torch.
"""

import ctypes
from pathlib import Path

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.permutation import valid_slots
from probsym_fast.ops.reference.permutation_entropy import permutation_entropy as dense_entropy
from probsym_fast.ops.reference.soft_permutation import soft_permutation as dense
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.helpers import cuda_on_host

pytestmark = pytest.mark.skipif(cuda_on_host.unable() is not None, reason=str(cuda_on_host.unable()))
NAMES = "soft_permutation", "permutation_entropy"
TAU, ITERATIONS = 0.1, 2


def registered(library: Path, namespace: str):
    """The definitions, with the schemas of the package's own ops, and torch.ops.<namespace>."""
    definitions = torch.library.Library(namespace, "FRAGMENT")
    for op in map(OPS.__getitem__, NAMES):
        for overload in (op.kernel, op.backward):
            definitions.define(str(overload._schema).split("::", 1)[1])
    ctypes.CDLL(str(library)).register_kernels_as(namespace.encode())
    return definitions, getattr(torch.ops, namespace)


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    kept, ops = registered(cuda_on_host.built(tmp_path_factory), "probsym_on_host")
    yield ops
    kept._destroy()


@pytest.mark.parametrize(
    ("B", "S", "N", "ragged", "dtype"),
    [(3, 2, 21, True, torch.float32), (1, 2, 300, False, torch.float64), (2, 1, 1030, True, torch.float32)],
)
def test_launches(ops, B, S, N, ragged, dtype):
    """A warp a row, a block a row, rows in memory; inputs that are not contiguous."""
    scores = torch.randn(N, B, S, dtype=dtype).permute(1, 2, 0)
    num_nodes = torch.arange(N - B + 1, N + 1) if ragged else None
    inside = torch.ones(B, S, N, dtype=torch.bool)
    if ragged:
        inside = valid_slots(num_nodes, N).expand(B, S, N)
    check(ops, scores, num_nodes, inside)


def check(ops, scores, num_nodes, inside):
    """Values and gradients are those of the definition in float64."""
    dtype, settings = scores.dtype, (TAU, ITERATIONS, True)
    found = t, log_r, log_c, order, rank = ops.soft_permutation(scores, num_nodes, *settings, False)
    exact = scores.double().requires_grad_()
    expected = dense(exact, num_nodes, *settings)
    assert torch.equal(order, expected[3]) and torch.equal(rank, expected[4])
    weights = [torch.randn(scores.shape, dtype=torch.float64).to(dtype).mT.contiguous().mT for _ in range(3)]
    for x, y in zip(found[:3], expected[:3], strict=True):
        assert_near(x, y.masked_fill(~inside, 0), VALUE, dtype)
    again = ops.soft_permutation(t, num_nodes, TAU, ITERATIONS, False, True)
    sorted_again = ops.soft_permutation(t, num_nodes, TAU, ITERATIONS, False, False)
    assert all(torch.equal(x, y) for x, y in zip(again, sorted_again, strict=True))
    for given in (weights, [None, weights[1], None]):
        pairs = [(x, w) for x, w in zip(expected[:3], given, strict=True) if w is not None]
        loss = sum((x * w.double() * inside).sum() for x, w in pairs)
        (d_scores,) = torch.autograd.grad(loss, exact, retain_graph=True)
        d = ops.soft_permutation_backward(*given, scores, order, t, num_nodes, *settings)
        assert_near(d, d_scores.masked_fill(~inside, 0), GRADIENT, dtype)

    vectors = [x.double().requires_grad_() for x in (t, log_r, log_c)]
    entropy = dense_entropy(*vectors, num_nodes, TAU)
    assert_near(ops.permutation_entropy(t, log_r, log_c, num_nodes, TAU), entropy, VALUE, dtype)
    d = torch.full((), 1.5, dtype=dtype)
    gradients = ops.permutation_entropy_backward(d, t, log_r, log_c, num_nodes, TAU)
    for x, y in zip(gradients, torch.autograd.grad(1.5 * entropy, vectors), strict=True):
        assert_near(x, y.masked_fill(~inside, 0), GRADIENT, dtype)


def test_no_rows(ops):
    nothing = torch.zeros(0, 2, 5)
    assert all(x.shape == nothing.shape for x in ops.soft_permutation(nothing, None, TAU, ITERATIONS, True, False))
    assert ops.permutation_entropy(nothing, nothing, nothing, None, TAU).isnan()  # as the mean of nothing
