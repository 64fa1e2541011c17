"""Calls with the shapes of the benchmarks and the experiments, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes, test_passes
from benchmarks.inputs import messages_like, pattern_like, peptides_like, read_like
from benchmarks.shapes import GRID, ITERATIONS, SOFT, TAU, WIDTH, Needs
from probsym_fast import ops
from probsym_fast.ops.triton import KERNELS

PASSES = {
    "n-body Transformer": "transformer",
    "n-body GNN": "message_passing",
    "EXP-classify GIN": "gin",
    "MLP of width 64": "mlp",
}


@dataclass
class Case:
    """op: whose launches count, and those of `also`. run: calls it. facts: what the data would say, for `source.HINTS`."""

    op: str
    needs: Needs
    run: Callable[[], object]
    kind: str = "float32"  # of its products, as `Device.rate` names it; "tf32" lets those of float32 be in tf32
    facts: dict[str, Any] = field(default_factory=dict)
    also: str = ""


def kind_of(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def zeros(*shape: int, dtype: torch.dtype = torch.float32, leaf: bool = True) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=leaf and dtype.is_floating_point)


def whole(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def permutation(B: int, S: int, N: int) -> ops.permutation.SoftPermutation:
    return ops.soft_permutation(zeros(B, S, N), whole(B))


def soft_permutations() -> Iterator[Case]:
    def run(shape):
        ops.permutation_entropy(ops.soft_permutation(zeros(*shape), tau=TAU, iterations=ITERATIONS))

    for shape in SOFT["cuda"]:
        yield Case("soft_permutation", shapes.soft_permutation(shape), partial(run, shape), also="permutation_entropy")


def patches(N: int, channels: int, axes: int, dtype: torch.dtype) -> Tensor:
    """A weight (WIDTH, channels, patch[, patch]) as `PatchWeight` stores it, the width innermost."""
    patch = -(-N // GRID)
    inner = zeros(*[patch] * axes, channels, WIDTH, dtype=dtype, leaf=False)
    return inner.movedim((-1, -2), (0, 1)).requires_grad_()


def used_share(N: int, sizes: list[int], axes: int) -> float:
    """The share of tokens that hold a place of a node."""
    patch = -(-N // GRID)
    return sum((min(GRID, -(-n // patch)) / GRID) ** axes for n in sizes) / len(sizes)


def embeddings(dtype: torch.dtype) -> Iterator[Case]:
    def sparse(B, S, M):
        given = whole(2, M), zeros(M, 8, dtype=dtype, leaf=False), whole(B + 1), permutation(B, S, 444)
        ops.embed_edges(*given, patches(444, 8, 2, dtype), zeros(WIDTH, dtype=dtype), grid=GRID)

    def dense(B, S):
        matrix = zeros(B, 188, 188, 4, dtype=dtype, leaf=False)
        weight, bias = patches(188, 4, 2, dtype), zeros(WIDTH, dtype=dtype)
        ops.embed_matrix(matrix, permutation(B, S, 188), weight, bias, grid=GRID)

    sizes, S, edges, _ = peptides_like("cuda")
    B, M = len(sizes), edges.shape[1]
    yield Case(
        "embed",
        shapes.embed(444, B, M, S, dtype),
        partial(sparse, B, S, M),
        kind_of(dtype),
        {"mean_nodes": sum(sizes) / B, "channels": 8, "used": used_share(444, sizes, 2)},
    )
    sizes, S = pattern_like("cuda")
    B = len(sizes)
    facts = {"used": used_share(188, sizes, 2), "filled": sum(sizes) / B / 188}
    run = partial(dense, B, S)
    yield Case("embed_matrix", shapes.embed_matrix(188, sizes, S, 4, dtype), run, kind_of(dtype), facts)


def images(dtype: torch.dtype) -> Iterator[Case]:
    """Rotated images, forward and in training with the angles learned; every element of D4; gradients to pixels."""
    sizes = 16, 8, 3, 224, 16, 384

    def run(op, training, to_pixels):
        B, S, C, H, P, D = sizes
        plane = whole(B, S) if op == "embed_turned" else zeros(B, S, 2, 2, leaf=training)
        weight, bias = zeros(D, C, P, P, dtype=dtype, leaf=training), zeros(D, dtype=dtype, leaf=training)
        ops.embed_image(zeros(B, C, H, H, dtype=dtype, leaf=to_pixels), plane, weight, bias)

    for op in ("embed_image", "embed_turned"):
        for training, to_pixels in ((False, False), (True, False), (True, True)):
            needs = shapes.embed_image(op, *sizes, dtype, "pixels" if to_pixels else "weight" * training)
            yield Case(op, needs, partial(run, op, training, to_pixels), kind_of(dtype))


def readouts(dtype: torch.dtype) -> Iterator[Case]:
    def run(axes, B, S, N, items):
        tokens = zeros(B, S, GRID**axes, WIDTH, dtype=dtype)
        given = whole(B + 1), permutation(B, S, N), patches(N, 1, axes, dtype)
        ops.readout(tokens, *given, at=whole(axes, items), nodes=items)

    for where, axes in (("nodes", 1), ("pairs", 2)):
        sizes, S, N = read_like(where, "cuda")
        B, items = len(sizes), sum(sizes)
        needs, call = shapes.readout(where, N, B, items, S, dtype), partial(run, axes, B, S, N, items)
        facts = {"mean_nodes": sum(sizes) / B, "channels": 1, "used": used_share(N, sizes, axes)}
        yield Case("readout", needs, call, kind_of(dtype), facts)


def messages(dtype: torch.dtype) -> Iterator[Case]:
    def run():
        ops.aggregate(zeros(*shape, dtype=dtype), whole(2, M), own=zeros(), ptr=whole(B + 1))

    sizes, edges, _ = messages_like("cuda")
    B, M = len(sizes), edges.shape[1]
    shape = sum(sizes) + B, 10, 64
    yield Case("aggregate", shapes.aggregate(M, shape, dtype), run, kind_of(dtype))


def nodes() -> Iterator[Case]:
    """Identifiers and the GIN's layers with the sizes of EXP: 100 graphs of 45 nodes, 10 samples."""
    B, S, N, D, n, M = 100, 10, 64, 64, 45, 45_500

    def identifiers():
        ops.node_identifiers(whole(B + 1), permutation(B, S, N), zeros(N, D), nodes=B * n)

    def layer():
        ops.linear_batch_norm_relu(zeros(M, D), zeros(D, D), zeros(D), zeros(D))

    def sort():
        ops.permute(permutation(64, 1, 1000), zeros(64, 1, 1000), inverse=True)

    yield Case("permute", shapes.permute(64, 1000), sort)
    yield Case("node_identifiers", shapes.node_identifiers(B, S, n, D), identifiers, facts={"filled": n / N})
    yield Case("linear_batch_norm_relu", shapes.linear_batch_norm_relu(M, D), layer)


