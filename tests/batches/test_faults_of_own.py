"""Faults in batches, distributions and groups of one's own: errors name the class, the field or method, and both values."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.distributions import Discrete, Distribution, Learned, Orbit
from probsym_fast.groups import Finite

FLIP = [[0, 1], [1, 0]], {"t": torch.stack([torch.arange(8), torch.arange(8).flip(0)])}
REVERSAL = Finite(*FLIP)


@dataclass(eq=False)
class Signals(psf.Batch):
    values: torch.Tensor
    extra: torch.Tensor | None = None

    layouts = {"values": "ct"}  # noqa: RUF012


class Embed(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, batch.values, "ct", inverse=True).flatten(2)


def model(distribution=None) -> psf.Symmetrized:
    parts = nn.Linear(16, 2), Embed(), psf.models.MeanReadout()
    return psf.Symmetrized(*parts, distribution or Orbit(REVERSAL)).eval()


def signals(kind=Signals, *more):
    return kind(torch.randn(3, 2, 8), *more)


@dataclass(eq=False)
class WithNames(psf.Batch):
    values: torch.Tensor
    names_: list = field(default_factory=list)


@dataclass(eq=False)
class ListFirst(psf.Batch):
    values: list


class Undecorated(psf.Batch):
    def __init__(self, values):
        self.values = values


class MoreFields(Signals):
    weights: torch.Tensor


@dataclass(eq=False)
class Typo(psf.Batch):
    values: torch.Tensor

    layouts = {"value": "ct"}  # noqa: RUF012


@dataclass(eq=False)
class WrongAxes(psf.Batch):
    values: torch.Tensor

    axes = {"value": {0: "batch"}}  # noqa: RUF012


@dataclass(eq=False)
class LayoutsOfText(psf.Batch):
    values: torch.Tensor

    layouts = "ct"


@dataclass(eq=False)
class NoFields(psf.Batch):
    values: torch.Tensor | None = None


BATCHES = {
    "a list of names": (lambda: signals(WithNames, ["a"]), TypeError, "WithNames: names_ must be a Tensor, got list"),
    "a list": (lambda: ListFirst([1.0, 2.0]), TypeError, "ListFirst: values must be a Tensor, got list"),
    "a list, optional": (
        lambda: signals(Signals, [1.0]),
        TypeError,
        "Signals: extra must be a Tensor or None, got list",
    ),
    "a number of no axes": (
        lambda: signals(Signals, torch.tensor(1.0)),
        ValueError,
        "Signals: extra must have 1 axes or more, got ()",
    ),
    "no dataclass": (
        lambda: signals(Undecorated),
        TypeError,
        "Undecorated: must be a dataclass, got a class without @dataclass(eq=False) above it",
    ),
    "no dataclass of its own": (
        lambda: signals(MoreFields),
        TypeError,
        "MoreFields: must be a dataclass, got the field weights in a class without @dataclass(eq=False) above it",
    ),
    "layouts": (lambda: signals(Typo), ValueError, "Typo: layouts must name fields, of values, got 'value'"),
    "axes": (lambda: signals(WrongAxes), ValueError, "WrongAxes: axes must name fields, of values, got 'value'"),
    "layouts of text": (
        lambda: signals(LayoutsOfText),
        TypeError,
        "LayoutsOfText: layouts must be a dict by field, got str",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    """Wherever a model, a test or a program reads the batch first."""
    make, error, message = BATCHES[name]
    batch, exactly = make(), f"^{re.escape(message)}$"
    for use in (
        batch.check,
        lambda: model()(batch, 2),
        lambda: model().estimate(batch, 2),
        lambda: psf.equivariance_error(model(), batch, samples=2),
        lambda: psf.export(model(), batch, 2),
    ):
        with pytest.raises(error, match=exactly):
            use()


def test_sizes_and_devices_of_faulty_batches():
    with pytest.raises(TypeError, match=r"^WithNames: names_ must be a Tensor, got list$"):
        signals(WithNames, ["a"]).size  # noqa: B018
    with pytest.raises(ValueError, match=r"^NoFields: some field must be a Tensor, got values all None$"):
        NoFields().device  # noqa: B018
    with pytest.raises(ValueError, match=r"^Typo: layouts must name fields, of values, got 'value'$"):
        signals(Typo).moved(REVERSAL, None)


class Same(Distribution):
    """draw returns what it is given, or the elements only."""

    def __init__(self, *more):
        super().__init__(REVERSAL)
        self.more = more

    def draw(self, batch, samples, draws=None):
        g = self.group.identity(batch, samples)
        return (g, *self.more) if self.more else g


class Few(Discrete):
    def candidates(self, batch, draws):
        return self.group.elements(batch), torch.zeros(batch.size, 2)


class Weighted(Same):
    def elements_and_weights(self, batch, samples, draws=None):
        return self.group.identity(batch, samples), torch.ones(batch.size, samples)


class Projecting(Finite):
    outputs = ("scores",)

    def project(self, outputs, batch, **settings):
        return self.identity(batch, 2)


class Network(nn.Module):
    outputs = ("scores",)

    def noise_shape(self, batch, samples):
        return batch.size, samples, 2

    def forward(self, batch, noise):
        return {"scores": noise}


MUST = "must return a tuple (elements, penalties) with a dict of penalties, got"
DISTRIBUTIONS = {
    "elements only": (lambda: Same(), {}, f"Same: draw {MUST} Tensor"),
    "no dict": (lambda: Same(torch.zeros(())), {}, f"Same: draw {MUST} tuple (Tensor, Tensor)"),
    "three": (lambda: Same({}, {}), {}, f"Same: draw {MUST} tuple (Tensor, dict, dict)"),
    "candidates": (
        lambda: Few(REVERSAL),
        {},
        "Few: candidates must return a tuple (elements, log_p, penalties) with a dict of penalties, got"
        " tuple (Tensor, Tensor)",
    ),
    "weights": (
        lambda: Weighted({}),
        {"reduce": "weighted"},
        "Weighted: elements_and_weights must return a tuple (elements, weights, penalties) with a dict of penalties, got"
        " tuple (Tensor, Tensor)",
    ),
    "project": (lambda: Learned(Projecting(*FLIP), Network()), {}, f"Projecting(2): project {MUST} Tensor"),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name):
    make, settings, message = DISTRIBUTIONS[name]
    distribution = make()
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        model(distribution)(signals(), 2, **settings)


class Unmoved(Finite):
    def act(self, g, x, layout, *, inverse=False, mean=False):
        return x


class Flat(Finite):
    def act(self, g, x, layout, *, inverse=False, mean=False):
        return super().act(g, x, layout, inverse=inverse, mean=mean).flatten(0, 1)


class Nothing(Finite):
    def act(self, g, x, layout, *, inverse=False, mean=False):
        super().act(g, x, layout, inverse=inverse, mean=mean)


ACTIONS = {
    "no samples": (
        Unmoved,
        ValueError,
        "Unmoved: act must return (B, S, *layout) = (3, 'S', 2, 8) for layout 'ct', got (3, 2, 8)",
    ),
    "joined axes": (
        Flat,
        ValueError,
        "Flat: act must return (B, S, *layout) = (3, 'S', 2, 8) for layout 'ct', got (6, 2, 8)",
    ),
    "nothing": (Nothing, TypeError, "Nothing: act must return a Tensor, got NoneType"),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_actions(name):
    kind, error, message = ACTIONS[name]
    group = kind(*FLIP)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        model(Orbit(group))(signals(), 2)


def test_means_of_actions():
    """`mean` has no sample axis, and right actions pass, also compiled."""
    batch = signals()
    g = REVERSAL.elements(batch)
    x = torch.randn(3, 2, 2, 8)

    class Right(Finite):
        def act(self, g, x, layout, *, inverse=False, mean=False):
            return super().act(g, x, layout, inverse=inverse, mean=mean)

    right, wrong = Right(*FLIP), Unmoved(*FLIP)
    assert torch.equal(right.act(g, x, "ct", mean=True), REVERSAL.act(g, x, "ct", mean=True))
    with pytest.raises(ValueError, match=re.escape("(B, *layout) = (3, 2, 8) for layout 'ct', got (3, 2, 2, 8)")):
        wrong.act(g, x, "ct", mean=True)
    f = model(Orbit(right))
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch, 2, seed=0)[0], f(batch, 2, seed=0)[0])
