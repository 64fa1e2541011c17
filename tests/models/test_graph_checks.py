"""Models of graphs: what they refuse, and what they do not read."""

import re

import pytest
import torch

from probsym_fast.distributions import Learned
from probsym_fast.models import MLP, FlatGraph, MeanReadout, Symmetrized
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs
from tests.models.test_graph_models import GROUP, KINDS, METHODS, SIZES, WIDTH, C, N, S, distribution, model

FIELDS = {
    "x": lambda batch: batch.replace(x=batch.x[1:]),
    "ptr": lambda batch: batch.replace(ptr=batch.ptr.float()),
    "edge_index": lambda batch: batch.replace(edge_index=batch.edge_index[:1]),
    "edge_attr": lambda batch: batch.replace(edge_attr=batch.x),
    "key": lambda batch: batch.replace(key=torch.arange(3)),
    "frame": lambda batch: batch.replace(frame=torch.arange(15)),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_to_read_a_batch_checks_it(field, method):
    good = random_graphs(SIZES)
    bad = FIELDS[field](good)
    f = model("gin", method).eval()
    g, _ = f.distribution(good, S)
    readers = [lambda: f(bad, S), lambda: f.distribution(bad, S), lambda: f.apply_elements(bad, g)]
    if isinstance(f.distribution, Learned):
        readers.append(lambda: f.distribution.network(bad, torch.zeros(bad.x.shape[0], S, C)))
    for read in readers:
        with pytest.raises((TypeError, ValueError), match=f"^Graphs: {'ptr' if field == 'x' else field} must .*, got "):
            read()


WRONG = [torch.int64, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", WRONG)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_node_features_of_another_dtype(dtype, kind, method):
    f, batch = model(kind, method, torch.float32), random_graphs(SIZES, dtype=torch.float32)
    wanted = r"torch\.float32 as the (weights are|scores are, or below)"
    with pytest.raises(TypeError, match=f"^(FlatGraph|IdentifiedNodes|GIN): x must be {wanted}, got {dtype}$"):
        f(batch.replace(x=batch.x.to(dtype)), S)


@pytest.mark.parametrize("dtype", WRONG)
@pytest.mark.parametrize("soft", [False, True])
def test_edge_features_of_another_dtype(dtype, soft):
    f = Symmetrized(MLP([8, 4]), FlatGraph(N, 8, C, 3, soft=soft), MeanReadout(), distribution("ps"))
    batch = random_graphs(SIZES, dtype=torch.float32, edge_features=3)
    assert f(batch, S)[0].isfinite().all()
    message = f"FlatGraph: edge_attr must be torch.float32 as the weights are, got {dtype}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        f(batch.replace(edge_attr=batch.edge_attr.to(dtype)), S)


@pytest.mark.parametrize("soft", [False, True])
def test_edges_that_leave_their_graph(soft):
    f = Symmetrized(MLP([8, 4]), FlatGraph(N, 8, C, soft=soft), MeanReadout(), distribution("ps"))
    batch = random_graphs(SIZES, dtype=torch.float32)
    g, _ = f.distribution(batch, S)
    for column, message in (([0, -1], "must hold node numbers 0 to"), ([0, SIZES[0]], "must join nodes of one graph")):
        edges = batch.edge_index.clone()
        edges[:, 0] = torch.tensor(column)
        with pytest.raises(ValueError, match=f"edge_index {message}"):
            f.apply_elements(batch.replace(edge_index=edges), g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ps", "ga"])
def test_autocast_takes_any_floating_dtype(kind, method):
    f, batch = model(kind, method, torch.float32).eval(), random_graphs(SIZES, dtype=torch.float32)
    batch = batch.replace(x=batch.x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = f(batch, S, torch.Generator().manual_seed(1))[0]
        for dtype in (torch.float64, torch.bfloat16):
            found = f(batch.replace(x=batch.x.to(dtype)), S, torch.Generator().manual_seed(1))[0]
            assert_near(found.float(), expected.float(), {torch.float32: 1e-2})
        with pytest.raises(TypeError, match=r"x must be torch\.float32 as the weights are, got torch\.int64"):
            f(batch.replace(x=batch.x.long()), S)


def test_features_that_are_not_read_may_be_of_any_dtype():
    embed, batch = FlatGraph(N, WIDTH), random_graphs(SIZES, dtype=torch.float32)
    g = GROUP.uniform(batch, S)
    for dtype in WRONG:
        assert torch.equal(embed(batch.replace(x=batch.x.to(dtype)), GROUP, g)[0], embed(batch, GROUP, g)[0])


@pytest.mark.parametrize("method", ["ps", "ga"])
def test_gin_does_not_read_edge_attr(method):
    f, batch = model("gin", method).eval(), random_graphs(SIZES, edge_features=3)
    with_them, without = (f(x, S, torch.Generator().manual_seed(1))[0] for x in (batch, batch.replace(edge_attr=None)))
    assert torch.equal(with_them, without)
