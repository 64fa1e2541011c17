"""`why_modules` of a call: what it says is what runs."""

import re

import pytest
import torch
from torch import nn

from probsym_fast.groups import Graphs
from probsym_fast.models import MLP, GINBackbone, MessagePassing, OnePass, Transformer, fuse
from probsym_fast.ops._op import OPS
from tests.helpers.graphs import random_graphs

built = pytest.mark.skipif("cpu" not in OPS["transformer"].backends("cpu"), reason="the extension is not built")


def encoder(width=12) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return fuse(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def graphs(nodes: int) -> tuple[torch.Tensor, Graphs]:
    return torch.randn(nodes, 2, 6), random_graphs([nodes])


def pairs(*lead, n=3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*lead, n, 6), torch.randn(*lead, n, n, 2)


CASES = {  # backbone, inputs, why they go through the modules
    "Transformer": (Transformer, lambda: (torch.randn(4, 25, 8),), None),
    "few sequences": (Transformer, lambda: (torch.randn(3, 1, 25, 8),), "3 sequences, fewer than 4"),
    "wide, few sequences": (
        lambda: Transformer(width=80),
        lambda: (torch.randn(15, 25, 8),),
        "15 sequences, fewer than 16",
    ),
    "sets": (lambda: Transformer(tokens=None), lambda: (torch.randn(4, 64, 8),), None),
    "large sets": (lambda: Transformer(tokens=None), lambda: (torch.randn(4, 65, 8),), "65 tokens"),
    "encoder": (encoder, lambda: (torch.randn(4, 9, 12), torch.tensor([1, 9, 3, 2])), None),
    "encoder, few": (encoder, lambda: (torch.randn(2, 9, 12), torch.tensor([1, 9])), "2 sequences, fewer than 4"),
    "encoder, none": (encoder, lambda: (torch.randn(0, 9, 12), torch.zeros(0).long()), "0 sequences, fewer than 4"),
    "encoder, long": (encoder, lambda: (torch.randn(4, 65, 12),), "65 tokens"),
    "GNN": (MessagePassing, lambda: pairs(2, 2), None),
    "GNN, few": (MessagePassing, lambda: pairs(3), "3 graphs, fewer than 4"),
    "GNN, one": (MessagePassing, lambda: pairs(), "1 graphs, fewer than 4"),
    "GNN, two dtypes": (
        MessagePassing,
        lambda: (pairs(2, 2)[0], pairs(2, 2)[1].double()),
        "x is float32, edges are float64",
    ),
    "GIN": (lambda: GINBackbone(6, 2, 3, "relu"), lambda: graphs(512), None),
    "GIN, large": (
        lambda: GINBackbone(6, 2, 3, "relu"),
        lambda: graphs(513),
        "513 nodes in 1 graphs, more than 512 each",
    ),
    "MLP": (lambda: MLP([6, 8, 3]), lambda: (torch.randn(10, 100, 6),), None),
    "MLP, few": (lambda: MLP([6, 8, 3]), lambda: (torch.randn(9, 111, 6),), "999 rows, fewer than 1000"),
    "MLP, dropout": (
        lambda: fuse(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))),
        lambda: (torch.randn(10, 100, 6),),
        None,
    ),
}


def ran(backbone: OnePass, inputs: tuple) -> bool:
    """Whether the op of all layers ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found, torch.no_grad():
        backbone(*inputs)
    return f"probsym_fast::{backbone.op}" in {event.key for event in found.key_averages()}


@built
@pytest.mark.parametrize("name", CASES)
def test_what_is_said_is_what_runs(name):
    make, inputs, reason = CASES[name]
    backbone, given = make(), inputs()
    assert backbone.why_modules(*given) == reason
    if name != "GNN, two dtypes":  # a product of two dtypes
        assert ran(backbone, given) == (reason is None)
    backbone.one_pass = False
    assert backbone.why_modules(*given) == "one_pass is False"
    backbone.one_pass = True
    if reason is None or "fewer than" in reason or "more than 512" in reason:  # asked for, it takes any number
        assert backbone.why_modules(*given) is None
        assert ran(backbone, given)


def test_empty_batches_with_lengths():
    fused = encoder()
    for one_pass in (None, True, False):
        fused.one_pass = one_pass
        assert fused(torch.zeros(0, 9, 12), torch.zeros(0, dtype=torch.int64)).shape == (0, 9, 12)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(
    ("edges", "ptr", "message"),
    [
        ([[0, 3], [1, 2]], [0, 3, 6], "edge_index must join nodes of one graph, got column 1 from graph 1 to graph 0"),
        ([[0, 5], [1, 6]], [0, 3, 6], "edge_index must hold node numbers 0 to 5, got 5 and 6 in column 1"),
        ([[0], [-1]], [0, 3, 6], "edge_index must hold node numbers 0 to 5, got 0 and -1 in column 0"),
        ([[0], [1]], [0, 3], "ptr must rise from 0 to the 6 nodes, got 0 to 3"),
        ([[0], [1]], [0, 4, 3, 6], "ptr must rise, got 3 after 4"),
    ],
)
def test_gin_refuses_the_same_graphs_either_way(one_pass, edges, ptr, message):
    backbone = GINBackbone(4, 2, 3, "relu")
    backbone.one_pass = one_pass
    batch = Graphs(torch.zeros(6, 1), torch.tensor(edges), torch.tensor(ptr))
    with pytest.raises(ValueError, match=f"^gin: {re.escape(message)}$"):
        backbone(torch.randn(6, 2, 4), batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP([3, 2], last="no"), "MLP: last must be a bool, got str 'no'"),
        (lambda: GINBackbone(3, 1, 2, "relu", final=1), "GINBackbone: final must be a bool, got int 1"),
    ],
)
def test_flags_are_bools(make, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        make()


def test_a_gnn_of_one_axis_is_refused():
    with pytest.raises(ValueError, match=re.escape("MessagePassing: x must be (..., n, 6), got (6,)")):
        MessagePassing()(torch.randn(6), torch.randn(1, 1, 2))
