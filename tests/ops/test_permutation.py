"""Permutation: a permutation by hand, and what is refused."""

import re

import pytest
import torch

from probsym_fast import ops
from probsym_fast.groups import Symmetric
from probsym_fast.ops import OPS, Permutation, SoftPermutation, soft_permutation
from tests.conftest import GRADIENT, assert_near


@pytest.fixture
def order(device):
    return torch.stack([torch.randperm(6) for _ in range(4)]).view(2, 2, 6).to(device)


def test_rank_undoes_order(order, device):
    p = Permutation(order)
    assert p.shape == (2, 2, 6) and p.num_nodes is None
    assert torch.equal(p.order.gather(-1, p.rank), torch.arange(6, device=device).expand(2, 2, 6))
    q = p.inverse()
    assert type(q) is Permutation
    assert torch.equal(q.order, p.rank) and torch.equal(q.rank, p.order)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.bool])
def test_hard_is_one_where_rank_is_the_slot(order, device, dtype):
    p = Permutation(order)
    hard = p.hard(dtype)
    assert hard.dtype == (dtype or torch.float32)
    for b, s in ((0, 0), (1, 1)):
        for slot, node in enumerate(order[b, s].tolist()):
            assert hard[b, s, node].tolist() == [j == slot for j in range(6)]
    assert torch.equal(p.dense(), p.hard())
    assert torch.equal(p.hard() @ p.inverse().hard(), torch.eye(6, device=device).expand(2, 2, 6, 6))


def test_soft_permutation_gives_its_inverse_as_a_hard_one(device):
    num_nodes = torch.tensor([6, 4], device=device)
    p = soft_permutation(torch.randn(2, 3, 6, dtype=torch.float64, device=device), num_nodes)
    q = p.inverse()
    assert type(p) is SoftPermutation and type(q) is Permutation
    assert p.hard().dtype == torch.float64
    assert torch.equal(q.order, p.rank) and torch.equal(q.inverse().order, p.order)
    assert torch.equal(q.num_nodes, num_nodes)


def test_counts_become_int64(order, device):
    p = Permutation(order, torch.tensor([6, 6], dtype=torch.int32, device=device))
    assert p.num_nodes.dtype == torch.int64


ORDER = torch.arange(3).expand(2, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1],), TypeError, "order must be an int64 Tensor, got list"),
        ((ORDER.int(),), TypeError, "order must be an int64 Tensor, got torch.int32"),
        ((ORDER.float(),), TypeError, "order must be an int64 Tensor, got torch.float32"),
        ((ORDER[0, 0, 0],), ValueError, "order must be (..., N), got ()"),
        (
            (torch.tensor([[[0, 1, 1]]]),),
            ValueError,
            "order[0, 0] must hold each of 0..2 once, got [0, 1, 1]",
        ),
        (
            (torch.tensor([[[1, 2, 3]]]),),
            ValueError,
            "order[0, 0] must hold each of 0..2 once, got [1, 2, 3]",
        ),
        (
            (torch.tensor([[[0, 1], [1, 0]], [[0, 1], [-1, 0]]]),),
            ValueError,
            "order[1, 1] must hold each of 0..1 once, got [-1, 0]",
        ),
        ((ORDER, torch.tensor([3])), ValueError, "num_nodes must be (B,) = (2,), got (1,)"),
        (
            (ORDER, torch.tensor([3, 4])),
            ValueError,
            "num_nodes must be between 1 and N = 3, got 4 for graph 1",
        ),
        (
            (ORDER, torch.tensor([0, 3])),
            ValueError,
            "num_nodes must be between 1 and N = 3, got 0 for graph 0",
        ),
        (
            (ORDER, torch.tensor([3.0, 3.0])),
            TypeError,
            "num_nodes must be an integer Tensor, got torch.float32",
        ),
        (
            (ORDER, torch.tensor([True, True])),
            TypeError,
            "num_nodes must be an integer Tensor, got torch.bool",
        ),
        ((ORDER, torch.tensor([[3], [3]])), ValueError, "num_nodes must be (B,) = (2,), got (2, 1)"),
        (
            (torch.tensor([[[0, 1, 2]], [[0, 2, 1]]]), torch.tensor([1, 2])),
            ValueError,
            "order[1, 0] must leave the slots beyond num_nodes in place, got [0, 2, 1]",
        ),
        (
            (torch.tensor([[[2, 0, 1]]]), torch.tensor([2]), torch.tensor([[[1, 2, 0]]])),
            ValueError,
            "order[0, 0] must leave the slots beyond num_nodes in place, got [2, 0, 1]",
        ),
        ((ORDER, torch.tensor([3, 4]), ORDER), ValueError, "num_nodes must be between 1 and N = 3, got 4 for graph 1"),
        ((ORDER, None, ORDER.int()), TypeError, "rank must be an int64 Tensor, got torch.int32"),
        ((ORDER, None, ORDER[0]), ValueError, "rank must be (2, 1, 3) on cpu as order is, got (1, 3) on cpu"),
        ((ORDER, None, ORDER[:1]), ValueError, "rank must be (2, 1, 3) on cpu as order is, got (1, 1, 3) on cpu"),
        (
            (torch.tensor([[[1, 2, 0]]]), None, torch.tensor([[[1, 2, 0]]])),
            ValueError,
            "rank[0, 0] must undo order, got [1, 2, 0]",
        ),
        (
            (torch.tensor([[[0, 0]]]), None, torch.tensor([[[0, 1]]])),
            ValueError,
            "rank[0, 0] must undo order, got [0, 1]",
        ),
        (
            (torch.tensor([[[0, 1]]]), None, torch.tensor([[[0, 7]]])),
            ValueError,
            "rank[0, 0] must undo order, got [0, 7]",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'Permutation: {message}')}$"):
        Permutation(*arguments)


