"""The distributions that `symmetrize` makes: what trains them, their dtypes, canonicalization by finite groups."""

import pytest
import torch
from torch import nn
from torch_geometric.nn.models import GIN

import probsym_fast as psf
from probsym_fast.distributions import Energy
from tests.models.test_symmetrize import E3, S6, encoder, graphs, mlp, vit

D4, C4 = psf.groups.Dihedral(4), psf.groups.Cyclic(4)
INVERSION = psf.groups.Finite.generated({"vp": -torch.eye(3)[None]})
ROTATIONS = psf.groups.SpecialOrthogonal(2)


def points(d: int = 3, counts=None) -> psf.PointClouds:
    return psf.PointClouds(torch.randn(4, 5, d), num_nodes=counts)


def padded() -> psf.PointClouds:
    return points(3, torch.tensor([3, 5, 4, 2]))


def images() -> psf.Images:
    return psf.Images(torch.randn(3, 3, 8, 8))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


# name -> (network, group, batch, settings, what trains p(g|x))
CHOICES = {
    "clouds, finite": (lambda: mlp(10, 2), D4, lambda: points(2), {}, "loss"),
    "clouds, finite, of one's own": (lambda: mlp(15, 2), INVERSION, points, {}, "loss"),
    "clouds, finite, padded": (lambda: mlp(3, 2), INVERSION, padded, {}, "loss"),
    "clouds, finite, vectors": (lambda: mlp(2, 2), D4, lambda: points(2), {"output": "vectors"}, "loss"),
    "clouds, two finite": (lambda: mlp(10, 2), C4 * psf.groups.Cyclic(5, "n"), lambda: points(2), {}, "loss"),
    "clouds, finite, canonical": (lambda: mlp(10, 2), D4, lambda: points(2), {"distribution": "canonical"}, "prior"),
    "clouds, two finite, canonical": (
        *(
            lambda: mlp(10, 2),
            C4 * psf.groups.Cyclic(5, "n"),
            lambda: points(2),
            {"distribution": "canonical"},
            "prior",
        ),
    ),
    "clouds": (lambda: mlp(15, 2), E3, points, {}, "loss"),
    "clouds, canonical": (lambda: mlp(15, 2), E3, points, {"distribution": "canonical"}, "loss"),
    "encoder": (encoder, E3, padded, {"out_features": 1}, "loss"),
    "graphs": (lambda: mlp(64, 2), S6, graphs, {}, "loss"),
    "graphs, canonical": (lambda: mlp(64, 2), S6, graphs, {"distribution": "canonical"}, "loss"),
    "GIN of PyG": (lambda: GIN(8, 8, 2, out_channels=2), S6, graphs, {}, "loss"),
    "images, finite": (cnn, D4, images, {"distribution": "learned"}, "loss"),
    "images, finite, canonical": (cnn, D4, images, {"distribution": "canonical"}, "prior"),
    "images, rotations": (cnn, ROTATIONS, images, {"distribution": "learned"}, "loss"),
    "images, rotations, canonical": (cnn, ROTATIONS, images, {"distribution": "canonical"}, "prior"),
}


def built(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    make, group, batch, settings, by = CHOICES[name]
    batch = batch().to(dtype)
    return psf.symmetrize(make().to(dtype), group, batch, **settings), batch, by


@pytest.mark.parametrize("name", CHOICES)
def test_a_loss_trains_the_distribution(name):
    """Every weight of it but the last bias, which moves all scores alike."""
    model, batch, by = built(name)
    assert (model.reduce == "weighted") == (
        isinstance(model.distribution, Energy | psf.distributions.RotationEnergy) and by == "loss"
    )
    prediction, penalties = model.eval()(batch, 2, seed=0)
    loss = prediction.square().sum() if by == "loss" else penalties[by]
    weights = {n: p for n, p in model.distribution.named_parameters() if not n.endswith("bias")}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    assert weights
    assert [n for n, x in zip(weights, found, strict=True) if x is None or not x.abs().sum() > 0] == []


def test_a_reduction_that_is_given_stays():
    batch = points(2)
    assert psf.symmetrize(mlp(10, 2), D4, batch, reduce="mean").reduce == "mean"
    given = Energy(D4, mlp(10, 1), psf.models.FlatCloud())
    assert psf.symmetrize(mlp(10, 2), D4, batch, distribution=given).reduce == "mean"


@pytest.mark.parametrize("name", [name for name in CHOICES if name.endswith("finite, canonical")])
def test_canonicalization_by_a_finite_group(name):
    """One sample is exact, and the prior is at the identity."""
    model, batch, _ = built(name)
    assert psf.equivariance_error(model.eval(), batch, samples=1, moves=4) < 1e-5
    group = model.distribution.group
    every, at = group.elements(batch), int(model.distribution.prior.argmax())
    assert model.distribution.prior.sum() == 1
    for e, i in zip(
        psf.groups.elements.tensors(every), psf.groups.elements.tensors(group.identity(batch, 1)), strict=True
    ):
        assert torch.equal(e[:, at : at + 1], i)


MORE = {  # parts with weights of their own
    "encoder, fused": (encoder, E3, points, {"out_features": 1}, ""),
    "encoder, by modules": (lambda: encoder(False), E3, padded, {"out_features": 1}, ""),
    "MLP, nodes": (lambda: mlp(64, 8), S6, graphs, {"output": "nodes", "out_features": 2}, ""),
    "ViT": (lambda: vit("pooled"), S6, graphs, {"out_features": 2}, ""),
    "ViT, nodes": (lambda: vit("diagonal"), S6, graphs, {"output": "nodes", "out_features": 2}, ""),
    "ViT on images": (
        lambda: vit("pooled"),
        D4,
        lambda: psf.Images(torch.randn(2, 3, 12, 12)),
        {"out_features": 2},
        "",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CHOICES | MORE)
def test_parts_have_the_dtype_of_the_example(monkeypatch, name, dtype):
    monkeypatch.setitem(CHOICES, name, (CHOICES | MORE)[name])
    model, batch, _ = built(name, dtype)
    assert model(batch, 2)[0].dtype == dtype
    parts = {"embed", "backbone", "readout"} | ({"distribution"} if dtype == torch.float64 else set())
    others = [n for n, p in model.named_parameters() if n.split(".")[0] in parts and p.dtype != dtype]
    assert others == []


def test_a_network_keeps_its_dtype():
    """What symmetrize is given it does not cast, also where a part shares it."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", **sizes)
    with pytest.raises((TypeError, ValueError)):  # it does not fit
        psf.symmetrize(net, D4, psf.Images(torch.randn(2, 3, 32, 32).double()))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
