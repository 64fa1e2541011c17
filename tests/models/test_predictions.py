"""Predictions in structures: every tensor of them as if it were the only one."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import probsym_fast as psf
from probsym_fast.distributions import Learned, Uniform, UniformNoise
from probsym_fast.distributions.gin import GIN
from probsym_fast.groups import Draws, Euclidean, Symmetric
from probsym_fast.models import MLP, FlatGraph, SlotReadout
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs

N, S, WIDTH = 6, 5, 8

SIZES = [6, 3, 5]


class Pair(NamedTuple):
    graph: torch.Tensor
    nodes: torch.Tensor


@dataclass
class Result:
    graph: torch.Tensor
    nodes: torch.Tensor


pytree.register_dataclass(Result)

FORMS = {
    "dict": lambda y, z: {"graph": y, "nodes": z},
    "tuple": lambda y, z: (y, z),
    "named": Pair,
    "nested": lambda y, z: {"all": [y, {"nodes": z}]},
    "dataclass": Result,
}


class Both(nn.Module):
    """A value of the graph and one of each node, in a form; complex: the phases too."""

    def __init__(self, form: str | None, is_complex: bool = False):
        super().__init__()
        self.form, self.complex, self.slots = form, is_complex, SlotReadout(N, WIDTH, 2)
        self.rows, self.layout = (FORMS[form]("graphs", "nodes"), FORMS[form]("c", "nc")) if form else ("graphs", "c")

    def forward(self, outputs, batch, group, g):
        y, z = outputs.mean(1), self.slots(outputs, batch, group, g)
        y, z = (torch.complex(x, 1 + x.flip(-1)) for x in (y, z)) if self.complex else (y, z)
        return FORMS[self.form](y, z)


class One(nn.Module):
    """One tensor of what another readout returns."""

    def __init__(self, readout: Both, which: int):
        super().__init__()
        self.readout, self.which, self.rows = readout, which, ("graphs", "nodes")[which]

    def forward(self, *given):
        return pytree.tree_leaves(self.readout(*given))[self.which]


def model(form="dict", is_complex=False, distribution=None, **settings) -> psf.Symmetrized:
    torch.manual_seed(1)
    parts = MLP([WIDTH, WIDTH], "tanh"), FlatGraph(N, WIDTH, 2), Both(form, is_complex)
    learned = distribution or Learned(Symmetric(N), GIN(2, 6), UniformNoise(), tau=0.1)
    return psf.Symmetrized(*parts, learned, **settings).double().eval()


def of_one(f: psf.Symmetrized, which: int) -> psf.Symmetrized:
    return psf.Symmetrized(f.backbone, f.embed, One(f.readout, which), f.distribution, chunk=f.chunk).eval()


def graphs() -> psf.Graphs:
    return random_graphs(SIZES)


HOW = {
    "mean": {},
    "none": {"reduce": "none"},
    "max": {"reduce": "max"},
    "weighted": {"reduce": "weighted", "weights": torch.rand(3, S, dtype=torch.float64) + 0.1},
    "best": {"reduce": "best", "score": torch.rand(3, S)},
}


@pytest.mark.parametrize(("form", "chunk"), [*((form, None) for form in FORMS), ("nested", 2)])
def test_every_tensor_as_if_it_were_alone(form, chunk):
    """Values in all reductions, the gradients of a mean and of the best, and the structure."""
    f, batch = model(form, chunk=chunk), graphs()
    structure = pytree.tree_structure(FORMS[form](0, 0))
    for name in HOW if form == "nested" else ("mean", "weighted"):
        how = HOW[name]
        found, penalties = f(batch, S, seed=3, **how)
        assert pytree.tree_structure(found) == structure and set(penalties) == {"entropy"}
        for which, x in enumerate(pytree.tree_leaves(found)):
            expected = of_one(f, which)(batch, S, seed=3, **how)[0]
            assert torch.equal(x, expected)
            if name in ("mean", "best"):
                weights = list(f.backbone.parameters())
                gradients = (torch.autograd.grad(y.square().sum(), weights, retain_graph=True) for y in (x, expected))
                assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("is_complex", [False, True])
def test_estimates(is_complex):
    """The error of complex numbers is that of both parts together; the tolerance holds for every tensor."""
    f, batch = model("nested", is_complex), graphs()
    found = f.estimate(batch, 32, seed=3)
    assert found.samples == 32
    for which, (x, error) in enumerate(zip(*map(pytree.tree_leaves, found[:2]), strict=True)):
        part = of_one(f, which)
        each = part(batch, 32, seed=3, reduce="none")[0].detach()
        parts = torch.view_as_real(each) if is_complex else each[..., None]
        assert_near(torch.view_as_real(x) if is_complex else x[..., None], parts.mean(0))
        assert_near(error, (parts.var(0).sum(-1) / 32).sqrt())
        assert error.dtype == torch.float64 and x.is_complex() == is_complex
    largest = max(float(x.max()) for x in pytree.tree_leaves(found.standard_error))
    stopped = f.estimate(batch, 512, seed=3, tolerance=2 * largest)
    assert 8 <= stopped.samples < 64
    assert all(float(x.max()) <= 2 * largest for x in pytree.tree_leaves(stopped.standard_error))


def test_complex_numbers():
    """In chunks, with weights, profiled; "max" has no meaning for them."""
    f, batch = model("dict", is_complex=True, chunk=2), graphs()
    each, mean = (f(batch, S, seed=3, reduce=how)[0]["nodes"] for how in ("none", "mean"))
    assert mean.dtype == torch.complex128
    assert_near(torch.view_as_real(mean), torch.view_as_real(each.mean(0)))
    weights = HOW["weighted"]["weights"]
    found = f(batch, S, seed=3, reduce="weighted", weights=weights)[0]["graph"]
    graph = f(batch, S, seed=3, reduce="none")[0]["graph"]
    expected = (graph * weights.T[..., None]).sum(0) / weights.sum(1)[:, None]
    assert_near(torch.view_as_real(found), torch.view_as_real(expected))
    with pytest.raises(
        TypeError, match=r"^Symmetrized: prediction\['graph'\] must be real with reduce 'max', got .*128$"
    ):
        f(batch, S, reduce="max")
    with pytest.raises(
        TypeError, match=r"^Symmetrized: prediction must be real with reduce 'max', got torch.complex128$"
    ):
        of_one(f, 0)(batch, S, reduce="max")
    narrow = model("tuple", is_complex=True, chunk="auto", memory=10**8).float()  # probes differentiate them too
    # many repeats: how many draws came before depends on the time, and two can have the same orders
    table = psf.profile(
        narrow, batch.to(torch.float32), samples=[2], seconds=0.001, repeats=16, modes=["training", "variance"]
    )
    assert all(row.latency or row.variance for row in table.rows)


def test_profiles_and_given_elements():
    f, batch = model("dataclass").float(), graphs().to(torch.float32)
    rows = psf.profile(f, batch, samples=[2], seconds=0.001, repeats=16, modes=["training", "inference"]).rows
    assert [row.latency > 0 for row in rows] == [True, True] and rows[1].variance > 0
    g, _ = f.distribution(batch, S, Draws(seed=3))
    found = f.apply_elements(batch, g)
    assert isinstance(found, Result) and torch.equal(found.nodes, f(batch, S, seed=3)[0].nodes)


def test_equivariance_by_layouts_and_for_one_layout():
    batch = graphs()
    uniform = model("nested", distribution=Uniform(Symmetric(N)))
    few, many = (psf.equivariance_error(uniform, batch, count, moves=2) for count in (2, 512))
    assert few / many > 4
    each = [psf.equivariance_error(of_one(uniform, k), batch, 8, output=("c", "nc")[k]) for k in (0, 1)]
    assert psf.equivariance_error(uniform, batch, 8) == max(each)
    clouds = psf.PointClouds(torch.randn(4, 5, 3))
    same = lambda x: {"here": x.positions, "there": (2 * x.positions, -x.positions)}  # noqa: E731
    assert psf.equivariance_error(same, clouds, group=psf.groups.Orthogonal(3), output="np") < 1e-5
    layouts = {"here": "np", "there": "nc"}  # for all in its place
    assert psf.equivariance_error(same, clouds, group=psf.groups.Orthogonal(3), output=layouts) > 0.1
    for output, error, message in (
        ({"here": "np"}, ValueError, "output must have the structure of the prediction, "),
        ({"here": "np", "there": 3}, TypeError, "output['there'] must be a str, got int"),
    ):
        with pytest.raises(error, match=f"^equivariance_error: {re.escape(message)}"):
            psf.equivariance_error(same, clouds, group=Euclidean(3), output=output)
    with pytest.raises(ValueError, match="predictions of both batches must have one structure, got"):
        psf.equivariance_error(Alternating(), clouds, group=Euclidean(3), output="c")
    uniform.reduce = "none"
    with pytest.raises(
        ValueError, match=r"^equivariance_error: the model's reduce must give one prediction, got 'none'$"
    ):
        psf.equivariance_error(uniform, batch)


class Alternating:
    """A tuple, then a list."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        return (tuple, list)[self.calls % 2]([batch.positions])


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (
            {"y": {"n": 3}},
            "prediction['y']['n'] must be a floating-point or complex Tensor (or a pytree of them), got int",
        ),
        ((torch.ones(3), torch.ones(3).long()), "prediction[1] must be a floating-point or complex Tensor"),
        ({"y": None}, "prediction['y'] must be a floating-point or complex Tensor (or a pytree of them), got NoneType"),
        ({}, "prediction must be a floating-point or complex Tensor (or a pytree of them), got an empty dict"),
        (
            torch.ones(3).bool(),
            "prediction must be a floating-point or complex Tensor (or a pytree of them), got torch.bool",
        ),
        (object(), "prediction must be a floating-point or complex Tensor (or a pytree of them), got object"),
    ],
)
def test_what_is_no_prediction(prediction, message):
    class Readout(nn.Module):
        def forward(self, *_):
            return prediction

    f = model()
    f.readout = Readout()
    for reduce in ("mean", "none"):
        with pytest.raises(TypeError, match=f"^{re.escape(f'Readout: {message}')}"):
            f(graphs(), 2, reduce=reduce)


