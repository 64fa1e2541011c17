"""Ragged batches of graphs: from PyTorch Geometric, padded, summed, numbered."""

import re

import pytest
import torch

from probsym_fast.groups import Graphs
from tests.helpers.graphs import random_graphs

geometric = pytest.importorskip("torch_geometric.data")


def data(n: int, **more) -> "geometric.Data":
    u = torch.arange(n - 1)
    edges = torch.stack([torch.cat([u, u + 1]), torch.cat([u + 1, u])])
    return geometric.Data(x=torch.randn(n, 3), edge_index=edges, **more)


def test_from_a_batch():
    several = [
        data(n, key=10 * n, frame=torch.arange(n).flip(0), edge_attr=torch.randn(2 * n - 2, 4)) for n in (3, 1, 5)
    ]
    batch = Graphs.from_data(geometric.Batch.from_data_list(several))
    assert batch.size == 3 and batch.num_nodes.tolist() == [3, 1, 5] and batch.ptr.tolist() == [0, 3, 4, 9]
    assert batch.graph.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert batch.local.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert batch.key.tolist() == [30, 10, 50]
    assert batch.frame.tolist() == [2, 1, 0, 0, 4, 3, 2, 1, 0]
    assert torch.equal(batch.x, torch.cat([d.x for d in several]))
    assert torch.equal(batch.edge_index[:, 4:], several[2].edge_index + 4)
    assert batch.attributes is batch.edge_attr and batch.edge_attr.shape == (12, 4)
    assert batch.center is None and batch.dtype == torch.float32 and batch.device == torch.device("cpu")


@pytest.mark.parametrize("key", [7, torch.tensor(7), torch.tensor([7])])
def test_from_one_data(key):
    one = data(4, key=key)
    for batch in (Graphs.from_data(one), Graphs.from_data(geometric.Batch.from_data_list([one]))):
        assert batch.size == 1 and batch.ptr.tolist() == [0, 4]
        assert torch.equal(batch.key, torch.tensor([7]))
        assert batch.frame is None and batch.edge_attr is None
        assert torch.equal(batch.attributes, torch.ones(6, 1))
    assert Graphs.from_data(data(4)).key is None


def test_from_the_loader():
    from torch_geometric.loader import DataLoader

    (batch,) = map(Graphs.from_data, DataLoader([data(n, key=n) for n in (2, 3)], batch_size=2))
    assert batch.ptr.tolist() == [0, 2, 5] and batch.key.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "Graphs.from_data: x must be (nodes, C), got None"),
        ({"x": torch.ones(4, 1, 1)}, "Graphs.from_data: x must be (nodes, C), got (4, 1, 1)"),
        ({"edge_index": None}, "Graphs.from_data: edge_index must be (2, E), got None"),
        ({"edge_index": torch.ones(6, 2).long()}, "Graphs.from_data: edge_index must be (2, E), got (6, 2)"),
        ({"edge_attr": torch.ones(5)}, "Graphs.from_data: edge_attr must be (E, Ce) = (6, *), got (5, 1)"),
        ({"edge_attr": torch.ones(5, 2)}, "Graphs.from_data: edge_attr must be (E, Ce) = (6, *), got (5, 2)"),
    ],
)
def test_from_data_refuses(change, message):
    one = data(4)
    for name, value in change.items():
        setattr(one, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        Graphs.from_data(one)


EDGES = random_graphs([3, 1, 5]).edge_index.shape[1]
BAD_FIELDS = [
    ({"x": torch.ones(9)}, ValueError, "x must be (nodes, C), got (9,)"),
    ({"x": [[1.0]] * 9}, TypeError, "x must be a Tensor, got list"),
    ({"edge_index": None}, ValueError, "edge_index must be (2, E), got None"),
    ({"edge_index": torch.zeros(4, 2).long()}, ValueError, "edge_index must be (2, E), got (4, 2)"),
    ({"edge_index": torch.zeros(2, 4).int()}, TypeError, "edge_index must be an int64 Tensor, got torch.int32"),
    (
        {"edge_index": torch.zeros(2, 4).long().to("meta")},
        RuntimeError,
        "edge_index must be on cpu as the nodes are, got meta",
    ),
    ({"ptr": [0, 3, 4, 9]}, TypeError, "ptr must be an int64 Tensor, got list"),
    ({"ptr": torch.tensor([0.0, 3, 4, 9])}, TypeError, "ptr must be an int64 Tensor, got torch.float32"),
    ({"ptr": torch.tensor([[0, 3, 4, 9]])}, ValueError, "ptr must be (B + 1,), got (1, 4)"),
    ({"ptr": torch.zeros(0).long()}, ValueError, "ptr must be (B + 1,) with B >= 0, got (0,)"),
    ({"ptr": torch.tensor([1, 3, 4, 9])}, ValueError, "ptr must begin with 0, got 1"),
    ({"ptr": torch.tensor([0, 3, 4, 8])}, ValueError, "ptr must end with the number of nodes 9, got 8"),
    ({"ptr": torch.tensor([0, 5, 4, 9])}, ValueError, "ptr must not decrease, got ptr[1] = 5 and ptr[2] = 4"),
    ({"edge_attr": torch.ones(EDGES)}, ValueError, f"edge_attr must be (E, Ce) = ({EDGES}, *), got ({EDGES},)"),
    ({"edge_attr": torch.ones(1, 2)}, ValueError, f"edge_attr must be (E, Ce) = ({EDGES}, *), got (1, 2)"),
    ({"key": torch.arange(2)}, ValueError, "key must be (B,) = (3,), got (2,)"),
    ({"key": torch.arange(3.0)}, TypeError, "key must be an int64 Tensor, got torch.float32"),
    ({"frame": torch.arange(8)}, ValueError, "frame must be (nodes,) = (9,), got (8,)"),
    ({"frame": torch.arange(9).int()}, TypeError, "frame must be an int64 Tensor, got torch.int32"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_FIELDS)
def test_check_refuses(change, error, message):
    good = random_graphs([3, 1, 5]).replace(key=torch.arange(3), frame=torch.arange(9))
    good.check()
    with pytest.raises(error, match=f"^{re.escape(f'Graphs: {message}')}$"):
        good.replace(**change).check()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ptr": torch.tensor([0, 3])}, ValueError, "ptr must end with the number of nodes 4, got 3"),
        ({"key": torch.tensor([1, 2])}, ValueError, "key must be (B,) = (1,), got (2,)"),
        ({"frame": torch.arange(4.0)}, TypeError, "frame must be an int64 Tensor, got torch.float32"),
    ],
)
def test_from_data_checks_every_field(change, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'Graphs.from_data: {message}')}$"):
        Graphs.from_data(data(4, **change))


