"""Launches of every op, forward and backward, for sizes as in the experiments; nothing runs."""

from unittest import mock

import pytest
import torch

from benchmarks.gpu_model import check
from benchmarks.gpu_model.launches import Launch, Launches, all_compiled
from probsym_fast.ops._patches import padded_axis, patch_size
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from probsym_fast.ops.triton import KERNELS, _launch, products
from probsym_fast.ops.triton import _lazy as launcher


def launches_of(name: str, dtype: torch.dtype, monkeypatch, precisions=("ieee", "tf32")) -> list:
    """The launches of an op, forward and backward, for sizes as in the experiments; nothing runs.

    precisions: what torch lets products of float32 be in.
    """
    launches, matmul = Launches(), torch.backends.cuda.matmul
    monkeypatch.setattr(_launch, "launch", launches)
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in precisions if dtype == torch.float32 else ("ieee",):
            CASES[name](dtype)
    finally:
        matmul.fp32_precision = before
    return list(launches.kept.items())


def aggregate_case(dtype):
    x, edges, ptr = (
        torch.zeros(130, 10, 64, dtype=dtype),
        torch.zeros(2, 512, dtype=torch.int64),
        torch.arange(0, 129, 64),
    )
    for virtual, own in ((ptr, torch.ones(())), (None, None)):
        launcher("aggregate", "forward")(x, edges, virtual, own)
        launcher("aggregate", "backward")(x, x, edges, virtual, own, True, own is not None)


def items_case(name, dtype):
    """Pairs and nodes, tokens as wide as a ViT and narrow, one channel and many; one token of the whole matrix; few items of
    many tokens, which are read one by one."""
    sizes = ((2, 188, 14, 8, 768, "zeros"), (1, 188, 196, 9, 768, "zeros"), (2, 20, 1, 1, 64, "zeros"))
    more = (2, 444, 14, 7, 768, "reflect") if name == "embed" else (2, 53, 14, 1, 768, "zeros")
    for axes, N, grid, C, D, pad_mode in (*sizes, more):
        S, B, P = 2, 2, patch_size(N, grid)
        ptr, rank = torch.arange(0, B * N + 1, N), torch.arange(N).expand(B, S, N)
        items = torch.zeros(axes, 60, dtype=torch.int64)
        soft = [torch.zeros(B, S, N) for _ in range(3)]
        axis = padded_axis(N, grid, pad_mode, False, rank.device)
        weight = torch.zeros(*[P] * axes, C, D, dtype=dtype).movedim((-1, -2), (0, 1))
        tokens, values = torch.zeros(B, S, grid**axes, D, dtype=dtype), torch.zeros(60, C, dtype=dtype)
        rest = ptr, rank, rank, *soft, 0.5, *axis, weight
        first, second = (items, values) if name == "embed" else (tokens, items)
        out = tokens if name == "embed" else values
        for bias in (torch.zeros(D if name == "embed" else C, dtype=dtype), None)[: 2 if C == 8 else 1]:
            launcher(name, "forward")(first, second, *rest, bias)
        launcher(name, "backward")(out, first, second, *rest, True, True, True, True)


def embed_matrix_case(dtype):
    """As wide as a ViT and of a width that 16 does not divide, one channel and several, several samples and one; addresses in
    32 bits and in 64."""
    _embed_matrices(dtype)
    with mock.patch.object(products, "NARROW", 0):
        _embed_matrices(dtype)


def _embed_matrices(dtype):
    for B, S, N, grid, C, D in ((2, 2, 188, 14, 1, 768), (2, 1, 20, 3, 3, 70)):
        P, soft = patch_size(N, grid), [torch.zeros(B, S, N) for _ in range(3)]
        matrix, order = torch.zeros(B, N, N, C, dtype=dtype), torch.arange(N).expand(B, S, N)
        axis = padded_axis(N, grid, "zeros", False, matrix.device)
        weight = torch.zeros(P, P, C, D, dtype=dtype).permute(3, 2, 0, 1)
        rest = matrix, None, order, order, *soft, 0.5, *axis, weight
        launcher("embed_matrix", "forward")(*rest, torch.zeros(D, dtype=dtype) if S == 2 else None)
        tokens = torch.zeros(B, S, grid**2, D, dtype=dtype)
        launcher("embed_matrix", "backward")(tokens, *rest, True, True, True, True)


