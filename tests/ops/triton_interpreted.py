"""The Triton kernels on CPU tensors under triton's interpreter, against the float64 reference: run by test_triton.py in a
process of its own, where TRITON_INTERPRET=1 stands before triton is imported."""

import importlib
import math
import os
import re

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode
from triton.runtime.interpreter import ScanOps

from probsym_fast.ops import (
    OPS,
    Permutation,
    aggregate,
    debug,
    embed_edges,
    orthogonal_frame,
    readout,
    soft_permutation,
)
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops._patches import padded_axis, patch_size
from probsym_fast.ops.reference._parts import FUNCTIONS
from probsym_fast.ops.triton import KERNELS, _launch, _lazy
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.helpers.interpreter import Programs, index_by_one_element, round_products
from tests.helpers.items import batch, weights
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, transformer_weights
from tests.ops.test_backends import CALLS, Calls, matrices
from tests.ops.test_embed_image import frames_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_dtypes(*cases):
    """(dtype, case): every case in float32, the first in the others, whose kernels differ in what they load and store."""
    return [(torch.float32, *case) for case in cases] + [(dtype, *cases[0]) for dtype in DTYPES[1:]]


# rounded once to the dtype, relative to the largest entry
BOUND = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
TF32 = 1e-3  # of products of float32 numbers, where they read 10 bits after the point


@pytest.fixture(autouse=True, params=["atomics", "deterministic"])
def mode(request):
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if request.param == "deterministic":
        if dtype != torch.float32:
            pytest.skip("the lists do not depend on the dtype")
        if request.node.callspec.params.get("N", 6) != 6:
            pytest.skip("nor on the padding")
        if not any(x in request.node.originalname for x in ("aggregate", "embed", "readout", "entries")):
            pytest.skip("no lists, nothing that the mode changes")
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield request.param
    torch.use_deterministic_algorithms(False)


def garbage(dtype: torch.dtype) -> float:
    """NaN, or a number that points nowhere."""
    return float("nan") if dtype.is_floating_point else 255 if dtype == torch.uint8 else -(10**9)


@pytest.fixture(autouse=True)
def garbage_in_fresh_memory(monkeypatch):
    def poisoned(make):
        def call(*arguments, **settings):
            x = make(*arguments, **settings)
            return x.fill_(garbage(x.dtype))

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """In an order of their own, not that of their numbers."""
    round_products(monkeypatch)
    index_by_one_element(monkeypatch)
    return Programs(monkeypatch)


def by_doubling(self, given):
    """`ScanOps.generic_scan` for whole blocks: the interpreter's own combines number after number, in Python."""
    blocks, count = [x.handle.data for x in given], given[0].handle.data.shape[self.axis]
    place = numpy.arange(count).reshape([-1 if axis == self.axis else 1 for axis in range(blocks[0].ndim)])
    for step in (2**k for k in range((count - 1).bit_length())):
        before = [numpy.roll(x, step, self.axis) for x in blocks]
        both = zip([*before, *blocks], [*given, *given], strict=True)
        joined = self.combine_fn.fn(*(self.to_tensor(x, y.dtype) for x, y in both))
        blocks = [numpy.where(place < step, x, y.handle.data) for x, y in zip(blocks, joined, strict=True)]
    return [self.to_tensor(x, y.dtype) for x, y in zip(blocks, given, strict=True)]


@pytest.fixture(autouse=True)
def scans_of_blocks(monkeypatch):
    monkeypatch.setattr(ScanOps, "generic_scan", by_doubling)


CALLS_OF_TRITON = [name for name in KERNELS if name in CALLS]  # with a gradient


def check_memory(results, arguments) -> None:
    """As a compiled program expects it of an op: each result begins its own memory, and all of it is set."""
    made = [x for x in results if isinstance(x, torch.Tensor) and x.numel()]
    assert all(x.storage_offset() == 0 for x in made)
    assert len({x.untyped_storage().data_ptr() for x in made}) == len(made)
    numbers = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if all(x.isfinite().all() for x in numbers):
        assert all(x.isfinite().all() for x in made)


class Through(torch.autograd.Function):
    """The launchers of an op as the dispatcher calls them, by the names in the op's schemas."""

    @staticmethod
    def forward(ctx, name, *arguments):
        out = _lazy(name, "forward")(*arguments)
        out = out if isinstance(out, tuple) else (out,)
        check_memory(out, arguments)
        ctx.name, ctx.arguments, ctx.out = name, arguments, out
        return out[0]  # of several results the first has the gradient

    @staticmethod
    def backward(ctx, d_out):
        op = OPS[ctx.name]
        names = [x.name for x in op.kernel._schema.arguments]
        results = [x.name for x in op.kernel._schema.returns]
        known = dict(zip(names, ctx.arguments, strict=True)) | dict(zip(results, ctx.out, strict=True))
        known[f"d_{results[0]}"] = d_out
        known |= {f"needs_{x}": needed for x, needed in zip(names, ctx.needs_input_grad[1:], strict=True)}
        found = _lazy(ctx.name, "backward")(*(known[x.name] for x in op.backward._schema.arguments))
        found = found if isinstance(found, tuple) else (found,)
        check_memory(found, (d_out, *ctx.arguments))
        gives = dict(zip((x.name for x in op.backward._schema.returns), found, strict=True))
        for x, needed in zip(names, ctx.needs_input_grad[1:], strict=True):
            if needed:
                given = known[x]
                assert gives[f"d_{x}"].shape == given.shape and gives[f"d_{x}"].dtype == given.dtype
        return None, *(gives.get(f"d_{x}") if known[f"needs_{x}"] else None for x in names)


def check(name, arguments, leaves, single=BOUND[torch.float32]):
    """Values and gradients to the arguments numbered `leaves`, against the reference in float64.

    single: the bound of those in float32.
    """

    def run(call, arguments):
        made = [
            x.detach().requires_grad_(i in leaves) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(arguments)
        ]
        out = call(*made)
        out = out[0] if isinstance(out, tuple) else out
        combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(lowest).to(out)
        return out.detach(), *torch.autograd.grad(out, [made[i] for i in leaves], combination)

    lowest = min(
        (x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()), key=lambda d: d.itemsize
    )
    found = run(lambda *x: Through.apply(name, *x), arguments)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    expected = run(OPS[name].reference, exact)
    bounds = BOUND | {torch.float32: single}
    for x, y in zip(found, expected, strict=True):
        if not y.numel():
            assert x.shape == y.shape
            continue
        assert_near(x, y, {dtype: max(bounds[dtype], BOUND[lowest] if x.ndim == 0 else 0) for dtype in DTYPES})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (330,)])
@pytest.mark.parametrize("virtual", [False, True])
def test_aggregate(shape, dtype, virtual):
    """More edges at a node than are read at a time, a graph of one node and one of none; several blocks of the width and of
    the nodes, of all and of one graph."""
    data = batch([2, 10, 1, 0], 10, edges=40)
    assert data.edges[1].bincount().max() > 4
    x = torch.randn(13 + 4 * virtual, *shape).to(dtype)
    check("aggregate", [x, data.edges, data.ptr if virtual else None, torch.tensor(1.3)], [0, 3])
    check("aggregate", [x, data.edges, data.ptr if virtual else None, None], [0])


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 3), (2, 2, 600), (0, 2, 3)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("forks", [None, [2, 5]])
def test_noise(shape, named, forks):
    rows = torch.arange(shape[0]) * 7 - 3 if named else None
    for streams in ([2**62], [-(2**62), 12345]):
        for block, mirrored in ((1, False), (2, True), (3, False)):
            call = torch.tensor(2**61 + 5), rows, list(shape), 3, forks, streams, block, mirrored
            found, expected = _lazy("noise", "forward")(*call), OPS["noise"].reference(*call)
            assert found.shape == shape and torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
            assert streams[1:] or torch.equal(found, expected)


@pytest.mark.parametrize("nodes", [0, 4])
def test_aggregate_of_nothing(nodes):
    x = torch.randn(nodes, 3)
    check("aggregate", [x, torch.zeros(2, 0, dtype=torch.int64), None, torch.tensor(0.5)], [0, 3])


# patches that fit, that are padded, more places than slots, one token
GRIDS = [(6, 3, "zeros", False), (5, 2, "reflect", True), (3, 5, "circular", True), (4, 1, "zeros", False)]
GRIDS += [(5, 7, "replicate", True)]


def soft_arguments(data, tau=0.5):
    p = data.soft(data.scores.float())
    return data.ptr, p.rank, p.order, p.scores, p.log_r, p.log_c, tau


