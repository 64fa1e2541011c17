"""Embeddings and readouts of point clouds with features, without velocities or edges, and padded."""

import re

import pytest
import torch
from torch import nn

from probsym_fast import Symmetrized, equivariance_error
from probsym_fast.distributions import Identity, Learned, Uniform, VectorNeurons
from probsym_fast.groups import Euclidean, PointClouds, Symmetric
from probsym_fast.models import (
    LayoutReadout,
    NodeReadout,
    NodeVectors,
    PairTokens,
    PooledReadout,
    Transformer,
    fuse,
)

N, S, F = 6, 4, 3
GROUPS = [Euclidean(3), Symmetric(N) * Euclidean(3)]


def clouds(counts=(2, 6, 4), n: int = N, dtype=torch.float64) -> PointClouds:
    torch.manual_seed(3)
    fields = [torch.randn(sum(counts), width, dtype=dtype) for width in (3, F)]
    ptr = torch.tensor([0, *counts]).cumsum(0)
    batch = PointClouds(fields[0], features=fields[1], ptr=ptr)
    more = n - batch.positions.shape[1]
    pad = {name: nn.functional.pad(getattr(batch, name), (0, 0, 0, more)) for name in ("positions", "features")}
    return batch.replace(**pad)


def molecules(readout: nn.Module, group, out: int, **settings) -> Symmetrized:
    torch.manual_seed(5)
    backbone = Transformer(3 + F, width=8, layers=2, heads=2, feedforward=8, tokens=None, out_features=out)
    return Symmetrized(backbone.double(), NodeVectors(lengths=True), readout, Uniform(group), **settings).eval()


def test_what_the_backbone_gets():
    batch, group = clouds(), Symmetric(N) * Euclidean(3)
    g = group.uniform(batch, S)
    x, lengths = NodeVectors(lengths=True)(batch, group, g)
    assert x.shape == (3, S, N, 3 + F) and lengths.tolist() == [[2] * S, [6] * S, [4] * S]
    valid = batch.valid[:, None].expand(3, S, N)
    assert not x[~valid].any()
    points = group.act(g, batch.positions, "np", inverse=True)
    assert torch.equal(x[..., :3][valid], points[valid])
    features = batch.features[:, None].expand(-1, S, -1, -1).take_along_dim(g[0].order[..., None], 2)
    assert torch.equal(x[..., 3:], features)
    whole = batch.replace(num_nodes=None, edges=torch.randn(3, N, N, 1), velocities=batch.positions)
    x, edges, lengths = NodeVectors(lengths=True)(whole, group, g)
    assert x.shape == (3, S, N, 6 + F) and edges.shape == (3, S, N, N, 1) and (lengths == N).all()
    (tokens,) = PairTokens()(whole, group, g)
    assert torch.equal(tokens.view(3, S, N, N, -1).diagonal(dim1=2, dim2=3)[..., :-1, :].mT, x)
    (alone,) = PairTokens()(whole.replace(edges=None), group, g)
    assert torch.equal(alone, tokens[..., :-1])


def test_padding_that_a_backbone_would_ignore_is_refused():
    batch, group = clouds(), Euclidean(3)
    message = "num_nodes must be None (every node counts as valid), got (3,)"
    for embed, way_out in ((NodeVectors(), "; for a backbone that takes lengths set lengths=True"), (PairTokens(), "")):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{type(embed).__name__}: {message}{way_out}')}$"):
            embed(batch, group, group.uniform(batch, S))
    with pytest.raises(ValueError, match=re.escape("PooledReadout: pool must be one of ('sum', 'mean'), got 'max'")):
        PooledReadout("max")
    with pytest.raises(TypeError, match=re.escape("NodeVectors: lengths must be a bool, got int")):
        NodeVectors(lengths=1)


READOUTS = [
    (NodeReadout(displacement=True), 3),
    (LayoutReadout("nc"), 2),
    (PooledReadout(), 2),
    (PooledReadout("mean"), 2),
]


