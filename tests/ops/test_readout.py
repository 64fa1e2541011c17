"""readout."""

import re

import pytest
import torch

from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import OPS, Permutation, readout
from probsym_fast.ops._patches import patch_size
from tests.conftest import GRADIENT, assert_near
from tests.helpers.items import (
    DTYPES,
    GRIDS,
    HALF,
    assert_same,
    batch,
    bit_equal_on_any_threads,
    check,
    check_half,
    dense_permutation,
    front_and_back,
    hard_matrix,
    value_and_gradients,
    weights,
)

BACKENDS = OPS["readout"].backends("cpu")
PLACES = ["nodes", "diagonal", "some nodes", "pairs"]


def at_of(data, where):
    """What `at` is, and the items (k, M) that it names."""
    nodes = torch.arange(int(data.ptr[-1]), device=data.ptr.device)
    if where == "nodes":
        return where, nodes[None]
    if where == "diagonal":
        return where, torch.stack([nodes, nodes])
    items = data.edges[1:] if where == "some nodes" else data.edges
    return items, items


def sizes_of(N):
    return [max(1, N - 2), N, 1, max(1, N // 2)]


def make(N, grid, where, D=7, C=3, S=3, device="cpu", sizes=None, edges=6):
    """data, at, and the leaves scores, tokens, weight, bias."""
    data = batch(sizes or sizes_of(N), N, S=S, device=device, edges=edges)
    at, items = at_of(data, where)
    axes = items.shape[0]
    tokens = torch.randn(len(data.ptr) - 1, S, grid**axes, D).double().to(device)
    weight = weights(D, C, *[patch_size(N, grid)] * axes, device=device)
    return data, at, [data.scores, tokens, weight, torch.randn(C).double().to(device)]


def call_of(data, at, centered=False):
    def call(backend, scores, tokens, weight, bias):
        p = data.soft(scores, backend)
        return readout(tokens, data.ptr, p, weight, bias, at=at, centered=centered, backend=backend)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "grid"), GRIDS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_value_and_gradients(device, N, grid, centered, where, dtype):
    data, at, leaves = make(N, grid, where, device=device)
    check("readout", call_of(data, at, centered), leaves, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("N", "grid"), [*GRIDS, (24, 2)])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("C", "D"), [(1, 7), (3, 256), (18, 70)])
