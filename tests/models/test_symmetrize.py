"""`symmetrize`: the parts that it chooses for common networks and data, and what it refuses."""

import re

import pytest
import torch
from torch import nn
from torch_geometric.nn import global_add_pool
from torch_geometric.nn.models import GIN

import probsym_fast as psf
from probsym_fast.models import Folded
from tests.conftest import assert_near

E3, S5, S6 = psf.groups.Euclidean(3), psf.groups.Symmetric(5), psf.groups.Symmetric(6)


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.GELU(), nn.Linear(16, outputs))


def encoder(norm_first: bool = True, batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, 0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class SetNetwork(nn.Module):
    """A sum over the valid points."""

    def __init__(self):
        super().__init__()
        self.points, self.set = mlp(5, 16), mlp(16, 2)

    def forward(self, x, mask=None):
        h = self.points(x)
        return self.set((h if mask is None else h * mask[..., None]).sum(1))


def clouds() -> psf.PointClouds:
    return psf.PointClouds(*torch.randn(2, 4, 5, 3))


def molecules() -> psf.PointClouds:
    return psf.PointClouds(torch.randn(9, 3), features=torch.randn(9, 2), ptr=torch.tensor([0, 4, 9]))


def graphs() -> psf.Graphs:
    ring = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
    edges = torch.cat([ring, ring.flip(0)], 1)
    rest = edges[:, (edges < 5).all(0)] + 6
    return psf.Graphs(torch.randn(11, 3), torch.cat([edges, rest], 1), torch.tensor([0, 6, 11]))


def vit(read: str) -> nn.Module:
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 1}
    return psf.models.timm_backbone("vit_tiny_patch16_224", grid=3, read=read, **sizes)


class PooledGNN(nn.Module):
    """A network of PyTorch Geometric's form that pools by itself."""

    def __init__(self):
        super().__init__()
        self.net = GIN(8, 8, 2, out_channels=2)
        self.in_channels = 8

    def forward(self, x, edge_index, batch):
        return global_add_pool(self.net(x, edge_index), batch)