@pytest.mark.parametrize(("readout", "out"), READOUTS, ids=lambda x: str(x))
@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_padding_changes_nothing(readout, out, group):
    """More of it, and NaN in it, gives the same predictions and gradients; each cloud alone has its own."""
    batch = clouds()
    model = molecules(readout, group, out)
    g = group.identity(batch, S)
    x = batch.positions.clone().requires_grad_()
    y = model.apply_elements(batch.replace(positions=x), g)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.shape[0] == 3 and not grad[~batch.valid].any()
    if readout.layout != "c":
        assert not y[~batch.valid].any()
    batch.positions[~batch.valid] = batch.features[~batch.valid] = torch.nan
    x = batch.positions.clone().requires_grad_()
    again = model.apply_elements(batch.replace(positions=x), g)
    assert torch.equal(again, y) and torch.equal(torch.autograd.grad(again.square().sum(), x)[0], grad)
    wide, wider = clouds(n=9), Symmetric(9) * Euclidean(3) if group is GROUPS[1] else group
    y9 = molecules(readout, wider, out).apply_elements(wide, wider.identity(wide, S))
    assert torch.allclose(y9[:, :N] if readout.layout != "c" else y9, y, atol=1e-12)
    one = PointClouds(batch.positions[2:, :4], features=batch.features[2:, :4])
    alone = Symmetrized(model.backbone, NodeVectors(), readout, Identity(Euclidean(3)))
    y1 = alone.apply_elements(one, Euclidean(3).identity(one, S))
    assert torch.allclose(y1[0], y[2, :4] if readout.layout != "c" else y[2], atol=1e-12)


@pytest.mark.parametrize(("readout", "out"), READOUTS, ids=lambda x: str(x))
def test_equivariance(readout, out):
    """To permutations, whatever the samples: the backbone has no positions of tokens."""
    assert equivariance_error(molecules(readout, Symmetric(N), out), clouds(), samples=1) < 1e-10


def test_a_fused_encoder_takes_the_lengths():
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, nn.GELU(), batch_first=True, norm_first=True, dtype=torch.float64)
    encoder = fuse(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    batch, group = clouds(), Euclidean(3)
    model = Symmetrized(encoder, NodeVectors(lengths=True), PooledReadout(), Uniform(group))
    y = model(batch, S, seed=0)[0]
    batch.positions[~batch.valid] = torch.nan
    assert torch.equal(model(batch, S, seed=0)[0], y) and y.shape == (3, 6)


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_forces_of_padded_clouds(pool):
    """Trained by the gradient of the energy: against finite differences, with the kernel and with the modules."""
    batch, group = clouds(), Euclidean(3)
    model = molecules(PooledReadout(pool), group, 1)
    p = model.backbone.blocks[0].up.weight
    found = []
    for one_pass in (True, False):
        model.backbone.one_pass = one_pass

        def loss(model=model):
            x = batch.positions.clone().requires_grad_()
            energy, _ = model(batch.replace(positions=x), S, seed=1)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            return force.square().sum()

        (grad,) = torch.autograd.grad(loss(), p)
        found.append(grad)
        direction, step = torch.ones_like(p), 1e-5
        values = []
        for change in (step, -2 * step):
            with torch.no_grad():
                p.add_(direction, alpha=change)
            values.append(loss().detach())
        with torch.no_grad():
            p.add_(direction, alpha=step)
        assert torch.allclose((grad * direction).sum(), (values[0] - values[1]) / (2 * step), rtol=1e-6)
    assert torch.allclose(found[0], found[1], atol=1e-10)


def test_chunks_and_reductions():
    batch, group = clouds(), Symmetric(N) * Euclidean(3)
    model = molecules(LayoutReadout("nc"), group, 2)
    y = model(batch, S, seed=0)[0]
    model.chunk = 1
    assert torch.allclose(model(batch, S, seed=0)[0], y)
    each = model(batch, S, seed=0, reduce="none")[0]
    assert each.shape == (S, 3, N, 2) and torch.allclose(each.mean(0), y)


def test_chunks_of_learned_elements():
    """The backward pass computes padded Vector Neurons again, layer by layer."""
    batch, group = clouds(), Symmetric(N) * Euclidean(3)
    network = VectorNeurons(channels=1, width=4, features=F, dropout=0.0).double()
    model = molecules(LayoutReadout("nc"), group, 2)
    model.distribution, found = Learned(group, network, tau=0.1), []
    for chunk in (None, 1):
        model.chunk = chunk
        y, penalties = model.train()(batch, S, seed=0)
        loss = y.square().sum() + sum(penalties.values())
        found.append([y, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-9 * max(1.0, float(one.detach().abs().max())))