@pytest.mark.parametrize(("dtype", "N", "grid", "pad_mode", "centered"), in_dtypes(*GRIDS))
@pytest.mark.parametrize("axes", [1, 2])
def test_embed(N, grid, pad_mode, centered, axes, dtype):
    data, P, D = batch([max(1, N - 2), N, 1], N, C=2, S=2, edges=4), patch_size(N, grid), 20
    items, values = (data.edges, data.attr) if axes == 2 else (torch.arange(len(data.x))[None], data.x)
    axis = padded_axis(N, grid, pad_mode, centered, torch.device("cpu"))
    arguments = [items, values.to(dtype), *soft_arguments(data), *axis, weights(D, 2, *[P] * axes).to(dtype)]
    check("embed", [*arguments, torch.randn(D).to(dtype)], [1, 5, 6, 7, 12, 13])
    check("embed", [*arguments, None], [12])


@pytest.mark.parametrize("axes", [1, 2])
def test_embed_of_nothing(axes):
    """No graphs; graphs without nodes; no items; items that no graph has."""
    axis = padded_axis(4, 2, "zeros", False, torch.device("cpu"))
    weight, nothing = weights(5, 2, *[2] * axes).float(), torch.zeros(axes, 0, dtype=torch.int64)
    for B in (0, 2):
        rank, ptr = torch.arange(4).expand(B, 3, 4), torch.zeros(B + 1, dtype=torch.int64)
        arguments = [
            nothing,
            torch.zeros(0, 2),
            ptr,
            rank,
            rank,
            None,
            None,
            None,
            1.0,
            *axis,
            weight,
            torch.randn(5),
        ]
        check("embed", arguments, [1, 12, 13])
    outside = torch.tensor([[0, 7, -1]]).expand(axes, 3).contiguous()
    rank, ptr = torch.arange(4).expand(1, 3, 4), torch.tensor([0, 3])
    rest = ptr, rank, rank, None, None, None, 1.0, *axis, weight, None
    assert torch.equal(
        _lazy("embed", "forward")(outside, torch.ones(3, 2), *rest),
        _lazy("embed", "forward")(outside[:, :1], torch.ones(1, 2), *rest),
    )


@pytest.mark.parametrize(("dtype", "N", "grid", "pad_mode", "centered"), in_dtypes(*GRIDS))
def test_embed_matrix(N, grid, pad_mode, centered, dtype):
    data, P, D = batch([max(1, N - 2), N, 1], N, C=2, S=2), patch_size(N, grid), 20
    axis = padded_axis(N, grid, pad_mode, centered, torch.device("cpu"))
    arguments = [data.matrix.to(dtype), data.ptr.diff(), *soft_arguments(data)[1:], *axis]
    arguments += [weights(D, 2, P, P).to(dtype), torch.randn(D).to(dtype)]
    single = TF32 if dtype == torch.float16 else BOUND[dtype]  # dA' is kept in bfloat16 if the matrix is
    check("embed_matrix", arguments, [0, 4, 5, 6, 11, 12], single)
    if pad_mode == "zeros":
        arguments[4:7] = [None] * 3
        check("embed_matrix", [*arguments[:-1], None], [11])


@pytest.mark.parametrize("parts", [False, True])
def test_embed_matrix_beyond_one_block(parts, monkeypatch):
    """Patch lines, widths and slots of several blocks; tokens in several parts, a graph's samples in several chunks, more
    rows than programs take at once."""
    N, grid, C, D = (10, 5, 4, 5) if parts else (66, 2, 1, 258)
    data, P = batch([N, N] if parts else [N], N, C=C, S=3 if parts else 1), patch_size(N, grid)
    if parts:
        gradient, patches, products = (
            importlib.import_module(f"probsym_fast.ops.triton.{x}") for x in ("matrix_gradient", "patches", "products")
        )
        monkeypatch.setattr(gradient, "PRODUCTS", 4 * grid**2 * P * P * C * 2)  # of two samples
        monkeypatch.setattr(products, "SPLIT", 5)
        monkeypatch.setattr(patches, "BYTES", 4 * grid**2 * P * P * C * 3)  # of three
        monkeypatch.setattr(products, "PROGRAMS", 1)
    axis, weight = padded_axis(N, grid, "zeros", False, torch.device("cpu")), weights(D, C, P, P).float() / P
    arguments = [data.matrix.float(), None, *soft_arguments(data)[1:], *axis, weight, None]
    check("embed_matrix", arguments, [0, 4, 5, 6, 11])


@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0)])
def test_embed_matrix_of_nothing(B, S):
    axis, order = padded_axis(4, 2, "zeros", False, torch.device("cpu")), torch.arange(4).expand(B, S, 4)
    soft = [torch.zeros(B, S, 4)] * 3
    arguments = [torch.randn(B, 4, 4, 2), torch.ones(B, dtype=torch.int64), order, order, *soft, 0.5, *axis]
    check("embed_matrix", [*arguments, weights(5, 2, 2, 2).float(), torch.randn(5)], [0, 4, 5, 6, 11, 12])


# C, H, W, P, Q, D: more channels than are read at a time; images of a row and of a pixel
IMAGES = [(3, 4, 12, 4, 6, 7), (6, 4, 6, 2, 3, 4), (2, 3, 1, 1, 1, 2)]


def image_arguments(sizes, dtype=torch.float32):
    C, H, W, P, Q, D = sizes
    weight = weights(D, C, P, Q) / (C * P * Q) ** 0.5
    return torch.randn(2, C, H, W).to(dtype), weight.to(dtype), torch.randn(D).to(dtype)


@pytest.mark.parametrize(("dtype", "sizes"), in_dtypes(*((x,) for x in IMAGES)))
@pytest.mark.parametrize("replicate", [False, True])
def test_images_moved(sizes, replicate, dtype):
    """Rotations, reflections, one that shows the image from afar; one sample."""
    x, weight, bias = image_arguments(sizes, dtype)
    check("embed_image", [x, frames_of(2, 3).float(), weight, bias, replicate], [0, 1, 2, 3], BOUND[dtype])
    if sizes == IMAGES[-1]:
        check("embed_image", [x, frames_of(2, 1).float(), weight, None, replicate], [0, 1, 2])


def test_images_of_several_blocks():
    x, weight, _ = image_arguments((1, 32, 32, 32, 32, 5))
    check("embed_image", [x, frames_of(2, 1).float(), weight, None, False], [0, 1, 2])


@pytest.mark.parametrize("replicate", [False, True])
def test_images_by_any_matrix(replicate):
    """No inverse, nearly none, a narrow one, one that magnifies; in float64 the gradient has its dtype."""
    x, weight, _ = image_arguments((1, 4, 6, 2, 3, 5))
    frames = torch.tensor(
        [[0, 0, 0, 0], [1.1, 2.2, 0.55, 1.1], [1, 2.2, 0.5, 1.14], [2.1, 0, 1, 0.13], [0.11, 0.3, 0.21, 0.1]]
    )
    frames = frames.view(5, 2, 2).expand(2, 5, 2, 2).contiguous()
    check("embed_image", [x, frames, weight, None, replicate], [0, 1, 2])
    wide, d = frames.double(), torch.randn(2, 5, 4, 5)
    if replicate:
        found, expected = (
            _lazy("embed_image", "backward")(d, x, f, weight, True, False, True, False, False)[1]
            for f in (wide, frames)
        )
        assert found.dtype == torch.float64
        assert_near(found.float(), expected.double(), BOUND)


@pytest.mark.parametrize(("dtype", "sizes"), in_dtypes(((3, 18, 18, 6, 9, 7),), (IMAGES[1],)))
def test_images_turned(sizes, dtype):
    x, weight, bias = image_arguments(sizes, dtype)
    turns = torch.stack([torch.arange(8), torch.arange(8).flip(0)])
    turns = turns if sizes[1] == sizes[2] else turns // 2 * 2
    check("embed_turned", [x, turns, weight, bias], [0, 2, 3])
    check("embed_turned", [x, turns[:, 5:6], weight, None], [2])


def test_images_in_parts(monkeypatch):
    """Of three samples, which end within an image and beyond it."""
    x, weight, bias = image_arguments((2, 6, 6, 3, 2, 4))
    monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.images"), "BYTES", 4 * 2 * 6 * 6 * 3)
    check("embed_image", [x, frames_of(2, 4).float(), weight, bias, False], [0, 1, 2, 3])
    check("embed_turned", [x, torch.arange(8).view(2, 4), weight, bias], [0, 2, 3])


@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0)])
def test_images_of_nothing(B, S):
    x, weight, bias = torch.randn(B, 2, 4, 6), torch.randn(5, 2, 2, 3), torch.randn(5)
    check("embed_image", [x, torch.zeros(B, S, 2, 2), weight, bias, False], [0, 1, 2, 3])
    check("embed_turned", [x, torch.zeros(B, S, dtype=torch.int64), weight, bias], [0, 2, 3])