def rotations() -> Iterator[Case]:
    B, S, n, d, C = 100, 20, 5, 3, 2

    def frames(special):
        ops.orthogonal_frame(zeros(2000, 3, 3), special=special)

    def act(mean):
        ops.act_orthogonal(zeros(B, n, d, C), zeros(B, S, d, d), mean=mean)

    for flag in (False, True):
        yield Case("orthogonal_frame", shapes.orthogonal_frame(2000, flag), partial(frames, flag))
        yield Case("act_orthogonal", shapes.act_orthogonal(B, S, n, d, C, flag), partial(act, flag))


def draws() -> Iterator[Case]:
    shape = 128, 10, 188

    def run(normal):
        ops.noise(whole(), shape, "model", normal=normal)

    for normal in (False, True):
        yield Case("noise", shapes.noise(shape, normal), partial(run, normal))


def edge_convolutions() -> Iterator[Case]:
    n, d, M, w = 5, 3, 2000, 21

    def run(C):
        maps = zeros(w, 2 * C), zeros(w, 2 * C), zeros(w, w, leaf=False)
        ops.vector_edge_convolution(zeros(C, d, n, M, leaf=C > 2), *maps, zeros(w), zeros(w), neighbors=4)

    for C in (2, 21):
        yield Case("vector_edge_convolution", shapes.vector_edge_convolution(C, d, n, M, w), partial(run, C))


def passes() -> Iterator[Case]:
    """The backbones in one pass: products in float32, and in tf32 where torch lets its own be."""

    def run(make, inputs):
        backbone = make()
        backbone.one_pass = True
        backbone(*inputs(M))

    M, count = test_passes.SIZES[0], test_passes.operations
    for name, (make, inputs) in test_passes.CASES.items():
        for kind, more in (("float32", ""), ("tf32", ", tf32")):
            needs = Needs(f"{name}, {M} at once, forward and backward{more}", 0, count(name, M))
            yield Case(PASSES[name], needs, partial(run, make, inputs), kind)


def all_cases() -> Iterator[Case]:
    """Those of ops that have Triton kernels."""
    found = [soft_permutations(), nodes(), rotations(), draws(), edge_convolutions(), passes()]
    for dtype in (torch.float32, torch.bfloat16):
        found += [embeddings(dtype), images(dtype), readouts(dtype), messages(dtype)]
    yield from (case for some in found for case in some if case.op in KERNELS)
