"""embed_matrix."""

import re

import pytest
import torch

from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import OPS, Permutation, embed_edges, embed_matrix, soft_permutation
from probsym_fast.ops._patches import patch_size
from tests.conftest import GRADIENT, assert_near
from tests.helpers.items import (
    DTYPES,
    GRIDS,
    PADDINGS,
    assert_same,
    batch,
    bit_equal_on_any_threads,
    check,
    dense_permutation,
    hard_matrix,
    padded,
    value_and_gradients,
    weights,
)

BACKENDS = OPS["embed_matrix"].backends("cpu")


def make(N, grid, D=7, C=3, S=3, device="cpu", sizes=None):
    """data, and the leaves scores, matrix, weight, bias."""
    data, P = batch(sizes or [max(1, N - 2), N, 1, max(1, N // 2)], N, C, S, device=device), patch_size(N, grid)
    leaves = [data.scores, data.matrix, weights(D, C, P, P, device=device), torch.randn(D).double().to(device)]
    return data, leaves


def call_of(data, grid, pad_mode="zeros", centered=False):
    def call(backend, scores, matrix, weight, bias):
        settings = {"grid": grid, "pad_mode": pad_mode, "centered": centered, "backend": backend}
        return embed_matrix(matrix, data.soft(scores, backend), weight, bias, **settings)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "grid"), GRIDS)
@pytest.mark.parametrize(("pad_mode", "centered"), PADDINGS)
def test_value_and_gradients(device, N, grid, pad_mode, centered, dtype):
    data, leaves = make(N, grid, device=device)
    check("embed_matrix", call_of(data, grid, pad_mode, centered), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "C"), [(1, 1), (1, 3), (64, 1), (70, 3), (256, 3)])
def test_widths(device, D, C, dtype):
    data, leaves = make(9, 2, D, C, device=device)
    check("embed_matrix", call_of(data, 2), leaves, dtype)


def test_samples_of_a_graph_in_several_tiles(device):
    """The patches of all samples do not fit the tile: 32 MiB hold 455 of these, 240 a graph."""
    data, leaves = make(12, 4, 2, 128, 240, device, [12, 12])
    check("embed_matrix", call_of(data, 4), leaves, torch.float64)


