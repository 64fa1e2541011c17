"""Two axes of one tensor that two groups permute: names of axes, outputs, penalties and counts."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from probsym_fast import Symmetrized, equivariance_error
from probsym_fast.distributions import Frame, Learned, Normal, Uniform
from probsym_fast.groups import Draws, Graphs, Symmetric
from tests.conftest import assert_near
from tests.groups.test_groups import N, S, check_axioms, clouds
from tests.helpers.graphs import random_graphs

M = 7
GROUP = Symmetric(N) * Symmetric(M, "m")


@dataclass
class Tables:
    """Tables x (B, N, M); num_m (B,) columns of each are valid."""

    x: Tensor
    num_m: Tensor | None = None
    num_nodes = center = None

    size = property(lambda self: len(self.x))
    dtype = property(lambda self: self.x.dtype)
    device = property(lambda self: self.x.device)

    def check(self): ...

    def names(self, rows): ...

    def moved(self, group, g):
        return Tables(group.act(g, self.x, "nm")[:, 0], self.num_m)

    def carried(self, group, g, values, layout):
        return group.act(g, values, layout)[:, 0]


def tables(num_m=None) -> Tables:
    x = torch.randn(3, N, M, dtype=torch.float64)
    if num_m is not None:
        num_m = torch.tensor(num_m)
        x = x * (torch.arange(M) < num_m[:, None, None])
    return Tables(x, num_m)


@pytest.mark.parametrize("layout", ["nm", "mnc", "mm", "n", "c"])
@pytest.mark.parametrize("num_m", [None, [7, 3, 1]])
def test_axioms(layout, num_m):
    batch = tables(num_m)
    x = torch.randn(3, S, *({"n": N, "m": M, "c": 2}[letter] for letter in layout), dtype=torch.float64)
    elements = [GROUP.uniform(batch, S, Draws(seed=i)) for i in range(3)]
    check_axioms(GROUP, batch, elements, x, layout)
    assert GROUP.keeps(layout) is (layout == "c")
    rows, columns = elements[0]
    assert rows.num_nodes is None and columns.num_nodes is batch.num_m
    found = GROUP.act(elements[0], batch.x, "nm")
    for b in range(3):
        for s in range(S):
            assert torch.equal(found[b, s], batch.x[b, rows.rank[b, s]][:, columns.rank[b, s]])


class Sums(nn.Module):
    """Scores of rows and columns from their sums and noise."""

    outputs = ("scores", "scores_m")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def noise_shape(self, batch, samples):
        return batch.size, samples, N + M

    def forward(self, batch, noise):
        rows, columns = self.scale * noise.split([N, M], -1)[0], noise.split([N, M], -1)[1]
        tanh = batch.x.tanh()
        return {"scores": rows + tanh.sum(2)[:, None], "scores_m": columns + tanh.sum(1)[:, None]}


class Parts(nn.Module):
    """Embedding, and readout with the group's action on the table that the backbone returns."""

    layout = "nm"

    def __init__(self, back: bool):
        super().__init__()
        self.back = back

    def forward(self, *given):
        if not self.back:
            batch, group, g = given
            return group.act(g, batch.x, "nm", inverse=True).flatten(2)
        y, _, group, g = given
        return group.act(g, y.unflatten(2, (N, M)), "nm", mean=True)


def model(distribution) -> Symmetrized:
    torch.manual_seed(0)
    return Symmetrized(
        nn.Sequential(nn.Linear(N * M, N * M), nn.Tanh()), Parts(False), Parts(True), distribution
    ).double()


def test_a_model_of_tables():
    """Equivariant to permutations of rows and of columns, with a gradient and a penalty for each."""
    f = model(Learned(GROUP, Sums(), tau=0.1)).eval()
    batch = tables()
    canonical = model(Learned(GROUP, Sums(), Normal(0.0), tau=0.1)).eval()
    assert equivariance_error(canonical, batch, moves=2) < 1e-12
    errors = [equivariance_error(f, batch, samples=samples, moves=2, scale=1.0) for samples in (1, 64)]
    assert errors[1] < 0.3 * errors[0]
    prediction, penalties = f(batch, samples=4, seed=0)
    assert sorted(penalties) == ["entropy", "entropy_m"] and all(x > 0 for x in penalties.values())
    (prediction.square().sum() + sum(penalties.values())).backward()
    assert f.distribution.network.scale.grad != 0
    assert model(Uniform(GROUP))(batch, samples=2)[0].shape == (3, N, M)


