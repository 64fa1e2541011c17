"""Every instruction set that this machine has gives what the float64 reference gives, not only the best one."""

import pytest
import torch

from probsym_fast.ops import (
    _extension,
    act_orthogonal,
    aggregate,
    embed_edges,
    embed_image,
    embed_matrix,
    embed_nodes,
    gin,
    linear_batch_norm_relu,
    message_passing,
    mlp,
    node_identifiers,
    orthogonal_frame,
    permutation_entropy,
    permute,
    readout,
    soft_permutation,
    transformer,
    vector_edge_convolution,
)
from tests.helpers.items import DTYPES, batch, check, weights
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, transformer_weights

MODULE = _extension.module()
pytestmark = pytest.mark.skipif(MODULE is None, reason="the extension is not built")
SETS = MODULE.instruction_sets() if MODULE else []


@pytest.fixture(params=SETS)
def instruction_set(request):
    best = MODULE.instruction_set()
    MODULE.use_instruction_set(request.param)
    yield request.param
    MODULE.use_instruction_set(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 3, 40), (2, 3, 100), (1, 2, 444), (1, 17, 65)])
def test_soft_permutation_and_entropy(instruction_set, shape, dtype):
    assert MODULE.instruction_set() == instruction_set
    torch.manual_seed(shape[-1])
    num_nodes = torch.randint(1, shape[-1] + 1, shape[:1])
    scores = torch.randn(shape, dtype=dtype)
    found = []
    for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
        x = scores.to(kind).requires_grad_()
        p = soft_permutation(x, num_nodes, tau=0.05, backend=backend)
        entropy = permutation_entropy(p, backend=backend)
        (gradient,) = torch.autograd.grad(entropy + (p.log_r * p.scores).sum() + (p.log_c**2).sum(), x)
        found.append((p.order, p.rank, p.scores, p.log_r, p.log_c, entropy, gradient))
    single = dtype == torch.float32
    for i, (value, expected) in enumerate(zip(*found, strict=True)):
        if i < 2:
            assert torch.equal(value, expected)
        else:
            scale = 1 + expected.abs().max().item()
            bound = (2e-4 if i == 6 else 2e-5) if single else (1e-9 if i == 6 else 1e-11)
            assert (value - expected).abs().max() < bound * scale, i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 3])
def test_frames_and_their_action(instruction_set, d, dtype):
    torch.manual_seed(d)
    matrices, vectors = torch.randn(3, 11, d, d, dtype=dtype), torch.randn(3, 5, d, 7, dtype=dtype)
    found = []
    for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
        a, v = matrices.to(kind).requires_grad_(), vectors.to(kind).requires_grad_()
        out = act_orthogonal(v, orthogonal_frame(a, special=True, backend=backend), inverse=True, backend=backend)
        found.append((out, *torch.autograd.grad(out.pow(3).sum(), (a, v))))
    for value, expected in zip(*found, strict=True):
        bound = (1 + expected.abs().max().item()) * (2e-4 if dtype == torch.float32 else 1e-10)
        assert (value - expected).abs().max() < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "C", "edges"), [(1, 1, 3), (33, 3, 60), (70, 1, 60), (256, 3, 4), (256, 3, 60)])
def test_graphs_to_tokens_and_back(instruction_set, D, C, edges, dtype):
    assert MODULE.instruction_set() == instruction_set
    data = batch([9, 20, 7], 20, C, S=4, edges=edges)
    w2, w1, bias = weights(D, C, 5, 5), weights(D, C, 5), torch.randn(D).double()

    def embeddings(backend, scores, attr, x, matrix, w2, w1, bias):
        p, settings = data.soft(scores, backend), {"pad_mode": "reflect", "centered": True, "backend": backend}
        tokens = embed_edges(data.edges, attr, data.ptr, p, w2, bias, grid=4, **settings)
        nodes = embed_nodes(x, data.ptr, p, w1, tokens=4, **settings)
        return torch.cat([tokens, nodes, embed_matrix(matrix, p, w2, bias, grid=4, **settings)], 2)

    check("embed", embeddings, [data.scores, data.attr, data.x, data.matrix, w2, w1, bias], dtype)

    def readouts(backend, scores, tokens, w2, w1):
        p = data.soft(scores, backend)
        pairs = readout(tokens, data.ptr, p, w2, at=data.edges, backend=backend)
        return torch.cat([pairs, readout(tokens[:, :, :4], data.ptr, p, w1, at="nodes", backend=backend)])

    check("readout", readouts, [data.scores, torch.randn(3, 4, 16, D).double(), w2, w1], dtype)

    def messages(backend, scores, weight):
        h = node_identifiers(data.ptr, data.soft(scores, backend), weight, backend=backend)
        return aggregate(h, data.edges, backend=backend)

    check("aggregate", messages, [data.scores, torch.randn(20, D).double()], dtype)

    for width in (2, D):  # scans of numbers, and of vectors

        def sorted_rows(backend, scores, x):
            return permute(data.soft(scores, backend), x, inverse=True, backend=backend)

        check("permute", sorted_rows, [data.scores, torch.randn(3, 1, 20, width).double()], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "C", "P", "Q"), [(1, 1, 4, 5), (33, 2, 8, 4), (70, 3, 4, 20), (200, 5, 2, 40)])
