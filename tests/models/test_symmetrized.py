"""Learned distributions and symmetrized models: equivariance, gradients, networks and backbones."""

import re

import pytest
import torch
from torch import nn

from probsym_fast import Symmetrized, equivariance_error
from probsym_fast.distributions import Identity, Learned, Normal, Uniform, VectorNeurons
from probsym_fast.groups import (
    Draws,
    Euclidean,
    Graphs,
    Motion,
    PointClouds,
    Product,
    SpecialEuclidean,
    Symmetric,
    Translation,
)
from probsym_fast.models import MessagePassing, NodeReadout, NodeVectors, PairTokens, Transformer
from probsym_fast.ops import Permutation
from tests.conftest import assert_near

N, S = 5, 4
SYMMETRIES = {
    "S5xO3": (Symmetric(N) * Euclidean(3), True, True),
    "S5xSO3": (Symmetric(N) * SpecialEuclidean(3), True, True),
    "O3": (Euclidean(3), False, True),
    "SO3": (SpecialEuclidean(3), False, True),
    "S5": (Symmetric(N) * Translation(3), True, False),
}


def clouds(count=3, dtype=torch.float64) -> PointClouds:
    x, v, e = torch.randn(count, N, 3), torch.randn(count, N, 3), torch.randn(count, N, N, 2)
    return PointClouds(x.to(dtype), v.to(dtype), (e + e.transpose(1, 2)).to(dtype))


def network(scores: bool, matrices: bool, **settings) -> VectorNeurons:
    return VectorNeurons(width=6, scores=scores, matrices=matrices, **settings)


def for_samples(group, h):
    """h of one sample a graph, repeated for S samples."""

    def repeat(e):
        if isinstance(e, Motion):
            frame = None if e.frame is None else e.frame.expand(-1, S, -1, -1)
            return Motion(frame, e.shift.expand(-1, S, -1))
        return Permutation(e.order.expand(-1, S, -1).contiguous(), e.num_nodes)

    return tuple(map(repeat, h)) if isinstance(group, Product) else repeat(h)


class Tokens(nn.Module):
    """A backbone without any symmetry: an MLP on everything at once."""

    def __init__(self, features: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, N * 3))

    def forward(self, *inputs):
        x = torch.cat([i.expand(*inputs[0].shape[:2], *i.shape[2:]).flatten(2) for i in inputs], dim=-1)
        return self.net(x).unflatten(-1, (N, 3))


def model(symmetry: str, embed=None, displacement=True, distribution=None) -> Symmetrized:
    group, scores, matrices = SYMMETRIES[symmetry]
    embed = embed or PairTokens()
    features = N * N * 8 if isinstance(embed, PairTokens) else N * 6 + N * N * 2
    distribution = distribution or Learned(group, network(scores, matrices), tau=0.1)
    return Symmetrized(Tokens(features), embed, NodeReadout(displacement), distribution).double().eval()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_learned_elements_follow_the_input(symmetry):
    """p(hg | hx) = p(g | x): with the same noise, moved along, the element for h x is h g."""
    group, scores, matrices = SYMMETRIES[symmetry]
    learned = Learned(group, network(scores, matrices).double().eval(), tau=0.1)
    batch = clouds()
    h = group.uniform(batch, 1, Draws(seed=11))
    noise = torch.randn(learned.network.noise_shape(batch, S), dtype=torch.float64)
    g, penalties = learned(batch, S, noise=noise)
    h_all = for_samples(group, h)
    gh, moved_penalties = learned(batch.moved(group, h), S, noise=group.act(h_all, noise, "nvc"))
    x = torch.randn(3, S, N, 3, dtype=torch.float64)
    assert_near(group.act(gh, x, "np"), group.act(h_all, group.act(g, x, "np"), "np"), {torch.float64: 1e-9})
    for name, value in penalties.items():
        assert_near(moved_penalties[name], value, {torch.float64: 1e-4})  # tie noise is drawn anew


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("displacement", [True, False])
@pytest.mark.parametrize("embed", [PairTokens, NodeVectors])
def test_model_is_equivariant_for_shared_elements(symmetry, displacement, embed):
    """f(h x) = h f(x) exactly when the elements move along; averaged, when they are drawn."""
    f = model(symmetry, embed(), displacement)
    group = f.distribution.group
    batch = clouds()
    h = group.uniform(batch, 1, Draws(seed=12))
    g = group.uniform(batch, S, Draws(seed=13))
    hg = group.compose(for_samples(group, h), g)
    found = f.apply_elements(batch.moved(group, h), hg)
    expected = group.act(h, f.apply_elements(batch, g), "np")[:, 0]
    assert_near(found, expected, {torch.float64: 1e-10})


def test_equivariance_error_falls_with_the_samples():
    f = model("O3", distribution=Uniform(Euclidean(3)))
    few, many = (equivariance_error(f, clouds(20), samples, moves=2) for samples in (4, 256))
    assert 5 < few / many < 13  # sqrt(256 / 4) = 8