def test_rows_of_other_structures():
    f, how = model("dict"), HOW["weighted"]
    for rows, error, message in (
        (("graphs", "nodes"), ValueError, "rows of the readout must have the structure of the prediction, "),
        ({"graph": "graphs", "nodes": 1}, TypeError, "rows of the readout['nodes'] must be a str, got int"),
    ):
        f.readout.rows = rows
        with pytest.raises(error, match=f"^{re.escape(f'Symmetrized: {message}')}"):
            f(graphs(), S, **how)

    f.readout.rows = "graphs"
    for how in (HOW["weighted"], HOW["best"]):
        with pytest.raises(
            ValueError,
            match=r"^Symmetrized: prediction must have 3 rows, by the readout's attribute rows, got \(14, 2\)$",
        ):
            f(graphs(), S, **how)


class Named(nn.Module):
    """Outputs in a dict, with what has no samples."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"y": self.net(x), "mask": None, "layers": 1}


def test_outputs_of_the_backbone_in_a_dict():
    f, batch = model("tuple"), graphs()
    expected = f(batch, S, seed=3, reduce="none")[0]
    f.backbone, hook = Named(f.backbone), lambda _, given: (given[0]["y"], *given[1:])
    f.readout.register_forward_pre_hook(hook)
    for x, y in zip(f(batch, S, seed=3, reduce="none")[0], expected, strict=True):
        assert torch.equal(x, y)


def score(each):
    """(S, B) of the values of graphs in the nested form."""
    return each["all"][0].square().sum(-1)


# --- programs ---


def test_compiled_exported_and_differentiated():
    """One graph each for the mean and the best; programs with dicts; torch.func. Weights: tests/batches/test_own.py."""
    f, batch, seed = model("nested", reduce="weighted", score=score), graphs(), torch.tensor(3)
    for reduce in ("mean", "best"):
        f.reduce = reduce
        torch._dynamo.reset()
        compiled = torch.compile(f, backend="eager", fullgraph=True)(batch, S, seed=seed)[0]
        for x, y in zip(*map(pytree.tree_leaves, (compiled, f(batch, S, seed=seed)[0])), strict=True):
            assert_near(x, y)
    other = random_graphs([4, 6, 2, 5])
    program = psf.export(f, batch, S)  # the best
    found = program.module()(other.x, other.edge_index, other.ptr, seed)
    expected = f(other, S, seed=seed)[0]
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for x, y in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
        assert_near(x, y)
    f.reduce = "mean"
    weights = dict(f.named_parameters())

    def loss(weights, seed):
        y = torch.func.functional_call(f, weights, (batch, 2), {"seed": seed})[0]
        return sum(x.square().sum() for x in pytree.tree_leaves(y))

    gradient = torch.func.grad(loss)(weights, seed)["readout.slots.bias"]
    assert_near(gradient, torch.autograd.grad(loss(weights, seed), weights["readout.slots.bias"])[0])
    both = torch.vmap(lambda seed: f(batch, 2, seed=seed)[0])(torch.tensor([3, 4]))
    assert_near(both["all"][1]["nodes"][1], f(batch, 2, seed=4)[0]["all"][1]["nodes"])
