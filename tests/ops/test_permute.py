"""permute against the dense matrix, for every shape and dtype that it takes, and permutations with other leading axes."""

import re
from dataclasses import replace

import numpy
import pytest
import torch

from probsym_fast.ops import OPS, Permutation, permutation_entropy, permute, soft_permutation
from tests.conftest import GRADIENT, assert_near

NUM_NODES = torch.tensor([9, 5])


def soft(*shape, num_nodes=None, dtype=torch.float64, **settings):
    scores = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return scores, soft_permutation(scores, num_nodes, tau=0.2, iterations=4, **settings)


@pytest.mark.parametrize("backend", OPS["permute"].backends("cpu"))
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("features", [(), (3,), (3, 6)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_nodes", [None, NUM_NODES])
def test_is_the_product_with_the_matrix(num_nodes, shared, features, inverse, backend):
    scores, p = soft(2, 3, 9, num_nodes=num_nodes, backend="reference")
    x = torch.randn(2, 1 if shared else 3, 9, *features, dtype=torch.float64, requires_grad=True)
    matrix = p.dense().mT if inverse else p.dense()
    flat = x.flatten(3) if features else x[..., None]
    expected = (matrix @ flat).reshape(2, 3, 9, *features)
    found = permute(p, x, inverse=inverse, backend=backend)
    assert torch.equal(found, expected)
    weight = torch.randn_like(expected)
    of = (torch.autograd.grad((y * weight).sum(), (x, scores), retain_graph=True) for y in (found, expected))
    for a, b in zip(*of, strict=True):
        assert_near(a, b, GRADIENT)


@pytest.mark.parametrize("features", [1, 2])
def test_long_rows(features):
    """Rows that the CPU kernel spreads over several lanes, against the reference."""
    num_nodes = torch.tensor([130, 60, 1])
    scores, p = soft(3, 5, 130, num_nodes=num_nodes)
    x = torch.randn(3, 1, 130, features, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 130, features, dtype=torch.float64)
    of = (
        torch.autograd.grad((permute(p, x, backend=name) * weight).sum(), (x, scores), retain_graph=True)
        for name in ("auto", "reference")
    )
    for a, b in zip(*of, strict=True):
        assert_near(a, b, GRADIENT)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 2, 3, 7)])
def test_any_leading_axes(shape):
    """As if each permutation were called by itself."""
    counts = torch.tensor([7, 4]) if len(shape) > 1 else None
    scores, p = soft(*shape, num_nodes=counts)
    x = torch.randn(*shape, 3, dtype=torch.float64)
    y = p @ x
    rows = counts.repeat_interleave(len(scores[0].flatten()) // 7) if len(shape) > 1 else [7]
    each = scores.reshape(-1, 1, 1, 7)
    expected = [
        permute(soft_permutation(s, torch.as_tensor(n).view(1), tau=0.2, iterations=4), a[None, None])
        for s, n, a in zip(each, rows, x.reshape(-1, 7, 3), strict=True)
    ]
    expected = torch.stack(expected).reshape(y.shape)
    assert torch.equal(y, expected)
    assert_near(*(torch.autograd.grad(a.sin().sum(), scores, retain_graph=True)[0] for a in (y, expected)))
    matrices = p.soft()
    assert matrices.shape == (*shape, 7)
    assert_near(matrices.sum(-2), torch.ones(shape).double())
    assert permutation_entropy(p).isfinite()
    assert torch.equal((p.detach().inverse() @ y).detach(), x)


def test_what_is_neither_float_nor_double():
    _, p = soft(1, 2, 5)
    for x in (torch.arange(10).view(1, 2, 5), torch.rand(1, 2, 5) > 0.5):
        assert torch.equal(permute(p, x), x.gather(-1, p.rank))
        assert torch.equal(torch.vmap(lambda x: permute(p, x))(x[None]), permute(p, x)[None])
    z = torch.randn(1, 2, 5, 3, dtype=torch.complex64, requires_grad=True)
    assert torch.equal(torch.view_as_real(p @ z), p @ torch.view_as_real(z))
    assert torch.equal(p @ z.conj(), (p @ z).conj())
    assert (p @ z.real.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((torch.arange(3), torch.ones(3)), {}, TypeError, "p must be a Permutation, got Tensor"),
        ((Permutation(torch.arange(3)), [1, 2, 3]), {}, TypeError, "x must be a Tensor, got list"),
        ((Permutation(torch.arange(3)), torch.ones(4)), {}, ValueError, "x must be (3, features...) as p is"),
        (
            (Permutation(torch.arange(3).expand(2, 4, 3)), torch.ones(2, 3, 3)),
            {},
            ValueError,
            "x must be (2, 4, 3, features...) as p is, or 1 along its first axes, got (2, 3, 3)",
        ),
        ((Permutation(torch.arange(3)), torch.ones(3)), {"inverse": 1}, TypeError, "inverse must be a bool, got int 1"),
        ((Permutation(torch.arange(3)), torch.ones(3)), {"backend": "x"}, RuntimeError, "backend must be one of"),
    ],
)
def test_errors(arguments, settings, error, message):
    with pytest.raises(error, match=f"^permute: {re.escape(message)}"):
        permute(*arguments, **settings)


