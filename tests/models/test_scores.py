"""Scores of the samples' predictions: the best sample, and weights of a mean."""

import re

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.distributions import Distribution, Uniform
from probsym_fast.groups import Symmetric
from probsym_fast.models import MLP, FlatGraph, MeanReadout, ScoredReadout
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs
from tests.models.test_predictions import WIDTH, N, S, graphs, model, of_one

# --- scores ---


def test_the_best_sample():
    f, batch = model("dict", distribution=Uniform(Symmetric(N))), graphs()
    each = f(batch, S, seed=3, reduce="none")[0]
    scores = each["graph"][..., 0]  # (S, B)
    chosen = scores.argmax(0)
    assert len(chosen.unique()) > 1
    f.readout = Scored(f.readout)
    for how in ("score", lambda y: y["score"], scores.T.detach()):
        found = f(batch, S, seed=3, reduce="best", score=how)[0]
        for b in range(3):
            assert torch.equal(found["graph"][b], each["graph"][chosen[b], b])
            assert torch.equal(found["nodes"][batch.graph == b], each["nodes"][chosen[b]][batch.graph == b])
    tied = torch.tensor([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0], [-torch.inf, -5, -5, -torch.inf, -9]])
    found = f(batch, S, seed=3, reduce="best", score=tied)[0]["graph"]
    assert torch.equal(found, torch.stack([each["graph"][k, b] for b, k in enumerate((1, 0, 1))]))
    by_sample = torch.randn(S, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    f.readout = Given(by_sample)
    (gradient,) = torch.autograd.grad(f(batch, S, reduce="best", score=tied)[0].sum(), by_sample)
    assert torch.equal(
        gradient.sum(-1).nonzero().tolist() and gradient[[1, 0, 1], [0, 1, 2]], torch.ones(3, WIDTH).double()
    )
    assert gradient.sum() == 3 * WIDTH


class Scored(nn.Module):
    """A score among the predictions."""

    def __init__(self, readout):
        super().__init__()
        self.readout, self.rows = readout, readout.rows | {"score": "graphs"}

    def forward(self, outputs, *given):
        y = self.readout(outputs, *given)
        return y | {"score": y["graph"][:, :1]}


class Given(nn.Module):
    """Predictions that are given, (S, ...), of one sample after the other."""

    def __init__(self, each):
        super().__init__()
        self.each, self.calls = each, 0

    def forward(self, *_):
        self.calls += 1
        return self.each[self.calls - 1]


@pytest.mark.parametrize("chunk", [None, 2])
def test_weights_of_a_head(chunk):
    """Softmax of the head's scores; head, backbone and distribution learn from them; one call after another."""
    f, batch = model(chunk=chunk), graphs()
    f.readout = ScoredReadout(f.readout, nn.Linear(WIDTH, 1).double())
    f.reduce, f.score = "weighted", "score"
    assert "reduce='weighted'" in repr(f)
    found = f(batch, S, seed=3)[0]
    each = f(batch, S, seed=3, reduce="none")[0]
    shares = each["score"].softmax(0)  # (S, B)
    nodes = (shares[:, batch.graph, None] * each["prediction"]["nodes"]).sum(0)
    assert_near(found["prediction"]["nodes"], nodes)
    assert_near(found["prediction"]["graph"], (shares[..., None] * each["prediction"]["graph"]).sum(0))
    parameters = list(f.parameters())
    gradients = [
        torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        for y in (found["prediction"]["nodes"], nodes)
    ]
    for (name, _), a, b in zip(f.named_parameters(), *gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b)
        assert a is None or not name.startswith("readout.head") or name.endswith("bias") or a.abs().max() > 0
    shift = f(batch, S, seed=3, score=each["score"].T.detach() + 1e4)[0]["prediction"]["nodes"]
    assert_near(shift, nodes)
    if chunk is None:
        few, many = (psf.equivariance_error(f, batch, samples=count) for count in (1, 64))
        assert few / many > 3  # 1 / sqrt(S): 8
    assert_near(f(batch, S, seed=3, reduce="mean")[0]["prediction"]["graph"], each["prediction"]["graph"].mean(0))
    f.reduce = "max"
    with pytest.raises(
        ValueError, match=r"^estimate: the model's reduce must be one of \('mean', 'weighted'\), got 'max'$"
    ):
        f.estimate(batch, S)


def test_a_score_that_is_a_module_is_trained_with_the_model():
    head = nn.Sequential(nn.Linear(WIDTH, 1), nn.Flatten(1)).double()
    f = psf.Symmetrized(
        *(getattr(model(), x) for x in ("backbone", "embed")), MeanReadout(), Uniform(Symmetric(N)), score=head
    )
    assert "score.0.weight" in f.state_dict()
    f.double()(graphs(), S, reduce="weighted")[0].square().sum().backward()
    assert head[0].weight.grad.abs().max() > 0


class Orbit(Distribution):
    """All orders of three nodes, each with a weight; a network gives the weights."""

    def __init__(self):
        super().__init__(Symmetric(3))
        self.logits = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def draw(self, batch, samples, draws=None):
        return self.group.uniform(batch, samples, draws), {}

    def elements_and_weights(self, batch, samples, draws=None):
        order = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
        g = psf.Permutation(order.expand(batch.size, -1, -1).contiguous())
        return g, self.logits.exp().expand(batch.size, -1), {"spread": self.logits.var()}


@pytest.mark.parametrize("chunk", [None, 4, "auto"])
def test_weights_of_the_distribution(chunk):
    """Here for a whole orbit, whatever the number of samples."""
    batch, embed = random_graphs([3, 3]), FlatGraph(3, WIDTH, 2)
    f = psf.Symmetrized(MLP([WIDTH, WIDTH]), embed, MeanReadout(), Orbit(), reduce="weighted", chunk=chunk).double()
    found, penalties = f(batch, 2)
    g, weights, _ = f.distribution.elements_and_weights(batch, 2)
    expected = f.apply_elements(batch, g, weights=weights)
    assert_near(found, expected)
    assert set(penalties) == {"spread"} and f(batch, 2, reduce="mean")[1] == {}
    parameters = list(f.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)), strict=True):
        assert_near(a, b)
    f.distribution.logits.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^Orbit: weights must be finite and >= 0 with a sum > 0, got "):
        f(batch, 2)


