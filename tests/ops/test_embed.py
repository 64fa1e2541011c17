"""embed_edges and embed_nodes."""

import pytest
import torch

from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import OPS, Permutation, embed_edges, embed_nodes, soft_permutation
from probsym_fast.ops._patches import PAD_MODES, pad_axis, patch_size, slots_of_places
from tests.conftest import GRADIENT, assert_near
from tests.helpers.items import (
    DTYPES,
    GRIDS,
    HALF,
    PADDINGS,
    assert_same,
    batch,
    bit_equal_on_any_threads,
    check,
    check_half,
    dense_graphs,
    dense_permutation,
    front_and_back,
    hard_matrix,
    padded,
    slot_of_place,
    value_and_gradients,
    weights,
)

BACKENDS = OPS["embed"].backends("cpu")
GEMM_GAIN = 5  # of csrc/cpu/items.cpp


def sizes_of(N):
    return [max(1, N - 2), N, 1, max(1, N // 2)]


def edges_call(data, grid, pad_mode="zeros", centered=False):
    """call(backend, scores, attr, weight, bias), for `check`."""

    def call(backend, scores, attr, weight, bias):
        p = data.soft(scores, backend)
        return embed_edges(
            data.edges,
            attr,
            data.ptr,
            p,
            weight,
            bias,
            grid=grid,
            pad_mode=pad_mode,
            centered=centered,
            backend=backend,
        )

    return call


def nodes_call(data, tokens, pad_mode="zeros", centered=False):
    def call(backend, scores, x, weight, bias):
        p = data.soft(scores, backend)
        settings = {"tokens": tokens, "pad_mode": pad_mode, "centered": centered, "backend": backend}
        return embed_nodes(x, data.ptr, p, weight, bias, **settings)

    return call


@pytest.mark.parametrize("pad_mode", PAD_MODES)
def test_padding_is_torchs_and_beyond_it_a_walk(pad_mode):
    for N in range(1, 8):
        for grid in range(1, 18):
            for centered in (False, True):
                slots = slots_of_places(N, grid, pad_mode, centered, torch.device("cpu"))
                front, back = front_and_back(N, grid, centered)
                assert slots.tolist() == [slot_of_place(i, N, front, pad_mode) for i in range(front + N + back)]
                x = torch.randn(2, 3, N)
                if max(front, back) <= {"reflect": N - 1, "circular": N}.get(pad_mode, back):
                    kind = "constant" if pad_mode == "zeros" else pad_mode
                    assert torch.equal(pad_axis(x, slots, 2), torch.nn.functional.pad(x, (front, back), mode=kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "grid"), GRIDS)
@pytest.mark.parametrize(("pad_mode", "centered"), PADDINGS)
def test_value_and_gradients(device, N, grid, pad_mode, centered, dtype):
    data, P = batch(sizes_of(N), N, device=device), patch_size(N, grid)
    bias = torch.randn(7).double().to(device)
    leaves = [data.scores, data.attr, weights(7, 3, P, P, device=device), bias]
    check("embed", edges_call(data, grid, pad_mode, centered), leaves, dtype)
    leaves = [data.scores, data.x, weights(7, 3, P, device=device), bias]
    check("embed", nodes_call(data, grid, pad_mode, centered), leaves, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("N", "grid"), [*GRIDS, (24, 2)])
@pytest.mark.parametrize(("pad_mode", "centered"), PADDINGS[::3])
@pytest.mark.parametrize(("C", "D"), [(1, 7), (3, 256), (4, 70)])
def test_half_precision_on_a_gpu(gpu, N, grid, pad_mode, centered, C, D, dtype):
    data, P = batch(sizes_of(N), N, C, device=gpu), patch_size(N, grid)
    leaves = [data.scores, data.attr, weights(D, C, P, P, device=gpu), torch.randn(D).double().to(gpu)]
    check_half("embed", edges_call(data, grid, pad_mode, centered), leaves, dtype, wide=[0])
    leaves[1:3] = data.x, weights(D, C, P, device=gpu)
    check_half("embed", nodes_call(data, grid, pad_mode, centered), leaves, dtype, wide=[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("D", [1, 7, 64, 70, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_widths(device, D, C, packed, dtype):
    """Few entries: rows of the weight as they are. Many: in packed blocks of 256 bytes, with a narrower one at the end."""
    N, grid = (6, 3) if packed else (24, 2)
    data, P = batch([N, N - 1, 2], N, C, S=5, edges=20 if packed else 3, device=device), patch_size(N, grid)
    assert (len(data.attr) * 5 > 2 * P * P * C) == packed
    leaves = [data.scores, data.attr, weights(D, C, P, P, device=device), torch.randn(D).double().to(device)]
    check("embed", edges_call(data, grid, "reflect", True), leaves, dtype)
    if packed:
        assert len(data.x) * 5 > 2 * P * C
        check("embed", nodes_call(data, grid), [data.scores, data.x, weights(D, C, P, device=device), leaves[3]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("gemm", [False, True])
def test_both_ways_to_the_permutations_gradient(device, gemm, C, dtype):
    N, grid = (8, 2) if gemm else (24, 6)
    data, P = batch([N, N, N // 2], N, C, edges=40 if gemm else 2, device=device), patch_size(N, grid)
    products = 2 * sum(int(data.ptr.diff()[g]) for g in graph_of(data))
    assert (len(data.ptr[1:]) * (grid * P) ** 2 * C < GEMM_GAIN * products) == gemm
    leaves = [data.scores, data.attr, weights(5, C, P, P, device=device), torch.randn(5).double().to(device)]
    for pad_mode in PAD_MODES:
        check("embed", edges_call(data, grid, pad_mode), leaves, dtype)


def graph_of(data):
    return (torch.searchsorted(data.ptr, data.edges[0], right=True) - 1).tolist()


def test_many_samples_take_several_products(device):
    """The products of all samples do not fit the tile: 2 MiB hold 14 of these."""
    data = batch([12], 12, C=128, S=240, edges=160, device=device)
    leaves = [data.scores, data.attr, weights(2, 128, 3, 3, device=device), torch.randn(2).double().to(device)]
    check("embed", edges_call(data, 4), leaves, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("twin", ["equal", "of another value", "missing"])
@pytest.mark.parametrize(("edges", "D"), [(12, 5), (12, 70), (4, 70)])
def test_one_token_of_graphs_with_edges_both_ways(device, edges, D, twin, C, dtype):
    """Where edges (u, v) and (v, u) have equal attributes the kernel makes the products with W + W^T alone, and adds each
    pair of weight rows once; many edges and a wide token go through a GEMM."""
    data = batch([7, 8, 5, 1], 8, C, S=8, edges=edges, device=device)
    attr, edges = data.attr[:, :C].abs() + 1, data.edges
    back = attr * (1.0 if twin == "equal" else 2.0)
    if twin != "missing":
        attr, edges = torch.cat([attr, back]), torch.cat([edges, edges.flip(0)], 1)
    data.edges = edges
    leaves = [data.scores, attr, weights(D, C, 8, 8, device=device), torch.randn(D).double().to(device)]
    check("embed", edges_call(data, 1), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [5, 70])
def test_one_token_of_nodes(device, D, dtype):
    """A wide token of many features goes through a GEMM."""
    data = batch([7, 8, 5, 1], 8, 3, S=8, device=device)

    leaves = [data.scores, data.x, weights(D, 3, 8, device=device), torch.randn(D).double().to(device)]
    check("embed", nodes_call(data, 1), leaves, dtype)


@pytest.mark.parametrize(("N", "grid"), [(9, 2), (7, 3), (3, 14)])
@pytest.mark.parametrize(("pad_mode", "centered"), PADDINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torchs_convolutions_of_dense_permuted_graphs(N, grid, pad_mode, centered, backend):
    data, P, D = batch(sizes_of(N), N, S=2), patch_size(N, grid), 5
    edge_bias, node_bias = torch.randn(2, D, dtype=torch.float64)
    leaves = [data.scores, data.attr, data.x, weights(D, 3, P, P), edge_bias, weights(D, 3, P), node_bias]

    def ours(scores, attr, x, w2, b2, w1, b1):
        p = data.soft(scores)
        settings = {"pad_mode": pad_mode, "centered": centered, "backend": backend}
        edges = embed_edges(data.edges, attr, data.ptr, p, w2, b2, grid=grid, **settings)
        return torch.cat([edges, embed_nodes(x, data.ptr, p, w1, b1, tokens=grid, **settings)], 2)

    def dense(scores, attr, x, w2, b2, w1, b1):
        p = dense_permutation(scores, data.ptr)
        adjacency, features = dense_graphs(data.edges, attr, x, data.ptr, N)
        acted = torch.einsum("bsui,bcuv,bsvj->bscij", p, adjacency, p).flatten(0, 1)
        rows = torch.einsum("bsui,bcu->bsci", p, features).flatten(0, 1)
        out = []
        for image, kind, weight, bias, axes in ((acted, "Conv2d", w2, b2, 2), (rows, "Conv1d", w1, b1, 1)):
            layer = getattr(torch.nn, kind)(3, D, P, stride=P, dtype=torch.float64)
            y = padded(image, grid, pad_mode, centered, axes)
            out.append(torch.func.functional_call(layer, {"weight": weight, "bias": bias}, y).flatten(2).mT)
        return torch.cat(out, 1).unflatten(0, data.scores.shape[:2])

    assert_same(value_and_gradients(ours, leaves), value_and_gradients(dense, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_permutations_by_hand(backend):
    """Any permutation of the slots, of graphs with fewer nodes or none."""
    data = batch([3, 0, 5, 0, 2], 5, S=2)
    p, w2, w1 = Permutation(data.order), weights(4, 3, 3, 3), weights(4, 3, 3)
    adjacency, features = dense_graphs(data.edges, data.attr, data.x, data.ptr, 5)
    dense = hard_matrix(p)
    edges = embed_edges(data.edges, data.attr, data.ptr, p, w2, grid=2, backend=backend)
    nodes = embed_nodes(data.x, data.ptr, p, w1, tokens=2, backend=backend)
    acted = torch.einsum("bsui,bcuv,bsvj->bscij", dense, adjacency, dense).flatten(0, 1)
    rows = torch.einsum("bsui,bcu->bsci", dense, features).flatten(0, 1)
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(acted, (0, 1, 0, 1)), w2, stride=3)
    assert_near(edges.flatten(0, 1), expected.flatten(2).mT)
    expected = torch.nn.functional.conv1d(torch.nn.functional.pad(rows, (0, 1)), w1, stride=3)
    assert_near(nodes.flatten(0, 1), expected.mT)


@pytest.mark.parametrize("sizes", [[4, 1, 4], [0, 0], [0], []])
def test_graphs_without_edges_and_without_nodes(sizes):
    data = batch(sizes, 4, C=2)
    nothing = data.edges[:, :0]
    w2, w1, bias = weights(6, 2, 2, 2), weights(6, 2, 2), torch.randn(6, dtype=torch.float64)
    soft = sizes and min(sizes)

    def edges(backend):
        def call(scores, attr, weight, bias):
            p = data.soft(scores) if soft else Permutation(data.order)
            out = embed_edges(nothing, attr, data.ptr, p, weight, bias, grid=2, backend=backend)
            return out + 0 * scores.sum()

        return value_and_gradients(call, [data.scores, data.attr[:0], w2, bias])

    def nodes(backend):
        def call(scores, x, weight, bias):
            p = data.soft(scores) if soft else Permutation(data.order)
            return embed_nodes(x, data.ptr, p, weight, bias, tokens=2, backend=backend) + 0 * scores.sum()

        return value_and_gradients(call, [data.scores, data.x, w1, bias])

    for run in (edges, nodes):
        values = [run(backend) for backend in BACKENDS]
        for found in values:
            for x, y in zip(found, values[-1], strict=True):
                assert x.shape == y.shape
                assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)
    if sizes:
        assert_near(edges(BACKENDS[0])[0], bias.expand(len(sizes), 3, 4, 6))
        assert (edges(BACKENDS[0])[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    data = batch([5, 6, 2], 6)
    call = edges_call(data, 2, "circular", True)
    leaves = [data.scores, data.attr, weights(5, 3, 3, 3), torch.randn(5, dtype=torch.float64)]
    full = value_and_gradients(lambda *x: call(backend, *x), leaves)[1:]
    for wanted in ([0], [1], [2], [3], [0, 2], [1, 3]):
        found = value_and_gradients(lambda *x: call(backend, *x), leaves, wanted)[1:]
        for i, x in zip(wanted, found, strict=True):
            assert_near(x, full[i], GRADIENT)
    with torch.no_grad():
        assert not call(backend, *(x.clone().requires_grad_() for x in leaves)).requires_grad
    detached = soft_permutation(data.scores, data.ptr.diff(), tau=0.1)
    weight = leaves[2].clone().requires_grad_()
    out = embed_edges(data.edges, data.attr, data.ptr, detached, weight, grid=2, backend=backend)
    assert torch.autograd.grad(out.sum(), weight)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("pad_mode", "centered"), [("zeros", False), ("reflect", True)])
def test_gradcheck(backend, pad_mode, centered):
    data = batch([4, 2], 4, C=2, S=2, edges=4)
    p = data.soft(data.scores)

    def edges(attr, weight, bias):
        settings = {"grid": 3, "pad_mode": pad_mode, "centered": centered, "backend": backend}
        return embed_edges(data.edges, attr, data.ptr, p, weight, bias, **settings)

    def nodes(x, weight, bias):
        settings = {"tokens": 3, "pad_mode": pad_mode, "centered": centered, "backend": backend}
        return embed_nodes(x, data.ptr, p, weight, bias, **settings)

    bias = torch.randn(2, dtype=torch.float64)
    for f, leaves in ((edges, (data.attr, weights(2, 2, 2, 2), bias)), (nodes, (data.x, weights(2, 2, 2), bias))):
        assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in leaves])


def test_the_straight_through_gradient_is_that_of_the_soft_permutation():
    """Numerically: the tokens with P = hard + (soft(scores + e) - soft(scores)), whose value is not the op's."""
    data = batch([5], 5, C=2, S=1)
    w2, combination = weights(3, 2, 3, 3), torch.randn(1, 1, 4, 3, dtype=torch.float64)
    adjacency, _ = dense_graphs(data.edges, data.attr, data.x, data.ptr, 5)
    scores = data.scores.clone().requires_grad_()
    p = data.soft(scores)
    hard, soft = p.hard(torch.float64), p.soft().detach()

    def loss(moved):
        q = hard + data.soft(moved).soft().detach() - soft
        acted = torch.einsum("bsui,bcuv,bsvj->bscij", q, adjacency, q)[0]
        y = torch.nn.functional.conv2d(torch.nn.functional.pad(acted, (0, 1, 0, 1)), w2, stride=3)
        return (y.flatten(2).mT * combination[0]).sum()

    out = embed_edges(data.edges, data.attr, data.ptr, p, w2, grid=2)
    (found,) = torch.autograd.grad((out * combination).sum(), scores)
    step = 1e-6 * torch.eye(5, dtype=torch.float64)
    expected = [(loss(data.scores + e) - loss(data.scores - e)) / 2e-6 for e in step]
    assert_near(found[0, 0], torch.stack(expected), {torch.float64: 1e-6})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_layout_does_not_matter(dtype):
    torch.manual_seed(3)
    data = batch([5, 7], 7, S=4, edges=40)
    inner = PatchWeight(70, 3, 4, 4)().to(dtype)
    assert inner.permute(2, 3, 1, 0).is_contiguous() and not inner.is_contiguous()
    found = []
    for weight in (inner, inner.contiguous()):
        leaves = [data.scores.to(dtype), data.attr.to(dtype), weight, torch.ones(70, dtype=dtype)]
        found.append(value_and_gradients(lambda *x: edges_call(data, 2)("auto", *x), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    leaf = inner.detach().requires_grad_()
    edges_call(data, 2)("auto", data.scores.to(dtype), data.attr.to(dtype), leaf, None).sum().backward()
    assert leaf.grad.stride() == leaf.stride()  # the optimizer's update stays in one layout


def test_strided_inputs():
    data = batch([5, 7], 7)
    w2, w1 = weights(6, 3, 4, 4), weights(6, 3, 4)
    bias = torch.randn(12, dtype=torch.float64)[::2]
    strided = {
        "scores": data.scores.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "attr": data.attr.T.contiguous().T,
        "weight": w2.flip(0).permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).flip(0),
    }
    for backend in BACKENDS:
        call = edges_call(data, 2)
        expected = value_and_gradients(lambda *x: call(backend, *x), [data.scores, data.attr, w2, bias.contiguous()])  # noqa: B023
        found = value_and_gradients(lambda *x: call(backend, *x), [*strided.values(), bias])  # noqa: B023
        assert_same(found, expected)
        edges, ptr = data.edges.T.contiguous().T, torch.stack([data.ptr, data.ptr], 1)[:, 0]
        p = data.soft(data.scores)
        assert torch.equal(
            embed_edges(edges, data.attr, ptr, p, w2, grid=2, backend=backend),
            embed_edges(data.edges, data.attr, data.ptr, p, w2, grid=2, backend=backend),
        )
        x = data.x.T.contiguous().T
        strided_p = Permutation(p.order.mT.contiguous().mT, p.num_nodes)
        assert torch.equal(
            embed_nodes(x, ptr, strided_p, w1, tokens=2, backend=backend),
            embed_nodes(data.x, data.ptr, p, w1, tokens=2, backend=backend),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    data = batch([5, 7, 3], 7)
    scores = data.scores.float()
    leaves = [x.to(dtype) for x in (data.attr, weights(6, 3, 4, 4), torch.randn(6))]
    found = value_and_gradients(lambda *x: edges_call(data, 2)("auto", scores, *x), leaves)
    assert all(x.dtype == dtype for x in found)
    reference = edges_call(data, 2)
    expected = value_and_gradients(lambda *x: reference("reference", scores.double(), *x), [x.double() for x in leaves])
    for x, y in zip(found, expected, strict=True):  # rounded once
        assert_near(x, y, {torch.bfloat16: 8e-3, torch.float16: 2e-3})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edges", [4, 60])
def test_autocast(backend, edges):
    """Backward under it too: the products of the gradient to the scores stay in float32."""
    data = batch([5, 7, 3], 7, edges=edges)
    leaves = [data.scores.float(), data.attr.bfloat16(), weights(6, 3, 4, 4).float(), torch.randn(6)]

    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda *x: edges_call(data, 2)(backend, *x), leaves)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    expected = value_and_gradients(lambda *x: edges_call(data, 2)("reference", *x), [x.double() for x in leaves])
    # the kernel computes in float32, the reference as autocast has it
    bound = {torch.float32: 1e-4, torch.bfloat16: 8e-3} if backend != "reference" else dict.fromkeys(GRADIENT, 0.1)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if backend != "reference" or i != 1:
            assert_near(x, y, bound)


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "edges"), [(70, 60), (70, 4), (256, 60)])
def test_bit_equal_on_any_threads(D, edges, dtype):
    """The gradient to the scores too where few products are made."""
    data = batch([20, 17, 4, 20], 20, S=5, edges=edges)
    bias = torch.randn(D, dtype=dtype)
    leaves = [data.scores.to(dtype), data.attr.to(dtype), weights(D, 3, 5, 5).to(dtype), bias]
    products = (1,) if edges == 60 else ()
    bit_equal_on_any_threads(lambda *x: edges_call(data, 4, "reflect")("cpu", *x), leaves, products)
    leaves[1:3] = data.x.to(dtype), weights(D, 3, 5).to(dtype)
    bit_equal_on_any_threads(lambda *x: nodes_call(data, 4, "reflect")("cpu", *x), leaves, (1,))


def test_after_inference_mode():
    """What the ops keep between calls can be saved for a gradient."""
    data = batch([5, 11], 11)
    w = weights(2, 3, 1, 1)
    with torch.inference_mode():
        embed_edges(data.edges, data.attr, data.ptr, data.soft(data.scores), w, grid=17, pad_mode="circular")
    w.requires_grad_()
    out = embed_edges(data.edges, data.attr, data.ptr, data.soft(data.scores), w, grid=17, pad_mode="circular")
    assert torch.autograd.grad(out.sum(), w)[0].isfinite().all()
