"""What graphs read of PyTorch Geometric's data: every field that has a meaning is read or refused."""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves

from probsym_fast.groups import Graphs, PointClouds

geometric = pytest.importorskip("torch_geometric.data")
HyperGraphData = pytest.importorskip("torch_geometric.data.hypergraph_data").HyperGraphData
FakeDataset = pytest.importorskip("torch_geometric.datasets").FakeDataset
FIRST, SECOND = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([[0, 1], [1, 0]])
EDGES = torch.cat([FIRST, SECOND + 3], 1)  # of two graphs, 3 and 2 nodes


def data(**fields) -> "geometric.Data":
    """Two graphs as one Data, without ptr and batch."""
    return geometric.Data(**{"x": torch.randn(5, 2), "edge_index": EDGES, **fields})


def test_graphs_told_apart_by_batch_alone():
    batch = torch.tensor([0, 0, 0, 1, 1])
    graphs = Graphs.from_data(data(batch=batch, key=torch.tensor([7, 8])))
    assert graphs.ptr.tolist() == [0, 3, 5] and graphs.key.tolist() == [7, 8]
    assert torch.equal(graphs.graph, batch)
    assert Graphs.from_data(data(batch=2 * batch)).num_nodes.tolist() == [3, 0, 2]  # a graph without nodes
    assert Graphs.from_data(data()).ptr.tolist() == [0, 5]
    two = [
        geometric.Data(x=torch.randn(3, 2), edge_index=FIRST),
        geometric.Data(x=torch.randn(0, 2), edge_index=FIRST[:, :0]),
    ]
    whole = geometric.Batch.from_data_list(two)
    del whole.ptr
    assert Graphs.from_data(whole).ptr.tolist() == [0, 3, 3]  # the last graph has no nodes
    none = geometric.Data(x=torch.ones(0, 1), edge_index=FIRST[:, :0], batch=torch.zeros(0, dtype=torch.int64))
    assert Graphs.from_data(none).size == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_features_of_any_dtype_with_or_without_a_channel_axis(dtype, default):
    x, attr = torch.tensor([0, 1, 1, 0, 1]).to(dtype), torch.tensor([1, 1, 0, 0, 1, 1]).to(dtype)
    torch.set_default_dtype(default)
    try:
        found = Graphs.from_data(data(x=x, edge_attr=attr))
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = dtype if dtype.is_floating_point else default
    assert torch.equal(found.x, x[:, None].to(wanted)) and found.x.dtype == wanted
    assert torch.equal(found.edge_attr, attr[:, None].to(wanted)) and found.edge_attr.dtype == wanted


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_edge_weight_is_edge_attr(shape):
    weight = torch.randn(shape)
    found = Graphs.from_data(data(edge_weight=weight))
    assert torch.equal(found.edge_attr, weight.view(6, 1)) and torch.equal(found.attributes, found.edge_attr)


