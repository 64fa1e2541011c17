"""psf.equivariance_error: of models that are equivariant, of some that are not, and of functions."""

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.distributions import GIN, Identity, Learned, Uniform
from probsym_fast.groups import Euclidean, Orthogonal, Symmetric, Translation
from probsym_fast.models import MLP, FlatGraph, MeanReadout, SlotReadout
from tests import face
from tests.helpers.graphs import random_graphs

N = 6


def clouds() -> psf.PointClouds:
    return psf.PointClouds(torch.randn(4, 5, 3), torch.randn(4, 5, 3), torch.randn(4, 5, 5, 2))


def of_graphs(readout: nn.Module, distribution=None) -> psf.Symmetrized:
    learned = distribution or Learned(Symmetric(N), GIN(2, width=8))
    return psf.Symmetrized(MLP([16, 8]), FlatGraph(N, 16, 2), readout, learned).double().eval()


@pytest.mark.parametrize("make", [MeanReadout, lambda: SlotReadout(N, 8)], ids=["graphs", "nodes"])
def test_graphs_are_relabelled(make):
    """A uniform distribution is equivariant in the mean; the same network without one is not."""
    batch, readout = random_graphs([6, 3, 1]), make()  # here, where the seed is set
    model = of_graphs(readout, Uniform(Symmetric(N)))
    few, many = (psf.equivariance_error(model, batch, S, moves=3) for S in (2, 512))
    assert few / many > 6  # 1 / sqrt(S): 16
    bare = psf.equivariance_error(of_graphs(readout, Identity(Symmetric(N))), batch, moves=3)
    assert bare > 3 * many


def test_a_moved_graph_is_the_same_graph():
    batch = random_graphs([6, 3, 1]).replace(frame=torch.arange(10), pairs=torch.tensor([[0, 7], [5, 8]]))
    group = Symmetric(N)
    g = group.uniform(batch, 1, psf.Draws(seed=3))
    found = batch.moved(group, g)
    assert not torch.equal(found.x, batch.x) and torch.equal(found.ptr, batch.ptr)
    old = batch.carried(group, g, torch.arange(10), "nc")  # of every new node
    assert torch.equal(found.x, batch.x[old]) and torch.equal(found.frame, batch.frame[old])
    assert torch.equal(old[found.edge_index], batch.edge_index) and torch.equal(old[found.pairs], batch.pairs)
    assert torch.equal(found.graph[found.edge_index[0]], found.graph[found.edge_index[1]])
    assert batch.moved(Orthogonal(3), None) is not None  # it keeps the nodes
    with pytest.raises(ValueError, match="layout must be 'nc' or 'c', got 'np'"):
        batch.carried(group, g, batch.x, "np")


def test_functions_of_others():
    """Distances are invariant, positions equivariant, and coordinates by themselves are neither."""
    batch, group = clouds(), Symmetric(5) * Euclidean(3)
    pairs = lambda x: torch.cdist(x.positions, x.positions).sort(-1).values  # noqa: E731
    assert psf.equivariance_error(pairs, batch, group=group, output="nc") < 1e-5
    assert psf.equivariance_error(lambda x: x.positions, batch, group=group, output="np") < 1e-5
    assert psf.equivariance_error(lambda x: x.positions.abs(), batch, group=group, output="np") > 0.1


def test_what_is_refused():
    batch, model = clouds(), lambda x: x.positions
    for error, settings, message in (
        (ValueError, {"output": "np"}, "group must be given: the model does not define it"),
        (ValueError, {"group": Euclidean(3)}, "output must be given: the model does not define it"),
        (TypeError, {"group": "O3", "output": "np"}, "group must be a Group, got str"),
        (ValueError, {"samples": 0}, "samples must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=f"^equivariance_error: {message}$"):
            psf.equivariance_error(model, batch, **settings)
    with pytest.raises(TypeError, match=r"^equivariance_error: model must be a Symmetrized or a function, got int$"):
        psf.equivariance_error(3, batch)
    with pytest.raises(TypeError, match=r"got Tensor$"):
        psf.equivariance_error(model, torch.ones(3))


def test_the_face():
    assert psf.tasks.load("nbody/demo").config.task == "nbody"
    assert set(psf.__all__) <= set(dir(psf)) and all(hasattr(psf, name) for name in psf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        psf.nothing  # noqa: B018
    text = str(of_graphs(MeanReadout()))
    assert (
        "draws='independent', chunk=None" in text and "Symmetric(6), noise=Normal(1.0), tau=0.01, iterations=20" in text
    )


@pytest.mark.parametrize("group", [Translation(3), Euclidean(3), Symmetric(5) * Euclidean(3)], ids=repr)
def test_translations_are_tried(group):
    """Centred clouds too; and far from the origin the error is the same."""
    batch = clouds()
    centred = batch.replace(positions=batch.positions - batch.positions.mean(1, keepdim=True))
    for far in (0, 1000):
        moved = centred.replace(positions=centred.positions.double() + far)
        assert psf.equivariance_error(lambda x: 2 * x.positions, moved, group=group, output="np") > 0.3
        assert psf.equivariance_error(lambda x: x.positions, moved, group=group, output="np") < 1e-5


def test_predictions_that_cannot_be_compared():
    batch, group = clouds(), Euclidean(3)
    for f, error, message in (
        (
            lambda x: (x.positions, {}),
            TypeError,
            "a Tensor, or a pytree of tensors, got tuple; return the prediction only",
        ),
        (lambda x: x.positions, ValueError, "scale must be a finite number > 0 or None, got 0"),
    ):
        with pytest.raises(error, match=message):
            psf.equivariance_error(f, batch, group=group, output="np", scale=0 if error is ValueError else None)
    assert psf.equivariance_error(lambda x: 0 * x.positions, batch, group=group, output="nv") == 0
    with pytest.raises(ValueError, match=r"g must have one sample per graph, \(B, 1\), got 2"):
        batch.moved(group, group.uniform(batch, 2))
    graphs = random_graphs([6, 3])
    product = Symmetric(N) * Orthogonal(3)
    assert not torch.equal(graphs.moved(product, product.uniform(graphs, 1)).x, graphs.x)


def test_a_script_over_the_whole_face(tmp_path, capsys):
    """The one that the type checker reads."""
    face.main(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {"profile.json", "profile.png", "trace.json"}
    assert "Symmetrized(" in capsys.readouterr().out