# name -> (network, group, batch, settings), shape of the prediction
CASES = {
    "MLP on clouds": (lambda: mlp(30, 2), S5 * E3, clouds, {}, (4, 2)),
    "MLP, positions": (lambda: mlp(30, 15), S5 * E3, clouds, {"output": "positions"}, (4, 5, 3)),
    "nodes, vectors": (lambda: mlp(6, 3), E3, clouds, {"output": "vectors", "distribution": "frame"}, (4, 5, 3)),
    "nodes, padded": (lambda: mlp(5, 2), E3, molecules, {"output": "nodes"}, (2, 5, 2)),
    "set network": (SetNetwork, E3, molecules, {}, (2, 2)),
    "encoder": (encoder, E3, molecules, {"out_features": 1}, (2, 1)),
    "encoder that is not fused": (lambda: encoder(False), E3, molecules, {"out_features": 1}, (2, 1)),
    "encoder, uniform": (encoder, E3, molecules, {"out_features": 1, "distribution": "uniform"}, (2, 1)),
    "encoder, canonical": (encoder, E3, molecules, {"out_features": 1, "distribution": "canonical"}, (2, 1)),
    "finite group": (
        lambda: mlp(10, 2),
        psf.groups.Dihedral(4),
        lambda: psf.PointClouds(torch.randn(4, 5, 2)),
        {},
        (4, 2),
    ),
    "MLP on graphs": (lambda: mlp(64, 2), S6, graphs, {}, (2, 2)),
    "MLP, nodes": (lambda: mlp(64, 8), S6, graphs, {"output": "nodes", "out_features": 2}, (11, 2)),
    "ViT": (lambda: vit("pooled"), S6, graphs, {"out_features": 2}, (2, 2)),
    "ViT, nodes": (lambda: vit("diagonal"), S6, graphs, {"output": "nodes", "out_features": 2}, (11, 2)),
    "GIN of PyG": (lambda: GIN(8, 8, 2, out_channels=2), S6, graphs, {}, (2, 2)),
    "GIN of PyG, nodes": (lambda: GIN(8, 8, 2, out_channels=2), S6, graphs, {"output": "nodes"}, (11, 2)),
    "GNN that pools": (PooledGNN, S6, graphs, {}, (2, 2)),
    "GIN": (lambda: psf.models.GINBackbone(64, 1, 2, "relu"), S6, graphs, {}, (2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_fit_and_are_equivariant(name):
    torch.manual_seed(0)
    make, group, batch, settings, shape = CASES[name]
    net, batch = make(), batch()
    state = torch.get_rng_state()
    model = psf.symmetrize(net, group, batch, **settings)
    assert model.training and all(m.training for m in model.modules())
    prediction, penalties = model(batch, samples=4, seed=0)
    assert prediction.shape == shape
    loss = prediction.square().sum() + sum(penalties.values(), torch.zeros(()))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    torch.set_rng_state(state)
    model.eval()
    counts = (2, group.order or 128)
    few, many = (psf.equivariance_error(model, batch, samples=S, moves=8, scale=1.0) for S in counts)
    assert many < 0.45 * few or few < 1e-5


def test_padding_changes_nothing():
    torch.manual_seed(0)
    batch = molecules()
    for make, settings in ((SetNetwork, {}), (lambda: encoder(False), {"out_features": 1})):
        model = psf.symmetrize(make(), E3, batch, distribution="none", **settings).eval()
        y = model(batch)[0]
        wider = {
            name: nn.functional.pad(getattr(batch, name), (0, 0, 0, 2), value=7.0) for name in ("positions", "features")
        }
        assert_near(model(batch.replace(**wider))[0], y)
        alone = psf.PointClouds(batch.positions[:1, :4], features=batch.features[:1, :4])
        assert_near(model(alone)[0], y[:1])


def test_folded():
    """The axes of inputs and samples are one for the network, and others with one sample are repeated."""
    net = Folded(nn.Bilinear(3, 2, 4))
    x, other = torch.randn(2, 5, 3), torch.randn(2, 1, 2)
    assert_near(net(x, other), net.net(x, other.expand(2, 5, 2).contiguous()))


class Extent(nn.Module):
    """Not in one of the lists of modules that act entry by entry."""

    def forward(self, x):
        return torch.cat([x.amax(1), x.amin(1)], -1)


@pytest.mark.parametrize("points", [1, 2])
def test_learned_frames_of_few_points(points):
    """Fewer vectors than dimensions: frames stay equivariant, and forces exact."""
    torch.manual_seed(0)
    batch = psf.PointClouds(torch.randn(8, points, 3).double())
    net = mlp(3 * points, 3 * points).double() if points > 1 else mlp(3, 3).double()
    model = psf.symmetrize(net, psf.groups.Orthogonal(3), batch, output="vectors").double().eval()
    few, many = (psf.equivariance_error(model, batch, samples=S, moves=4, scale=1.0) for S in (8, 2048))
    assert many < 0.2 * few


def test_padded_diatomics_have_exact_forces():
    torch.manual_seed(0)
    batch = psf.PointClouds(torch.randn(6, 3).double(), ptr=torch.tensor([0, 2, 6]))
    model = psf.symmetrize(SetOfPoints().double(), E3, batch).double().eval()
    energy = lambda x: model(batch.replace(positions=x), samples=4, seed=0)[0].sum()  # noqa: E731
    _, forces, _ = psf.models.energy_and_forces(model, batch, samples=4, seed=0)
    step = 1e-5 * torch.eye(3).double()[0]
    there, back = batch.positions.clone(), batch.positions.clone()
    there[0, 1] += step
    back[0, 1] -= step
    torch.testing.assert_close((energy(back) - energy(there)) / 2e-5, forces[0, 1, 0], rtol=1e-5, atol=1e-8)


class SetOfPoints(nn.Module):
    def __init__(self):
        super().__init__()
        self.points, self.set = mlp(3, 16), mlp(16, 1)

    def forward(self, x, mask):
        return self.set((self.points(x) * mask[..., None]).sum(1))


def test_no_axis_of_samples_is_taken_for_one_of_values():
    """A softmax over axis 1 and a reduction over it see one input's values, not its samples."""
    batch = clouds()
    first = psf.PointClouds(batch.positions[:1], batch.velocities[:1])
    for last in (nn.Softmax(dim=1), nn.Identity()):
        net = nn.Sequential(nn.Linear(30, 8), last, nn.Linear(8, 2))
        model = psf.symmetrize(net, E3, batch, distribution="uniform").eval()
        one = psf.symmetrize(net, E3, first, distribution="uniform").eval()
        each = model(batch, samples=3, seed=0, reduce="none")[0]
        assert not torch.allclose(each[0], each[1])
        assert_near(model(batch, samples=1, seed=0, reduce="none")[0], each[:1])
        alone = one(first, samples=3, seed=0, reduce="none")[0]
        assert_near(each[:, :1], alone)
    model = psf.symmetrize(Extent(), E3, batch, distribution="uniform").eval()
    assert model(batch, samples=3)[0].shape == (4, 12)


def test_a_whole_orbit_has_no_standard_error():
    batch = psf.PointClouds(torch.randn(4, 5, 2).double())
    model = psf.symmetrize(mlp(10, 2).double(), psf.groups.Dihedral(4), batch, distribution="orbit").eval()
    found = model.estimate(batch, 128, tolerance=1e-9)
    assert found.samples == 8 and not found.standard_error.any()
    assert_near(model.estimate(batch).prediction, found.prediction)
    model.distribution = psf.distributions.Uniform(model.distribution.group)
    message = "estimate: samples must be an int where elements are drawn at random (Uniform), got None"
    with pytest.raises(TypeError, match=re.escape(message)):
        model.estimate(batch)


def test_scores_of_another_shape():
    readout = psf.models.ScoredReadout(psf.models.PooledReadout(), nn.Linear(2, 1))
    model = psf.symmetrize(mlp(6, 2), E3, clouds(), readout=readout)
    with pytest.raises(
        ValueError, match=re.escape("ScoredReadout: head must return (B, S) or (B, S, 1), got (4, 2, 5, 1)")
    ):
        model(clouds(), samples=2)


def test_orders_of_graphs_on_clouds():
    with pytest.raises(TypeError, match=re.escape("Frame: batch must have frame, got PointClouds without frame")):
        psf.symmetrize(mlp(30, 2), S5, clouds(), distribution="frame")


def test_empty_clouds():
    """No clouds, and a cloud without points."""
    model = psf.symmetrize(SetNetwork(), E3, molecules()).eval()
    none = psf.PointClouds(
        torch.zeros(0, 5, 3), features=torch.zeros(0, 5, 2), num_nodes=torch.zeros(0, dtype=torch.int64)
    )
    assert model(none, samples=2)[0].shape == (0, 2)
    empty = psf.PointClouds(torch.zeros(0, 3), features=torch.zeros(0, 2), ptr=torch.tensor([0, 0]))
    assert model(empty, samples=2)[0].isfinite().all()


# --- one size of a flat network, clouds of any size up to it ---

TURN = psf.groups.Finite.generated({"vp": torch.diag(torch.tensor([-1.0, -1.0, 1.0]))[None]})


def ragged(*sizes: int, n: int | None = None, seed: int = 0) -> psf.PointClouds:
    generator = torch.Generator().manual_seed(seed)
    x, f = (torch.randn(sum(sizes), width, generator=generator) for width in (3, 2))
    return psf.PointClouds(x, features=f, ptr=torch.tensor([0, *sizes]).cumsum(0), n=n)


FLAT = {name: (E3, {"distribution": name}) for name in ("learned", "canonical", "uniform", "frame")} | {
    "weighted frame": (E3, {"distribution": psf.distributions.WeightedFrame(E3)}),
    "minimal frame": (E3, {"distribution": psf.distributions.MinimalFrame(E3)}),
    "finite, learned": (TURN, {"reduce": "weighted"}),
    "positions": (E3, {"output": "positions"}),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_network_on_the_next_batch(name):
    """Of smaller clouds than the example's: it predicts as on those padded to its size, whatever the padding holds."""
    torch.manual_seed(0)
    group, settings = FLAT[name]
    positions = settings.get("output") == "positions"
    model = psf.symmetrize(mlp(6 * 5, 6 * 3 if positions else 2), group, ragged(3, 6), **settings).eval()
    short, long = ragged(2, 4), ragged(2, 4, n=6)
    for x in (long.positions, long.features):
        x[~long.valid] = torch.nan
    found, padded = (model(batch, samples=2, seed=3)[0] for batch in (short, long))
    assert_near(found, padded[:, :4] if positions else padded)
    with pytest.raises(ValueError, match=r"positions must be \(B, n, d\) with n of at most 6, got \(1, 7, 3\)$"):
        model(ragged(7), samples=2)


def test_permuted_clouds_of_one_n():
    """Symmetric(n) takes clouds of any size that are padded to n, also in chunks, compiled and exported."""
    torch.manual_seed(0)
    group, example = psf.groups.Symmetric(8) * E3, ragged(3, 5, n=8)
    model = psf.symmetrize(mlp(8 * 5, 2), group, example).eval()
    batch = ragged(2, 7, 4, n=8)
    few, many = (psf.equivariance_error(model, batch, samples=S, moves=2, scale=1) for S in (4, 1024))
    assert few / many > 5  # 1 / sqrt(S): 16
    whole = model(batch, samples=4, seed=3)[0]
    hidden = batch.replace()
    for x in (hidden.positions, hidden.features):
        x[~hidden.valid] = torch.nan
    assert_near(model(hidden, samples=4, seed=3)[0], whole)
    program = psf.export(model, example, 4).module()
    found = program(batch.positions, batch.features, batch.num_nodes, torch.tensor(3))
    assert_near(found, whole)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_near(compiled(batch, samples=4, seed=3)[0], whole)
    model.chunk = 3
    assert_near(model(batch, samples=4, seed=3)[0], whole)
    message = "Symmetric(8): positions must be (B, n, d) with n = 8, got (1, 4, 3); pad them: PointClouds(..., n=8)"
    model = psf.symmetrize(mlp(8 * 5, 2), group, example, distribution="uniform")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(ragged(4), samples=2)


def test_a_flat_network_exported_for_any_number_of_points():
    torch.manual_seed(0)
    model = psf.symmetrize(mlp(9 * 5, 2), E3, ragged(3, 9), distribution="uniform").eval()
    program = psf.export(model, ragged(3, 6), 4, dynamic={"batch": None, "points": 9}).module()
    other = ragged(2, 7, 1)
    found = program(other.positions, other.features, other.num_nodes, torch.tensor(3))
    assert_near(found, model(other, samples=4, seed=3)[0])


ERRORS = [
    (
        lambda: (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, None, False),
            E3,
            clouds(),
            {"out_features": 1},
        ),
        "Folded: net must have batch_first=True, got TransformerEncoder with False",
    ),
    (lambda: (mlp(6, 2), E3, clouds(), {"pool": "max"}), "symmetrize: pool must be one of ('sum', 'mean'), got 'max'"),
    (
        lambda: (mlp(6, 2), psf.groups.Symmetric(8), clouds(), {}),
        "symmetrize: group must permute the n = 5 points of the example, got Symmetric(8); pad the clouds:"
        " PointClouds(..., n=8) or from_data(..., n=8)",
    ),
    (
        lambda: (mlp(6, 2), psf.groups.Symmetric(4), clouds(), {}),
        "symmetrize: group must permute the n = 5 points of the example, got Symmetric(4)",
    ),
    (
        lambda: (mlp(6, 2), psf.groups.Euclidean(2), clouds(), {}),
        "symmetrize: group must act in the d = 3 dimensions of the example, got Euclidean(2)",
    ),
    (
        lambda: (mlp(7, 2), E3, clouds(), {}),
        "symmetrize: net must take inputs of shapes [(4, 2, 5, 6)], got mat1 and mat2",
    ),
    (
        lambda: (mlp(6, 2), E3, clouds(), {"output": "vectors"}),
        "symmetrize: net must return (B, S, n, d) with n, d = 5, 3 for output 'vectors', got (4, 2, 5, 2)",
    ),
    (
        lambda: (encoder(), E3, molecules(), {}),
        "symmetrize: out_features must be given for an nn.TransformerEncoder, got None",
    ),
    (
        lambda: (mlp(6, 2), E3, clouds(), {"output": "pairs"}),
        "symmetrize: output must be one of ('invariant', 'nodes', 'vectors', 'positions') for PointClouds, got 'pairs'",
    ),
    (
        lambda: (mlp(6, 2), E3, clouds(), {"distribution": "best"}),
        "symmetrize: distribution must be a Distribution or one of ('learned', 'canonical', 'uniform', 'orbit', 'frame',"
        " 'none'), got 'best'",
    ),
    (
        lambda: (mlp(6, 2), psf.groups.Lorentz(3), clouds(), {}),
        "symmetrize: distribution must be given where nothing is 'learned' for the group, got Lorentz(3) on PointClouds",
    ),
    (lambda: (mlp(6, 2), E3, graphs(), {}), "symmetrize: group must be Symmetric(n) for Graphs, got Euclidean(3)"),
    (
        lambda: (vit("pooled"), S6, graphs(), {"output": "nodes", "out_features": 2}),
        "symmetrize: net must return tokens (B, S, L, D) for output 'nodes', got (2, 2, 32)",
    ),
    (
        lambda: (nn.Conv1d(5, 2, 1), E3, molecules(), {}),
        "Folded: Conv1d must take one of lengths, src_key_padding_mask, key_padding_mask, attention_mask, mask",
    ),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    make, message = ERRORS[case]
    net, group, batch, settings = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        psf.symmetrize(net, group, batch, **settings)


def test_an_example_that_is_no_batch():
    message = "symmetrize: example must be Graphs, PointClouds or another batch with a check method, got Tensor"
    with pytest.raises(TypeError, match=f"^{message}; give psf.PointClouds\\(positions\\)$"):
        psf.symmetrize(mlp(6, 2), E3, torch.zeros(2, 5, 3))
