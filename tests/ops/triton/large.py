"""Calls with more than 2^31 numbers in a tensor, which fit on a GPU of 80 GB; on tensors without data."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_model.cases import patches, permutation, whole, zeros
from benchmarks.shapes import GRID, WIDTH
from probsym_fast import ops
from probsym_fast.groups import Graphs
from probsym_fast.models import MLP, GINBackbone, MessagePassing, Transformer
from probsym_fast.ops.triton._launch import MOST

HALF = torch.bfloat16


def embed():
    """Tokens of 512 graphs, 30 samples: 2.3e9 numbers."""
    B, S, M = 512, 30, 200_000
    given = whole(2, M), zeros(M, 8, dtype=HALF, leaf=False), whole(B + 1), permutation(B, S, 444)
    ops.embed_edges(*given, patches(444, 8, 2, HALF), zeros(WIDTH, dtype=HALF), grid=GRID)


def embed_matrix():
    """Tokens as in `embed`; then a matrix of 4.2e9 numbers."""
    for B, S, N, C in ((512, 30, 188, 4), (2000, 1, 512, 8)):
        matrix = zeros(B, N, N, C, dtype=HALF, leaf=C < 8)
        ops.embed_matrix(matrix, permutation(B, S, N), patches(N, C, 2, HALF), zeros(WIDTH, dtype=HALF), grid=GRID)


def embed_image(turned: bool = False):
    """Images of 4.4e9 numbers, and tokens of 2.2e9."""
    B, S, H = 1400, 1, 1024
    plane = whole(B, S) if turned else zeros(B, S, 2, 2)
    weight, bias = zeros(384, 3, 16, 16, dtype=HALF), zeros(384, dtype=HALF)
    ops.embed_image(zeros(B, 3, H, H, dtype=HALF), plane, weight, bias)


def readout():
    """Tokens of nodes and of pairs."""
    for axes, B, S, N, items in ((1, 6000, 40, 188, 700_000), (2, 512, 30, 53, 60_000)):
        tokens = zeros(B, S, GRID**axes, WIDTH, dtype=HALF)
        ops.readout(
            tokens, whole(B + 1), permutation(B, S, N), patches(N, 1, axes, HALF), at=whole(axes, items), nodes=B * N
        )


def aggregate():
    """Rows of a million nodes, 40 samples."""
    x = zeros(1_001_000, 40, 64, dtype=HALF)
    ops.aggregate(x, whole(2, 3_000_000), own=zeros(), ptr=whole(1001))


def node_identifiers():
    ops.node_identifiers(whole(10_001), permutation(10_000, 40, 100), zeros(100, 64), nodes=1_000_000)


def linear_batch_norm_relu():
    ops.linear_batch_norm_relu(zeros(40_000_000, 64, dtype=HALF), zeros(64, 64, dtype=HALF), zeros(64), zeros(64))


def soft_permutation():
    ops.permutation_entropy(ops.soft_permutation(zeros(40_000, 120, 500), tau=0.1, iterations=2))


def noise():
    for normal in (False, True):
        ops.noise(whole(), (30_000, 100, 1000), "model", normal=normal)


def orthogonal_frame():
    ops.orthogonal_frame(zeros(300_000_000, 3, 3))


def act_orthogonal():
    for mean in (False, True):
        ops.act_orthogonal(zeros(1_000_000, 5, 3, 2), zeros(1_000_000, 100, 3, 3), mean=mean)


def vector_edge_convolution():
    maps = zeros(21, 42), zeros(21, 42), zeros(21, 21, leaf=False)
    ops.vector_edge_convolution(zeros(21, 3, 5, 8_000_000), *maps, zeros(21), zeros(21), neighbors=4)


def transformer():
    _run(Transformer(read=range(0, 25, 6)), torch.zeros(40_000, 25, 8))


def message_passing():
    _run(MessagePassing(), torch.zeros(2000, 20, 5, 6), torch.zeros(2000, 1, 5, 5, 2))


def gin():
    graphs = Graphs(torch.zeros(4_500_000, 1), whole(2, 9_000_000), whole(100_001))
    _run(GINBackbone(64, 3, 10, "relu"), torch.zeros(4_500_000, 10, 64), graphs)


def mlp():
    _run(MLP([64, 64, 64, 64]), torch.zeros(2_000_000, 20, 64))


def _run(backbone, *given):
    backbone.one_pass = True
    backbone(*given)


CALLS: dict[str, Callable[[], object]] = {
    x.__name__: x
    for x in (
        embed, embed_matrix, embed_image, readout, aggregate, node_identifiers, linear_batch_norm_relu, soft_permutation,
        noise, orthogonal_frame, act_orthogonal, vector_edge_convolution, transformer, message_passing, gin, mlp,
    )
}  # fmt: skip
CALLS["embed_turned"] = lambda: embed_image(turned=True)


def _used(x: dict[str, Any]) -> int:
    """Used tokens of one sample of every graph, at most."""
    return x["graphs"] * x["grid"] ** x.get("AXES", 2) if "grid" in x else x["p_rows"].numel() // x["S"]


# Lists by the name of their parameter, or of the kernel and it -> the largest number that they hold, from the launch's
# arguments. Of lists of pairs: tokens and weight rows together, and pairs of all lists, are at most MOST, else refused.
SMALL: dict[str, Callable[[dict[str, Any]], int]] = {
    "p_cells": lambda x: x["grid"],
    "p_before": _used,
    "p_columns": lambda x: x["N"] - 1,
    "p_rows": lambda x: x["p_rows"].numel() - 1,
    "cut.p_order": lambda x: x["N"] - 1,  # larger ones count as none
    "list_pairs.p_token": lambda x: x["tokens"] - 1,
    "list_pairs.p_offset": lambda x: (MOST - x["tokens"]) // x["C"] - 1,
    "list_pairs.p_place": lambda x: x["pairs"] - 1,
    "list_pairs.p_begin": lambda x: MOST - x["pairs"],
}
# A launch sees a part of the sequences, rows, samples or clouds, which is smaller.
IN_PARTS = "transformer", "message_passing", "mlp", "gin", "vector_edge_convolution"