def test_columns_are_sorted_within_their_tables():
    batch, group = tables([7, 3, 1]), Symmetric(M, "m")
    scores = torch.randn(3, S, M, dtype=torch.float64)
    p, penalties = group.project({"scores_m": scores}, batch, draws=Draws(seed=1))
    assert list(penalties) == ["entropy_m"] and p.num_nodes is batch.num_m
    assert torch.equal(p.order[1, :, :3], scores[1, :, :3].argsort(-1, descending=True))
    assert torch.equal(p.order[1, :, 3:], torch.arange(3, M).expand(S, -1))
    q, _ = Symmetric(M).project({"scores": scores}, tables(), draws=Draws(seed=1))
    assert_near(q.scores[0], p.scores[0])


def test_names():
    assert GROUP.outputs == ("scores", "scores_m") and GROUP.moves == "nm" and GROUP.n == N
    assert repr(GROUP) == "Symmetric(5) * Symmetric(7, 'm')"
    flipped = Symmetric(M, "m") * Symmetric(N)
    assert flipped.n == N  # the nodes, not the first axis
    graphs = random_graphs([2, 4, N])
    g = flipped.uniform(graphs, 1, Draws(seed=1))
    assert isinstance(graphs.moved(flipped, g), Graphs)
    assert torch.equal(graphs.moved(Symmetric(M, "m"), g[0]).x, graphs.x)  # it keeps nodes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Symmetric(5, "nm"), ValueError, "Symmetric: axis must be one letter but 'c', got 'nm'"),
        (lambda: Symmetric(5, "c"), ValueError, "Symmetric: axis must be one letter but 'c', got 'c'"),
        (lambda: Symmetric(5, 2), TypeError, "Symmetric: axis must be a str, got int"),
        (
            lambda: (Symmetric(3, "m") * Symmetric(3, "m")).project({"scores_m": torch.ones(3, 1, 3)}, tables()),
            ValueError,
            "each output must be read by one factor, got 'scores_m' read by two",
        ),
        (
            lambda: Symmetric(M, "m").project({"scores": torch.ones(3, 1, M)}, tables()),
            KeyError,
            "Symmetric(7, 'm'): the network must return 'scores_m', got ['scores']",
        ),
        (
            lambda: Symmetric(M, "m").project({"scores_m": torch.ones(3, 1, N)}, tables()),
            ValueError,
            "Symmetric(7, 'm'): scores_m must be (B, S, 7), got (3, 1, 5)",
        ),
        (
            lambda: Symmetric(M, "m").act(Symmetric(M, "m").identity(tables(), 1), torch.ones(3, N), "m"),
            ValueError,
            "Symmetric(7, 'm'): axis 2 of x must have size 7, got (3, 1, 5)",
        ),
        (
            lambda: Symmetric(N).act(Symmetric(N).identity(tables(), 1), torch.ones(3, M), "m"),
            ValueError,
            "Symmetric(5): layout must use only the letters 'nvpc', got 'm' in 'm'",
        ),
        (
            lambda: Frame(Symmetric(M, "m")),
            TypeError,
            "Frame: group must be Symmetric(n), Orthogonal, SpecialOrthogonal, Euclidean or SpecialEuclidean,"
            " got Symmetric(7, 'm')",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_axis_of_points_may_be_permuted():
    """Permuted coordinates: the letter is what counts."""
    batch = clouds()
    g = Symmetric(3, "v").uniform(batch, S, Draws(seed=1))
    found = Symmetric(3, "v").act(g, batch.velocities, "nv")
    assert torch.equal(found.sort(-1).values, batch.velocities.sort(-1).values[:, None].expand_as(found))
