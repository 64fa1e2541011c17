"""transformer, message_passing, gin and mlp: input that is refused."""

import re

import pytest
import torch

from probsym_fast.ops import OPS, gin, message_passing, mlp, transformer
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, ring, sequences

BACKENDS = OPS["transformer"].backends("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_transformer(backend):
    settings, (x, weights) = sequences(4, 5, {})
    lengths, P = torch.full((4,), 5), weights.numel()
    for x_, weights_, more, error, message in (
        (x[0], weights, {}, ValueError, "x must be (M, L, 3) with L >= 1, got (5, 3)"),
        (x[..., :2], weights, {}, ValueError, "x must be (M, L, 3) with L >= 1, got (4, 5, 2)"),
        (x, weights[1:], {}, ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        (x, weights.float(), {}, TypeError, "weights must be torch.float64 as x is, got torch.float32"),
        (x.long(), weights, {}, TypeError, "x must be floating point, got torch.int64"),
        (x, weights.to("meta"), {}, RuntimeError, "weights must be on cpu, got meta"),
        (x, weights, {"heads": 4}, ValueError, "width must be a multiple of heads = 4, got 6"),
        (x, weights, {"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        (x, weights, {"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        (x, weights, {"activation": "tanh"}, ValueError, "activation must be one of ('gelu', 'relu'), got 'tanh'"),
        (x, weights, {"read": [5]}, ValueError, "read must hold one token or more, each in 0..4, got [5]"),
        (x, weights, {"read": []}, ValueError, "read must hold one token or more, each in 0..4, got []"),
        (x, weights, {"recompute": 1}, TypeError, "recompute must be a bool, got int 1"),
        (x, weights, {"lengths": lengths[1:]}, ValueError, "lengths must be (M,) = (4,), got (3,)"),
        (x, weights, {"lengths": lengths.int()}, TypeError, "lengths must be int64, got torch.int32"),
        (
            x,
            weights,
            {"lengths": lengths, "read": [0]},
            ValueError,
            "read must be None where lengths are given, got both",
        ),
        (x, weights, {"lengths": lengths + 1}, ValueError, "each of lengths must be in 1..5, got 6"),
        (x, weights, {"lengths": lengths - 5}, ValueError, "each of lengths must be in 1..5, got 0"),
    ):
        with pytest.raises(error, match=f"^transformer: {re.escape(message)}$"):
            transformer(x_, weights_, **(settings | more), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_message_passing(backend):
    x, edges, weights = torch.randn(4, 5, 3), torch.randn(2, 5, 5, 2), message_weights(3, 2, 6, 2, 2).float()
    P = weights.numel()
    for x_, edges_, weights_, error, message in (
        (x[0], edges, weights, ValueError, "x must be (M, n, E) with n, E >= 1, got (5, 3)"),
        (x, edges[:, 1:], weights, ValueError, "edges must be (B, n, n, C) = (*, 5, 5, *), got (2, 4, 5, 2)"),
        (x[1:], edges, weights, ValueError, "M must be a multiple of edges' B = 2, got 3"),
        (x, edges[:0], weights, ValueError, "M must be a multiple of edges' B = 0, got 4"),
        (x, edges, weights[1:], ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        (x, edges.double(), weights, TypeError, "edges must be torch.float32 as x is, got torch.float64"),
        (x, edges, weights.to("meta"), RuntimeError, "weights must be on cpu, got meta"),
    ):
        with pytest.raises(error, match=f"^message_passing: {re.escape(message)}$"):
            message_passing(x_, edges_, weights_, width=6, layers=2, out_features=2, backend=backend)
    with pytest.raises(ValueError, match="message_passing: width must be at least 1, got 0"):
        message_passing(x, edges, weights, width=0, layers=2, out_features=2, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_gin(backend):
    x, (edges, ptr), weights = torch.randn(8, 3, 6), ring(2), gin_weights(6, 2, 2).float()
    P = weights.numel()
    far, apart = edges.clone(), edges.clone()
    far[1, 2], apart[1, 2] = 8, 7
    for given, error, message in (
        ((x[0], edges, ptr, weights), ValueError, "x must be (nodes, S, width) with width >= 1, got (3, 6)"),
        ((x, edges[0], ptr, weights), ValueError, "edge_index must be (2, E), got (8,)"),
        ((x, edges.int(), ptr, weights), TypeError, "edge_index must be int64, got torch.int32"),
        ((x, edges, ptr[None], weights), ValueError, "ptr must be (B + 1,), got (1, 3)"),
        ((x, edges, ptr.to("meta"), weights), RuntimeError, "ptr must be on cpu, got meta"),
        ((x, edges, ptr, weights[1:]), ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        ((x, edges, ptr + 1, weights), ValueError, "ptr must rise from 0 to the 8 nodes, got 1 to 9"),
        ((x, edges, torch.tensor([0, 4, 3, 8]), weights), ValueError, "ptr must rise, got 3 after 4"),
        ((x, far, ptr, weights), ValueError, "edge_index must hold node numbers 0 to 7, got 2 and 8 in column 2"),
        (
            (x, apart, ptr, weights),
            ValueError,
            "edge_index must join nodes of one graph, got column 2 from graph 0 to graph 1",
        ),
    ):
        with pytest.raises(error, match=f"^gin: {re.escape(message)}$"):
            gin(*given, layers=2, out_features=2, backend=backend)
    with pytest.raises(
        ValueError, match=r"^gin: activation must be one of \('tanh', 'relu', 'gelu', 'silu'\), got 'elu'$"
    ):
        gin(x, edges, ptr, weights, layers=2, out_features=2, activation="elu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_mlp(backend):
    x, widths = torch.randn(8, 6), [6, 4, 2]
    weights = mlp_weights(widths).float()
    P = weights.numel()
    for given, more, error, message in (
        ((x[0], weights), {}, ValueError, "x must be (M, widths[0]) = (*, 6), got (6,)"),
        ((x[:, :5], weights), {}, ValueError, "x must be (M, widths[0]) = (*, 6), got (8, 5)"),
        ((x, weights[1:]), {}, ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        ((x, weights.double()), {}, TypeError, "weights must be torch.float32 as x is, got torch.float64"),
        ((x, weights), {"widths": [6]}, ValueError, "widths must be two or more, each at least 1, got [6]"),
        ((x, weights), {"widths": [6, 0]}, ValueError, "widths must be two or more, each at least 1, got [6, 0]"),
        ((x, weights), {"widths": 6}, TypeError, "widths must be a sequence of ints, got int"),
        ((x, weights), {"first": 1}, TypeError, "first must be a bool, got int 1"),
        (
            (x, weights),
            {"activation": "elu"},
            ValueError,
            "activation must be one of ('tanh', 'relu', 'gelu', 'silu'), got 'elu'",
        ),
    ):
        with pytest.raises(error, match=f"^mlp: {re.escape(message)}$"):
            mlp(*given, **{"widths": widths} | more, backend=backend)