def embed_image_case(dtype):
    """A ViT's patches; more channels than four, patches that 16 does not divide, a matrix in float64."""
    for B, S, C, H, W, P, D, kind in (
        (2, 2, 3, 224, 224, 16, 384, torch.float32),
        (2, 1, 5, 21, 28, 7, 70, torch.float64),
    ):
        pixels, weight = torch.zeros(B, C, H, W, dtype=dtype), torch.zeros(D, C, P, P, dtype=dtype)
        frames, bias = torch.zeros(B, S, 2, 2, dtype=kind), torch.zeros(D, dtype=dtype) if C == 3 else None
        for replicate in (False, True):
            tokens = launcher("embed_image", "forward")(pixels, frames, weight, bias, replicate)
            launcher("embed_image", "backward")(tokens, pixels, frames, weight, replicate, True, True, True, True)


def embed_turned_case(dtype):
    for B, S, C, H, P, D in ((2, 8, 3, 224, 16, 384), (2, 1, 5, 28, 7, 70)):
        pixels, weight = torch.zeros(B, C, H, H, dtype=dtype), torch.zeros(D, C, P, P, dtype=dtype)
        turns, bias = torch.zeros(B, S, dtype=torch.int64), torch.zeros(D, dtype=dtype) if C == 3 else None
        tokens = launcher("embed_turned", "forward")(pixels, turns, weight, bias)
        launcher("embed_turned", "backward")(tokens, pixels, turns, weight, True, True, True)


def node_identifiers_case(dtype):
    for B, S, N, D in ((16, 10, 64, 64), (2, 1, 188, 7)):
        ptr, rank = torch.arange(0, B * N + 1, N), torch.arange(N).expand(B, S, N)
        soft, weight = [torch.zeros(B, S, N) for _ in range(3)], torch.zeros(N, D, dtype=dtype)
        arguments = ptr, rank, rank, *soft, 0.5, weight
        out = launcher("node_identifiers", "forward")(*arguments, B * N)
        launcher("node_identifiers", "backward")(out, *arguments, True, True)


def act_orthogonal_case(dtype):
    frames = torch.zeros(2, 3, 3, 3)
    for C, mean, inverse in ((1, True, False), (16, False, True), (16, True, True)):
        for vectors in (torch.zeros(2, 5, 3, C, dtype=dtype), torch.zeros(2, 3, 5, 3, C, dtype=dtype)):
            out = launcher("act_orthogonal", "forward")(vectors, frames, inverse, mean)
            launcher("act_orthogonal", "backward")(out, vectors, frames, inverse, mean, True, True)


def orthogonal_frame_case(dtype):
    for d in (1, 2, 3):
        x = torch.zeros(33, d, d, dtype=dtype)
        for special in (False, True):
            launcher("orthogonal_frame", "forward")(x, special)
        launcher("orthogonal_frame", "backward")(x, x, x)


def linear_batch_norm_relu_case(dtype):
    for M, C in ((45_500, 64), (45_511, 9), (300, 128)):
        x, linear, (weight, bias) = torch.zeros(M, 2, dtype=dtype), torch.zeros(C, 2, dtype=dtype), torch.zeros(2, C)
        y, mean, variance = launcher("linear_batch_norm_relu", "forward")(x, linear, weight, bias, 1e-5)
        launcher("linear_batch_norm_relu", "backward")(y, x, linear, weight, bias, mean, variance, 1e-5, True, True)


def noise_case(dtype):
    """Uniform and normal, named rows and counted ones, of a fork and of none, mirrored and not."""
    seed, shape = torch.tensor(3), [5, 4, 300]
    for rows, forks, streams, mirrored in (
        (torch.arange(5), [2], [2**40], False),
        (None, None, [-(2**40), 2**41], True),
    ):
        launcher("noise", "forward")(seed, rows, shape, 0, forks, streams, 2, mirrored)


def transformer_case(dtype):
    """As in the experiments: 25 tokens, width 64, four heads; only some tokens read, and lengths."""
    sizes = [8, 64, 1, 4, 64, 3]
    x, row = torch.zeros(2, 25, 8, dtype=dtype), torch.zeros(transformer_count(sizes, 25), dtype=dtype)
    y, kept = launcher("transformer", "forward")(x, row, None, sizes, [0, 6], True, 1e-5, True)
    launcher("transformer", "backward")(y, x, row, kept, None, sizes, [0, 6], True, 1e-5, True, True)
    launcher("transformer", "forward")(x, row, torch.full((2,), 25), sizes, [], True, 1e-5, False)


def message_passing_case(dtype):
    """As in the experiments: 5 nodes, width 60, two edge features."""
    x, edges = torch.zeros(6, 5, 6, dtype=dtype), torch.zeros(2, 5, 5, 2, dtype=dtype)
    row, sizes = torch.zeros(message_count(6, 2, 60, 1, 60), dtype=dtype), (60, 1, 60)
    y, kept = launcher("message_passing", "forward")(x, edges, row, *sizes, True)
    launcher("message_passing", "backward")(y, x, edges, row, kept, *sizes, True, True, True)


