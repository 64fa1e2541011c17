"""aggregate and node_identifiers, what a message-passing backbone needs."""

import re

import pytest
import torch

from probsym_fast.ops import OPS, Permutation, aggregate, node_identifiers
from tests.conftest import GRADIENT, assert_near
from tests.helpers.items import (
    DTYPES,
    HALF,
    assert_same,
    batch,
    bit_equal_on_any_threads,
    check,
    check_half,
    dense_permutation,
    value_and_gradients,
    weights,
)

BACKENDS = OPS["aggregate"].backends("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 64), (2, 70), (1, 256), (2, 3, 5), (0,)])
def test_aggregate_value_and_gradient(device, shape, dtype):
    data = batch([5, 4, 1, 9], 9, device=device)
    x = torch.randn(19, *shape, device=device).double()
    if not x.numel():
        assert aggregate(x, data.edges).shape == x.shape
        return
    check("aggregate", lambda backend, x: aggregate(x, data.edges, backend=backend), [x], dtype)
    adjacency = torch.zeros(19, 19, dtype=torch.float64, device=device)
    for u, v in data.edges.T.tolist():
        adjacency[v, u] += 1
    found, gradient = value_and_gradients(lambda x: aggregate(x, data.edges), [x])
    direct, expected = (
        value_and_gradients(lambda x: (adjacency @ x.reshape(19, -1)).view(x.shape), [x]) if x.numel() else (x, x)
    )
    assert torch.allclose(found, direct, atol=1e-12) and torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(), (1,), (3, 64), (2, 70), (1, 256), (2, 3, 5)])
