"""Batches of any sizes share their compiled kernels: nothing compiles again in a training."""

import pytest
import torch

from benchmarks.gpu_model.launches import Launches
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from probsym_fast.ops.triton import _launch
from probsym_fast.ops.triton import _lazy as launcher
from tests.ops.triton.inputs import axis_of


def test_images_of_any_number_share_their_kernels(monkeypatch):
    """Also 1 and multiples of 16."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)

    def run(B):
        pixels, weight, plane = torch.zeros(B, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(B, 2, 2, 2)
        tokens = launcher("embed_image", "forward")(pixels, plane, weight, None, True)
        launcher("embed_image", "backward")(tokens, pixels, plane, weight, True, True, True, True, True)
        turns = torch.zeros(B, 2, dtype=torch.int64)
        launcher("embed_turned", "backward")(tokens, pixels, turns, weight, True, True, True)

    run(5)
    first = set(launches.kept)
    assert len({kernel for kernel, _ in first}) == 4 and len(first) == 7
    for B in (1, 16, 7):
        run(B)
    assert set(launches.kept) == first


def ragged_batch(B: int, generator: torch.Generator) -> None:
    """Forward and backward of every op on graphs, for B graphs of any sizes."""
    S, N, D, C, grid = 3, 24, 64, 4, 4
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, N + 1, (B,), generator=generator).cumsum(0)])
    nodes = int(ptr[-1])
    edges = torch.zeros(2, int(torch.randint(1, 200, (), generator=generator)), dtype=torch.int64)
    rank, soft, axis = torch.arange(N).expand(B, S, N), [torch.zeros(B, S, N)] * 3, axis_of(N, grid)
    tokens, weight, own = torch.zeros(B, S, grid**2, D), torch.zeros(6, 6, C, D).permute(3, 2, 0, 1), torch.ones(())
    x, permutation = torch.zeros(nodes + B, S, 64), (ptr, rank, rank, *soft, 0.5)
    launcher("aggregate", "forward")(x, edges, ptr, own)
    launcher("aggregate", "backward")(x, x, edges, ptr, own, True, True)
    values = torch.zeros(edges.shape[1], C)
    launcher("embed", "forward")(edges, values, *permutation, *axis, weight, torch.zeros(D))
    launcher("embed", "backward")(tokens, edges, values, *permutation, *axis, weight, True, True, True, True)
    launcher("readout", "forward")(tokens, edges, *permutation, *axis, weight, torch.zeros(C))
    launcher("readout", "backward")(values, tokens, edges, *permutation, *axis, weight, True, True, True, True)
    matrix = torch.zeros(B, N, N, C), ptr.diff(), *permutation[1:], *axis, weight
    launcher("embed_matrix", "forward")(*matrix, None)
    launcher("embed_matrix", "backward")(tokens, *matrix, True, True, True, True)
    features = launcher("node_identifiers", "forward")(*permutation, torch.zeros(N, 64), nodes)
    launcher("node_identifiers", "backward")(features, *permutation, torch.zeros(N, 64), True, True)
    row = torch.zeros(gin_count(64, 2, 4))
    y, kept = launcher("gin", "forward")(x[:nodes], edges, ptr, row, 2, 4, 0, True, True)
    launcher("gin", "backward")(y, x[:nodes], edges, ptr, row, kept, 2, 4, 0, True, True, True)
    rows, square, row = torch.zeros(nodes * S, 64), torch.zeros(64, 64), torch.zeros(64)
    y, *statistics = launcher("linear_batch_norm_relu", "forward")(rows, square, row, row, 1e-5)
    launcher("linear_batch_norm_relu", "backward")(y, rows, square, row, row, *statistics, 1e-5, True, True)


def ragged_sequences(M: int) -> None:
    """Forward and backward of the ops on sequences and on small graphs, for M of them."""
    sizes, lengths, row = [3, 8, 1, 2, 8, 2], torch.ones(M + M % 2, dtype=torch.int64)[M % 2 :], torch.zeros(10_000)
    x, row = torch.zeros(M, 4, 3), row[: transformer_count(sizes, 4)]
    y, kept = launcher("transformer", "forward")(x, row, lengths, sizes, [], True, 1e-5, True)
    launcher("transformer", "backward")(y, x, row, kept, lengths, sizes, [], True, 1e-5, True, True)
    edges, row, sizes = torch.zeros(1, 4, 4, 2), torch.zeros(message_count(3, 2, 8, 1, 2)), (8, 1, 2)
    y, kept = launcher("message_passing", "forward")(x, edges, row, *sizes, True)
    launcher("message_passing", "backward")(y, x, edges, row, kept, *sizes, True, True, True)
    rows, widths = torch.zeros(M, 8), [8, 8, 8, 8]
    row = torch.zeros(mlp_count(widths))
    y, kept = launcher("mlp", "forward")(rows, row, widths, 2, True, True, True)
    launcher("mlp", "backward")(y, rows, row, kept, widths, 2, True, True, True, True)
    clouds, maps, row = torch.zeros(2, 3, 3, M), torch.zeros(6, 4), torch.zeros(6)
    arguments = clouds, maps, maps, torch.zeros(6, 6), row, row, None, None, None
    y, *known = launcher("vector_edge_convolution", "forward")(*arguments, 2)
    launcher("vector_edge_convolution", "backward")(y, *arguments, *known, 2, True)


@pytest.mark.parametrize("bytes_", [2**28, 5000])
def test_sequences_of_any_number_share_their_kernels(bytes_, monkeypatch):
    """Also 1 and multiples of 16, at once and in parts."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)
    for name in ("transformer", "message_passing", "mlp", "vector_edge_convolution"):
        monkeypatch.setattr(f"probsym_fast.ops.triton.{name}.BYTES", bytes_)
    ragged_sequences(5)
    first = set(launches.kept)
    assert len({kernel for kernel, _ in first}) == 20
    for M in (1, 16, 7, 32, 33):
        ragged_sequences(M)
    assert set(launches.kept) == first


def test_ragged_batches_share_their_kernels(monkeypatch):
    """Whatever the numbers of nodes and edges, also 1 and multiples of 16: the first batch has compiled all there is.

    A last, smaller batch is another multiple of 16 in the planes of the soft permutation, which are read in wide loads.
    """
    launches, generator = Launches(), torch.Generator().manual_seed(0)
    monkeypatch.setattr(_launch, "launch", launches)
    ragged_batch(4, generator)
    first = set(launches.kept)
    assert len(first) > 30
    for _ in range(8):
        ragged_batch(4, generator)
    assert set(launches.kept) == first
    ragged_batch(3, generator)
    assert {kernel for kernel, _ in set(launches.kept) - first} <= {"reduce_matrix", "reduce_identifiers"}
