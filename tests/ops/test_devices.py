"""Tensors of two devices are refused, op by op and argument by argument; and the debug mode of a GPU."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import probsym_fast
from probsym_fast import _checks, ops
from probsym_fast._checks import looks_at_values
from probsym_fast.ops import OPS, Permutation, SoftPermutation
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, transformer_weights

B, S, N, C, D, GRID = 2, 2, 4, 3, 5, 2
NODES, ITEMS = 7, 6


def soft(order, rank, num_nodes, scores, log_r, log_c):
    return SoftPermutation(order, num_nodes, rank, scores, log_r, log_c, 0.5, checked=True)


def on(call):
    """call(p, **others) of tensors that make up the permutation and others."""

    def run(num_nodes, scores, log_r, log_c, order=None, rank=None, **others):
        return call(soft(order, rank, num_nodes, scores, log_r, log_c), **others)

    return run


PERMUTATION = {
    "order": torch.arange(N).expand(B, S, N).contiguous(),
    "rank": torch.arange(N).expand(B, S, N).contiguous(),
    "num_nodes": torch.tensor([4, 3]),
    "scores": torch.arange(N, 0.0, -1).expand(B, S, N).contiguous(),
    "log_r": torch.zeros(B, S, N),
    "log_c": torch.zeros(B, S, N),
}
BLOCKS = {"in_features": 2, "width": 4, "layers": 1, "heads": 2, "feedforward": 3, "out_features": 2}
PTR, EDGES = torch.tensor([0, 4, 7]), torch.zeros(2, ITEMS, dtype=torch.int64)
MAP, ROW = torch.randn(D, C, 2, 2), torch.randn(D, C, 2)
# op -> function, its tensors
CASES = {
    "soft_permutation": (ops.soft_permutation, {"scores": torch.randn(B, S, N), "num_nodes": torch.tensor([4, 3])}),
    "permutation_entropy": (
        on(lambda p: ops.permutation_entropy(p)),
        {name: x for name, x in PERMUTATION.items() if name not in ("order", "rank")},
    ),
    "act_orthogonal": (
        ops.act_orthogonal,
        {"vectors": torch.randn(B, 2, 3, C), "frames": torch.eye(3).expand(B, S, 3, 3)},
    ),
    "aggregate": (
        ops.aggregate,
        {"x": torch.randn(NODES + B, C), "edge_index": EDGES, "own": torch.ones(()), "ptr": PTR},
    ),
    "linear_batch_norm_relu": (
        ops.linear_batch_norm_relu,
        {"x": torch.randn(9, D), "linear": torch.randn(C, D), "weight": torch.ones(C), "bias": torch.zeros(C)},
    ),
    "gin": (
        lambda **tensors: ops.gin(**tensors, layers=2, out_features=3),
        {"x": torch.randn(NODES, S, D), "edge_index": EDGES, "ptr": PTR, "weights": gin_weights(D, 2, 3).float()},
    ),
    "mlp": (
        lambda x, weights: ops.mlp(x, weights, widths=[D, 4, 3]),
        {"x": torch.randn(9, D), "weights": mlp_weights([D, 4, 3]).float()},
    ),
    "message_passing": (
        lambda x, edges, weights: ops.message_passing(x, edges, weights, width=4, layers=1, out_features=2),
        {
            "x": torch.randn(4, 3, 2),
            "edges": torch.randn(2, 3, 3, 1),
            "weights": message_weights(2, 1, 4, 1, 2).float(),
        },
    ),
    "transformer": (
        lambda **tensors: ops.transformer(**tensors, **BLOCKS),
        {
            "x": torch.randn(4, 3, 2),
            "weights": transformer_weights(BLOCKS, 3).float(),
            "lengths": torch.tensor([1, 3, 2, 2]),
        },
    ),
    "vector_edge_convolution": (
        lambda mean, variance, **tensors: ops.vector_edge_convolution(**tensors, running=(mean, variance), neighbors=2),
        {
            **{"x": torch.randn(C, 3, N, B), "feature": torch.randn(D, 2 * C), "direction": torch.randn(D, 2 * C)},
            **{"pool": torch.randn(D, D), "gain": torch.ones(D), "bias": torch.ones(D)},
            **{"mean": torch.ones(D), "variance": torch.ones(D), "num_nodes": torch.full((B,), N)},
        },
    ),
    "embed_edges": (
        on(lambda p, **others: ops.embed_edges(p=p, grid=GRID, **others)),
        PERMUTATION
        | {"edge_index": EDGES, "edge_attr": torch.randn(ITEMS, C), "ptr": PTR, "weight": MAP, "bias": torch.randn(D)},
    ),
    "embed_nodes": (
        on(lambda p, **others: ops.embed_nodes(p=p, tokens=GRID, **others)),
        PERMUTATION | {"x": torch.randn(NODES, C), "ptr": PTR, "weight": ROW, "bias": torch.randn(D)},
    ),
    "embed_matrix": (
        on(lambda p, **others: ops.embed_matrix(p=p, grid=GRID, **others)),
        PERMUTATION | {"matrix": torch.randn(B, N, N, C), "weight": MAP, "bias": torch.randn(D)},
    ),
    "embed_image": (
        ops.embed_image,
        {
            **{"pixels": torch.randn(B, C, 6, 6), "plane": torch.randn(B, S, 2, 2)},
            **{"weight": torch.randn(D, C, 3, 2), "bias": torch.randn(D)},
        },
    ),
    "readout": (
        on(lambda p, **others: ops.readout(p=p, **others)),
        PERMUTATION
        | {"tokens": torch.randn(B, S, 4, D), "ptr": PTR, "weight": MAP, "bias": torch.randn(C), "at": EDGES},
    ),
    "noise": (
        lambda seed, rows: ops.noise(seed, (3, 2), "x", rows=rows),
        {"seed": torch.tensor(1), "rows": torch.arange(3)},
    ),
    "permute": (
        on(lambda p, **others: ops.permute(p=p, **others)),
        PERMUTATION | {"x": torch.randn(B, S, N, D)},
    ),
    "node_identifiers": (
        on(lambda p, **others: ops.node_identifiers(p=p, nodes=NODES, **others)),
        PERMUTATION | {"ptr": PTR, "weight": torch.randn(N, D)},
    ),
}
ALONE = {"orthogonal_frame"}  # of one tensor
SHARED = {"embed_turned"}  # called by embed_image, with its checks


def test_every_op_has_a_case():
    assert {name.replace("embed_edges", "embed") for name in CASES} - {"embed_nodes"} | ALONE | SHARED == set(OPS)


@pytest.mark.parametrize(("op", "moved"), [(op, name) for op, (_, tensors) in CASES.items() for name in tensors])
def test_tensors_of_two_devices_are_refused(op, moved):
    call, tensors = CASES[op]
    call(**tensors)
    with pytest.raises(RuntimeError, match=rf"^{op}: \S+ must be on (cpu|meta)( as \w+ is)?, got (cpu|meta)$"):
        call(**tensors | {moved: tensors[moved].to("meta")})


def test_permutations_of_two_devices_are_refused():
    order = PERMUTATION["order"]
    with pytest.raises(RuntimeError, match=r"^Permutation: num_nodes must be on cpu, got meta$"):
        Permutation(order, PERMUTATION["num_nodes"].to("meta"))
    with pytest.raises(ValueError, match=r"on cpu as order is, got .* on meta$"):
        Permutation(order, None, order.to("meta"))


def test_debug_mode_is_for_a_while_and_for_the_process(monkeypatch):
    assert probsym_fast.debug is ops.debug
    monkeypatch.setattr(_checks, "_on", False)
    with ops.debug():
        assert _checks.debugging()
        with ops.debug(False):
            assert not _checks.debugging()
        with pytest.raises(KeyError), ops.debug(False):
            raise KeyError
        assert _checks.debugging()
    assert not _checks.debugging()
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("PROBSYM_DEBUG", value)
        path = Path(_checks.__file__)
        assert runpy.run_path(str(path))["debugging"]() == expected


def test_debug_mode_looks_at_the_values_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_checks, "_on", False)
    capturing = False
    monkeypatch.setattr(_checks, "batched", lambda x: False)  # these are no tensors
    on_gpu, on_cpu, on_meta = (SimpleNamespace(device=torch.device(x)) for x in ("cuda", "cpu", "meta"))
    assert looks_at_values(on_cpu) and not looks_at_values(on_gpu) and not looks_at_values(on_meta)
    with ops.debug():
        assert looks_at_values(on_cpu) and looks_at_values(on_gpu) and not looks_at_values(on_meta)
        capturing = True
        assert looks_at_values(on_cpu) and not looks_at_values(on_gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_debug_mode_on_a_gpu():
    """The CPU's messages; without it nothing is raised, and memory is left alone."""

    def made(device, **changed):
        tensors = {name: x.to(device) for name, x in (CASES["embed_edges"][1] | changed).items()}
        return CASES["embed_edges"][0](**tensors)

    nan = torch.full((B, S, N), torch.nan)
    edges = EDGES.clone()
    edges[0, 3] = NODES + 5
    calls = [
        lambda device: made(device, edge_index=edges),
        lambda device: made(device, ptr=torch.tensor([0, 6, 7])),
        lambda device: ops.aggregate(torch.ones(NODES, 2, device=device), edges.to(device)),
        lambda device: ops.soft_permutation(nan.to(device)),
        lambda device: ops.orthogonal_frame(nan[..., :2, None].expand(B, S, 2, 2).to(device)),
        lambda device: Permutation(torch.zeros(B, S, N, dtype=torch.int64, device=device)),
        lambda device: ops.soft_permutation(torch.ones(B, S, N, device=device), torch.tensor([4, 9]).to(device)),
    ]
    for call in calls:
        with pytest.raises(ValueError) as expected:
            call("cpu")
        call("cuda")
        with ops.debug(), pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
            call("cuda")
    torch.cuda.synchronize()
