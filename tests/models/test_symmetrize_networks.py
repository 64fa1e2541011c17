"""Networks that `symmetrize` finds by what they take: masks, batches that are padded later, models of other libraries."""

import re

import pytest
import torch
from torch import nn
from torch_geometric.nn.models import GCN

import probsym_fast as psf
from probsym_fast.models import Folded
from tests.conftest import assert_near
from tests.models.test_symmetrize import E3, S6, SetNetwork, SetOfPoints, encoder, graphs, mlp


def dense(**fields) -> psf.PointClouds:
    return psf.PointClouds(torch.randn(2, 5, 3), **fields)


class OnPairs(nn.Module):
    """Points and features of pairs."""

    def __init__(self):
        super().__init__()
        self.net = mlp(4, 2)

    def forward(self, x, edges, mask):
        h = torch.cat([x, (edges * mask[:, None, :, None]).sum(2)], -1)
        return (self.net(h) * mask[..., None]).sum(1)


class Longest(nn.Module):
    """Takes numbers of points, by keyword only."""

    def forward(self, x, *, lengths):
        return x.square().sum((1, 2))[:, None] / lengths[:, None]


def test_masks_without_a_default_are_given():
    """All tokens are valid where none is padded."""
    x, edges = torch.randn(2, 3, 5, 3), torch.randn(2, 1, 5, 5, 1)
    flat, every = x.flatten(0, 1), torch.ones(6, 5, dtype=torch.bool)
    net = SetOfPoints()
    assert_near(Folded(net)(x).flatten(0, 1), net(flat, every))
    assert_near(Folded(net)(x, torch.ones(2, 1, 5)), Folded(net)(x))  # given by position
    net = OnPairs()
    assert_near(Folded(net)(x, edges).flatten(0, 1), net(flat, edges.expand(2, 3, 5, 5, 1).flatten(0, 1), every))
    assert_near(Folded(Longest())(x).flatten(), flat.square().sum((1, 2)) / 5)


@pytest.mark.parametrize("make", [SetOfPoints, Longest, lambda: encoder(), lambda: encoder(False), lambda: mlp(3, 2)])
@pytest.mark.parametrize("first", ["dense", "padded"])
def test_dense_and_padded_clouds_in_one_model(make, first):
    """Whatever the example was. A padded cloud is as the cloud without its padding."""
    torch.manual_seed(0)
    counts = torch.tensor([3, 5])
    batch = dense() if first == "dense" else dense(num_nodes=counts)
    net = make()
    settings = {"out_features": 2} if isinstance(net, nn.TransformerEncoder) else {}
    model = psf.symmetrize(net, E3, batch, distribution="none", **settings).eval()
    padded = batch.replace(num_nodes=counts)
    y = model(padded)[0]
    alone = psf.PointClouds(batch.positions[:1, :3])
    assert_near(model(alone)[0], y[:1])
    assert_near(model(batch.replace(num_nodes=None))[0][1], y[1])


def test_pairs_of_dense_and_padded_clouds():
    batch = dense(edges=torch.randn(2, 5, 5, 1))
    model = psf.symmetrize(OnPairs(), E3, batch, distribution="none").eval()
    y = model(batch.replace(num_nodes=torch.tensor([3, 5])))[0]
    alone = psf.PointClouds(batch.positions[:1, :3], edges=batch.edges[:1, :3, :3])
    assert_near(model(alone)[0], y[:1])
    assert_near(model(batch)[0][1], y[1])


class DeepSet(nn.Module):
    """Its first linear map has as many inputs as all points have values."""

    def __init__(self):
        super().__init__()
        self.head, self.points = nn.Linear(15, 1), nn.Linear(3, 15)

    def forward(self, x):
        return self.head(self.points(x).sum(-2))


def test_the_choice_of_tokens_is_in_the_error():
    message = "; symmetrize chose tokens='flat', others are 'nodes', 'pairs'"
    with pytest.raises(ValueError, match=re.escape(message)):
        psf.symmetrize(DeepSet(), E3, dense())
    assert psf.symmetrize(DeepSet(), E3, dense(), tokens="nodes")(dense(), 2)[0].shape == (2, 1)
    with pytest.raises(ValueError) as found:
        psf.symmetrize(DeepSet(), E3, dense(), tokens="flat")
    assert "symmetrize chose" not in str(found.value)


def test_bare_models_of_other_libraries_on_graphs():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):
        net = timm.create_model(name, **sizes)
        message = r"^symmetrize: net must be made by timm_backbone\(model, grid=\.\.\.\) for Graphs, got "
        for settings in ({}, {"tokens": "patches"}):
            with pytest.raises(ValueError, match=message + type(net).__name__):
                psf.symmetrize(net, S6, graphs(), out_features=2, **settings)
        made = psf.models.timm_backbone(net, grid=3)
        assert psf.symmetrize(made, S6, graphs(), out_features=2)(graphs(), 2)[0].shape == (2, 2)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    net = transformers.BertModel(transformers.BertConfig(vocab_size=5, **small))
    with pytest.raises(
        ValueError, match=r"net must be made by hf_backbone\(name, tokens=\.\.\.\) for Graphs, got BertModel"
    ):
        psf.symmetrize(net, S6, graphs())


def test_edges_with_channels_that_a_gnn_does_not_take():
    batch = graphs()
    batch = batch.replace(edge_attr=torch.randn(batch.edge_index.shape[1], 4))
    net = GCN(8, 8, 2, out_channels=2)
    with pytest.raises(ValueError, match=re.escape("(20, 4); PyGBackbone(net, inputs=()) leaves it out")):
        psf.symmetrize(net, S6, batch)
    net = psf.models.PyGBackbone(net, inputs=(), pool="sum")
    assert psf.symmetrize(net, S6, batch)(batch, 2)[0].shape == (2, 2)


def test_empty_clouds_of_a_network_with_a_mask():
    model = psf.symmetrize(
        SetNetwork(), E3, psf.PointClouds(torch.randn(2, 5, 3), features=torch.randn(2, 5, 2))
    ).eval()
    none = psf.PointClouds(torch.zeros(0, 5, 3), features=torch.zeros(0, 5, 2))
    assert model(none, samples=2)[0].shape == (0, 2)