def test_arguments_that_do_not_fit_images():
    x, frames, turns = torch.zeros(2, 3, 4, 6), torch.zeros(2, 5, 2, 2), torch.zeros(2, 5, dtype=torch.int64)
    weight = torch.zeros(7, 3, 2, 3)
    for arguments, message in (
        ((x[0], frames, weight, None), "pixels must have 4 axes, got (3, 4, 6)"),
        ((x[:1], frames, weight, None), "pixels must be (2, 3, 4, 6), got (1, 3, 4, 6)"),
        ((x[:, :2], frames, weight, None), "pixels must be (2, 3, 4, 6), got (2, 2, 4, 6)"),
        ((x[..., :5], frames, weight, None), "pixels must be whole patches, got 4 x 5 of 2 x 3"),
        ((x, frames, weight[..., :0], None), "pixels must be whole patches, got 4 x 6 of 2 x 0"),
        ((x, turns, weight, None), "plane must have 4 axes, got (2, 5)"),
        ((x, frames[..., :1], weight, None), "plane must be (2, 5, 2, 2), got (2, 5, 2, 1)"),
        ((x, frames, weight[0], None), "weight must have 4 axes, got (3, 2, 3)"),
        ((x, frames, weight, torch.zeros(6)), "bias must be (7,), got (6,)"),
    ):
        with pytest.raises(ValueError, match=f"^embed_image: {re.escape(message)}$"):
            _lazy("embed_image", "forward")(*arguments, False)
    for tokens in (torch.zeros(2, 5, 4, 6), torch.zeros(2, 5, 3, 7)):
        message = re.escape(f"tokens must be (2, 5, 4, 7), got {tuple(tokens.shape)}")
        with pytest.raises(ValueError, match=f"^embed_turned: {message}$"):
            _lazy("embed_turned", "backward")(tokens, x, turns, weight, True, True, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "N", "S", "D"), [([5, 1, 3, 7], 7, 3, 20), ([66], 66, 1, 1), ([2, 3], 3, 2, 530)])
def test_node_identifiers(sizes, N, S, D, dtype):
    data = batch(sizes, N, S=S)
    arguments = [*soft_arguments(data), weights(N, D).to(dtype), int(data.ptr[-1])]
    check("node_identifiers", arguments, [3, 4, 5, 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2])
def test_other_configurations(number, dtype, monkeypatch, mode):
    """Of products of matrices, where the one that is fixed is not the only one."""
    if mode == "deterministic":
        pytest.skip("there the first is taken")

    def numbered(self, constants):
        return self.configurations[number % len(self.configurations) :]  # of the tensor cores for float32 too

    monkeypatch.setattr(_launch.Kernel, "among", numbered)
    data, axis = batch([3, 4], 4, C=3, S=2), padded_axis(4, 2, "zeros", False, torch.device("cpu"))
    p = soft_arguments(data)
    arguments = [data.matrix.to(dtype), data.ptr.diff(), *p[1:], *axis, weights(5, 3, 2, 2).to(dtype), None]
    check("embed_matrix", arguments, [0, 4, 5, 6, 11], BOUND[dtype])  # products with the weight are kept in its dtype
    check("node_identifiers", [*p, weights(4, 5).to(dtype), 7], [3, 4, 5, 7])


def test_node_identifiers_of_many_samples(monkeypatch):
    module = importlib.import_module("probsym_fast.ops.triton.node_identifiers")
    monkeypatch.setattr(module, "SPLIT", 8)
    data = batch([3, 2, 3], 3, S=7)
    check("node_identifiers", [*soft_arguments(data), weights(3, 5).float(), 8], [3, 4, 5, 7])