def test_generator_repeats_and_noise_matters():
    f = model("S5xO3")
    batch = clouds()
    draw = lambda seed: f(batch, 3, torch.Generator().manual_seed(seed))[0]  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_canonical_draws_nothing_but_ties():
    group = Symmetric(N) * Euclidean(3)
    f = model("S5xO3", distribution=Learned(group, network(True, True), Normal(0.0), tau=0.1))
    batch = clouds()
    assert_near(f(batch, 1)[0], f(batch, 1)[0], {torch.float64: 1e-5})
    assert (f(batch, 2)[0] - f(batch, 1)[0]).abs().max() < 1e-5


def test_identity_is_the_bare_backbone():
    f = model("O3", distribution=Identity(Euclidean(3)))
    batch = clouds()
    tokens = PairTokens()(batch, Euclidean(3), Euclidean(3).identity(batch, 1))
    assert_near(f(batch, 1)[0], batch.positions + f.backbone(*tokens)[:, 0])


def test_bad_input():
    f = model("S5xO3")
    batch = clouds()
    with pytest.raises(ValueError, match="Symmetrized: samples must be at least 1, got 0"):
        f(batch, 0)
    for samples in (2.5, "4", True, None):
        given = re.escape(f"{type(samples).__name__} {samples!r}")
        readers = [(f.distribution, "Learned")] + [(f, "Symmetrized")] * (samples is not None)
        for reader, name in readers:
            with pytest.raises(TypeError, match=f"^{name}: samples must be an int, got {given}$"):
                reader(batch, samples)
    with pytest.raises(
        ValueError, match=re.escape("PointClouds: velocities must be (B, n, d) = (3, 5, 3), got (2, 5, 3)")
    ):
        f(batch.replace(velocities=batch.velocities[1:]), 2)
    with pytest.raises(ValueError, match=re.escape("Learned: noise must be (3, 2, 5, 3, 2), got (1,)")):
        f.distribution(batch, 2, noise=torch.zeros(1))
    with pytest.raises(ValueError, match="Learned: tau must be finite and > 0, got 0"):
        Learned(Symmetric(5), network(True, False), tau=0)
    with pytest.raises(ValueError, match="Normal: scale must be finite and >= 0, got -1"):
        Normal(-1)


# --- Vector Neurons ---


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize("training", [False, True])
def test_vector_neurons_are_equivariant(n, training):
    net = network(True, True, dropout=0.3).double().train(training)
    x = torch.randn(4, 3, n, 3, 2, dtype=torch.float64)
    batch = PointClouds(torch.zeros(4, n, 3).double(), torch.zeros(4, n, 3).double(), torch.zeros(4, n, n, 0))
    h = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    order = torch.randperm(n)

    def run(noise):
        torch.manual_seed(3)
        return net(batch, noise)

    plain, turned = run(x), run(torch.einsum("ij,bsnjc->bsnic", h, x))
    assert_near(turned["scores"], plain["scores"], {torch.float64: 1e-9})
    assert_near(turned["matrices"], h @ plain["matrices"], {torch.float64: 1e-9})
    if not training:  # dropout masks belong to slots
        permuted = run(x[:, :, order])
        assert_near(permuted["scores"], plain["scores"][..., order], {torch.float64: 1e-9})
        assert_near(permuted["matrices"], plain["matrices"], {torch.float64: 1e-9})


