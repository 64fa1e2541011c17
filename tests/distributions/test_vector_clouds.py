"""Vector Neurons on molecules: features of nodes, positions only, clouds of different sizes."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from probsym_fast._memory import peak_memory
from probsym_fast.distributions import Learned, Normal, VectorNeurons, vector_neurons
from probsym_fast.groups import Euclidean, Orthogonal, PointClouds, Symmetric
from tests.conftest import assert_near

SIZES, S, TYPES = (3, 7, 1, 4, 7, 2), 3, 4


def molecules(sizes=SIZES, more: int = 0, dtype=torch.float64) -> PointClouds:
    """Positions and one-hot types, of the largest size and `more`."""
    torch.manual_seed(1)
    x, types = torch.randn(sum(sizes), 3, dtype=dtype), torch.randint(TYPES, (sum(sizes),))
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    batch = PointClouds(x, features=F.one_hot(types, TYPES).to(dtype), ptr=ptr)
    return padded(batch, more)


def padded(batch: PointClouds, more: int) -> PointClouds:
    return batch.replace(**{name: F.pad(getattr(batch, name), (0, 0, 0, more)) for name in ("positions", "features")})


def network(features: int = TYPES, dtype=torch.float64, **settings) -> VectorNeurons:
    torch.manual_seed(2)
    net = VectorNeurons(**{"channels": 1, "width": 6, "dropout": 0.0, "features": features, **settings}).to(dtype)
    for name, p in net.named_parameters():  # away from what a new network has, such as gains of 1
        p.data.add_(0.2 * torch.randn_like(p) if "norm" in name or "gates" in name else 0)
    return net


def noise_of(net: VectorNeurons, batch: PointClouds) -> torch.Tensor:
    """That of a cloud does not depend on padding."""
    return Normal(1.0, fixed=3)(net.noise_shape(batch, S), batch)


def results(net, batch, noise) -> dict[str, torch.Tensor]:
    """Outputs, gradients and running statistics; outputs of nodes without padding."""
    before = {name: x.clone() for name, x in net.state_dict().items()}
    leaves = [batch.positions.clone().requires_grad_(), noise.clone().requires_grad_(), *net.parameters()]
    outputs = net(batch.replace(positions=leaves[0]), leaves[1])
    first = {"scores": lambda y: y[..., :7], "matrices": lambda y: y.sum(2)}
    loss = 0.0
    for name, y in outputs.items():
        y = first[name](y)
        loss = loss + (y.square() * torch.linspace(-1, 2, y[0].numel()).view_as(y[0])).sum()
    gradients = torch.autograd.grad(loss, leaves)
    found = {name: first[name](y).detach() for name, y in outputs.items()}
    found |= {"d positions": gradients[0][:, :7], "d noise": gradients[1][:, :, :7]}
    found |= {f"d {name}": d for (name, _), d in zip(net.named_parameters(), gradients[2:], strict=True)}
    found |= {name: x.clone() for name, x in net.named_buffers()}
    net.load_state_dict(before)
    return found


def assert_same(found, expected, bound: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_near(found[name].double(), x.double(), {torch.float64: bound})


def marked(monkeypatch) -> None:
    """Makes networks mark valid nodes instead of listing them, as on a GPU and in programs."""
    monkeypatch.setattr(vector_neurons, "looks_at_values", lambda *_: False)


SETTINGS = [{}, {"features": 0}, {"scores": False}, {"matrices": False, "neighbors": 9}, {"channels": 2}]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_padding_changes_nothing(settings, training, monkeypatch):
    """Listed and marked, with more padding and with NaN in it: outputs, gradients and statistics."""
    net, batch = network(**settings).train(training), molecules()
    batch = batch.replace(velocities=batch.positions.flip(0)) if net.channels == 2 else batch
    noise = noise_of(net, batch)
    expected = results(net, batch, noise)
    wide = padded(batch, 4).replace(
        velocities=None if batch.velocities is None else F.pad(batch.velocities, (0, 0, 0, 4))
    )
    wide_noise = noise_of(net, wide)
    for name in ("positions", "features"):
        getattr(wide, name)[~wide.valid] = torch.nan
    assert_same(results(net, wide, wide_noise), expected)
    marked(monkeypatch)
    assert_same(results(net, batch, noise), expected)
    assert_same(results(net, wide, wide_noise), expected)
    if net.scores:
        assert not net(wide, wide_noise)["scores"][~wide.valid[:, None].expand(-1, S, -1)].any()


def test_padding_in_float32():
    net, batch = network(dtype=torch.float32).eval(), molecules(dtype=torch.float32)
    noise = noise_of(net, batch)
    wide = padded(batch, 30)
    for one, other in zip(net(batch, noise).values(), net(wide, noise_of(net, wide)).values(), strict=True):
        other = other if other.ndim == 4 else other[..., :7]
        assert (one - other).abs().max() < 1e-5 * one.abs().max()


@pytest.mark.parametrize("how", ["listed", "marked"])
def test_each_cloud_is_as_if_alone(how, monkeypatch):
    net, batch = network().eval(), molecules()
    noise = noise_of(net, batch)
    if how == "marked":
        marked(monkeypatch)
    outputs = net(batch, noise)
    for b, n in enumerate(SIZES):
        alone = PointClouds(batch.positions[b : b + 1, :n], features=batch.features[b : b + 1, :n])
        expected = net(alone, noise[b : b + 1, :, :n])
        assert_near(outputs["matrices"][b], expected["matrices"][0], {torch.float64: 1e-10})
        assert_near(outputs["scores"][b, :, :n], expected["scores"][0], {torch.float64: 1e-10})


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_equivariance(training, dtype):
    """To rotations and reflections, translations, and permutations of the nodes."""
    net, batch, bound = network(dtype=dtype).train(training), molecules(dtype=dtype), 1e-9 if training else 1e-5
    noise = noise_of(net, batch)
    group = Symmetric(7) * Euclidean(3)
    g = group.anywhere(batch, 1)
    moved = batch.moved(group, g)
    p, motion = g
    turned = torch.einsum("bij,bsnjc->bsnic", motion.frame[:, 0], noise)
    turned = turned.take_along_dim(p.inverse().order[:, :, :, None, None], 2)
    here, there = net(batch, noise), net(moved, turned)
    expected = torch.einsum("bij,bsjk->bsik", motion.frame[:, 0], here["matrices"])
    assert (there["matrices"] - expected).abs().max() < bound * expected.abs().max()
    scores = here["scores"].take_along_dim(p.inverse().order.expand(-1, S, -1), 2)
    assert (there["scores"] - scores).abs().max() < bound * scores.abs().max()


def test_types_are_read():
    """Another type of one atom changes its cloud's outputs and no other's."""
    net, batch = network().eval(), molecules()
    noise = noise_of(net, batch)
    other = batch.replace(features=batch.features.clone())
    other.features[1, 2] = other.features[1, 2].roll(1)
    for one, changed in zip(net(batch, noise).values(), net(other, noise).values(), strict=True):
        away = (one - changed).abs().flatten(1).amax(1)
        assert (away > 1e-3).tolist() == [b == 1 for b in range(len(SIZES))]
    plain, before = network(0).eval(), VectorNeurons(1, 6).state_dict()
    assert plain.state_dict().keys() == before.keys()
    assert torch.equal(plain(batch, noise)["scores"], plain(other, noise)["scores"])


def test_second_derivatives(monkeypatch):
    """Of parameters by forces: listed and marked, and against finite differences along a direction."""
    net, batch = network().eval(), molecules()
    noise, p = noise_of(net, batch), dict(net.named_parameters())

    def forces():
        x = batch.positions.clone().requires_grad_()
        outputs = net(batch.replace(positions=x), noise)
        loss = outputs["scores"].square().sum() + outputs["matrices"].pow(3).sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    found = torch.autograd.grad(forces(), list(p.values()), allow_unused=True)
    direction = [torch.randn_like(x) for x in p.values()]
    along = sum((a * b).sum() for a, b in zip(found, direction, strict=True) if a is not None)
    values, step = [], 1e-6
    for change in (step, -2 * step):
        for x, d in zip(p.values(), direction, strict=True):
            x.data.add_(d, alpha=change)
        values.append(forces().detach())
    assert abs(along - (values[0] - values[1]) / (2 * step)) < 1e-5 * abs(along)
    for x, d in zip(p.values(), direction, strict=True):
        x.data.add_(d, alpha=step)
    marked(monkeypatch)
    for a, b in zip(found, torch.autograd.grad(forces(), list(p.values()), allow_unused=True), strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-9 * a.abs().max())


@pytest.mark.parametrize("how", ["listed", "marked"])
def test_clouds_without_nodes(how, monkeypatch):
    net, batch = network(), molecules((2, 0, 5, 0))
    if how == "marked":
        marked(monkeypatch)
    learned = Learned(Orthogonal(3), net)
    g, _ = learned(batch, S)
    assert g.isfinite().all()
    outputs = net(batch, noise_of(net, batch))
    sum(y.square().sum() for y in outputs.values()).backward()
    assert not outputs["scores"][1].any() and all(p.grad.isfinite().all() for p in net.parameters())


def test_learned_elements_do_not_depend_on_padding():
    """With fixed noise; also where samples run in parts."""
    learned = Learned(Symmetric(7) * Euclidean(3), network(), Normal(1.0, fixed=5)).eval()
    wide = Learned(Symmetric(9) * Euclidean(3), learned.network, learned.noise).eval()
    batch, wider = molecules(), molecules(more=2)
    for of in (lambda g: g[1].frame, lambda g: g[0].order[..., :7]):
        assert_near(of(learned(batch, S)[0]).double(), of(wide(wider, S)[0]).double(), {torch.float64: 1e-10})


class Both(nn.Module):
    """Outputs of padded clouds as tensors."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, positions, features, num_nodes, noise):
        outputs = self.net(PointClouds(positions, features=features, num_nodes=num_nodes), noise)
        return outputs["scores"], outputs["matrices"]


