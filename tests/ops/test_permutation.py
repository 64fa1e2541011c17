"""Permutation: a permutation by hand, and what is refused."""

import re

import pytest
import torch

from probsym_fast.ops import Permutation, SoftPermutation, soft_permutation


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
        ((ORDER[0],), ValueError, "order must be (B, S, N), got (1, 3)"),
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
        ((ORDER, None, ORDER[0]), ValueError, "rank must be (B, S, N), got (1, 3)"),
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