@pytest.mark.parametrize(("B", "S", "nodes"), [(0, 3, 0), (2, 2, 0), (2, 0, 4)])
def test_node_identifiers_of_nothing(B, S, nodes):
    """No graphs; graphs without nodes; no samples."""
    ptr, rank = torch.tensor([0] + [nodes // 2] * (B > 0) + [nodes] * (B > 1)), torch.arange(4).expand(B, S, 4)
    soft = [torch.zeros(B, S, 4)] * 3
    check("node_identifiers", [ptr, rank, rank, *soft, 0.5, weights(4, 5).float(), nodes], [3, 4, 5, 7])


@pytest.mark.parametrize(("dtype", "N", "grid", "centered"), in_dtypes((6, 3, False), (3, 4, True)))
@pytest.mark.parametrize("where", ["nodes", "diagonal", "pairs"])
def test_readout(N, grid, centered, where, dtype):
    data = batch([max(1, N - 2), N, 1], N, C=2, S=2, edges=4)
    nodes = torch.arange(len(data.x))
    items = {"nodes": nodes[None], "diagonal": torch.stack([nodes, nodes]), "pairs": data.edges}[where]
    axes, P, D, C = items.shape[0], patch_size(N, grid), 20, 18 if where == "nodes" else 3
    axis = padded_axis(N, grid, "zeros", centered, torch.device("cpu"))
    tokens, weight = torch.randn(3, 2, grid**axes, D).to(dtype), weights(D, C, *[P] * axes).to(dtype)
    arguments = [tokens, items, *soft_arguments(data), *axis, weight]
    check("readout", [*arguments, torch.randn(C).to(dtype)], [0, 5, 6, 7, 12, 13])
    check("readout", [*arguments, None], [0])


@pytest.mark.parametrize(("B", "S", "D"), [(2, 3, 4), (2, 1, 3), (0, 2, 3), (1, 1, 0)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_permute(B, S, D, inverse, shared):
    """Also where nothing is contiguous: some of the samples, nodes first, every second count."""
    scores, num_nodes = torch.randn(B, S + 1, 9), torch.tensor([9, 9, 5, 5][: 2 * B], dtype=torch.int64)[::2]
    p = soft_permutation(scores, num_nodes, 0.5, 3, backend="reference").narrow(0, S)
    x = torch.randn(9, B, 1 if shared else S, D).permute(1, 2, 0, 3)
    check("permute", [x, p.rank, p.order, num_nodes, p.scores, p.log_r, p.log_c, 0.5, inverse], [0, 4, 5, 6])


@pytest.mark.parametrize("items", [0, 3])
def test_readout_of_nothing(items):
    axis = padded_axis(4, 2, "zeros", False, torch.device("cpu"))
    B, nodes = (0, 0) if not items else (1, 3)
    rank, ptr = torch.arange(4).expand(B, 2, 4), torch.tensor([0] + [nodes] * B)
    soft = [torch.randn(B, 2, 4).sort(-1, descending=True)[0] * 0.1, torch.zeros(B, 2, 4), torch.zeros(B, 2, 4)]
    at = torch.zeros(2, 0, dtype=torch.int64)  # a graph of which nothing is read
    arguments = [
        torch.randn(B, 2, 4, 5),
        at,
        ptr,
        rank,
        rank,
        *soft,
        0.5,
        *axis,
        weights(5, 3, 2, 2).float(),
        torch.randn(3),
    ]
    check("readout", arguments, [0, 5, 6, 7, 12, 13])


def test_many_entries_are_split():
    """More pairs a weight row than one program sums, more samples than one matrix product holds, more places than a block."""
    data = batch([4, 4], 4, C=2, S=1, edges=40)
    axis, weight = padded_axis(4, 1, "zeros", False, torch.device("cpu")), weights(20, 2, 4, 4).float()
    arguments = [data.edges[:, :24], data.attr[:24].float(), *soft_arguments(data), *axis, weight, None]
    items, soft_rows = (importlib.import_module(f"probsym_fast.ops.triton.{x}") for x in ("items", "soft_rows"))
    kept = items.SPLIT, soft_rows.PRODUCTS, soft_rows.PLACES
    try:
        items.SPLIT, soft_rows.PRODUCTS, soft_rows.PLACES = 1, 4 * 16 * 2, 2
        check("embed", arguments, [1, 5, 6, 7, 12])
    finally:
        items.SPLIT, soft_rows.PRODUCTS, soft_rows.PLACES = kept


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("dtype", "n", "d", "C"), in_dtypes((5, 3, 1), (60, 2, 9), (2, 5, 2)))
def test_act_orthogonal(n, d, C, mean, per_sample, dtype):
    vectors = torch.randn(2, *[3] * per_sample, n, d, C).to(dtype)
    for inverse in (False, True) if d == 3 else (True,):
        check("act_orthogonal", [vectors, torch.randn(2, 3, d, d), inverse, mean], [0, 1])


@pytest.mark.parametrize("shape", [(0, 3, 1, 3, 3), (2, 3, 0, 3, 1), (2, 3, 4, 3, 0)])
def test_act_orthogonal_of_nothing(shape):
    B, S, n, d, C = shape
    for mean in (False, True):
        check("act_orthogonal", [torch.randn(B, n, d, C), torch.randn(B, S, d, d), False, mean], [0, 1])


@pytest.mark.parametrize("shape", [(1, 1), (7, 1, 1), (5, 2, 2), (150, 3, 3), (2, 3, 3, 3), (0, 3, 3)])
@pytest.mark.parametrize("special", [False, True])
def test_orthogonal_frame(shape, special):
    matrices = torch.randn(shape)
    if matrices.shape[-1] > 1:  # no matrix whose columns nearly depend: there float32 has fewer digits
        matrices = matrices + 3 * torch.eye(shape[-1]).flip(0)
    check("orthogonal_frame", [matrices, special], [0])


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in divide"
)  # of numpy; the kernel brings it back into the range
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_dependent_columns_are_filled(d, special):
    """As the reference fills them, with its gradient: each column zero, equal to another, opposite to it; ties of axes."""
    a = torch.randn(3 * d + 2, d, d) + 3 * torch.eye(d).flip(0)
    for column in range(d):
        other = a[3 * column : 3 * column + 3, :, 0 if column else -1]
        a[3 * column : 3 * column + 3, :, column] = torch.tensor([[0.0], [1.0], [-2.0]]) * other
    a[-2], a[-1] = 0, 1
    q = _lazy("orthogonal_frame", "forward")(a, special)
    assert (q.mT @ q - torch.eye(d)).abs().max() < 1e-5
    check("orthogonal_frame", [a, special], [0])
    d_q = torch.randn_like(q)
    gradient = _lazy("orthogonal_frame", "backward")(d_q, q, a)
    for column in range(d):
        assert (gradient[3 * column, :, column] == 0).all()
    for scale in (1e-44, 1e-37, 3e38):
        scaled = a.clamp(-1, 1) * scale
        x = scaled.clone().requires_grad_()
        expected = OPS["orthogonal_frame"].reference(x, special)
        q = _lazy("orthogonal_frame", "forward")(scaled, special)
        assert_near(q, expected)
        found = _lazy("orthogonal_frame", "backward")(d_q, q, scaled)
        assert found.isfinite().all()
        if scale > 1e-38:  # below, rounding is beyond the range, too
            (expected,) = torch.autograd.grad(expected, x, d_q)
            assert (found.double() - expected.double()).abs().max() * scale < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:var\\(\\)")  # of no numbers, by torch
@pytest.mark.parametrize(("M", "C"), [(1, 3), (70, 1), (201, 20), (130, 150), (1100, 3), (4, 0)])
def test_linear_batch_norm_relu(M, C, dtype, monkeypatch):
    """One row, one channel, parts that are not full, more parts than are added at a time, several blocks of channels."""
    if M == 1100:
        module = importlib.import_module("probsym_fast.ops.triton.linear_batch_norm_relu")
        monkeypatch.setattr(module, "LEAST", 16)
    x, linear = (
        (torch.randn(M, 4) * 3 + 1).to(dtype),
        torch.eye(4, dtype=dtype).repeat(C // 4 + 1, 1)[:C],
    )  # z has no rounding
    weight, bias = torch.randn(2, C)
    check("linear_batch_norm_relu", [x, linear, weight, bias, 0.1 if M == 1 else 1e-5], [0, 1, 2, 3])
    _, mean, variance = _lazy("linear_batch_norm_relu", "forward")(x, linear, weight, bias, 1e-5)
    z = x @ linear.T
    assert mean.dtype == variance.dtype == torch.float32
    assert torch.allclose(mean.double(), z.double().mean(0), rtol=1e-5)
    assert torch.allclose(variance.double(), z.double().var(0, correction=0), rtol=1e-5)


def test_batch_norm_of_nan_and_of_a_large_mean():
    x, linear = torch.randn(50, 3) + torch.tensor([0.0, 3e4, 0.0]), torch.eye(3)
    exact = OPS["linear_batch_norm_relu"].reference(
        *(t.double() for t in (x, linear, torch.ones(3), torch.zeros(3))), 0.0
    )
    linear[2, 2] = torch.nan
    y, _, variance = _lazy("linear_batch_norm_relu", "forward")(x, linear, torch.ones(3), torch.zeros(3), 0.0)
    assert y[:, 2].isnan().all() and not y[:, :2].isnan().any()
    assert (variance[:2].double() - exact[2][:2]).abs().max() < 1e-4
    assert (y[:, :2].double() - exact[0][:, :2]).abs().max() < 5e-3  # float32 has four digits behind 3e4


# --- the soft permutation ---

SOFT = {  # dtype, B, S, N, valid nodes, tau, iterations, normalize, which outputs have a gradient
    "rows": (torch.float64, 3, 2, 5, [5, 1, 3], 0.05, 3, True, (1, 1, 1)),  # several a program, and two programs
    "lanes": (torch.float32, 1, 1, 70, None, 0.1, 2, False, (1, 0, 1)),
    "memory": (torch.float64, 2, 1, 20, [20, 5], 0.05, 2, True, (0, 1, 1)),  # rows of three blocks
    "sorted": (torch.float32, 2, 1, 3, None, 0.1, 0, True, (1, 1, 1)),
}


def soft_modules():
    return [
        importlib.import_module(f"probsym_fast.ops.triton.{x}") for x in ("soft_permutation", "permutation_entropy")
    ]


@pytest.fixture
def rows_in_memory(monkeypatch):
    for module in soft_modules():
        monkeypatch.setattr(module, "MOST", 16)
    monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.long_rows"), "BLOCK", 8)


@pytest.mark.parametrize("case", SOFT)
def test_soft_permutation(case, monkeypatch, request):
    """And the entropy of what it gives. Too little memory for c in all iterations: rows, or graphs, in turn."""
    dtype, B, S, N, counts, tau, iterations, normalize, wanted = SOFT[case]
    soft, _ = soft_modules()
    monkeypatch.setattr(soft, "BYTES", 1 if case != "lanes" else 2**20)
    if case == "memory":
        request.getfixturevalue("rows_in_memory")
    num_nodes = None if counts is None else torch.tensor(counts)
    scores, settings = torch.randn(B, S, N, dtype=dtype), (num_nodes, tau, iterations, normalize)
    exact = scores.double().requires_grad_()
    *found, order, rank = _lazy("soft_permutation", "forward")(scores, *settings)
    *expected, its_order, its_rank = OPS["soft_permutation"].reference(exact, *settings)
    assert torch.equal(order, its_order) and torch.equal(rank, its_rank)
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, VALUE)
        assert num_nodes is None or not x.masked_select(torch.arange(N) >= num_nodes[:, None, None]).any()
    weights = [torch.randn(B, S, N, dtype=dtype) for _ in wanted]
    known = [x if one else None for x, one in zip(weights, wanted, strict=True)]
    gradient = _lazy("soft_permutation", "backward")(*known, scores, order, found[0], *settings)
    loss = sum((x * y).sum() for x, y, one in zip(weights, expected, wanted, strict=True) if one)
    assert_near(gradient, torch.autograd.grad(loss, exact)[0], GRADIENT)

    exact = [x.double().requires_grad_() for x in found]
    entropy = _lazy("permutation_entropy", "forward")(*found, num_nodes, tau)
    expected = OPS["permutation_entropy"].reference(*exact, num_nodes, tau)
    assert entropy.dtype == dtype
    assert_near(entropy, expected, VALUE)
    gradients = _lazy("permutation_entropy", "backward")(torch.tensor(-3.0, dtype=dtype), *found, num_nodes, tau)
    for x, y in zip(gradients, torch.autograd.grad(expected, exact, torch.tensor(-3.0).double()), strict=True):
        assert_near(x, y, GRADIENT)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # of numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_soft_permutation_at_its_edges(normalize, dtype):
    """Ties and -0, gaps that overflow, an outlier, equal scores; NaN among the nodes stays in its row and sorts first."""
    most = torch.finfo(dtype).max / 8
    scores = torch.tensor(
        [
            [0.0, -0.0, 1.0, 0.0, 1.0, -1.0],
            [0.3, -1.0, 0.7, 1.0, -0.2, 0.1],
            [1e15, 1.0, 2.0, 3.0, 4.0, 5.0],
            [0.0] * 6,
            [1.0, math.nan, 2.0, 3.0, 4.0, 5.0],
            [1.0, 3.0, 2.0, math.nan, math.inf, -math.inf],
        ],
        dtype=dtype,
    )[:, None]
    scores[1] *= most
    num_nodes, settings = torch.tensor([6, 6, 6, 6, 6, 3]), (1e-4, 2, normalize)
    t, log_r, log_c, order, rank = _lazy("soft_permutation", "forward")(scores, num_nodes, *settings)
    assert torch.equal(order.sort(-1)[0], torch.arange(6).expand(6, 1, 6))
    assert torch.equal(order.gather(-1, rank), torch.arange(6).expand(6, 1, 6))
    whole = torch.tensor([0, 1, 2, 3, 5])
    clean = torch.where(torch.arange(6) < num_nodes[:, None, None], scores, 0)[whole]
    assert torch.equal(order[whole], OPS["soft_permutation"].reference(clean, num_nodes[whole], *settings)[3])
    assert normalize or order[4, 0, 0] == 1
    gradient = _lazy("soft_permutation", "backward")(t, log_r, log_c, scores, order, t, num_nodes, *settings)
    kept = [x[whole] for x in (t, log_r, log_c)]
    entropy = _lazy("permutation_entropy", "forward")(*kept, num_nodes[whole], 1e-4)
    turned = _lazy("permutation_entropy", "backward")(torch.ones((), dtype=dtype), *kept, num_nodes[whole], 1e-4)
    assert all(x.isfinite().all() for x in (*kept, gradient[whole], entropy, *turned))
    assert not t[5, 0, 3:].any() and not gradient[5, 0, 3:].any() and not t[4].isfinite().all()
    ties = torch.tensor([[2, 2, 3, 3, 3, 1]]).double()
    assert_near(log_r[0], -ties.log())
    assert not log_r[1].any() and not turned[0][1].any()  # a hard permutation


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (0, 1, 20)])
def test_soft_permutation_of_nothing(shape, rows_in_memory):
    x, order, num_nodes = torch.randn(shape), torch.zeros(shape, dtype=torch.int64), torch.ones(shape[:1]).long()
    found = _lazy("soft_permutation", "forward")(x, num_nodes, 0.1, 2, True)
    gradient = _lazy("soft_permutation", "backward")(x, None, None, x, order, x, num_nodes, 0.1, 2, True)
    turned = _lazy("permutation_entropy", "backward")(torch.ones(()), x, x, x, num_nodes, 0.1)
    assert all(y.shape == shape for y in (*found, gradient, *turned))
    assert _lazy("permutation_entropy", "forward")(x, x, x, num_nodes, 0.1).isnan()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_bad_planes_reach_no_memory_of_images(fences):
    """Matrices of huge and of no numbers, turns out of range, odd ones of images that are not square."""
    x, weight, tokens = (fences(torch.randn(size)) for size in ((1, 2, 4, 6), (5, 2, 2, 3), (1, 6, 4, 5)))
    frames = torch.tensor([1e30, -1e-30, torch.inf, torch.nan, 1e4, 3e38]).view(1, 6, 1, 1) * torch.tensor(
        [[1, 0.5], [0, 1]]
    )
    turns = fences(torch.tensor([[1, 7, -1, -(2**40), 2**40 + 3, 11]]))
    for replicate in (False, True):
        _lazy("embed_image", "forward")(x, fences(frames), weight, None, replicate)
        _lazy("embed_image", "backward")(tokens, x, fences(frames), weight, replicate, True, True, True, True)
    _lazy("embed_turned", "forward")(x, turns, weight, None)
    _lazy("embed_turned", "backward")(tokens, x, turns, weight, True, True, True)