def test_refused_scores():
    f, batch = model("dict"), graphs()
    needed = "score must be a key, a function or a Tensor with reduce 'best', got None"
    shape = "score must give (S, B) or (S, B, 1) with (5, 3), got (5, 3, 8)"
    for error, how, message in (
        (ValueError, {"reduce": "best"}, needed),
        (ValueError, {"score": "graph"}, "score must be None with reduce 'mean', got 'graph'"),
        (ValueError, {"reduce": "max", "score": torch.ones(3, S)}, "score must be None with reduce 'max', got Tensor"),
        (
            TypeError,
            {"reduce": "best", "score": 3},
            "score must be a key (str), a function, a Tensor or None, got int 3",
        ),
        (
            ValueError,
            {"reduce": "best", "score": "y"},
            "prediction must be a dict with the score 'y', got a dict with ['graph'",
        ),
        (ValueError, {"reduce": "best", "score": "graph"}, shape),
        (ValueError, {"reduce": "best", "score": torch.ones(S, 3)}, "score must give (B, S) with (3, 5), got (5, 3)"),
        (
            TypeError,
            {"reduce": "best", "score": torch.ones(3, S).int()},
            "score must give a floating-point Tensor, got torch.int32",
        ),
        (ValueError, {"reduce": "weighted", "score": torch.full((3, S), torch.nan)}, "score must give no NaN, got NaN"),
        (
            ValueError,
            {"reduce": "weighted", "score": "graph", "weights": torch.ones(3, S)},
            "weights must be None with a score",
        ),
        (
            ValueError,
            {"reduce": "weighted"},
            "weights must be (B, S) = (3, 5), got None; without weights give a score, or a dis",
        ),
        (
            ValueError,
            {"reduce": "best", "weights": torch.ones(3, S)},
            "weights must be None with reduce 'best', got (3, 5)",
        ),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'Symmetrized: {message}')}"):
            f(batch, S, **how)
    with pytest.raises(ValueError, match=r"^Symmetrized: prediction must be a dict with the score 'y', got a Tensor$"):
        of_one(f, 0)(batch, S, reduce="best", score="y")
    with pytest.raises(ValueError, match=r"^Symmetrized: reduce must be one of "):
        f.reduce = "median"