def test_half_precision_on_a_gpu(gpu, N, grid, where, C, D, dtype):
    data, at, leaves = make(N, grid, where, D, C, device=gpu)
    for centered in (False, True):
        check_half("readout", call_of(data, at, centered), leaves, dtype, wide=[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("D", [1, 7, 64, 70, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_widths(device, D, C, packed, dtype):
    N, grid = (6, 3) if packed else (24, 2)
    sizes, edges = [N, N - 1, 2], 20 if packed else 3
    data, at, leaves = make(N, grid, "pairs", D, C, 5, device, sizes, edges)
    assert (at.shape[1] * 5 > 2 * patch_size(N, grid) ** 2 * C) == packed
    check("readout", call_of(data, at), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemm", [False, True])
def test_both_ways_to_the_permutations_gradient(device, gemm, dtype):
    N, grid = (8, 2) if gemm else (24, 6)
    data, at, leaves = make(N, grid, "pairs", 5, 3, 3, device, [N, N, N // 2], 40 if gemm else 2)
    graph = (torch.searchsorted(data.ptr, at[0], right=True) - 1).tolist()
    products = 2 * sum(int(data.ptr.diff()[g]) for g in graph)
    assert (3 * (grid * patch_size(N, grid)) ** 2 * 3 < 5 * products) == gemm  # gemm_gain of csrc/cpu/items.cpp
    check("readout", call_of(data, at), leaves, dtype)


@pytest.mark.parametrize("N", range(1, 8))
@pytest.mark.parametrize("grid", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torchs_transposed_convolutions_for_every_padding(N, grid, backend):
    """None of it too, where the public code's crop leaves nothing."""
    P, S, D, C = patch_size(N, grid), 2, 5, 2
    for centered in (False, True):
        front, _ = front_and_back(N, grid, centered)
        for where in ("nodes", "pairs"):
            data, at, leaves = make(N, grid, where, D, C, S)
            axes = 1 if where == "nodes" else 2
            items = at_of(data, where)[1]
            graph = torch.searchsorted(data.ptr, items[0], right=True) - 1

            def dense(scores, tokens, weight, bias):
                layer = getattr(torch.nn, f"ConvTranspose{axes}d")(D, C, P, stride=P, bias=False, dtype=torch.float64)  # noqa: B023
                z = tokens.flatten(0, 1).mT.unflatten(2, (grid,) * axes)  # noqa: B023
                z = torch.func.functional_call(layer, {"weight": weight}, z)
                for axis in range(axes):  # noqa: B023
                    z = z.narrow(2 + axis, front, N)  # noqa: B023
                p, z = dense_permutation(scores, data.ptr), z.unflatten(0, (-1, S))  # noqa: B023
                if axes == 1:  # noqa: B023
                    y = torch.einsum("bsui,bsci->buc", p, z) / S
                else:
                    y = torch.einsum("bsui,bscij,bsvj->buvc", p, z, p) / S
                return y[(graph, *(items - data.ptr[graph]))] + bias  # noqa: B023

            call = call_of(data, at, centered)
            found = value_and_gradients(lambda *x: call(backend, *x), leaves)  # noqa: B023
            assert_same(found, value_and_gradients(dense, leaves))
            assert found[0].shape == (items.shape[1], C)


@pytest.mark.parametrize("backend", BACKENDS)
def test_undoes_the_embedding_of_a_permutation_by_hand(backend):
    """Of graphs with fewer nodes than slots, or none; tokens that name their slot."""
    data = batch([3, 0, 5, 0, 2], 5, S=2)
    p = Permutation(data.order)
    slots = torch.arange(6, dtype=torch.float64).view(1, 1, 2, 3).expand(5, 2, 2, 3)
    weight = torch.eye(3, dtype=torch.float64)[:, None]  # (D, 1, P): the value of slot l P + o is tokens[l, o]
    y = readout(slots, data.ptr, p, weight, at="nodes", backend=backend)
    ranks = (hard_matrix(p) * torch.arange(5)).sum(-1).mean(1)  # mean slot of each node
    expected = torch.cat([ranks[b, :n] for b, n in enumerate(data.ptr.diff().tolist())])
    assert_near(y[:, 0], expected)
    at = torch.cat([data.edges, data.edges.flip(0)], 1)
    tokens = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    pair_weight = weights(3, 2, 3, 3)
    y = readout(tokens, data.ptr, p, pair_weight, at=at, backend=backend)
    z = torch.nn.functional.conv_transpose2d(tokens.flatten(0, 1).mT.unflatten(2, (2, 2)), pair_weight, stride=3)
    dense, z = hard_matrix(p), z[..., :5, :5].unflatten(0, (5, 2))
    map_of = torch.einsum("bsui,bscij,bsvj->buvc", dense, z, dense) / 2
    graph = torch.searchsorted(data.ptr, at[0], right=True) - 1
    assert_near(y, map_of[(graph, *(at - data.ptr[graph]))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_read(backend):
    data, _, leaves = make(5, 2, "pairs")
    nothing = data.edges[:, :0]
    found = value_and_gradients(lambda *x: call_of(data, nothing)(backend, *x), leaves)
    assert found[0].shape == (0, 3)
    for x, leaf in zip(found[1:], leaves, strict=True):
        assert x.shape == leaf.shape and (x == 0).all()
    empty = Permutation(torch.arange(5).expand(2, 3, 5))
    for at in ("nodes", "diagonal"):
        weight = leaves[2] if at == "diagonal" else leaves[2][..., 0]
        tokens = leaves[1][:2, :, : 4 if at == "diagonal" else 2]
        assert readout(tokens, torch.zeros(3).long(), empty, weight, at=at, backend=backend).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    data, at, leaves = make(6, 2, "pairs")
    call = call_of(data, at)
    full = value_and_gradients(lambda *x: call(backend, *x), leaves)[1:]
    for wanted in ([0], [1], [2], [3], [0, 2], [1, 3]):
        found = value_and_gradients(lambda *x: call(backend, *x), leaves, wanted)[1:]
        for i, x in zip(wanted, found, strict=True):
            assert_near(x, full[i], GRADIENT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", PLACES)
def test_gradcheck(backend, where):
    data, at, leaves = make(4, 3, where, 2, 2, 2, sizes=[4, 2], edges=4)
    p = data.soft(data.scores)

    def f(tokens, weight, bias):
        return readout(tokens, data.ptr, p, weight, bias, at=at, centered=True, backend=backend)

    assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in leaves[1:]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_is_no_part_of_the_permutations_gradient(backend):
    data, at, (scores, tokens, weight, bias) = make(6, 2, "pairs")
    gradients = []
    for b in (bias, bias * 100, None):
        leaf = scores.clone().requires_grad_()
        y = readout(tokens, data.ptr, data.soft(leaf), weight, b, at=at, backend=backend)
        gradients.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_the_weights_layout_does_not_matter():
    data, at, leaves = make(7, 2, "pairs", 70)
    inner = PatchWeight(70, 3, 4, 4)().double()
    found = []
    for weight in (inner, inner.contiguous()):
        found.append(value_and_gradients(lambda *x: call_of(data, at)("auto", *x), [*leaves[:2], weight, leaves[3]]))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    leaf = inner.detach().requires_grad_()
    call_of(data, at)("auto", *leaves[:2], leaf, None).sum().backward()
    assert leaf.grad.stride() == leaf.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    data, at, leaves = make(7, 2, "pairs")
    expected = value_and_gradients(lambda *x: call_of(data, at)(backend, *x), leaves)
    scores, tokens, weight, bias = leaves
    strided = [
        scores.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        tokens.mT.contiguous().mT,
        weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        torch.stack([bias, bias], 1)[:, 0],
    ]
    found = value_and_gradients(lambda *x: call_of(data, at.T.contiguous().T)(backend, *x), strided)
    assert_same(found, expected)
    expanded = tokens[:, :, :1].expand_as(tokens)
    p = data.soft(scores)
    y = readout(expanded, data.ptr, p, weight, at=at, backend=backend)
    assert torch.equal(y, readout(expanded.contiguous(), data.ptr, p, weight, at=at, backend=backend))
    for gradient in (torch.ones(1, dtype=torch.float64).expand_as(y), torch.randn_like(y.T).T):
        leaf = tokens.clone().requires_grad_()
        y = readout(leaf, data.ptr, p, weight, at=at, backend=backend)
        (x,) = torch.autograd.grad(y, leaf, gradient, retain_graph=True)
        assert torch.equal(x, torch.autograd.grad(y, leaf, gradient.contiguous())[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    data, at, (scores, *leaves) = make(7, 2, "pairs", 70)
    scores, leaves = scores.float(), [x.to(dtype) for x in leaves]
    call = call_of(data, at)
    found = value_and_gradients(lambda *x: call("auto", scores, *x), leaves)
    assert all(x.dtype == dtype for x in found)
    expected = value_and_gradients(lambda *x: call("reference", scores.double(), *x), [x.double() for x in leaves])
    for x, y in zip(found, expected, strict=True):  # rounded once
        assert_near(x, y, {torch.bfloat16: 8e-3, torch.float16: 2e-3})


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    data, at, (scores, *leaves) = make(7, 2, "pairs")
    scores, tokens, weight, bias = scores.float(), leaves[0].bfloat16(), leaves[1].float(), leaves[2].float()
    call = call_of(data, at)

    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda *x: call(backend, *x), [scores, tokens, weight, bias])
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    if backend != "reference":  # that one computes as autocast has it
        double = [x.double() for x in (scores, tokens, weight, bias)]
        expected = value_and_gradients(lambda *x: call("reference", *x), double)
        for i in (0, 2, 3):
            assert_near(found[i], expected[i], {torch.bfloat16: 8e-3, torch.float32: 8e-3})


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("where", "D", "edges"), [("pairs", 70, 60), ("pairs", 70, 4), ("nodes", 256, 4)])
def test_bit_equal_on_any_threads(where, D, edges, dtype):
    data, at, leaves = make(20, 4, where, D, 3, 5, sizes=[20, 17, 4, 20], edges=edges)
    call = call_of(data, at)
    products = (1, 2, 3) if where == "nodes" else (1,) if edges > 4 else ()  # some entries: a matrix; few: none
    bit_equal_on_any_threads(lambda *x: call("cpu", *x), [x.to(dtype) for x in leaves], products)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    data, at, (scores, tokens, weight, bias) = make(5, 2, "pairs", D=3, C=2, S=1, sizes=[4, 2])
    p, ptr = data.soft(scores), data.ptr
    joining, beyond = torch.tensor([[0, 3], [1, 4]]), torch.tensor([[0, 3], [1, 6]])

    def run(tokens=tokens, ptr=ptr, p=p, weight=weight, bias=bias, at=at):
        readout(tokens, ptr, p, weight, bias, at=at, backend=backend)

    patches = "with patches of ceil(N / grid) = ceil(5 / 2)"
    for arguments, error, message in (
        ({"at": "edges"}, ValueError, 'at must be "nodes", "diagonal" or node numbers (1 or 2, M), got \'edges\''),
        ({"at": None}, ValueError, 'at must be "nodes", "diagonal" or node numbers (1 or 2, M), got None'),
        ({"at": at.int()}, TypeError, "at must be int64 node numbers, got torch.int32"),
        ({"at": at[0]}, ValueError, f"at must be (1, M) or (2, M), got ({at.shape[1]},)"),
        ({"at": at.repeat(2, 1)}, ValueError, f"at must be (1, M) or (2, M), got (4, {at.shape[1]})"),
        ({"at": at.to("meta")}, RuntimeError, "at must be on cpu, got meta"),
        ({"at": beyond}, ValueError, "at must hold node numbers 0 to 5, got 6 in column 1"),
        ({"at": beyond - 1}, ValueError, "at must hold node numbers 0 to 5, got -1 in column 0"),
        ({"at": joining}, ValueError, "at must join nodes of one graph, got column 1 from graph 0 to graph 1"),
        ({"tokens": tokens[:, 0]}, ValueError, "tokens must be (B, S, L, D) = (2, 1, *, 3), got (2, 4, 3)"),
        ({"tokens": tokens[:1]}, ValueError, "tokens must be (B, S, L, D) = (2, 1, *, 3), got (1, 1, 4, 3)"),
        ({"tokens": tokens[..., 1:]}, ValueError, "tokens must be (B, S, L, D) = (2, 1, *, 3), got (2, 1, 4, 2)"),
        ({"tokens": tokens[:, :, 1:]}, ValueError, "tokens must have a square number L for pairs, got 3"),
        ({"tokens": tokens[:, :, :0]}, ValueError, "grid must be at least 1, got 0"),
        ({"tokens": tokens.float()}, TypeError, "weight must be torch.float64 as tokens is, got torch.float32"),
        ({"tokens": tokens.long()}, TypeError, "tokens must be floating point, got torch.int64"),
        ({"weight": weight.to("meta")}, RuntimeError, "weight must be on cpu as tokens is, got meta"),
        ({"weight": weight[..., 0]}, ValueError, f"weight must be (D, C, 3, 3) {patches}, got (3, 2, 3)"),
        ({"weight": weight[..., 1:]}, ValueError, f"weight must be (D, C, 3, 3) {patches}, got (3, 2, 3, 2)"),
        ({"bias": bias[1:]}, ValueError, "bias must be (2,), got (1,)"),
        ({"p": scores}, TypeError, "p must be a Permutation, got Tensor"),
        ({"ptr": ptr + 1}, ValueError, "ptr must rise from 0 by at most N = 5 a graph, got [1, 5, 7]"),
        (
            {"ptr": torch.tensor([0, 3, 5])},
            ValueError,
            "ptr must give graph 0 the 4 valid nodes of the permutation, got 3",
        ),
    ):
        if "as tokens is, got torch.float32" in message:
            message = "weight must be torch.float32 as tokens is, got torch.float64"
        with pytest.raises(error, match=f"^readout: {re.escape(message)}$"):
            run(**arguments)
