"""Networks of PyTorch Geometric as backbones: equal to a loop over samples, in a model, what is refused."""

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.models import IdentifiedNodes, MeanReadout, PyGBackbone
from tests.conftest import GRADIENT, assert_near
from tests.helpers.graphs import random_graphs

pyg = pytest.importorskip("torch_geometric.nn")

S, WIDTH, SIZES = 3, 8, [4, 1, 5]
GRAPHS = random_graphs(SIZES, edge_features=1)


class GPS(nn.Module):
    """Two layers of attention and message passing, then the mean of each graph."""

    def __init__(self):
        super().__init__()
        local = lambda: pyg.GINEConv(nn.Linear(WIDTH, WIDTH), edge_dim=1)  # noqa: E731
        kinds = {"heads": 2, "norm": "layer_norm", "attn_type": "multihead"}
        self.layers = nn.ModuleList(pyg.GPSConv(WIDTH, local(), **kinds) for _ in range(2))

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        for layer in self.layers:
            x = layer(x, edge_index, batch, edge_attr=edge_attr)
        return pyg.global_mean_pool(x, batch, batch_size)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = pyg.GraphConv(WIDTH, 3)

    def forward(self, x, edge_index, edge_weight=None):
        return self.layer(x, edge_index, edge_weight)


NETS = {  # network, settings, and how PyTorch Geometric calls it on one copy
    "GIN": (lambda: pyg.models.GIN(WIDTH, WIDTH, 2, 3), {}, lambda net, x, e, w, b: net(x, e)),
    "SAGE, mean": (
        lambda: pyg.models.GraphSAGE(WIDTH, WIDTH, 2, 3, norm="graph_norm"),
        {"pool": "mean"},
        lambda net, x, e, w, b: pyg.global_mean_pool(net(x, e, batch=b, batch_size=3), b),
    ),
    "GCN": (
        lambda: pyg.models.GCN(WIDTH, WIDTH, 2, 3),
        {},
        lambda net, x, e, w, b: net(x, e, edge_weight=w.abs()[:, 0]),
    ),
    "GAT": (lambda: pyg.models.GAT(WIDTH, WIDTH, 2, 3, edge_dim=1), {}, lambda net, x, e, w, b: net(x, e, edge_attr=w)),
    "GPS": (GPS, {"rows": "graphs"}, lambda net, x, e, w, b: net(x, e, w, b, 3)),
    "weights, sum": (Weighted, {"pool": "sum"}, lambda net, x, e, w, b: pyg.global_add_pool(net(x, e, w[:, 0]), b)),
    "Sequential": (
        lambda: pyg.Sequential("x, edge_index, batch", [(pyg.GCNConv(WIDTH, 3), "x, edge_index -> x")]),
        {"inputs": ("batch",)},
        lambda net, x, e, w, b: net(x, e, b),
    ),
}


@pytest.mark.parametrize("key", NETS)
def test_equals_a_loop_over_samples(key):
    make, settings, call = NETS[key]
    torch.manual_seed(0)
    net, batch = make().double().eval(), GRAPHS
    if key == "GCN":
        batch = batch.replace(edge_attr=batch.edge_attr.abs())
    backbone = PyGBackbone(net, **settings)
    x = torch.randn(sum(SIZES), S, WIDTH, dtype=torch.float64, requires_grad=True)
    y = backbone(x, batch)
    expected = torch.stack([call(net, x[:, s], batch.edge_index, batch.edge_attr, batch.graph) for s in range(S)], 1)
    graphs = "pool" in settings or "rows" in settings
    assert y.shape[:2] == (len(SIZES) if graphs else sum(SIZES), S)
    assert_near(y, expected)
    weight, inputs = torch.randn_like(y), [x, *net.parameters()]
    found, wanted = (torch.autograd.grad((some * weight).sum(), inputs) for some in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, GRADIENT)


@pytest.mark.parametrize("nodes", [False, True])
def test_a_model_of_it(nodes):
    """Outputs of graphs and of nodes: equivariant for given elements, in chunks, and with the reductions."""
    torch.manual_seed(0)
    net, batch = pyg.models.GIN(WIDTH, WIDTH, 2, 3), GRAPHS.replace(edge_attr=None)
    backbone = PyGBackbone(net, pool=None if nodes else "sum")
    embed, readout = IdentifiedNodes(5, WIDTH, 2), MeanReadout("nodes" if nodes else "graphs")
    group = psf.groups.Symmetric(5)
    model = psf.Symmetrized(backbone, embed, readout, psf.distributions.Uniform(group))
    model = model.double().eval()
    expected = model(batch, 6, seed=1)[0]
    assert expected.shape == (sum(SIZES) if nodes else len(SIZES), 3)
    assert_near(model(batch, 6, seed=1, reduce="none")[0].mean(0), expected)
    assert_near(model(batch, 6, seed=1, reduce="weighted", weights=torch.full((3, 6), 2.0).double())[0], expected)
    model.chunk = 2
    assert_near(model(batch, 6, seed=1)[0], expected)
    if nodes:
        errors = [psf.equivariance_error(model, batch, samples=samples, seed=0) for samples in (2, 64)]
        assert errors[1] < 0.5 * errors[0]


class Needs(nn.Module):
    def forward(self, x, edge_index, positions):
        return x


class One(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("net", "settings", "error", "message"),
    [
        (3, {}, TypeError, "net must be an nn.Module, got int"),
        (One(), {}, TypeError, "net must take x and edge_index, got One"),
        (Needs(), {}, TypeError, "net must take x, edge_index and of batch, .*, edge_attr, got also positions"),
        (Weighted(), {"rows": "edges"}, ValueError, "rows must be nodes or graphs, got 'edges'"),
        (Weighted(), {"pool": "max"}, ValueError, "pool must be one of mean, sum or None, got 'max'"),
        (Weighted(), {"rows": "graphs", "pool": "sum"}, ValueError, "pool must be None with rows 'graphs', got 'sum'"),
        (Weighted(), {"inputs": ["pos"]}, ValueError, "inputs must be among batch, .*, edge_attr, got 'pos'"),
    ],
)
def test_settings_that_are_refused(net, settings, error, message):
    with pytest.raises(error, match=f"^PyGBackbone: {message}$"):
        PyGBackbone(net, **settings)


def test_inputs_that_are_refused():
    x = torch.randn(sum(SIZES), S, WIDTH)
    with pytest.raises(
        ValueError, match=r"^PyGBackbone: the outputs of net must have 9 rows \(of graphs\), got \(30, 3\)$"
    ):
        PyGBackbone(Weighted(), rows="graphs")(x, GRAPHS.replace(edge_attr=GRAPHS.edge_attr.float()))
    with pytest.raises(ValueError, match=r"^PyGBackbone: edge_attr must have one channel as a weight, got "):
        PyGBackbone(Weighted())(x, random_graphs(SIZES, edge_features=2))