def test_bad_numbers_reach_no_memory_of_soft_permutation(fences):
    """Counts out of range count as none or as all; an order that is none writes nothing beyond."""
    scores, num_nodes = (fences(x) for x in (torch.randn(3, 1, 6), torch.tensor([2**40, 6, -5])))
    t, log_r, log_c, order, _ = _lazy("soft_permutation", "forward")(scores, num_nodes, 0.1, 2, True)
    soft = [fences(x) for x in (t, log_r, log_c)]
    for given in (order, with_bad_entries(order)):
        _lazy("soft_permutation", "backward")(*soft, scores, fences(given), soft[0], num_nodes, 0.1, 2, True)
    _lazy("permutation_entropy", "forward")(*soft, num_nodes, 0.1)
    _lazy("permutation_entropy", "backward")(torch.ones(()), *soft, num_nodes, 0.1)
    alone = _lazy("soft_permutation", "forward")(scores[:2], None, 0.1, 2, True)
    assert all(torch.equal(x[:2], y) for x, y in zip((t, log_r, log_c, order), alone, strict=False))


ROOM = 4096  # numbers around a tensor
NOWHERE = [-1, -(2**40), 2**40, 10**9]


class Fences:
    """Tensors in the middle of memory that must be left alone: NaN, and numbers that point nowhere."""

    def __init__(self):
        self.kept = []

    def __call__(self, x):
        if not isinstance(x, torch.Tensor) or not x.ndim:
            return x
        memory = torch.full((x.numel() + 2 * ROOM,), garbage(x.dtype), dtype=x.dtype)
        inside = memory[ROOM : ROOM + x.numel()].view(x.shape)
        self.kept.append((memory, x.numel()))
        return inside.copy_(x)

    def stand(self):
        for memory, count in self.kept:
            for side in (memory[:ROOM], memory[ROOM + count :]):
                assert (side.isnan() if side.is_floating_point() else side == garbage(side.dtype)).all()


@pytest.fixture
def fences(monkeypatch):
    """What the launchers allocate stands between fences; in the end all fences stand."""
    fences = Fences()
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, make=make, **kind: fences(make(*size, **kind)))
    yield fences
    fences.stand()


def run_fenced(fences, name, arguments, result):
    """The op and its whole gradient on fenced tensors: every result is finite, and returned."""
    arguments = [fences(x) for x in arguments]
    out = _lazy(name, "forward")(*arguments)
    schema = [x.name for x in OPS[name].kernel._schema.arguments]
    known = dict(zip(schema, arguments, strict=True)) | {f"d_{result}": fences(torch.ones_like(out))}
    takes = [x.name for x in OPS[name].backward._schema.arguments]
    known |= {x: True for x in takes if x.startswith("needs_")}
    found = _lazy(name, "backward")(*(known[x] for x in takes))
    found = [out, *(x for x in found if x is not None)]
    assert all(x.isfinite().all() for x in found)
    return found


def with_bad_columns(items):
    """The items, and behind them columns with a number that is no node, or of two graphs."""
    bad = torch.tensor(NOWHERE)[None].expand(items.shape[0], -1).contiguous()
    half = bad.clone()
    half[0] = items[0, 0]
    across = torch.tensor([[0], [4]]) if items.shape[0] == 2 else bad[:, :1]
    return torch.cat([items, bad, *([half, half.flip(0)] if items.shape[0] == 2 else []), across], 1)


@pytest.mark.parametrize("axes", [1, 2])
def test_bad_items_reach_no_memory(axes, fences):
    """Items that are no nodes count as nothing; offsets and permutations that are none read and write nothing beyond."""
    data, axis = batch([3, 5], 5, C=1, S=2, edges=3), padded_axis(5, 2, "circular", True, torch.device("cpu"))
    items = data.edges if axes == 2 else torch.arange(8)[None]
    bad, good = with_bad_columns(items), items.shape[1]
    ptr, rank, order, *soft = (x.detach() if isinstance(x, torch.Tensor) else x for x in soft_arguments(data))
    weight, values = weights(5, 1, *[3] * axes).float(), torch.randn(bad.shape[1], 1)
    tokens = torch.randn(2, 2, 2**axes, 5)

    def embed(items, ptr, rank):
        rest = ptr, rank, order, *soft, *axis, weight, torch.arange(5.0)
        return run_fenced(fences, "embed", [items, values[: items.shape[1]], *rest], "tokens")

    def readout(items, ptr, rank):
        rest = ptr, rank, order, *soft, *plain, weight, torch.ones(1)
        return run_fenced(fences, "readout", [tokens, items, *rest], "values")

    plain = padded_axis(5, 2, "zeros", False, torch.device("cpu"))
    for x, y in zip(embed(bad, ptr, rank), embed(items, ptr, rank), strict=True):
        if x.shape == values.shape:
            assert (x[good:] == 0).all()
            x = x[:good]
        assert_near(x, y)
    found, expected = readout(bad, ptr, rank), readout(items, ptr, rank)
    assert_near(found[0][:good], expected[0])
    assert torch.equal(found[0][good:], found[0][good : good + 1].expand(len(found[0]) - good, -1))  # the bias
    for x, y in zip(found[1:-1], expected[1:-1], strict=True):
        assert_near(x, y)
    for offsets in ([0, 10**9, 2**40], [-(2**40), 3, 8], [5, 2, 9]):
        embed(bad, torch.tensor(offsets), rank)
        readout(bad, torch.tensor(offsets), rank)
    wrong = rank.clone()
    wrong[:, :, :4] = torch.where(torch.rand(2, 2, 4) < 0.5, torch.tensor(NOWHERE), wrong[:, :, :4])
    embed(bad, ptr, wrong)
    readout(bad, ptr, wrong)


def test_bad_numbers_reach_no_memory_of_aggregate(fences):
    data, own = batch([3, 5], 5), torch.tensor(1.5)
    edges, x = with_bad_columns(data.edges)[:, :-1], torch.randn(10, 3)
    for ptr, rows in ((data.ptr, 10), (None, 8)):
        found = run_fenced(fences, "aggregate", [x[:rows], edges, ptr, own], "sums")
        for y, z in zip(found, run_fenced(fences, "aggregate", [x[:rows], data.edges, ptr, own], "sums"), strict=True):
            assert_near(y, z)
    for offsets in ([0, 10**9, 2**40], [-(2**40), 3, 8], [5, 2, 9], [2**40, -(2**40), 8]):
        run_fenced(fences, "aggregate", [x, edges, torch.tensor(offsets), own], "sums")


def with_bad_entries(x):
    """A copy of x (B, S, N) with numbers of no slot and no node, some in every place but the last."""
    most = x[..., :-1]
    bad = torch.tensor([*NOWHERE, x.shape[-1]])[torch.randint(5, most.shape)]
    return torch.cat([torch.where(torch.rand(most.shape) < 0.5, bad, most), x[..., -1:]], -1)