def test_images_to_tokens(instruction_set, D, C, P, Q, dtype):
    """Blocks of rows and of columns that are not full, pixels of one and of several vectors, rows in parts."""
    angle = torch.tensor([[0.3, 2.0, 4.0], [1.0, -1.0, 6.0]])
    frames = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2)).double()
    leaves = [torch.randn(2, C, 40, 40).double(), frames, weights(D, C, P, Q), torch.randn(D).double()]
    check("embed_image", lambda b, *x: embed_image(*x, pad_mode="replicate", backend=b), leaves, dtype)
    turns = torch.tensor([[0, 1, 7], [4, 2, 3]])
    leaves.pop(1)
    check("embed_turned", lambda b, x, w, c: embed_image(x, turns, w, c, backend=b), leaves, dtype)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=f"must be one of .*{SETS[-1]}.* got sse9"):
        MODULE.use_instruction_set("sse9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "C"), [(13, 5, 3), (700, 64, 70)])
def test_linear_batch_norm_relu(instruction_set, M, K, C, dtype):
    leaves = [torch.randn(M, K), torch.randn(C, K), torch.randn(C), torch.randn(C)]
    call = lambda b, *leaves: linear_batch_norm_relu(*leaves, backend=b)[0]  # noqa: E731
    check("linear_batch_norm_relu", call, [x.double() for x in leaves], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_networks(instruction_set, dtype):
    """19 sequences: a part of a tile is empty with any set."""
    settings = {"in_features": 7, "width": 18, "layers": 2, "heads": 3, "feedforward": 11, "out_features": 5}
    leaves = [torch.randn(19, 11, 7).double(), transformer_weights(settings, 11)]
    for more in ({}, {"read": [0, 5]}, {"lengths": torch.randint(1, 12, (19,)), "activation": "relu"}):
        check("transformer", lambda b, *t, more=more: transformer(*t, **settings, **more, backend=b), leaves, dtype)
    leaves = [torch.randn(19, 6, 7).double(), torch.randn(19, 6, 6, 2).double(), message_weights(7, 2, 18, 2, 5)]
    call = lambda b, *t: message_passing(*t, width=18, layers=2, out_features=5, backend=b)  # noqa: E731
    check("message_passing", call, leaves, dtype)
    edges, ptr = torch.randint(0, 9, (2, 40)), torch.tensor([0, 9, 9])
    for activation in ("tanh", "relu", "gelu"):
        settings = {"layers": 3, "out_features": 5, "activation": activation}
        leaves = [torch.randn(9, 4, 70).double(), gin_weights(70, 3, 5)]
        check("gin", lambda b, x, w, s=settings: gin(x, edges, ptr, w, **s, backend=b), leaves, dtype)
    for activation in ("tanh", "relu", "gelu", "silu"):
        settings = {"widths": [7, 70, 18, 5], "activation": activation, "first": True}
        leaves = [torch.randn(103, 7).double(), mlp_weights(settings["widths"])]
        check("mlp", lambda b, x, w, s=settings: mlp(x, w, **s, backend=b), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_edge_convolution(instruction_set, dtype):
    """19 clouds: a part of a tile is empty with any set."""
    leaves = [torch.randn(3, 3, 5, 19), torch.randn(7, 6), torch.randn(7, 6), torch.rand(7) + 0.5, torch.randn(7)]
    pool = torch.randn(7, 7)

    def call(backend, x, feature, direction, *norm):
        weights = feature, direction, pool.to(x), *norm
        return vector_edge_convolution(x, *weights, neighbors=3, backend=backend)[0]

    check("vector_edge_convolution", call, [x.double() for x in leaves], dtype)