def test_parts_of_permutations():
    scores, p = soft(2, 3, 9, num_nodes=NUM_NODES)
    x = torch.randn(2, 3, 9, 2, dtype=torch.float64)
    for index in (
        0,
        (1, 2),
        (slice(None), 1),
        (slice(None), [2, 0]),
        (slice(None), slice(1, 3)),
        torch.tensor([1, 1, 0]),
    ):
        part = p[index]
        assert torch.equal(part @ x[index], (p @ x)[index]), index
        whole, alone = (p @ x)[index], part @ x[index]
        wanted, found = (torch.autograd.grad(y.sin().sum(), scores, retain_graph=True)[0] for y in (whole, alone))
        assert_near(found, wanted)
    assert (
        p[1].num_nodes.tolist() == [5] * 3
        and p[:, 0].num_nodes.tolist() == [9, 5]
        and p[1, 0].num_nodes.tolist() == [5]
    )
    assert p[:0].shape == (0, 3, 9) and p[:, :0].shape == (2, 0, 9)
    with pytest.raises(IndexError):
        p[0, 0, 0]
    for mixed in (None, torch.tensor([[0, 1]])):
        with pytest.raises(IndexError, match=r"^Permutation: an index must keep graphs along the first axis"):
            p[mixed]
    assert torch.equal(p[..., 1:3].order, p[:, 1:3].order)
    one = soft(7)[1]
    assert torch.equal(one[...].order, one.order) and one[None].shape == (1, 7)
    with pytest.raises(ValueError, match=r"^Permutation.narrow: order must be \(B, S, N\), got \(7,\)$"):
        one.narrow(0, 1)
    with pytest.raises(TypeError, match=r"^Permutation.to: dtype must be floating, got torch.int64$"):
        p.to(torch.int64)
    single = p.to(torch.float32)
    assert single.scores.dtype == single.log_c.dtype == torch.float32 and single.order.dtype == torch.int64
    assert p.to("meta").device.type == p.to(device="meta").num_nodes.device.type == "meta"