@pytest.mark.parametrize("virtual", [False, True])
def test_aggregate_of_half_precision_on_a_gpu(gpu, shape, virtual, dtype):
    data = batch([5, 4, 1, 9], 9, edges=20, device=gpu)
    x, ptr = torch.randn(19 + 4 * virtual, *shape, device=gpu), data.ptr if virtual else None

    def call(backend, x, own):
        return aggregate(x, data.edges, own=own, ptr=ptr, backend=backend)

    check_half("aggregate", call, [x, torch.tensor(1.3, device=gpu)], dtype, wide=[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_aggregate_without_edges_and_without_nodes(backend):
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    for x in (torch.randn(4, 3), torch.randn(0, 3), torch.randn(0)):
        value, gradient = value_and_gradients(lambda x: aggregate(x, nothing, backend=backend), [x])
        assert value.shape == gradient.shape == x.shape
        assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_aggregate_gradcheck_strided_and_half(backend):
    data = batch([5, 4, 1], 5)
    edges, x = data.edges, torch.randn(10, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: aggregate(x, edges, backend=backend), x.clone().requires_grad_())
    expected = value_and_gradients(lambda x: aggregate(x, edges, backend=backend), [x])
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    flipped = edges.T.contiguous().T
    assert_same(value_and_gradients(lambda x: aggregate(x, flipped, backend=backend), [strided]), expected)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(aggregate(leaf, edges, backend=backend).sum(), leaf)  # an expanded one comes in
    assert_near(gradient[:, 0, 0], torch.bincount(edges[0], minlength=10))
    for dtype in (torch.bfloat16, torch.float16):
        found = value_and_gradients(lambda x: aggregate(x, edges, backend=backend), [x.to(dtype)])
        assert all(y.dtype == dtype for y in found)
        exact = value_and_gradients(lambda x: aggregate(x, edges), [x.to(dtype).double()])
        for y, z in zip(found, exact, strict=True):
            assert_near(y, z, {torch.bfloat16: 8e-3, torch.float16: 2e-3})
    with torch.autocast("cpu", torch.bfloat16):
        assert aggregate(x.float(), edges, backend=backend).dtype == torch.float32
        assert aggregate(x.bfloat16(), edges, backend=backend).dtype == torch.bfloat16


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_on_any_threads(dtype):
    data = batch([20, 17, 4, 20], 20, edges=600, S=4)
    x, weight = torch.randn(61, 4, 70, dtype=dtype), torch.randn(20, 70, dtype=dtype)
    bit_equal_on_any_threads(lambda x: aggregate(x, data.edges, backend="cpu"), [x])

    def identifiers(scores, weight):
        return node_identifiers(data.ptr, data.soft(scores), weight, backend="cpu")

    bit_equal_on_any_threads(identifiers, [data.scores.to(dtype), weight])


@pytest.mark.parametrize("backend", BACKENDS)
def test_aggregate_bad_input(backend):
    x, edges = torch.zeros(4, 3), torch.tensor([[0, 1, 3], [1, 2, 0]])
    for arguments, error, message in (
        ((x, edges + 1), ValueError, "edge_index must hold node numbers 0 to 3, got 4 and 1 in column 2"),
        ((x, edges - 1), ValueError, "edge_index must hold node numbers 0 to 3, got -1 and 0 in column 0"),
        (
            (x, edges + 2**40),
            ValueError,
            f"edge_index must hold node numbers 0 to 3, got {2**40} and {2**40 + 1} in column 0",
        ),
        ((x[:0], edges), ValueError, "edge_index must hold node numbers 0 to -1, got 0 and 1 in column 0"),
        ((x, edges.int()), TypeError, "edge_index must be int64, got torch.int32"),
        ((x, [[0], [1]]), TypeError, "edge_index must be int64, got list"),
        ((x, edges.T), ValueError, "edge_index must be (2, E) and x (nodes, ...), got (3, 2), (4, 3)"),
        ((x[0, 0], edges), ValueError, "edge_index must be (2, E) and x (nodes, ...), got (2, 3), ()"),
        ((x.long(), edges), TypeError, "x must be floating point, got torch.int64"),
        ((x, edges.to("meta")), RuntimeError, "edge_index must be on cpu, got meta"),
    ):
        with pytest.raises(error, match=f"^aggregate: {re.escape(message)}$"):
            aggregate(*arguments, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 7, 64, 70])
@pytest.mark.parametrize("sizes", [[5, 9, 1], [1], [9, 9]])
def test_identifiers_value_and_gradients(device, sizes, D, dtype):
    data = batch(sizes, 9, device=device)

    def call(backend, scores, weight):
        return node_identifiers(data.ptr, data.soft(scores, backend), weight, backend=backend)

    if sizes != [1]:
        check("node_identifiers", call, [data.scores, weights(9, D, device=device)], dtype)
    else:  # a graph of one node: no gradient to its score
        found = value_and_gradients(lambda *x: call("auto", *x), [data.scores, weights(9, D, device=device)])
        assert (found[1] == 0).all() and (found[2][1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identifiers_are_rows_of_the_permutation_times_the_weight(backend):
    data = batch([5, 7, 1], 7)
    graph = torch.repeat_interleave(torch.arange(3), data.ptr.diff())
    local = torch.arange(13) - data.ptr[graph]

    def ours(scores, weight):
        return node_identifiers(data.ptr, data.soft(scores), weight, nodes=13, backend=backend)

    def dense(scores, weight):
        return (dense_permutation(scores, data.ptr) @ weight)[graph, :, local]

    leaves = [data.scores, weights(7, 4)]
    assert_same(value_and_gradients(ours, leaves), value_and_gradients(dense, leaves))
    p = data.soft(data.scores)
    assert torch.autograd.gradcheck(
        lambda w: node_identifiers(data.ptr, p, w, backend=backend), leaves[1].clone().requires_grad_()
    )
    full = value_and_gradients(ours, leaves)
    for i in (0, 1):
        assert_near(value_and_gradients(ours, leaves, [i])[1], full[1 + i], GRADIENT)
    strided = leaves[1].T.contiguous().T
    assert_same(value_and_gradients(ours, [data.scores, strided]), full)
    half = value_and_gradients(lambda w: ours(data.scores.float(), w), [leaves[1].bfloat16()])
    assert all(x.dtype == torch.bfloat16 for x in half)
    assert_near(half[0], full[0], {torch.bfloat16: 8e-3})
    assert_near(half[1], full[2], {torch.bfloat16: 8e-3})


@pytest.mark.parametrize("backend", BACKENDS)
def test_identifiers_of_permutations_by_hand(backend):
    """Any permutation of the slots, of graphs with fewer nodes or none: nodes may stand behind the first n slots."""
    for sizes in ([3, 0, 5, 0, 2], [0], []):
        data = batch(sizes, 5)
        p = Permutation(data.order)
        weight = weights(5, 4).requires_grad_()
        found = node_identifiers(data.ptr, p, weight, backend=backend)
        slots = [p.rank[b, :, u] for b, n in enumerate(sizes) for u in range(n)]
        expected = weight[torch.stack(slots)] if slots else torch.zeros(0, 3, 4).double() * weight.sum()
        assert torch.equal(found, expected)
        combination = torch.randn_like(found)
        gradients = [torch.autograd.grad((x * combination).sum(), weight)[0] for x in (found, expected)]
        assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identifiers_bad_input(backend):
    data = batch([4, 2], 5)
    p, w = data.soft(data.scores), weights(5, 3)
    for arguments, settings, error, message in (
        ((data.ptr, p, w[1:]), {}, ValueError, "weight must be (N, D) = (5, *), got (4, 3)"),
        ((data.ptr, p, w[0]), {}, ValueError, "weight must be (N, D) = (5, *), got (3,)"),
        ((data.ptr, p, w.long()), {}, TypeError, "weight must be floating point, got torch.int64"),
        ((data.ptr, p, w.to("meta")), {}, RuntimeError, "ptr must be on meta, got cpu"),
        ((data.ptr, p, w), {"nodes": 7}, ValueError, "ptr must end with the number of nodes 7, got 6"),
        ((data.ptr + 1, p, w), {}, ValueError, "ptr must rise from 0 by at most N = 5 a graph, got [1, 5, 7]"),
        (
            (torch.tensor([0, 4, 5]), p, w),
            {},
            ValueError,
            "ptr must give graph 1 the 2 valid nodes of the permutation, got 1",
        ),
        ((data.ptr, data.order, w), {}, TypeError, "p must be a Permutation, got Tensor"),
    ):
        if backend != "reference" and "meta" in message:
            settings = settings | {"backend": "auto"}
        with pytest.raises(error, match=f"^node_identifiers: {re.escape(message)}$"):
            node_identifiers(*arguments, **{"backend": backend} | settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5, 4, 1, 9], [30], [20, 0, 14]])
def test_own_rows_and_virtual_nodes(device, sizes, dtype):
    """Virtual nodes equal real ones that are joined to themselves and to all nodes of their graph."""
    ptr = torch.tensor([0, *sizes], device=device).cumsum(0)
    nodes, graphs = int(ptr[-1]), len(sizes)
    pieces = [torch.randint(0, n, (2, 2 * n), device=device) + start for n, start in zip(sizes, ptr, strict=False) if n]
    edges = torch.cat(pieces, 1)
    x = torch.randn(nodes + graphs, 2, 5, device=device).double()
    own = torch.tensor(1.3, device=device).double()
    check("aggregate", lambda b, x, own: aggregate(x, edges, own=own, ptr=ptr, backend=b), [x, own], dtype)
    adjacency = torch.zeros(len(x), len(x), dtype=torch.float64, device=device)
    for u, v in edges.T.tolist():
        adjacency[v, u] += 1
    for b in range(graphs):
        adjacency[nodes + b, ptr[b] : ptr[b + 1]] = adjacency[ptr[b] : ptr[b + 1], nodes + b] = 1
        adjacency[nodes + b, nodes + b] = 1
    found = value_and_gradients(lambda x, own: aggregate(x, edges, own=own, ptr=ptr), [x, own])
    dense = value_and_gradients(lambda x, own: own * x + (adjacency @ x.flatten(1)).view(x.shape), [x, own])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_virtual_nodes(backend):
    edges, x = torch.tensor([[0], [1]]), torch.randn(5, 2)
    for ptr, message in (
        ([0, 4, 5], "ptr must rise from 0 to the 3 nodes, got 0 to 5"),
        ([1, 2, 3], "ptr must rise from 0 to the 3 nodes, got 1 to 3"),
        ([0, 1, 0, 2], "ptr must rise, got 0 after 1"),
        ([0] * 8, "ptr must be (B + 1,) int64 with at most x's 5 rows for B, got torch.int64 (8,)"),
    ):
        with pytest.raises(ValueError, match=f"^aggregate: {re.escape(message)}$"):
            aggregate(x, edges, ptr=torch.tensor(ptr), backend=backend)
    with pytest.raises(ValueError, match="must join nodes of one graph, got column 0 from graph 0 to graph 1"):
        aggregate(x, edges, ptr=torch.tensor([0, 1, 3]), backend=backend)
    with pytest.raises(ValueError, match=r"aggregate: own must be a scalar tensor, got \(1,\)"):
        aggregate(x, edges, own=torch.ones(1), backend=backend)
    with pytest.raises(ValueError, match="must hold node numbers 0 to 2, got 0 and 3 in column 0"):
        aggregate(x, torch.tensor([[0], [3]]), ptr=torch.tensor([0, 1, 3]), backend=backend)  # a virtual node's number