def test_rank_by_hand(order):
    p = Permutation(order, None, order.argsort(-1))
    assert torch.equal(p.rank, Permutation(order).rank)
    wrong = Permutation(order, None, order, checked=True)
    assert wrong.rank is order


def test_a_long_order_is_cut_in_the_message():
    with pytest.raises(ValueError, match=r"must hold each of 0\.\.99 once, got \[(0, ){15}0\]$"):
        Permutation(torch.zeros(1, 1, 100, dtype=torch.int64))


B, S, N, C, D = 2, 3, 6, 2, 4
PTR = torch.tensor([0, N, 2 * N])
EDGES = torch.tensor([[0, 1, 4, 7], [3, 2, 5, 11]])


def readers(backend: str) -> dict:
    """Everything that a permutation's gradient comes from, as functions of it."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pairs, nodes, table, attr, x = draw(D, C, N, N), draw(D, C, N), draw(N, D), draw(4, C), draw(B * N, C)
    matrix, tokens, points = draw(B, N, N, C), draw(B, S, 1, D), draw(B, N, C)
    given = {"backend": backend}
    return {
        "embed_edges": lambda p: ops.embed_edges(EDGES, attr, PTR, p, pairs, grid=1, **given),
        "embed_matrix": lambda p: ops.embed_matrix(matrix, p, pairs, grid=1, **given),
        "embed_nodes": lambda p: ops.embed_nodes(x, PTR, p, nodes, tokens=1, **given),
        "readout": lambda p: ops.readout(tokens, PTR, p, nodes, at="nodes", **given),
        "permute": lambda p: ops.permute(p, points[:, None], **given),
        "permute, inverse": lambda p: ops.permute(p, points[:, None], inverse=True, **given),
        "node_identifiers": lambda p: ops.node_identifiers(PTR, p, table, **given),
        "permutation_entropy": lambda p: ops.permutation_entropy(p, **given),
        "act": lambda p: Symmetric(N).act(p, points, "nc"),
    }


@pytest.mark.parametrize("part", ["scores", "log_r", "log_c"])
@pytest.mark.parametrize("backend", OPS["embed"].backends("cpu"))
@pytest.mark.parametrize("name", readers("auto"))
def test_each_part_of_a_soft_permutation_by_hand_gets_its_gradient(name, backend, part):
    """Alone as where all three ask for one."""
    made = soft_permutation(torch.randn(B, S, N, dtype=torch.float64), tau=0.3, iterations=5)

    def gradient(*asked, backend):
        parts = {key: getattr(made, key).clone().requires_grad_(key in asked) for key in ("scores", "log_r", "log_c")}
        p = SoftPermutation(made.order, None, made.rank, *parts.values(), tau=made.tau)
        assert p.requires_grad
        return torch.autograd.grad(readers(backend)[name](p).sin().sum(), parts[part])[0]

    expected = gradient("scores", "log_r", "log_c", backend="reference")
    assert expected.abs().max() > 1e-3
    assert_near(gradient(part, backend=backend), expected, GRADIENT)


def test_a_soft_permutation_without_gradients():
    made = soft_permutation(torch.randn(1, 1, 3, requires_grad=True))
    with torch.no_grad():
        assert not made.requires_grad
    assert made.requires_grad
    assert not soft_permutation(torch.randn(1, 1, 3)).requires_grad