@pytest.mark.parametrize(("scores", "matrices"), [(True, True), (True, False), (False, True)])
def test_vector_neurons_train_every_parameter(scores, matrices):
    net = network(scores, matrices)
    batch = clouds(8, torch.float32)
    outputs = net(batch, torch.randn(net.noise_shape(batch, 4)))
    assert set(outputs) == {name for name, wanted in (("scores", scores), ("matrices", matrices)) if wanted}
    sum((x * torch.randn_like(x)).sum() for x in outputs.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_vector_neurons_stay_in_float32_under_autocast():
    net = network(True, True).eval()
    batch = clouds(2, torch.float32)
    noise = torch.randn(net.noise_shape(batch, 2))
    plain = net(batch, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(batch, noise)
    for name, value in plain.items():
        assert mixed[name].dtype == torch.float32
        assert torch.equal(mixed[name], value)


def test_vector_neurons_at_zero():
    """Vectors of length zero, and their gradients, stay finite."""
    net = network(True, True)
    batch = PointClouds(*(torch.zeros(2, 5, k) for k in (3, 3)), torch.zeros(2, 5, 5, 0))
    noise = torch.zeros(net.noise_shape(batch, 1), requires_grad=True)
    outputs = net(batch, noise)
    sum(x.sum() for x in outputs.values()).backward()
    assert noise.grad.isfinite().all()


# --- backbones ---


def test_message_passing_equals_the_direct_form():
    net = MessagePassing(6, 2, 7, 3, 3).double()
    x, e = torch.randn(2, 4, N, 6).double(), torch.randn(2, N, N, 2).double()
    h = net.embed(x)
    for layer in net.layers:
        new = []
        for i in range(N):
            message = 0
            for j in range(N):
                if i != j:
                    parts = [h[:, :, i], h[:, :, j], e[:, None, i, j].expand(-1, 4, -1)]
                    message = message + layer.act(layer.message(layer.act(layer.pair(torch.cat(parts, -1)))))
            new.append(layer.update(torch.cat([h[:, :, i], message], -1)))
        h = torch.stack(new, 2)
    assert_near(net(x, e[:, None]), net.decoder(h))
    assert_near(net(x, e[:, None].expand(-1, 4, -1, -1, -1)), net.decoder(h))
    order = torch.randperm(N)
    permuted = net(x[:, :, order], e[:, None][:, :, order][:, :, :, order])
    assert_near(permuted, net(x, e[:, None])[:, :, order])
    assert net(x[:, :, :1], e[:, None, :1, :1]).shape == (2, 4, 1, 3)


def test_transformer_equals_torchs_encoder():
    net = Transformer(8, 16, 2, 4, 24, 25, 3, read=[0, 6, 24]).eval()
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False).eval()
    for theirs, ours in zip(encoder.layers, net.blocks, strict=True):
        theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = ours.qkv.weight, ours.qkv.bias
        theirs.self_attn.out_proj.load_state_dict(ours.out.state_dict())
        for a, b in (("linear1", "up"), ("linear2", "down"), ("norm1", "norm1"), ("norm2", "norm2")):
            getattr(theirs, a).load_state_dict(getattr(ours, b).state_dict())
    encoder.norm.load_state_dict(net.norm.state_dict())
    x = torch.randn(2, 3, 25, 8)
    with torch.no_grad():
        h = encoder(net.embed(x).flatten(0, 1) + net.positions)
        expected = net.head(h[:, [0, 6, 24]]).unflatten(0, (2, 3))
        assert_near(net(x), expected)
    net.read = None
    assert net(x).shape == (2, 3, 25, 3)


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: Transformer(), [(2, 24, 8)], "Transformer: x must be (..., 25, 8), got (2, 24, 8)"),
        (lambda: MessagePassing(), [(2, 5, 7), (2, 5, 5, 2)], "x must be (..., n, 6), got (2, 5, 7)"),
        (lambda: MessagePassing(), [(2, 5, 6), (2, 4, 4, 2)], "edges must be (..., 5, 5, 2), got (2, 4, 4, 2)"),
    ],
)
def test_backbones_refuse_other_shapes(make, inputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()(*(torch.zeros(shape) for shape in inputs))


def test_the_whole_model_of_points_is_one_graph():
    """torch.compile records it without a break, with the values and gradients of the eager model and noise of its own."""
    group, scores, matrices = SYMMETRIES["S5xO3"]
    network = VectorNeurons(width=8, scores=scores, matrices=matrices)
    backbone = Transformer(width=16, layers=1, feedforward=16, read=[6 * i for i in range(N)])
    pieces = backbone, PairTokens(), NodeReadout(displacement=True)
    f, batch = Symmetrized(*pieces, Learned(group, network, tau=0.1)).train(), clouds(dtype=torch.float32)
    recorded, found = torch.compile(f, backend="aot_eager", fullgraph=True), []
    for run in (f, recorded):
        f.zero_grad()
        torch.manual_seed(3)
        prediction, penalties = run(batch, S)
        (prediction.square().sum() + sum(penalties.values())).backward()
        found.append([prediction, *(p.grad for p in f.parameters())])
    for value, expected in zip(found[1], found[0], strict=True):
        assert_near(value, expected, {torch.float32: 1e-4})
    assert not torch.equal(recorded(batch, S)[0], found[1][0])


def test_backbones_compile_without_a_break():
    for net, inputs in (
        (Transformer(8, 16, 1, 4, 16, 4, 3), [torch.randn(2, 4, 8)]),
        (MessagePassing(6, 2, 8, 1, 3), [torch.randn(2, 3, 5, 6), torch.randn(2, 1, 5, 5, 2)]),
    ):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert_near(compiled(*inputs), net(*inputs))


def test_batches_of_another_kind_are_refused():
    from torch_geometric.data import Data

    f = model("S5")
    pyg = Data(x=torch.ones(3, 2), edge_index=torch.zeros(2, 0, dtype=torch.int64))
    way_out = "; convert it with psf.Graphs.from_data"
    for batch, got in (
        (pyg, f"Data{way_out}"),
        ((1, 2), "tuple"),
        (None, "NoneType"),
        (torch.ones(2), "Tensor"),
        (torch.ones(2, 5, 3), "Tensor; give psf.PointClouds(positions)"),
        (torch.ones(2, 3, 8, 8), "Tensor; give psf.Images(pixels)"),
    ):
        with pytest.raises(
            TypeError, match=f"^Symmetrized: batch must be Graphs, .* with a check method, got {re.escape(got)}$"
        ):
            f(batch, 2)
    with pytest.raises(TypeError, match=r"batch must have positions and velocities, got Graphs without positions$"):
        f(Graphs.from_data(pyg), 2)