def test_check_compiles_and_reads_no_values():
    batch = random_graphs([3, 1, 5])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(x, edge_index, ptr):
        graphs = Graphs(x, edge_index, ptr)
        graphs.check()
        return graphs.x.sum()

    for ptr in (batch.ptr, batch.ptr + 1):
        assert total(batch.x, batch.edge_index, ptr) == batch.x.sum()


@pytest.mark.parametrize("N", [5, 8])
def test_padded(N):
    batch = random_graphs([3, 1, 5])
    values = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    padded = batch.padded(values, N)
    assert padded.shape == (3, 2, N)
    for b, (start, n) in enumerate(zip(batch.ptr.tolist(), batch.num_nodes.tolist(), strict=False)):
        assert torch.equal(padded[b, :, :n], values[start : start + n].T)
        assert (padded[b, :, n:] == 0).all()
    weight = torch.randn_like(padded)
    (found,) = torch.autograd.grad((padded * weight).sum(), values)
    assert torch.equal(found, weight[batch.graph, :, batch.local])
    assert torch.equal(batch.padded(torch.arange(9)[:, None], N)[1, 0, :2], torch.tensor([3, 0]))


def test_padded_refuses_larger_graphs():
    batch = random_graphs([3, 6, 5])
    with pytest.raises(ValueError, match="Graphs: a graph must have at most N = 5 nodes, got 6 in graph 1"):
        batch.padded(torch.zeros(14, 1), 5)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_pooled(shape):
    batch = random_graphs([3, 1, 5])
    values = torch.randn(9, *shape, dtype=torch.float64)
    expected = torch.stack([part.sum(0) for part in values.split([3, 1, 5])])
    assert (batch.pooled(values) - expected).abs().max() < 1e-12


def test_empty_graphs_and_no_graphs():
    batch = Graphs(torch.ones(3, 1), torch.zeros(2, 0).long(), torch.tensor([0, 0, 3, 3]))
    assert batch.num_nodes.tolist() == [0, 3, 0]
    assert batch.graph.tolist() == [1, 1, 1] and batch.local.tolist() == [0, 1, 2]
    assert batch.pooled(batch.x).flatten().tolist() == [0, 3, 0]
    assert batch.padded(batch.x, 4).sum(-1).flatten().tolist() == [0, 3, 0]
    none = Graphs(torch.ones(0, 1), torch.zeros(2, 0).long(), torch.tensor([0]))
    assert none.size == 0 and none.padded(none.x, 4).shape == (0, 1, 4) and none.pooled(none.x).shape == (0, 1)
