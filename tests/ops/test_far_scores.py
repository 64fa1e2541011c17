"""Scores far apart in units of tau: the kernels' padding lanes must not reach the gradients of any op that reads them."""

import pytest
import torch

from probsym_fast import ops
from tests.conftest import assert_near
from tests.helpers.items import DTYPES, weights

N, TAU = 40, 0.01
FAR = {torch.float32: 30.0, torch.float64: 300.0}  # exp(score / tau) overflows, below and above the others
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # 1 / tau magnifies the rounding of the scores


def calls(n, dtype):
    """An op each, from a permutation of n valid nodes to a value."""
    ptr = torch.tensor([0, n])
    edges = torch.stack([torch.arange(n), torch.arange(n).roll(1)])
    attr, x, matrix = (torch.randn(*shape, 2, dtype=dtype) for shape in ((n,), (n,), (1, N, N)))
    one, two = weights(20, 2, 10).to(dtype), weights(20, 2, 10, 10).to(dtype)
    tokens, identifiers = torch.randn(1, 2, 4, 20, dtype=dtype), torch.randn(N, 5, dtype=dtype)
    return {
        "embed_edges": lambda p, backend: ops.embed_edges(edges, attr, ptr, p, two, grid=4, backend=backend),
        "embed_nodes": lambda p, backend: ops.embed_nodes(x, ptr, p, one, tokens=4, backend=backend),
        "embed_matrix": lambda p, backend: ops.embed_matrix(matrix, p, two, grid=4, backend=backend),
        "readout": lambda p, backend: ops.readout(tokens, ptr, p, one, at="nodes", backend=backend),
        "permute": lambda p, backend: ops.permute(p, identifiers[None, None], backend=backend)[:, :, :n],
        "permute, inverse": lambda p, backend: ops.permute(p, identifiers[None, None], inverse=True, backend=backend)[
            :, :, :n
        ],
        "node_identifiers": lambda p, backend: ops.node_identifiers(ptr, p, identifiers, nodes=n, backend=backend),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 15, 16, 17, 33])
def test_gradients_with_an_outlier(n, sign, dtype):
    scores = torch.randn(1, 2, N, dtype=dtype) / 10
    scores[0, 0, 0] = sign * FAR[dtype]
    for name, call in calls(n, dtype).items():
        found = []
        for backend in ("auto", "reference"):
            leaf = scores.clone().requires_grad_()
            p = ops.soft_permutation(leaf, torch.tensor([n]), TAU, normalize=False, backend=backend)
            y = call(p, backend)
            combination = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
                dtype
            )
            found.append(torch.autograd.grad((y * combination).sum(), leaf)[0])
        assert found[0].isfinite().all(), name
        assert_near(*found, TOLERANCE)


def test_a_graph_of_one_node_trains_at_the_published_temperature():
    scores = torch.tensor([[[-3.0] + [0.0] * (N - 1)]], requires_grad=True)
    p = ops.soft_permutation(scores, torch.tensor([1]), TAU)
    ops.node_identifiers(torch.tensor([0, 1]), p, torch.randn(N, 5), nodes=1).sum().backward()
    assert scores.grad.abs().max() < 1e-4
