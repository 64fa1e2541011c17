"""Every op once on a GPU, forward and backward, on graphs small enough for compute-sanitizer (benchmarks/gpu.sh)."""

import pytest
import torch

from probsym_fast.ops import (
    OPS,
    SoftPermutation,
    aggregate,
    embed_edges,
    embed_matrix,
    node_identifiers,
    permutation_entropy,
    readout,
    soft_permutation,
)
from tests.helpers.items import HALF, batch, weights
from tests.ops.test_backends import CALLS, matrices


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_op(gpu, name, deterministic):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)  # some references are not
    try:
        x = matrices(gpu, requires_grad=True)
        out = CALLS[name](x, OPS[name].backends("cuda")[0])
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [3, 7, 300, 1100])
def test_every_team_of_the_soft_permutation(gpu, N, dtype):
    """A warp a sample, a block a sample, and rows that stay in memory; samples of few nodes beside full ones."""
    scores = torch.randn(3, 2, N, dtype=dtype, device=gpu, requires_grad=True)
    p = soft_permutation(scores, torch.tensor([N, 1, N - 1], device=gpu), tau=0.1, iterations=3)
    (permutation_entropy(p) + p.log_r.sum() + (p.log_c * p.scores).sum()).backward()
    torch.cuda.synchronize()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_ragged_graphs_with_bad_numbers(gpu, dtype):
    """Items that are no nodes must reach no memory."""
    data = batch([5, 3, 7], 7, device=gpu)
    p, weight = data.soft(data.scores.float().requires_grad_()), weights(20, 3, 4, 4, device=gpu).to(dtype)
    edges = data.edges.clone()
    edges[0, ::4], edges[1, 1::5] = 10**9, -3
    leaves = [x.detach().to(dtype).requires_grad_() for x in (data.attr, weight)]
    tokens = embed_edges(edges, leaves[0], data.ptr, p, leaves[1], grid=2, pad_mode="circular")
    values = readout(tokens, data.ptr, p, leaves[1], at=edges)
    sums = aggregate(data.x.to(dtype), edges)
    values.float().sum().backward()
    torch.cuda.synchronize()
    for x in (tokens, values, sums, *(y.grad for y in leaves)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_permutations_that_are_none(gpu, dtype):
    """Slots and nodes out of range must reach no memory either."""
    data = batch([5, 3, 7], 7, device=gpu)
    p = data.soft(data.scores.float().requires_grad_())
    order, rank = p.order.clone(), p.rank.clone()
    order[:, 0, ::2], rank[:, 1, 1::2] = 10**9, -3
    p = SoftPermutation(order, p.num_nodes, rank, p.scores, p.log_r, p.log_c, p.tau, checked=True)
    matrix, weight = data.matrix.to(dtype).requires_grad_(), weights(20, 3, 4, 4, device=gpu).to(dtype)
    identifiers = weights(7, 20, device=gpu).to(dtype).requires_grad_()
    tokens = embed_matrix(matrix, p, weight.requires_grad_(), grid=2, pad_mode="circular")
    features = node_identifiers(data.ptr, p, identifiers, nodes=15)
    (tokens.float().sum() + features.float().sum()).backward()
    torch.cuda.synchronize()
    for x in (tokens, features, matrix.grad, weight.grad, identifiers.grad):
        assert x.isfinite().all()