@pytest.mark.parametrize("C", [1, 3])
def test_bad_numbers_reach_no_memory_of_embed_matrix(C, fences):
    """More valid nodes than slots count as all of them; permutations that are none read and write nothing beyond."""
    data, axis = batch([3, 5], 5, C=C, S=2), padded_axis(5, 2, "circular", True, torch.device("cpu"))
    matrix, weight = data.matrix.float(), weights(20, C, 3, 3).float()
    _, rank, order, *soft = (x.detach() if isinstance(x, torch.Tensor) else x for x in soft_arguments(data))

    def run(counts, rank, order):
        counts = torch.tensor(counts)
        rest = counts, rank, order, *soft, *axis, weight, torch.arange(20.0)
        return run_fenced(fences, "embed_matrix", [matrix, *rest], "tokens")

    expected = run([5, 5], rank, order)
    for counts in ([6, 300], [10**9, 2**40]):
        for x, y in zip(run(counts, rank, order), expected, strict=True):
            assert_near(x, y)
    for counts in ([3, 5], [7, 2**40], [0, -(2**40)]):
        run(counts, with_bad_entries(rank), order)
        run(counts, rank, with_bad_entries(order))


def test_bad_numbers_reach_no_memory_of_node_identifiers(fences):
    data, weight = batch([3, 5], 5, S=2), weights(5, 20).float()
    ptr, rank, order, *soft = (x.detach() if isinstance(x, torch.Tensor) else x for x in soft_arguments(data))

    def run(ptr, rank, order):
        return run_fenced(fences, "node_identifiers", [ptr, rank, order, *soft, weight, 8], "features")

    for offsets in (ptr.tolist(), [0, 10**9, 2**40], [-(2**40), 3, 8], [5, 2, 9], [2**40, -(2**40), 8], [0, 7, 8]):
        offsets = torch.tensor(offsets)
        run(offsets, rank, order)
        run(offsets, with_bad_entries(rank), order)
        run(offsets, rank, with_bad_entries(order))


@pytest.fixture
def in_place_of_cpu_kernels(monkeypatch, request):
    """The launchers registered for CPU tensors as `register` does for CUDA, under the public functions.

    Of the op that the test names, if it does; others keep their kernels, which are faster here.
    """
    library = torch.library.Library("probsym_fast", "IMPL")
    named = request.node.callspec.params.get("name")
    for name, dtypes in KERNELS.items() if named is None else [(named, KERNELS[named])]:
        library.impl(name, _lazy(name, "forward"), "CPU", allow_override=True)
        library.impl(f"{name}_backward", _lazy(name, "backward"), "CPU", allow_override=True)
        monkeypatch.setitem(OPS[name].from_python, "cpu", ("triton", dtypes))
        monkeypatch.setitem(BACKENDS, (name, "cpu"), ("triton", "reference"))
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore::UserWarning")  # the dispatcher tells of the override
@pytest.mark.parametrize("name", CALLS_OF_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_dispatcher(name, dtype, in_place_of_cpu_kernels):
    """Schemas, autograd with results left out, dtypes of the public functions, fake results like the real ones."""
    x = matrices().to(dtype)
    results = []
    for backend, leaf in (("triton", x), ("reference", x.double())):
        leaf = leaf.detach().requires_grad_()
        with Calls() as record:
            out = CALLS[name](leaf, backend)
            combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype).to(out)
            results.append((out, *torch.autograd.grad(out, leaf, combination)))
        if backend == "triton":
            calls = [(f, a) for f, a in record.calls if f.name().split("::")[1].removesuffix("_backward") == name]
            assert len(calls) == 2
    for y, z in zip(*results, strict=True):
        bound = 5e-2 if dtype == torch.bfloat16 else 5e-5  # of some roundings to bfloat16 on the way
        assert (y.double() - z).abs().max() <= bound * z.abs().max().clamp(min=1)
    for function, arguments in calls:
        real = function(*arguments)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for a, b in zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]:
            assert (a is None) == (b is None)
            assert a is None or (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def strided(x):
    """x among other numbers: no two of its own are neighbours."""
    if not isinstance(x, torch.Tensor) or not x.ndim:
        return x
    return torch.stack([x, torch.full_like(x, garbage(x.dtype))], -1)[..., 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS_OF_TRITON)
def test_any_strides(name, in_place_of_cpu_kernels):
    """Forward and backward as the op itself calls them, once more with every tensor strided."""
    leaf = matrices().requires_grad_()
    with Calls() as record:
        CALLS[name](leaf, "triton").sum().backward()
    calls = [(f, a) for f, a in record.calls if f.name().split("::")[1].removesuffix("_backward") == name]
    assert len(calls) == 2
    for function, arguments in calls:
        pair = [function(*some) for some in (arguments, [strided(x) for x in arguments])]
        for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in pair), strict=True):
            assert (x is None) == (y is None)
            if x is not None:  # NaN where nothing is kept
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS_OF_TRITON)
def test_the_order_of_programs_changes_no_bit(name, programs, in_place_of_cpu_kernels):
    """In deterministic mode: no program reads or adds to what another of its launch writes."""
    torch.use_deterministic_algorithms(True)
    x, results = matrices(), []
    for programs.seed in (None, 2):
        leaf = x.clone().requires_grad_()
        out = CALLS[name](leaf, "triton")
        combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append((out, *torch.autograd.grad(out, leaf, combination)))
    for y, z in zip(*results, strict=True):
        assert torch.equal(y, z)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS_OF_TRITON)
def test_kernels_compute_in_their_dtype_under_autocast(name, in_place_of_cpu_kernels):
    """Forward and backward, bit for bit, as the kernels of the CPU do."""
    x, results = matrices(), []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = CALLS[name](leaf, "triton")
            assert out.dtype == torch.float32
            results.append((out, *torch.autograd.grad(out, leaf, torch.ones_like(out))))
    for y, z in zip(*results, strict=True):
        assert torch.equal(y, z)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_debug_mode_checks_what_the_kernels_do_not(in_place_of_cpu_kernels):
    """With the messages of the reference; without it bad numbers pass."""
    p, ptr = Permutation(torch.arange(4).expand(1, 2, 4)), torch.tensor([0, 4])
    edges, x, nan = torch.tensor([[0, 7], [1, 2]]), torch.randn(4, 3), torch.full((2, 3, 3), torch.nan)
    tokens, weight = torch.randn(1, 2, 4, 5), torch.randn(5, 3, 2, 2)
    calls = {
        "embed_edges: edge_index must hold node numbers 0 to 3, got 7 in column 1": lambda b: embed_edges(
            edges, torch.randn(2, 3), ptr, p, weight, grid=2, backend=b
        ),
        "readout: at must hold node numbers 0 to 3, got 7 in column 1": lambda b: readout(
            tokens, ptr, p, weight, at=edges, backend=b
        ),
        "aggregate: edge_index must hold node numbers 0 to 3, got 7 and 2 in column 1": lambda b: aggregate(
            x, edges, backend=b
        ),
        "orthogonal_frame: matrices must be finite, got NaN or infinity": lambda b: orthogonal_frame(nan, backend=b),
    }
    for message, call in calls.items():
        call("triton")
        with debug():
            for backend in ("triton", "auto", "reference"):
                with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                    call(backend)
            with debug(False):
                call("auto")
        with Calls() as record:
            call("triton")
        assert record.calls  # the kernel itself again


NETWORK = {"in_features": 3, "width": 6, "layers": 2, "heads": 2, "feedforward": 5, "out_features": 2}


def sequences(M, L, **settings):
    """Tensors and sizes as in the schema of transformer."""
    settings = NETWORK | settings
    weights_of_all = transformer_weights(settings, L).float()
    return torch.randn(M, L, settings["in_features"] or settings["width"]), weights_of_all, list(settings.values())