ADJACENCY = torch.sparse_coo_tensor(EDGES.flip(0), torch.arange(6.0), (5, 5), check_invariants=True).coalesce()
REFUSED = [
    (
        {"batch": torch.tensor([0, 1, 0, 1, 1])},
        ValueError,
        "batch must not decrease, got batch[1] = 1 and batch[2] = 0; sort the nodes by graph",
    ),
    ({"batch": torch.tensor([-1, 0, 0, 1, 1])}, ValueError, "batch must be at least 0, got -1"),
    ({"batch": torch.zeros(4).long()}, ValueError, "batch must be (nodes,) = (5,), got (4,)"),
    ({"batch": torch.zeros(5).int()}, TypeError, "batch must be an int64 Tensor, got torch.int32"),
    ({"batch": [0] * 5}, TypeError, "batch must be an int64 Tensor, got list"),
    (
        {"batch": torch.zeros(5).long().to("meta")},
        RuntimeError,
        "batch must be on cpu as the nodes are, got meta",
    ),
    (
        {"batch": torch.tensor([0, 0, 1, 1, 1]), "ptr": torch.tensor([0, 3, 5])},
        ValueError,
        "batch must agree with ptr, got batch[2] = 1 in graph 0",
    ),
    (
        {"edge_attr": torch.ones(6, 2), "edge_weight": torch.ones(6)},
        ValueError,
        "edge_attr or edge_weight must be None, got both;"
        " join them as edge_attr = torch.cat([edge_attr, edge_weight[:, None]], 1)",
    ),
    ({"edge_weight": torch.ones(6, 2)}, ValueError, "edge_weight must be (E,) = (6,), got (6, 2)"),
    ({"edge_weight": torch.ones(5)}, ValueError, "edge_weight must be (E,) = (6,), got (5,)"),
    (
        {"adj_t": ADJACENCY},
        ValueError,
        "adj_t must be None, as it is not read, got (5, 5);"
        " read it with edge_index, edge_attr = torch_geometric.utils.to_edge_index(data.adj_t.t())",
    ),
    (
        {"edge_type": torch.zeros(6).long()},
        ValueError,
        "edge_type must be None, as it is not read, got (6,);"
        " pass it as edge_attr, for example torch.nn.functional.one_hot(data.edge_type)",
    ),
    (
        {"node_type": torch.zeros(5).long()},
        ValueError,
        "node_type must be None, as it is not read, got (5,);"
        " pass it as x, for example torch.nn.functional.one_hot(data.node_type)",
    ),
    ({"num_nodes": 7}, ValueError, "num_nodes must equal the 5 rows of x, got 7"),
    (
        {"x": None, "pos": torch.randn(5, 3), "z": torch.ones(5).long()},
        ValueError,
        "x must be (nodes, C), got None; the data hold edge_index, pos, z",
    ),
    (
        {"edge_index": None, "face": torch.zeros(3, 2).long()},
        ValueError,
        "edge_index must be (2, E), got None; the data hold face, x",
    ),
    (
        {"x": torch.tensor([1, 2, 2**24 + 1, 0, 0])},
        ValueError,
        "x must be integers that torch.float32 holds exactly, got 16777217",
    ),
    (
        {"edge_attr": torch.full((6,), 2**40 + 1)},
        ValueError,
        "edge_attr must be integers that torch.float32 holds exactly, got 1099511627777",
    ),
    ({"x": torch.ones(5, 2).to_sparse()}, TypeError, "x must be a dense Tensor, got torch.sparse_coo"),
    ({"edge_attr": torch.ones(6) * 1j}, TypeError, "edge_attr must be real, got torch.complex64"),
    ({"x": [[1.0]] * 5}, TypeError, "x must be a Tensor, got list"),
    ({"edge_attr": [1.0] * 6}, TypeError, "edge_attr must be a Tensor, got list"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED)
def test_fields_that_are_refused(fields, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'Graphs.from_data: {message}')}$"):
        Graphs.from_data(data(**fields))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
def test_the_way_out_of_adj_t(layout):
    from torch_geometric.utils import to_edge_index

    edge_index, edge_attr = to_edge_index(getattr(ADJACENCY, layout)().t())
    found = Graphs.from_data(data(edge_index=edge_index, edge_attr=edge_attr))
    given = data(edge_weight=torch.arange(6.0))
    assert torch.equal(found.matrix(found.edge_attr, 5), Graphs.from_data(given).matrix(torch.arange(6.0)[:, None], 5))


