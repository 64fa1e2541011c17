"""embed and readout: tokens of nodes and of pairs of nodes, and values read from them."""

import pytest
import torch

from probsym_fast.ops._patches import patch_size
from probsym_fast.ops.triton import _lazy as launcher
from tests.helpers.items import batch, weights
from tests.ops.triton.inputs import axis_of, soft_arguments
from tests.ops.triton.interpreted.checks import check, in_dtypes

# patches that fit, that are padded, more places than slots, one token
GRIDS = [(6, 3, "zeros", False), (5, 2, "reflect", True), (3, 5, "circular", True), (4, 1, "zeros", False)]
GRIDS += [(5, 7, "replicate", True)]


@pytest.mark.parametrize(("dtype", "N", "grid", "pad_mode", "centered"), in_dtypes(*GRIDS))
@pytest.mark.parametrize("axes", [1, 2])
def test_embed(N, grid, pad_mode, centered, axes, dtype):
    data, P, D = batch([max(1, N - 2), N, 1], N, C=2, S=2, edges=4), patch_size(N, grid), 20
    items, values = (data.edges, data.attr) if axes == 2 else (torch.arange(len(data.x))[None], data.x)
    axis = axis_of(N, grid, pad_mode, centered)
    arguments = [items, values.to(dtype), *soft_arguments(data), *axis, weights(D, 2, *[P] * axes).to(dtype)]
    check("embed", [*arguments, torch.randn(D).to(dtype)], [1, 5, 6, 7, 12, 13])
    check("embed", [*arguments, None], [12])


@pytest.mark.parametrize("axes", [1, 2])
def test_embed_of_nothing(axes):
    """No graphs; graphs without nodes; no items; items that no graph has."""
    axis = axis_of(4, 2)
    weight, nothing = weights(5, 2, *[2] * axes).float(), torch.zeros(axes, 0, dtype=torch.int64)
    for B in (0, 2):
        rank, ptr = torch.arange(4).expand(B, 3, 4), torch.zeros(B + 1, dtype=torch.int64)
        rest = ptr, rank, rank, *[None] * 3, 1.0, *axis, weight, torch.randn(5)
        check("embed", [nothing, torch.zeros(0, 2), *rest], [1, 12, 13])
    outside = torch.tensor([[0, 7, -1]]).expand(axes, 3).contiguous()
    rank, ptr = torch.arange(4).expand(1, 3, 4), torch.tensor([0, 3])
    rest = ptr, rank, rank, *[None] * 3, 1.0, *axis, weight, None
    assert torch.equal(
        launcher("embed", "forward")(outside, torch.ones(3, 2), *rest),
        launcher("embed", "forward")(outside[:, :1], torch.ones(1, 2), *rest),
    )


@pytest.mark.parametrize(("dtype", "N", "grid", "centered"), in_dtypes((6, 3, False), (3, 4, True)))
@pytest.mark.parametrize("where", ["nodes", "diagonal", "pairs"])
def test_readout(N, grid, centered, where, dtype):
    data = batch([max(1, N - 2), N, 1], N, C=2, S=2, edges=4)
    nodes = torch.arange(len(data.x))
    items = {"nodes": nodes[None], "diagonal": torch.stack([nodes, nodes]), "pairs": data.edges}[where]
    axes, P, D, C = items.shape[0], patch_size(N, grid), 20, 18 if where == "nodes" else 3
    axis = axis_of(N, grid, centered=centered)
    tokens, weight = torch.randn(3, 2, grid**axes, D).to(dtype), weights(D, C, *[P] * axes).to(dtype)
    arguments = [tokens, items, *soft_arguments(data), *axis, weight]
    check("readout", [*arguments, torch.randn(C).to(dtype)], [0, 5, 6, 7, 12, 13])
    check("readout", [*arguments, None], [0])


@pytest.mark.parametrize(("S", "D"), [(2, 20), (19, 5), (3, 530)])
def test_readout_of_one_channel(S, D):
    """Fewer samples than a block, and more; several blocks and parts of the width."""
    data = batch([3, 1], 4, C=1, S=S, edges=3)
    axis, weight = axis_of(4, 3), weights(D, 1, 2).float()
    tokens = torch.randn(2, S, 3, D)
    arguments = [tokens, torch.arange(4)[None], *soft_arguments(data), *axis, weight]
    check("readout", [*arguments, torch.randn(1)], [0, 5, 6, 7, 12, 13])
    check("readout", [*arguments, None], [0])


@pytest.mark.parametrize("order", ["centered", "mixed"])
def test_pairs_read_one_by_one(order):
    """Of more graphs than a search compares at once, some without nodes; padding in front, and slots in no order."""
    ptr = torch.tensor([2, 0, 3, *[1] * 70]).cumsum(0)
    ptr, rank = torch.cat([ptr[:1] * 0, ptr]), torch.rand(73, 2, 4).argsort(-1)
    slots, most, grid = axis_of(4, 3, centered=True)
    if order == "mixed":
        slots = slots[torch.tensor([3, 0, 5, 2, 4, 1])]
    tokens, weight = torch.randn(73, 2, 9, 20), weights(20, 1, 2, 2).float()
    edges = torch.tensor([[0, 4, 2, 30, 74], [1, 2, 3, 30, 74]])
    soft = ptr, rank, rank, *[torch.zeros(73, 2, 4)] * 3, 0.5
    values = launcher("readout", "forward")(tokens, edges, *soft, slots, most, grid, weight, torch.ones(1))
    place = slots.argsort()[-4:]  # of slots 0 to 3
    for (u, v), value in zip(edges.T.tolist(), values[:, 0], strict=True):
        graph = int((ptr[1:] <= u).sum())
        first, expected = int(ptr[graph]), 0.0
        for s in range(2):
            p, q = int(place[rank[graph, s, u - first]]), int(place[rank[graph, s, v - first]])
            token, row = tokens[graph, s, p // 2 * 3 + q // 2], weight[:, 0, p % 2, q % 2]
            expected += float(token @ row) / 2
        assert abs(float(value) - 1 - expected) < 1e-4


@pytest.mark.parametrize("items", [0, 3])
def test_readout_of_nothing(items):
    B, nodes = (0, 0) if not items else (1, 3)
    rank, ptr = torch.arange(4).expand(B, 2, 4), torch.tensor([0] + [nodes] * B)
    soft = [torch.randn(B, 2, 4).sort(-1, descending=True)[0] * 0.1, torch.zeros(B, 2, 4), torch.zeros(B, 2, 4)]
    at = torch.zeros(2, 0, dtype=torch.int64)  # a graph of which nothing is read
    rest = ptr, rank, rank, *soft, 0.5, *axis_of(4, 2), weights(5, 3, 2, 2).float(), torch.randn(3)
    check("readout", [torch.randn(B, 2, 4, 5), at, *rest], [0, 5, 6, 7, 12, 13])


def test_many_entries_are_split(monkeypatch):
    """More pairs a weight row than one program sums, more samples than one matrix product holds, more places than a block."""
    data = batch([4, 4], 4, C=2, S=1, edges=40)
    axis, weight = axis_of(4, 1), weights(20, 2, 4, 4).float()
    arguments = [data.edges[:, :24], data.attr[:24].float(), *soft_arguments(data), *axis, weight, None]
    for name, value in (("items.SPLIT", 1), ("soft_rows.PRODUCTS", 4 * 16 * 2), ("soft_rows.PLACES", 2)):
        monkeypatch.setattr(f"probsym_fast.ops.triton.{name}", value)
    check("embed", arguments, [1, 5, 6, 7, 12])