@pytest.mark.parametrize(("N", "grid"), [(9, 2), (7, 3), (3, 14)])
@pytest.mark.parametrize(("pad_mode", "centered"), PADDINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torchs_convolution_of_dense_permuted_matrices(N, grid, pad_mode, centered, backend):
    data, leaves = make(N, grid, 5, S=2)
    P, valid = patch_size(N, grid), torch.arange(N) < data.ptr.diff()[:, None]

    def dense(scores, matrix, weight, bias):
        p = dense_permutation(scores, data.ptr)
        matrix = matrix * (valid[:, :, None] & valid[:, None])[..., None]
        acted = torch.einsum("bsui,buvc,bsvj->bscij", p, matrix, p).flatten(0, 1)
        layer = torch.nn.Conv2d(3, 5, P, stride=P, dtype=torch.float64)
        y = padded(acted, grid, pad_mode, centered, 2)
        y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, y)
        return y.flatten(2).mT.unflatten(0, scores.shape[:2])

    call = call_of(data, grid, pad_mode, centered)
    assert_same(value_and_gradients(lambda *x: call(backend, *x), leaves), value_and_gradients(dense, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_embed_edges_of_all_pairs(backend):
    data, leaves = make(6, 2, S=4)
    pairs = [torch.cartesian_prod(torch.arange(n), torch.arange(n)).T for n in data.ptr.diff().tolist()]
    edges = torch.cat([pair + start for pair, start in zip(pairs, data.ptr.tolist(), strict=False)], 1)
    graph = torch.searchsorted(data.ptr, edges[0], right=True) - 1

    def by_edges(scores, matrix, weight, bias):
        attr = matrix[(graph, *(edges - data.ptr[graph]))]
        p = data.soft(scores)
        return embed_edges(edges, attr, data.ptr, p, weight, bias, grid=2, pad_mode="reflect", backend=backend)

    call = call_of(data, 2, "reflect")
    assert_same(value_and_gradients(lambda *x: call(backend, *x), leaves), value_and_gradients(by_edges, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_permutations_by_hand_and_without_counts(backend):
    data, (_, matrix, weight, bias) = make(5, 2, sizes=[5, 5], S=2)
    p = Permutation(data.order)
    dense = hard_matrix(p)
    acted = torch.einsum("bsui,buvc,bsvj->bscij", dense, matrix, dense).flatten(0, 1)
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(acted, (0, 1, 0, 1)), weight, bias, stride=3)
    assert_near(embed_matrix(matrix, p, weight, bias, grid=2, backend=backend).flatten(0, 1), expected.flatten(2).mT)
    found = []
    for count in (None, torch.tensor([5, 5])):
        scores = data.scores.clone().requires_grad_()
        q = soft_permutation(scores, count, tau=0.5)
        out = embed_matrix(matrix, q, weight, grid=2, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), scores)))
    assert_same(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graphs_and_no_samples(backend):
    _, (_, matrix, weight, bias) = make(5, 2)
    none = Permutation(torch.zeros(0, 3, 5).long())
    assert embed_matrix(matrix[:0], none, weight, bias, grid=2, backend=backend).shape == (0, 3, 4, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    data, leaves = make(6, 2)
    call = call_of(data, 2, "circular", True)
    full = value_and_gradients(lambda *x: call(backend, *x), leaves)[1:]
    for wanted in ([0], [1], [2], [3], [0, 2], [1, 3]):
        found = value_and_gradients(lambda *x: call(backend, *x), leaves, wanted)[1:]
        for i, x in zip(wanted, found, strict=True):
            assert_near(x, full[i], GRADIENT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pad_mode", "centered"), [("zeros", False), ("reflect", True)])
def test_gradcheck(backend, pad_mode, centered):
    data, (scores, *leaves) = make(4, 3, 2, 2, 2, sizes=[4, 2])
    p = data.soft(scores)

    def f(matrix, weight, bias):
        settings = {"grid": 3, "pad_mode": pad_mode, "centered": centered, "backend": backend}
        return embed_matrix(matrix, p, weight, bias, **settings)

    assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in leaves])


def test_the_weights_layout_does_not_matter():
    data, leaves = make(7, 2, 70)
    inner = PatchWeight(70, 3, 4, 4)().double()
    found = []
    for weight in (inner, inner.contiguous()):
        found.append(value_and_gradients(lambda *x: call_of(data, 2)("auto", *x), [*leaves[:2], weight, leaves[3]]))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    data, (scores, matrix, weight, bias) = make(7, 2)
    call = call_of(data, 2)
    expected = value_and_gradients(lambda *x: call(backend, *x), [scores, matrix, weight, bias])
    strided = [
        scores.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        matrix.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),  # channels first, as images are
        weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        torch.stack([bias, bias], 1)[:, 0],
    ]
    assert_same(value_and_gradients(lambda *x: call(backend, *x), strided), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    data, (scores, *leaves) = make(7, 2, 70)
    scores, leaves = scores.float(), [x.to(dtype) for x in leaves]
    call = call_of(data, 2)
    found = value_and_gradients(lambda *x: call("auto", scores, *x), leaves)
    assert all(x.dtype == dtype for x in found)
    expected = value_and_gradients(lambda *x: call("reference", scores.double(), *x), [x.double() for x in leaves])
    for x, y in zip(found, expected, strict=True):  # rounded once
        assert_near(x, y, {torch.bfloat16: 8e-3, torch.float16: 2e-3})


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    data, leaves = make(7, 2)
    scores, matrix, weight, bias = leaves[0].float(), leaves[1].bfloat16(), leaves[2].float(), leaves[3].float()
    call = call_of(data, 2)

    leaves = [scores, matrix, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda *x: call(backend, *x), leaves)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    if backend != "reference":  # that one computes as autocast has it
        expected = value_and_gradients(lambda *x: call("reference", *x), [x.double() for x in leaves])
        for x, y in zip(found, expected, strict=True):
            assert_near(x, y, {torch.bfloat16: 8e-3, torch.float32: 1e-4})


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[20, 17, 4, 20], [20]])
def test_bit_equal_on_any_threads(sizes, dtype):
    data, leaves = make(20, 4, 70, sizes=sizes)
    bit_equal_on_any_threads(lambda *x: call_of(data, 4)("cpu", *x), [x.to(dtype) for x in leaves], range(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    data, (scores, matrix, weight, bias) = make(5, 2, 3, 2, 1, sizes=[4, 2])
    p = data.soft(scores)

    def run(matrix=matrix, p=p, weight=weight, bias=bias, grid=2, pad_mode="zeros"):
        embed_matrix(matrix, p, weight, bias, grid=grid, pad_mode=pad_mode, backend=backend)

    for arguments, error, message in (
        ({"matrix": matrix[:1]}, ValueError, "matrix must be (B, N, N, C) = (2, 5, 5, 2), got (1, 5, 5, 2)"),
        ({"matrix": matrix[:, 1:]}, ValueError, "matrix must be (B, N, N, C) = (2, 5, 5, 2), got (2, 4, 5, 2)"),
        ({"matrix": matrix[..., 0]}, ValueError, "matrix must be (B, N, N, C) = (2, 5, 5, 2), got (2, 5, 5)"),
        ({"matrix": matrix.float()}, TypeError, "matrix must be torch.float64 as weight is, got torch.float32"),
        ({"matrix": matrix.long()}, TypeError, "matrix must be floating point, got torch.int64"),
        ({"matrix": matrix.to("meta")}, RuntimeError, "matrix must be on cpu as weight is, got meta"),
        ({"p": Permutation(data.order.to("meta"))}, RuntimeError, "p must be on cpu, got meta"),
        ({"p": scores}, TypeError, "p must be a Permutation, got Tensor"),
        ({"bias": bias[1:]}, ValueError, "bias must be (3,), got (2,)"),
        ({"grid": -1}, ValueError, "grid must be at least 1, got -1"),
        (
            {"weight": weight[..., 1:]},
            ValueError,
            "weight must be (D, C, 3, 3) with patches of ceil(N / grid) = ceil(5 / 2), got (3, 2, 3, 2)",
        ),
        (
            {"pad_mode": "constant"},
            ValueError,
            "pad_mode must be one of ('zeros', 'replicate', 'reflect', 'circular'), got 'constant'",
        ),
    ):
        with pytest.raises(error, match=f"^embed_matrix: {re.escape(message)}$"):
            run(**arguments)