def test_other_things_than_one_graph():
    hetero = geometric.HeteroData()
    hetero["atom"].x, hetero["atom", "bond", "atom"].edge_index = torch.ones(3, 2), FIRST
    one = data()
    join = "join the graphs with torch_geometric.data.Batch.from_data_list"
    kinds = "call batch.to_homogeneous() and pass the node and edge types as features"
    for given, message in (
        ([one, one], f"batch must be one Data or Batch, got list of 2; {join}"),
        ((one,), f"batch must be one Data or Batch, got tuple of 1; {join}"),
        (hetero, f"batch must have one kind of nodes and edges, got HeteroData; {kinds}"),
        (
            geometric.Batch.from_data_list([hetero]),
            f"batch must have one kind of nodes and edges, got HeteroDataBatch; {kinds}",
        ),
        (
            FakeDataset(3),
            "batch must be one Data or Batch, got the data set FakeDataset of 3; take one graph, or join them with "
            "torch_geometric.data.Batch.from_data_list(list(dataset))",
        ),
        (HyperGraphData(x=one.x), "batch must have edges between two nodes, got HyperGraphData"),
        (data(key="a"), "key must be one int64 number per graph, got 'a'"),
        (data(key=2**70), f"key must be one int64 number per graph, got {2**70}"),
        (data(edge_weight=[1.0] * 6), "edge_weight must be a Tensor, got list"),
        ({"x": one.x}, "batch must be a Data or Batch of PyTorch Geometric, got dict"),
        (one.x, "batch must be a Data or Batch of PyTorch Geometric, got Tensor"),
        (None, "batch must be a Data or Batch of PyTorch Geometric, got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(f'Graphs.from_data: {message}')}$"):
            Graphs.from_data(given)
    with pytest.raises(ValueError, match="edge_type must be None"):  # types are not lost on the way out either
        Graphs.from_data(hetero.to_homogeneous())


def graphs() -> Graphs:
    fields = {"edge_attr": torch.randn(6, 3), "key": torch.arange(2), "frame": torch.arange(5)}
    return Graphs(torch.randn(5, 2), EDGES, torch.tensor([0, 3, 5]), pairs=EDGES, **fields)


def clouds() -> PointClouds:
    return PointClouds(torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(2, 4, 4, 1))


@pytest.mark.parametrize("make", [graphs, clouds])
def test_a_dtype_touches_floats_only(make):
    batch = make()
    for where in ((torch.float64,), ("cpu", torch.float64), (torch.zeros(1, dtype=torch.float64),)):
        found = batch.to(*where)
        found.check()
        assert type(found) is type(batch) and found.dtype == torch.float64
        for before, after in zip(tree_leaves(batch), tree_leaves(found), strict=True):
            assert after.dtype == (torch.float64 if before.is_floating_point() else torch.int64)
            assert torch.equal(after, before.to(after.dtype))
    found = batch.to(device="meta", dtype=torch.bfloat16, non_blocking=True)
    assert all(x.device.type == "meta" for x in tree_leaves(found)) and found.dtype == torch.bfloat16
    assert all(x is y for x, y in zip(tree_leaves(batch.to("cpu")), tree_leaves(batch), strict=True))
    name = type(batch).__name__
    with pytest.raises(TypeError, match=rf"^{name}\.to: dtype must be floating point, got torch\.int64$"):
        batch.to(torch.int64)
    with pytest.raises(TypeError, match=rf"^{name}\.to: must be a device, a dtype or a Tensor, got float 1\.5$"):
        batch.to(1.5)


def test_fields_that_are_not_there_stay_so():
    some = Graphs(torch.ones(2, 1), SECOND, torch.tensor([0, 2])).to(torch.float16)
    assert some.x.dtype == torch.float16 and some.edge_attr is None and some.pairs is None


@pytest.mark.parametrize("make", [graphs, clouds])
def test_pinned_memory(make, gpu):
    batch = make()
    found = batch.pin_memory()
    assert type(found) is type(batch) and all(x.is_pinned() for x in tree_leaves(found))
    moved = found.to(gpu, non_blocking=True)
    for before, after in zip(tree_leaves(batch), tree_leaves(moved), strict=True):
        assert after.device.type == "cuda" and torch.equal(after.cpu(), before)


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"^Graphs.from_data: num_nodes must equal the 5 rows of x, got 4$"):
        Graphs.from_data(data(num_nodes=torch.tensor(4)))
    with pytest.raises(ValueError, match=r"^Graphs.from_data: x must be \(nodes, C\), got \(\)$"):
        Graphs.from_data(data(x=torch.tensor(1.0)))
    for key in (-1, 2**43):
        with pytest.raises(ValueError, match=rf"^Graphs.from_data: key must be in 0..2\^43 - 1, got {key}$"):
            Graphs.from_data(data(key=key))