def test_compiled_and_exported():
    from torch.export import Dim

    net, batch = network().eval(), molecules()
    given = batch.positions, batch.features, batch.num_nodes, noise_of(net, batch)
    expected = Both(net)(*given)
    compiled = torch.compile(Both(net), fullgraph=True, backend="eager")
    sizes = tuple({0: Dim.DYNAMIC} for _ in range(4))
    with torch.no_grad():
        program = torch.export.export(Both(net), given, dynamic_shapes=sizes).module()
    for found, y in zip(compiled(*given), expected, strict=True):
        assert_near(found, y, {torch.float64: 1e-10})
    for found, y in zip(program(*(x[1:5] for x in given)), expected, strict=True):
        assert_near(found, y[1:5], {torch.float64: 1e-10})
    grad = torch.func.grad(lambda x: Both(net)(x, *given[1:])[0].sum())(batch.positions)
    x = batch.positions.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(Both(net)(x, *given[1:])[0].sum(), x)
    assert_near(grad, wanted, {torch.float64: 1e-9})


def test_memory_grows_with_the_valid_nodes():
    net = network(0, torch.float32, width=21)
    few = molecules((24, *(2,) * 31), dtype=torch.float32)
    full = few.replace(num_nodes=None)

    def step(batch):
        sum(y.square().sum() for y in net(batch, noise_of(net, batch)).values()).backward()

    step(few)
    assert peak_memory(lambda: step(few), "cpu") < 0.4 * peak_memory(lambda: step(full), "cpu")


def test_fields_that_are_missing():
    batch = molecules()
    for net, given, message in (
        (network(channels=2), batch, "velocities must be (B, n, 3), got None"),
        (network(), batch.replace(features=None), "features must be (B, n, 4), got None"),
        (network(3), batch, "features must be (B, n, 3), got (6, 7, 4)"),
        (network(), batch.replace(features=batch.features / 0), "features must be finite, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'VectorNeurons: {message}')}$"):
            net(given, torch.randn(net.noise_shape(given, S), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^VectorNeurons: features must be at least 0, got -1$"):
        VectorNeurons(features=-1)
    assert "features=4" in str(network())
