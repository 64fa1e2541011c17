"""node_identifiers: rows of a weight for the slots of nodes."""

import pytest
import torch

from probsym_fast.ops.triton import _lazy as launcher
from tests.helpers.items import batch, weights
from tests.ops.triton.inputs import soft_arguments
from tests.ops.triton.interpreted.checks import DTYPES, check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "N", "S", "D"), [([5, 1, 3, 7], 7, 3, 20), ([66], 66, 1, 1), ([2, 3], 3, 2, 530)])
def test_node_identifiers(sizes, N, S, D, dtype):
    data = batch(sizes, N, S=S)
    arguments = [*soft_arguments(data), weights(N, D).to(dtype), int(data.ptr[-1])]
    check("node_identifiers", arguments, [3, 4, 5, 7])


def test_node_identifiers_of_many_samples(monkeypatch):
    monkeypatch.setattr("probsym_fast.ops.triton.node_identifiers.SPLIT", 8)
    data = batch([3, 2, 3], 3, S=7)
    check("node_identifiers", [*soft_arguments(data), weights(3, 5).float(), 8], [3, 4, 5, 7])


def test_nodes_beyond_the_last_slot_have_no_features():
    """Of graphs with more nodes than slots, which only debug mode refuses: they do not take those of the next sample."""
    S, N = 2, 3
    rank, weight = torch.randperm(N).expand(4, S, N).contiguous(), torch.rand(N, 4) + 1
    soft, ptr = [torch.zeros(4, S, N)] * 3, torch.tensor([0, 5, 8, 13, 18])
    found = launcher("node_identifiers", "forward")(ptr, rank, rank, *soft, 0.5, weight, 18)
    full, none = weight[rank[0, 0]], torch.zeros(2, 4)
    expected = torch.cat([full, none, full, full, none, full, none])
    assert torch.equal(found, expected[:, None].expand(18, S, 4))


def test_nodes_of_no_graph_have_no_features():
    """Before the first graph and after the last, which only a direct call can have."""
    rank, weight = torch.arange(3).expand(2, 2, 3), torch.rand(3, 4) + 1
    soft = [torch.zeros(2, 2, 3)] * 3
    found = launcher("node_identifiers", "forward")(torch.tensor([2, 4, 7]), rank, rank, *soft, 0.5, weight, 9)
    expected = torch.zeros(9, 4)
    expected[2:7] = weight[[0, 1, 0, 1, 2]]
    assert torch.equal(found, expected[:, None].expand(9, 2, 4))


@pytest.mark.parametrize(("B", "S", "nodes"), [(0, 3, 0), (2, 2, 0), (2, 0, 4)])
def test_node_identifiers_of_nothing(B, S, nodes):
    """No graphs; graphs without nodes; no samples."""
    ptr, rank = torch.tensor([0] + [nodes // 2] * (B > 0) + [nodes] * (B > 1)), torch.arange(4).expand(B, S, 4)
    soft = [torch.zeros(B, S, 4)] * 3
    check("node_identifiers", [ptr, rank, rank, *soft, 0.5, weights(4, 5).float(), nodes], [3, 4, 5, 7])