def test_orders_as_lists_arrays_and_with_padding():
    """All forms of the same orders; -1 is padding."""
    wanted, counts = [[[2, 0, 1, 3]], [[1, 0, 2, 3]]], [3, 2]
    padded = [[2, 0, 1, -1], [1, 0, -1, -1]]
    for orders in (
        [[2, 0, 1], [1, 0]],
        ([2, 0, 1, -1], (1, 0)),
        padded,
        [numpy.array([2, 0, 1], dtype=numpy.int32), numpy.array([0, 1])[::-1]],
        numpy.array(padded),
        numpy.array(padded, dtype=numpy.int16)[:, None],
        torch.tensor(padded),
        torch.tensor(padded, dtype=torch.int32),
        [torch.tensor([2, 0, 1]), [1, 0, -1]],
    ):
        p = Permutation.from_orders(orders, N=4)
        assert p.order.dtype == torch.int64 and p.order.tolist() == wanted and p.num_nodes.tolist() == counts
    two = Permutation.from_orders([[[1, 0, -1], [0, 1, -1]], [[2, 1, 0], [1, 2, 0]]])
    assert (
        two.shape == (2, 2, 3) and two.num_nodes.tolist() == [2, 3] and two.order[0].tolist() == [[1, 0, 2], [0, 1, 2]]
    )
    for orders, error, message in (
        (
            [[0, -1, 1]],
            ValueError,
            "orders[0] must have -1 only after its nodes, in each sample as often, got [0, -1, 1]",
        ),
        (
            [[0], [[0, -1], [1, 0]]][1:],
            ValueError,
            "orders[0] must have -1 only after its nodes, in each sample as often, got [[0, -1], [1, 0]]",
        ),
        ([[0.0, 1.0]], TypeError, "orders[0] must be a list, an array or a Tensor of ints, got float64"),
        ([[True, False]], TypeError, "orders[0] must be a list, an array or a Tensor of ints, got bool"),
        (["ab"], TypeError, "orders[0] must be a list, an array or a Tensor of ints, got <U2"),
        ([[[0, 1], [0]]], TypeError, "orders[0] must be a list, an array or a Tensor of ints, got list [[0, 1], [0]]"),
        ([2, 0, 1], ValueError, "orders must be one or more of (n,), or of (S, n) with one S, got [(), (), ()]"),
        ([[]], ValueError, "orders must be one or more of (n,), or of (S, n) with one S, got [(0,)]"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'Permutation.from_orders: {message}')}$"):
            Permutation.from_orders(orders)
    for orders in ([[0, 2]], [[0, -2]], [[-1, -1]], [[1, 1, -1]]):
        with pytest.raises(ValueError, match=r"^Permutation: (order|num_nodes)"):
            Permutation.from_orders(orders)


def test_from_orders():
    p = Permutation.from_orders([torch.tensor([2, 0, 1]), torch.tensor([1, 0])], N=4)
    assert p.order.tolist() == [[[2, 0, 1, 3]], [[1, 0, 2, 3]]] and p.num_nodes.tolist() == [3, 2]
    assert Permutation.from_orders([torch.tensor([[0, 1], [1, 0]])]).shape == (1, 2, 2)
    for orders, error, message in (
        ([], ValueError, "Permutation.from_orders: orders must be one or more"),
        ([torch.tensor([0]), torch.tensor([[0]])], ValueError, "Permutation.from_orders: orders must be one or more"),
        (
            [torch.tensor([0.0])],
            TypeError,
            "Permutation.from_orders: orders[0] must be a list, an array or a Tensor of ints, got torch.float32",
        ),
        (3, TypeError, "Permutation.from_orders: orders must be a list of orders, an array or a Tensor, got int"),
        ([torch.tensor([1, 1])], ValueError, "Permutation: order[0, 0] must hold each of 0..1 once, got [1, 1]"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            Permutation.from_orders(orders)
    with pytest.raises(ValueError, match=r"^Permutation.from_orders: N must be at least 3, got 2$"):
        Permutation.from_orders([torch.arange(3)], N=2)


def test_a_changed_field_counts_where_leading_axes_are_not_two():
    """The permutations (B, S, N) that `soft_permutation` made are used again only while the fields are theirs."""
    p = soft_permutation(torch.randn(3, 6), tau=0.1)
    assert p.of_samples() is p.of_samples()
    moved = replace(p, order=p.rank, rank=p.order, checked=True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(permute(moved, x), permute(p, x, inverse=True))
    p.order, p.rank = p.rank, p.order
    torch.testing.assert_close(permute(p, x), permute(moved, x))


def test_product_of_permutations():
    p, q = (Permutation(torch.rand(2, 3, 5).argsort(-1)) for _ in range(2))
    x = torch.randn(2, 3, 5, 2)
    assert torch.equal((p @ q) @ x, p @ (q @ x))
    with pytest.raises(ValueError, match=re.escape("Permutation: both must be (2, 3, 5), got (2, 3, 4)")):
        p @ Permutation(torch.arange(4).expand(2, 3, 4))