def mlp_case(dtype):
    """Three layers of width 64, two at once and one; an activation before the first and after the last."""
    widths = [64] * 4
    x, row = torch.zeros(40, 64, dtype=dtype), torch.zeros(mlp_count(widths), dtype=dtype)
    y, kept = launcher("mlp", "forward")(x, row, widths, 2, True, True, True)
    launcher("mlp", "backward")(y, x, row, kept, widths, 2, True, True, True, True)


def gin_case(dtype):
    """As in the experiments: 10 samples, width 64."""
    x, edges = torch.zeros(130, 10, 64, dtype=dtype), torch.zeros(2, 512, dtype=torch.int64)
    ptr, row, sizes = torch.tensor([0, 65, 130]), torch.zeros(gin_count(64, 2, 64), dtype=dtype), (2, 64, 2, True)
    y, kept = launcher("gin", "forward")(x, edges, ptr, row, *sizes, True)
    launcher("gin", "backward")(y, x, edges, ptr, row, kept, *sizes, True, True)


def vector_edge_convolution_case(dtype):
    """As in the experiments: clouds of 5 nodes in space, width 21, 4 neighbours."""
    x, maps, pool, row = torch.zeros(2, 3, 5, 40), torch.zeros(21, 4), torch.zeros(21, 21), torch.zeros(21)
    arguments = x.to(dtype), maps, maps, pool, row, row, None, None, torch.full((40,), 5)
    y, *known = launcher("vector_edge_convolution", "forward")(*arguments, 4)
    launcher("vector_edge_convolution", "backward")(y, *arguments, *known, 4, True)


def permute_case(dtype):
    x, slots = torch.zeros(2, 3, 188, 4, dtype=dtype), torch.arange(188).expand(2, 3, 188)
    t = torch.zeros(2, 3, 188, dtype=dtype)
    arguments = x, slots, slots, None, t, t, t, 0.1, True
    launcher("permute", "backward")(launcher("permute", "forward")(*arguments), *arguments, True, True)


def slots_case(dtype, run):
    """A warp a row, and rows in memory; float32, with fewer registers: several rows a warp."""
    for N in (188, 1100) if dtype == torch.float64 else (16,):
        x = torch.zeros(2, 3, N, dtype=dtype)
        run(x, torch.full((2,), N) if N == 188 else None)


def soft_permutation_case(dtype):
    def run(scores, num_nodes):
        t, log_r, log_c, order, _ = launcher("soft_permutation", "forward")(scores, num_nodes, 0.1, 20, True, False)
        settings = order, t, num_nodes, 0.1, 20, True
        launcher("soft_permutation", "backward")(t, log_r, log_c, scores, *settings)

    slots_case(dtype, run)


def permutation_entropy_case(dtype):
    def run(t, num_nodes):
        entropy = launcher("permutation_entropy", "forward")(t, t, t, num_nodes, 0.1)
        launcher("permutation_entropy", "backward")(entropy, t, t, t, num_nodes, 0.1)

    slots_case(dtype, run)


CASES = {
    "soft_permutation": soft_permutation_case,
    "permutation_entropy": permutation_entropy_case,
    "noise": noise_case,
    "act_orthogonal": act_orthogonal_case,
    "orthogonal_frame": orthogonal_frame_case,
    "aggregate": aggregate_case,
    "linear_batch_norm_relu": linear_batch_norm_relu_case,
    "embed": lambda dtype: items_case("embed", dtype),
    "embed_image": embed_image_case,
    "embed_matrix": embed_matrix_case,
    "embed_turned": embed_turned_case,
    "gin": gin_case,
    "message_passing": message_passing_case,
    "mlp": mlp_case,
    "node_identifiers": node_identifiers_case,
    "permute": permute_case,
    "readout": lambda dtype: items_case("readout", dtype),
    "transformer": transformer_case,
    "vector_edge_convolution": vector_edge_convolution_case,
}


def one_of_each() -> list[tuple[Launch, object]]:
    """The first launch of each key of `check`, compiled for 9.0: what benchmarks/results/gpu-predicted.json keeps of them."""
    launches = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in CASES:
            for dtype in KERNELS[name]:
                launches += [launch for _, launch in launches_of(name, dtype, monkeypatch)]
    chosen = check.first(launches).values()
    return list(zip(chosen, all_compiled(chosen, 90), strict=True))