@pytest.mark.parametrize(
    ("M", "L", "more", "read", "gelu", "keep"),
    [
        (3, 4, {}, [], True, True),
        (2, 17, {"in_features": 0, "width": 20, "feedforward": 70, "out_features": 0, "layers": 1}, [], False, False),
        (1, 33, {"heads": 1, "width": 20, "layers": 1}, [32, 0, 32], True, True),
        (2, 1, {"out_features": 0, "width": 9, "heads": 3}, [0], True, False),
        (0, 3, {}, [], True, True),
    ],
)
def test_transformer(M, L, more, read, gelu, keep):
    """Several blocks of rows, of features and of hidden features; with and without embedding and head; no sequences."""
    x, row, sizes = sequences(M, L, **more)
    check("transformer", [x, row, None, sizes, read, gelu, 1e-5, keep, False], [0, 1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy
def test_transformer_of_some_sequences_at_a_time(monkeypatch):
    """What is computed again is the same to the bit, and in any parts nearly; NaN in one sequence reaches no other."""
    x, row, sizes = sequences(3, 4, layers=1, heads=1)
    x[1, 2] = torch.nan
    run, turn = _lazy("transformer", "forward"), _lazy("transformer", "backward")
    found = []
    for bytes_, keep in ((2**26, True), (2**26, False), (1, True)):
        monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.transformer"), "BYTES", bytes_)
        y, kept = run(x, row, None, sizes, [], True, 1e-5, keep)
        d_x, _ = turn(torch.ones_like(y), x, row, kept, None, sizes, [], True, 1e-5, True, False)
        found.append((y, d_x))
    for whole, again, parts in zip(*found, strict=True):
        assert whole.flatten(1).isnan().any(1).tolist() == [False, True, False]
        torch.testing.assert_close(again, whole, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(parts, whole, equal_nan=True)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of numpy, where the kernel takes another value
@pytest.mark.parametrize("more", [{}, {"in_features": 0, "out_features": 0}])
def test_transformer_of_lengths(more, monkeypatch):
    """What follows the end of a sequence is neither read nor counted, and its norm does not divide by zero; in parts too."""
    monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.transformer"), "BYTES", 1)
    x, row, sizes = sequences(2, 3, layers=1, **more)
    lengths, eps, keep = torch.tensor([1, 3]), 1e-5 if sizes[0] else 0.0, bool(sizes[0])
    check("transformer", [x, row, lengths, sizes, [], True, eps, keep, False], [0, 1])
    x[torch.arange(3) >= lengths[:, None]] = torch.nan
    y, kept = _lazy("transformer", "forward")(x, row, lengths, sizes, [], True, eps, False)
    gradients = _lazy("transformer", "backward")(y, x, row, kept, lengths, sizes, [], True, eps, True, True)
    assert all(t.isfinite().all() for t in (y, *gradients))
    assert not y[0, 1:].any() and not gradients[0][0, 1:].any()


def test_arguments_that_do_not_fit_a_transformer():
    x, row, sizes = sequences(3, 4)
    run, lengths = _lazy("transformer", "forward"), torch.ones(3, dtype=torch.int64)
    for arguments, message in (
        ((x, row[1:], None, sizes, []), f"weights must be ({len(row)},), got ({len(row) - 1},)"),
        ((x[0], row, None, sizes, []), "x must have 3 axes, got (4, 3)"),
        ((x, row, None, [4, *sizes[1:]], []), f"sizes must fit x (3, 4, 3), got {[4, *sizes[1:]]}"),
        ((x, row, None, sizes[1:], []), f"sizes must fit x (3, 4, 3), got {sizes[1:]}"),
        ((x, row, None, [3, 6, 2, 0, 5, 2], []), "sizes must fit x (3, 4, 3), got [3, 6, 2, 0, 5, 2]"),
        ((x, row, None, [*sizes[:3], 4, 5, 2], []), "sizes must fit x (3, 4, 3), got [3, 6, 2, 4, 5, 2]"),
        ((x, row, None, sizes, [4]), "each of read must be in 0..3, got [4]"),
        ((x, row, lengths[1:], sizes, []), "lengths must be (3,), got (2,)"),
        ((x, row, lengths, sizes, [0]), "read must be empty where lengths are given, got 1 tokens"),
        ((x, row, None, [3, 260, 1, 2, 5, 2], []), "its kernels take at most 256 features of the width, got 260"),
        ((x, row, None, [3, 130, 1, 2, 5, 2], []), "its kernels take at most 64 features of a head, got 65"),
        ((x[:, :1].expand(3, 65, 3), row, None, sizes, []), "its kernels take at most 64 tokens, got 65"),
    ):
        with pytest.raises(ValueError, match=f"^transformer: {re.escape(message)}$"):
            run(*arguments, True, 1e-5, False)
    y, other = torch.zeros(3, 4, 2), torch.zeros(2, (2 * 4 + 4) * 6)
    with pytest.raises(ValueError, match=r"^transformer: kept must be \(17, 72\), got \(2, 72\)$"):
        _lazy("transformer", "backward")(y, x, row, other, None, sizes, [], True, 1e-5, True, True)


@pytest.mark.parametrize(
    ("B", "S", "n", "features", "C", "width", "layers", "out", "keep"),
    [
        (2, 2, 4, 3, 2, 5, 2, 2, True),
        (1, 2, 3, 6, 0, 70, 1, 3, False),
        (2, 1, 1, 5, 3, 9, 1, 33, True),
        (0, 1, 3, 2, 1, 4, 1, 2, False),
    ],
)
def test_message_passing(B, S, n, features, C, width, layers, out, keep):
    """Several blocks of features; no edge features, one node, no graphs. Loops are not read, nor counted."""
    row = message_weights(features, C, width, layers, out).float()
    x, edges = torch.randn(B * S, n, features), torch.randn(B, n, n, C)
    edges.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    check("message_passing", [x, edges, row, width, layers, out, keep, False], [0, 1, 2])


def test_message_passing_of_some_graphs_at_a_time(monkeypatch):
    """Some samples of a graph, and several graphs; what is computed again is the same to the bit; NaN stays in its graph."""
    row = message_weights(3, 2, 6, 1, 2).float()
    x, edges = torch.randn(6, 3, 3), torch.randn(2, 3, 3, 2)
    module = importlib.import_module("probsym_fast.ops.triton.message_passing")
    for bytes_ in (4 * 5 * 470, 2 * 4 * 470):  # of 3 samples and more, of 2
        monkeypatch.setattr(module, "BYTES", bytes_)
        check("message_passing", [x, edges, row, 6, 1, 2, True, False], [0, 1, 2])
    monkeypatch.setattr(module, "BYTES", 2**26)
    x[4, 1] = torch.nan
    found = []
    for keep in (True, False):
        y, kept = _lazy("message_passing", "forward")(x, edges, row, 6, 1, 2, keep)
        settings = 6, 1, 2, True, False, False
        found.append((y, _lazy("message_passing", "backward")(torch.ones_like(y), x, edges, row, kept, *settings)[0]))
    for kept, again in zip(*found, strict=True):
        assert kept.flatten(1).isnan().any(1).tolist() == [m == 4 for m in range(6)]
        torch.testing.assert_close(again, kept, rtol=0, atol=0, equal_nan=True)


def test_arguments_that_do_not_fit_message_passing():
    x, edges, row = torch.randn(4, 5, 3), torch.randn(2, 5, 5, 2), message_weights(3, 2, 6, 2, 2).float()
    for arguments, message in (
        ((x[0], edges, row, 6), "x must have 3 axes, got (5, 3)"),
        ((x, edges[:, 1:], row, 6), "edges must be (2, 5, 5, 2), got (2, 4, 5, 2)"),
        ((x[1:], edges, row, 6), "M must be a multiple of edges' B = 2, got 3"),
        (
            (x, edges, row, 0),
            "sizes must be at least 1, got n, features, width, layers and out_features = (5, 3, 0, 2, 2)",
        ),
        ((x, edges, row[1:], 6), f"weights must be ({len(row)},), got ({len(row) - 1},)"),
        ((x, edges, row, 257), "its kernels take at most 256 features of the width or output, got 257"),
    ):
        with pytest.raises(ValueError, match=f"^message_passing: {re.escape(message)}$"):
            _lazy("message_passing", "forward")(*arguments, 2, 2, False)
    y, other = torch.zeros(4, 5, 2), torch.zeros(16, 90)
    with pytest.raises(ValueError, match=r"^message_passing: kept must be \(17, 90\), got \(16, 90\)$"):
        _lazy("message_passing", "backward")(y, x, edges, row, other, 6, 2, 2, True, True, True)


ACTIVATIONS = list(FUNCTIONS)


@pytest.mark.parametrize(
    ("M", "widths", "act", "first", "last", "keep", "most"),
    [
        (7, [3, 6, 2], "gelu", True, False, True, 600),
        (33, [20, 9, 70, 5], "tanh", False, True, False, 2**26),
        (5, [4, 8, 12, 4, 8], "silu", True, True, True, 2**26),
        (0, [5, 3], "relu", False, False, True, 2**26),
    ],
)
def test_mlp(M, widths, act, first, last, keep, most, monkeypatch):
    """Some rows at a time; several blocks of rows and of hidden features; layers alone behind a wide one; no rows."""
    module = importlib.import_module("probsym_fast.ops.triton.mlp")
    monkeypatch.setattr(module, "BYTES", most)
    monkeypatch.setattr(module, "WIDEST", 8)
    x, row = torch.randn(M, widths[0]), mlp_weights(widths).float()
    check("mlp", [x, row, widths, ACTIVATIONS.index(act), first, last, keep, False], [0, 1])


@pytest.mark.parametrize("scale", [1e-4, 0.3, 3.0, 30.0])
def test_tanh_has_all_digits(scale):
    """Value and slope, near 0 and far from it."""
    rows = importlib.import_module("probsym_fast.ops.triton.rows")
    x = torch.tensor([-1.1, -0.8, 0.0, 0.7, 1.0, torch.inf, torch.nan]) * scale
    value, slope = rows.activate(x, "tanh"), rows.activate(x, "tanh", torch.ones_like(x))
    exact = x.double()
    torch.testing.assert_close(value.double(), exact.tanh(), rtol=5e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(slope.double(), exact.cosh() ** -2, rtol=5e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("sizes", "S", "W", "layers", "out", "act", "final", "keep", "most"),
    [
        ([2, 3, 1, 0], 3, 5, 3, 2, "gelu", True, True, 2**26),
        ([3, 1], 3, 8, 2, 3, "tanh", False, False, 1),
        ([3], 2, 8, 2, 3, "silu", True, True, 1),
        ([2, 1], 1, 70, 1, 3, "relu", False, True, 2**26),
        ([0, 0], 2, 3, 2, 2, "relu", True, True, 2**26),
        ([], 2, 3, 1, 2, "tanh", False, False, 2**26),
        ([2], 0, 3, 2, 2, "tanh", False, True, 2**26),
    ],
)
def test_gin(sizes, S, W, layers, out, act, final, keep, most, monkeypatch):
    """All samples, and one at a time; several blocks of features; graphs without nodes, no graphs, no samples."""
    monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.gin"), "BYTES", most)
    nodes, ptr = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    edges = batch(sizes, max(sizes), edges=12).edges if nodes else torch.zeros(2, 0, dtype=torch.int64)
    x, row = torch.randn(nodes, S, W), gin_weights(W, layers, out).float()
    check("gin", [x, edges, ptr, row, layers, out, ACTIVATIONS.index(act), final, keep], [0, 3])


def test_bad_numbers_reach_no_memory_of_gin(fences):
    data, row, sizes = batch([3, 5], 5), gin_weights(4, 2, 3).float(), (2, 3, 0, False)
    x, edges = torch.randn(8, 2, 4), with_bad_columns(data.edges)
    for ptr in ([0, 10**9, 2**40], [-(2**40), 3, 8], [5, 2, 9]):
        arguments = [fences(t) for t in (x, edges, torch.tensor(ptr), row)]
        y, kept = _lazy("gin", "forward")(*arguments, *sizes, True)
        gradients = _lazy("gin", "backward")(fences(torch.ones_like(y)), *arguments, kept, *sizes, True, True)
        assert all(t.isfinite().all() for t in (y, *gradients))


def edge_arguments(C, d, n, M, w, neighbors, running=False):
    leaves = [torch.randn(shape) for shape in ((C, d, n, M), (w, 2 * C), (w, 2 * C), (w, w), (w,), (w,))]
    leaves[4] = leaves[4].abs() + 0.5
    return [*leaves, *((torch.rand(w) + 0.5 for _ in range(2)) if running else (None, None)), None, neighbors]


@pytest.mark.parametrize(
    ("sizes", "running", "most", "ragged"),
    [
        ((2, 3, 3, 17, 5, 2), False, 2**26, False),
        ((2, 3, 3, 17, 5, 2), False, 2**26, True),
        ((3, 2, 2, 1, 34, 1), True, 2**26, False),
        ((1, 5, 2, 7, 2, 2), False, 1, True),
        ((2, 3, 3, 0, 3, 2), True, 2**26, False),
    ],
)
def test_vector_edge_convolution(sizes, running, most, ragged, monkeypatch):
    """Several blocks of clouds and of channels; all near, one cloud at a time; two components, five; no clouds; padding."""
    monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.vector_edge_convolution"), "BYTES", most)
    arguments = edge_arguments(*sizes, running)
    if ragged:
        arguments[-2] = torch.arange(sizes[3]) % (sizes[2] + 1)
    check("vector_edge_convolution", arguments, [0, 1, 2, 4, 5])
    exact = OPS["vector_edge_convolution"].reference(*(t.double() if torch.is_tensor(t) else t for t in arguments))
    for found, expected in zip(_lazy("vector_edge_convolution", "forward")(*arguments)[1:], exact[1:], strict=True):
        assert found.dtype in (expected.dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy
def test_clouds_of_ties_and_of_nan(fences):
    """A square, where two corners are as near; NaN stays in its cloud; numbers of no neighbour reach no memory."""
    square = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).t()[None, ..., None].contiguous()
    nearest = importlib.import_module("probsym_fast.ops.triton.vector_pairs").nearest
    assert [int(nearest(square, k).sum()) for k in (1, 2, 3)] == [4, 12, 12] and nearest(square, 4) is None
    run, turn = _lazy("vector_edge_convolution", "forward"), _lazy("vector_edge_convolution", "backward")
    x, *rest = edge_arguments(2, 3, 2, 5, 3, 1, running=True)
    x[:, :, 1, 2] = torch.nan
    y, taken, *known = run(x, *rest)
    whole = run(x[..., 3:], *rest)[0]
    assert torch.equal(y[..., 3:], whole) and y.isnan().any(-2).any(-2).any(0).tolist() == [m == 2 for m in range(5)]
    x, rest = fences(x.nan_to_num()), [fences(t) for t in rest]
    wrong = fences(torch.full_like(taken, 255))
    gradients = turn(fences(torch.ones_like(y)), x, *rest[:-1], wrong, *known, rest[-1], True)
    assert all(t.isfinite().all() for t in gradients)


def test_arguments_that_do_not_fit_the_other_networks():
    rows, row, numbers = torch.randn(4, 3), mlp_weights([3, 5, 2]).float(), torch.zeros(2, 3, dtype=torch.int64)
    nodes, ptr, of_graphs = torch.randn(4, 2, 3), torch.tensor([0, 4]), gin_weights(3, 2, 2).float()
    clouds = edge_arguments(2, 3, 4, 5, 3, 2)
    few = [*clouds[:1], *(clouds[k] for k in (2, 1)), *clouds[3:]]
    few[4] = few[4][:2]
    for name, arguments, message in (
        ("mlp", (rows[0], row, [3, 5, 2], 0), "x must have 2 axes, got (3,)"),
        ("mlp", (rows, row, [4, 5, 2], 0), "widths must fit x (4, 3), got [4, 5, 2]"),
        ("mlp", (rows, row, [3, 5, 2], 4), "activation must be in 0..3, got 4"),
        ("mlp", (rows, row[1:], [3, 5, 2], 0), f"weights must be ({len(row)},), got ({len(row) - 1},)"),
        ("mlp", (rows, row, [3, 4097], 0), "its kernels take at most 4096 features, got 4097"),
        ("gin", (nodes[0], numbers, ptr, of_graphs, 2, 2, 0), "x must have 3 axes, got (2, 3)"),
        ("gin", (nodes, numbers, ptr[:1], of_graphs, 2, 2, 0), "ptr must rise from 0 to the 4 nodes, got one number"),
        (
            "gin",
            (nodes, numbers, ptr, of_graphs, 0, 2, 0),
            "sizes must be at least 1, got width, layers, out_features and B + 1 = (3, 0, 2, 2)",
        ),
        ("gin", (nodes, numbers, ptr, of_graphs, 2, 2, -1), "activation must be in 0..3, got -1"),
        ("gin", (nodes, numbers[:1], ptr, of_graphs, 2, 2, 0), "edge_index must be (2, 3), got (1, 3)"),
        ("gin", (nodes, numbers, ptr, of_graphs, 2, 4097, 0), "its kernels take at most 4096 features, got 4097"),
        ("vector_edge_convolution", few, "feature must be (2, 4), got (3, 4)"),
        ("vector_edge_convolution", [*clouds[:-1], 0], "neighbors must be at least 1, got 0"),
        (
            "vector_edge_convolution",
            [clouds[0][..., :0], *clouds[1:]],
            "x must be of at least one cloud without running statistics, got M = 0",
        ),
        (
            "vector_edge_convolution",
            [*clouds[:6], clouds[5], None, None, 2],
            "running_mean must be given with running_var, got one of them",
        ),
    ):
        more = {"mlp": (True, True, False), "gin": (True, False)}.get(name, ())
        with pytest.raises(ValueError, match=f"^{name}: {re.escape(message)}$"):
            _lazy(name, "forward")(*arguments, *more)


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_products_in_tf32(tf32):
    """Where torch allows them in float32, and there only: they do not keep its bound."""
    data, axis = batch([3, 4], 4, C=3, S=2), padded_axis(4, 2, "zeros", False, torch.device("cpu"))
    p = soft_arguments(data)
    arguments = [data.matrix.float(), data.ptr.diff(), *p[1:], *axis, weights(5, 3, 2, 2).float(), None]
    x, edges, row = torch.randn(4, 3, 3), torch.randn(2, 3, 3, 2), message_weights(3, 2, 6, 1, 2).float()
    calls = {
        "embed_matrix": (arguments, [0, 4, 5, 6, 11]),
        "node_identifiers": ([*p, weights(4, 5).float(), 7], [3, 4, 5, 7]),
        "message_passing": ([x, edges, row, 6, 1, 2, True, False], [0, 1, 2]),
    }
    for name, call in calls.items():
        check(name, *call, 10 * TF32)
        with pytest.raises(AssertionError):
            check(name, *call)
