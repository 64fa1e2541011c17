import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot as torch_one_hot

from probsym_fast.data import molecules
from probsym_fast.data.molecules import DEGREE, PCQM, PEPTIDES, one_hot
from probsym_fast.groups import Graphs

geometric = pytest.importorskip("torch_geometric")

KINDS = {"peptides": (PEPTIDES, 8, 151, 307.3, 15), "pcqm": (PCQM, 6, 30.14, 61.1, 1.5)}  # published means


@pytest.fixture(scope="module", params=KINDS)
def drawn(request):
    return request.param, molecules(2000, request.param, seed=1)


def test_sizes_are_near_the_published_ones(drawn):
    kind, graphs = drawn
    table, least, nodes, edges, deviation = KINDS[kind]
    n, e = graphs.ptr.diff().double(), graphs.edge_ptr.diff().double()
    assert len(graphs) == 2000
    assert least <= n.min() and n.max() <= table.nodes
    assert abs(n.mean() - nodes) < deviation / 2 and abs(e.mean() - edges) < deviation
    assert (table.node_channels, table.edge_channels) == {"peptides": (50, 8), "pcqm": (68, 7)}[kind]


def test_graphs_are_connected_and_simple(drawn):
    from torch_geometric.utils import contains_isolated_nodes, to_networkx

    networkx = pytest.importorskip("networkx")
    _, graphs = drawn
    for i in range(0, 2000, 100):
        g = graphs[i]
        assert g.validate() and g.is_undirected() and not g.has_self_loops()
        assert len(g.edge_index.unique(dim=1).T) == g.num_edges
        assert not contains_isolated_nodes(g.edge_index, g.num_nodes)
        assert networkx.is_connected(to_networkx(g, to_undirected=True))
    rings = graphs.edge_ptr.diff() // 2 - (graphs.ptr.diff() - 1)
    assert (rings >= 0).all() and 0.5 < rings.double().mean() < 5


def test_features_fill_their_ranges(drawn):
    kind, graphs = drawn
    table = KINDS[kind][0]
    for column, values in enumerate(table.node):
        found = torch.bincount(graphs.x[:, column].long())
        assert len(found) <= values
        if column != DEGREE:
            assert len(found) == values and (found > 0).all()
    for column, values in enumerate(table.edge):
        assert (torch.bincount(graphs.edge_attr[:, column].long()) > 0).sum() == values
    assert torch.equal(graphs.edge_attr[::2], graphs.edge_attr[1::2])  # both directions of a bond
    batch = graphs[torch.arange(50)]
    first = sum(table.node[:DEGREE])
    degree = batch.x[:, first : first + table.node[DEGREE]].argmax(1)
    assert torch.equal(degree, torch.bincount(batch.edge_index[0], minlength=len(batch.x)))


def test_labels_are_random():
    binary, real = molecules(500, seed=2), molecules(500, seed=2, labels="real")
    assert binary.y.shape == (500, 10) and set(binary.y.unique().tolist()) == {0.0, 1.0}
    assert (binary.y.mean(0) - 0.5).abs().max() < 0.15
    assert real.y.shape == (500, 11) and real.y.mean(0).abs().max() < 0.25 and (real.y.std(0) - 1).abs().max() < 0.2
    assert torch.equal(binary.x, real.x)


def test_contacts():
    graphs = molecules(300, "pcqm", seed=3)
    for i in range(300):
        g = graphs[i]
        i, j = g.edge_label_index
        assert g.edge_label_index.max() < g.num_nodes and g.edge_label.shape == i.shape
        assert len(g.edge_label_index.unique(dim=1).T) == len(i)
        positive = g.edge_label == 1
        assert positive.any() and ((i - j).abs()[positive] >= 5).all()
        pairs = {*zip(i[positive].tolist(), j[positive].tolist(), strict=True)}
        assert pairs == {(b, a) for a, b in pairs}
        assert set(i[~positive].tolist()) <= set(i[positive].tolist())


def test_a_seed_gives_the_same_graphs():
    first, again, other = (molecules(20, "pcqm", seed=s)[torch.arange(20)].to_dict() for s in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["ptr"], other["ptr"])


@pytest.mark.parametrize(
    "index",
    [torch.tensor([5, 0, 17, 5]), [3], slice(2, 40, 3), torch.arange(40) % 4 == 1, torch.tensor([], dtype=torch.int64)],
)
def test_batch_is_what_torch_geometric_collates(drawn, index):
    graphs = molecules(40, drawn[0], seed=6)
    numbers = torch.arange(40)[index].tolist()
    batch = graphs[index]
    if not numbers:
        assert batch.x.shape == (0, graphs.table.node_channels) and batch.ptr.tolist() == [0]
        return
    expected = geometric.data.Batch.from_data_list([graphs[i] for i in numbers])
    for name in expected.keys():
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == expected[name].dtype
    assert sorted(batch.keys()) == sorted(expected.keys())
    assert batch.key.tolist() == numbers
    read = Graphs.from_data(batch)
    assert read.num_nodes.tolist() == [graphs[i].num_nodes for i in numbers] and torch.equal(read.key, batch.key)


def test_items():
    graphs = molecules(4, seed=7)
    for i in (1, np.int64(1), -3):
        item = graphs[i]
        assert item.x.shape[1] == 50 and item.edge_attr.shape[1] == 8 and item.y.shape == (1, 10)
        assert item.key.tolist() == [1] and torch.equal(item.x, graphs[[1]].x)
    assert len([*graphs]) == 4
    for i in (4, -5):
        with pytest.raises(IndexError, match=rf"MolecularGraphs: index must be in -4..3, got {i}"):
            graphs[i]


def test_one_hot():
    values = (3, 1, 4)
    features = torch.tensor([[2, 0, 3], [0, 0, 1]], dtype=torch.uint8)
    expected = torch.cat([torch_one_hot(features[:, k].long(), v) for k, v in enumerate(values)], 1).float()
    assert torch.equal(one_hot(features, values), expected)
    assert torch.equal(one_hot(features, values, present=True), torch.cat([torch.ones(2, 1), expected], 1))
    assert one_hot(features[:0], values).shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1, "kind": "water"}, r"molecules: kind must be one of \['peptides', 'pcqm'\], got 'water'"),
        ({"count": 0}, "molecules: count must be at least 1 and seed in .*, got 0 and 0"),
        ({"count": 1, "seed": -1}, "molecules: count must be at least 1 and seed in .*, got 1 and -1"),
        (
            {"count": 1, "labels": "none"},
            "molecules: labels must be binary, or real for peptides, got 'none' for peptides",
        ),
        (
            {"count": 1, "kind": "pcqm", "labels": "real"},
            "labels must be binary, or real for peptides, got 'real' for pcqm",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        molecules(**arguments)
