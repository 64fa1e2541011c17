"""The axioms of every group, uniform sampling against Haar measure, and gradients through actions."""

import re
from collections import Counter

import pytest
import torch

from probsym_fast import ops
from probsym_fast.groups import (
    Draws,
    Euclidean,
    Graphs,
    Motion,
    Orthogonal,
    PointClouds,
    SpecialEuclidean,
    SpecialOrthogonal,
    Symmetric,
    Translation,
)
from probsym_fast.ops import Permutation
from probsym_fast.ops.permutation import Relaxation
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs

N, S = 5, 3
GROUPS = [
    Symmetric(N),
    Orthogonal(3),
    Orthogonal(2),
    SpecialOrthogonal(3),
    Translation(3),
    Euclidean(3),
    Euclidean(2),
    SpecialEuclidean(3),
    Symmetric(N) * Euclidean(3),
    Symmetric(N) * SpecialOrthogonal(3),
    Symmetric(N) * Translation(2),
]
LAYOUTS = ["np", "nv", "nnc", "nvc", "v", "c", "nnvv", "cnp"]


def dimension(group) -> int:
    return next((f.d for f in getattr(group, "factors", (group,)) if hasattr(f, "d")), 3)


def clouds(count=2, d=3, seed=0) -> PointClouds:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return PointClouds(draw(count, N, d), draw(count, N, d), draw(count, N, N, 2))


def data(layout: str, d: int, lead: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(*lead, *({"n": N, "v": d, "p": d, "c": 2}[x] for x in layout), dtype=torch.float64)


def check_axioms(group, batch, elements, x, layout):
    """elements: g, h, k; x (B, S, *layout)."""
    g, h, k = elements
    act = lambda a, y: group.act(a, y, layout)  # noqa: E731

    assert_near(act(group.identity(batch, S), x), x)
    assert_near(act(g, act(h, x)), act(group.compose(g, h), x))
    assert_near(act(group.compose(g, group.inverse(g)), x), x)
    assert_near(group.act(g, act(g, x), layout, inverse=True), x)
    assert_near(group.act(g, x, layout, inverse=True), act(group.inverse(g), x))
    a, b = group.compose(group.compose(g, h), k), group.compose(g, group.compose(h, k))
    assert_near(act(a, x), act(b, x))
    shared = x[:, 0]
    assert_near(act(g, shared), act(g, shared[:, None].expand(x.shape)))
    for inverse in (False, True):
        mean = group.act(g, x, layout, inverse=inverse, mean=True)
        assert_near(mean, group.act(g, x, layout, inverse=inverse).mean(1))


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_axioms(group, layout):
    d = dimension(group)
    batch = clouds(d=d)
    g, h, k = (group.uniform(batch, S, Draws(seed=i)) for i in range(3))
    if layout.count("p") and not isinstance(group, Symmetric | Orthogonal):
        h = group.compose(h, g)  # shifts that differ
    check_axioms(group, batch, (g, h, k), data(layout, d, (2, S)), layout)


@pytest.mark.parametrize("group", [Symmetric(N), Symmetric(N + 2), Symmetric(N) * Orthogonal(3)], ids=repr)
@pytest.mark.parametrize("layout", ["n", "nc", "nnc", "cn", "c", "nv"])
def test_axioms_on_ragged_graphs(group, layout):
    """Padded node axes; slots beyond a graph's nodes stay where they are."""
    batch = random_graphs([1, 2, 4, N])
    n = getattr(group, "factors", (group,))[0].n
    x = torch.randn(4, S, *({"n": n, "c": 2, "v": 3}[letter] for letter in layout), dtype=torch.float64)
    elements = tuple(group.uniform(batch, S, Draws(seed=i)) for i in range(3))
    check_axioms(group, batch, elements, x, layout)
    g, h, _ = elements
    for p in (g, group.compose(g, h), group.inverse(g), group.identity(batch, S)):
        p = p[0] if isinstance(p, tuple) else p
        assert torch.equal(p.num_nodes, batch.num_nodes)
        assert torch.equal(p.rank.gather(-1, p.order), torch.arange(n).expand(p.shape))
        for b, count in enumerate(batch.num_nodes.tolist()):
            assert torch.equal(p.order[b, :, count:], torch.arange(count, n).expand(S, -1))


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_actions_that_matter_move_something(group):
    d = dimension(group)
    g = group.uniform(clouds(d=d), S, Draws(seed=5))
    x = data("np", d, (2, S))
    assert (group.act(g, x, "np") - x).abs().max() > 0.1
    y = data("c", d, (2, S))
    assert torch.equal(group.act(g, y, "c"), y)


def test_gradients_reach_input_and_element():
    group = Symmetric(N) * Euclidean(3)
    x = data("np", 3, (2, S)).requires_grad_()
    scores = torch.randn(2, S, N, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, S, 3, 3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, S, 3, dtype=torch.float64, requires_grad=True)

    def f(x, matrix, shift):
        g = (ops.soft_permutation(scores, tau=0.1), Motion(ops.orthogonal_frame(matrix), shift))
        return group.act(g, x, "np", inverse=True)

    assert torch.autograd.gradcheck(f, (x, matrix, shift))
    G = torch.randn(2, S, N, 3, dtype=torch.float64)
    p = ops.soft_permutation(scores, tau=0.1)
    (found,) = torch.autograd.grad((Symmetric(N).act(p, x.detach(), "np", inverse=True) * G).sum(), scores)
    soft = ops.soft_permutation(scores, tau=0.1).soft()  # the straight-through gradient is that of P
    (expected,) = torch.autograd.grad((torch.einsum("bsuj,bsuc->bsjc", soft, x.detach()) * G).sum(), scores)
    assert_near(found, expected)
    with torch.no_grad():
        gathered = Symmetric(N).act(p, x, "np", inverse=True)
    assert torch.equal(Symmetric(N).act(p, x, "np", inverse=True), gathered)


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("samples", [1, 7])
def test_uniform_permutations_of_the_valid_nodes(n, samples):
    """Every permutation of n valid nodes out of 6 slots equally often (chi-square); the padding stays."""

    size = 24_000 // samples
    batch = Graphs(torch.zeros(size * n, 1), torch.zeros(2, 0).long(), torch.arange(size + 1) * n)
    p = Symmetric(6).uniform(batch, samples, Draws(seed=2))
    assert torch.equal(p.order[..., n:], torch.arange(n, 6).expand(*p.shape[:2], -1))
    counts = Counter(map(tuple, p.order[..., :n].flatten(0, 1).tolist()))
    cells = {3: 6, 4: 24}[n]
    assert len(counts) == cells
    expected = p.shape[0] * samples / cells
    chi2 = sum((c - expected) ** 2 / expected for c in counts.values())
    assert chi2 < (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5


def ks(samples: torch.Tensor, distribution) -> float:
    """Kolmogorov-Smirnov distance times sqrt(count): below 1.95 for 999 of 1000 draws of the distribution."""
    x = samples.flatten().sort().values
    F = distribution(x)
    steps = torch.arange(len(x) + 1, dtype=x.dtype) / len(x)
    return max((F - steps[:-1]).max().item(), (steps[1:] - F).max().item()) * len(x) ** 0.5


def two_sample_ks(x: torch.Tensor, y: torch.Tensor) -> float:
    y = y.sort().values
    return ks(x, lambda t: torch.searchsorted(y, t, right=True).double() / len(y)) / 2**0.5


@pytest.mark.parametrize("group", [Orthogonal(3), SpecialOrthogonal(3), Orthogonal(2), SpecialOrthogonal(2)], ids=repr)
def test_uniform_follows_haar_measure(group):
    d, count = group.d, 40_000
    q = group.uniform(clouds(count, d), 1, Draws(seed=7))[:, 0]
    flat = q.flatten(1)
    assert flat.mean(0).abs().max() < 5 * (1 / d / count) ** 0.5
    moments = flat.mT @ flat / count  # E Q_ij Q_kl = delta_ik delta_jl / d
    expected = torch.eye(d * d, dtype=q.dtype) / d
    if isinstance(group, SpecialOrthogonal) and d == 2:
        expected = expected + torch.tensor([[0, 0, 0, 1], [0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0]]) / 2
    assert (moments - expected).abs().max() < 0.02
    determinant = torch.linalg.det(q)
    assert (determinant.abs() - 1).abs().max() < 1e-9
    if group.special:
        assert (determinant > 0).all()
    else:
        assert determinant.mean().abs() < 5 / count**0.5
    trace = q.diagonal(dim1=-2, dim2=-1).sum(-1)
    if d == 3:  # the angle of a rotation has density (1 - cos a) / pi; a coordinate of a unit vector is uniform
        rotation = trace * determinant
        angle = ((rotation - 1) / 2).clamp(-1, 1).acos()
        assert ks(angle, lambda a: (a - a.sin()) / torch.pi) < 1.95
        for entry in flat.T:
            assert ks(entry, lambda u: (u + 1) / 2) < 2.2
    h = group.uniform(clouds(1, d), 1, Draws(seed=8))[0, 0]
    other = group.uniform(clouds(count, d), 1, Draws(seed=9))[:, 0]
    for moved in (h @ other, other @ h):  # left and right invariance
        assert two_sample_ks(moved[:, 0, 0], q[:, 0, 0]) < 1.95


def test_the_haar_test_would_notice():
    """QR without the sign fix is not Haar."""
    q = torch.linalg.qr(torch.randn(40_000, 3, 3, dtype=torch.float64)).Q
    assert ks(q[:, 0, 0], lambda u: (u + 1) / 2) > 10


def test_translation_is_removed_and_restored():
    batch = clouds()
    group = Euclidean(3)
    g = group.uniform(batch, S)
    centred = group.act(g, batch.positions, "np", inverse=True)
    assert centred.mean(2).abs().max() < 1e-12
    assert_near(group.act(g, centred, "np", mean=True), batch.positions)
    moved = batch.replace(positions=batch.positions + 3.0)
    again = group.act(Motion(g.frame, moved.center[:, None].expand(-1, S, -1)), moved.positions, "np", inverse=True)
    assert_near(again, centred)


def test_bad_input():
    batch = clouds()
    x = batch.positions
    with pytest.raises(ValueError, match="Symmetric: n must be at least 1, got 0"):
        Symmetric(0)
    with pytest.raises(ValueError, match="SpecialOrthogonal: d must be at least 1, got -1"):
        SpecialOrthogonal(-1)
    g = Symmetric(4).identity(batch, S)
    with pytest.raises(ValueError, match=re.escape("axis 2 of x must have size 4, got (2, 3, 5, 3)")):
        Symmetric(4).act(g, x, "np")
    with pytest.raises(ValueError, match=re.escape("axis 2 of x must have size 2, got (2, 5, 3)")):
        Orthogonal(2).act(Orthogonal(2).identity(batch, S), x, "np")
    with pytest.raises(ValueError, match=re.escape("x must be (B, [S,] *'np'), 2 axes after the batch, got (2, 5)")):
        Orthogonal(3).act(Orthogonal(3).identity(batch, S), x[..., 0], "np")
    with pytest.raises(ValueError, match="layout must have at most one point axis, got 'pp'"):
        Euclidean(3).act(Euclidean(3).identity(batch, S), data("pp", 3, (2,)), "pp")
    with pytest.raises(KeyError, match=re.escape("Symmetric(5): the network must return 'scores', got ['matrices']")):
        Symmetric(5).project({"matrices": x}, batch)
    with pytest.raises(ValueError, match=re.escape("Symmetric(5): scores must be (B, S, 5), got (2, 3, 4)")):
        Symmetric(5).project({"scores": torch.zeros(2, 3, 4)}, batch)
    with pytest.raises(ValueError, match=re.escape("matrices must be (B, S, 3, 3), got (2, 3, 2, 2)")):
        Orthogonal(3).project({"matrices": torch.zeros(2, 3, 2, 2)}, batch)
    assert isinstance(Symmetric(5).uniform(batch, 1), Permutation)


def test_ragged_scores_are_sorted_within_their_graphs():
    """project of scores (nodes, S): as for padded scores, and gradients come back to the nodes."""
    batch, n = random_graphs([3, 1, 5]), 6
    scores = torch.randn(9, S, dtype=torch.float64, requires_grad=True)
    p, penalties = Symmetric(n).project({"scores": scores}, batch, relaxation=Relaxation(0.3), draws=Draws(seed=1))
    q, same = Symmetric(n).project(
        {"scores": batch.padded(scores, n)}, batch, relaxation=Relaxation(0.3), draws=Draws(seed=1)
    )
    assert torch.equal(p.order, q.order) and torch.equal(penalties["entropy"], same["entropy"])
    for b, (start, count) in enumerate(zip(batch.ptr.tolist(), batch.num_nodes.tolist(), strict=False)):
        expected = scores[start : start + count].argsort(0, descending=True).T
        assert torch.equal(p.order[b, :, :count], expected)
    (p.soft() * torch.randn(n, n, dtype=torch.float64)).sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[batch.graph != 1] != 0).all()
    with pytest.raises(ValueError, match="Graphs: a graph must have at most N = 4 nodes, got 5 in graph 2"):
        Symmetric(4).project({"scores": scores}, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_ties_are_broken_at_random(dtype, scale):
    """Equal scores: every order equally often (chi-square), however large they are; other scores keep their order."""
    count = 6000
    batch = Graphs(torch.zeros(4 * count, 1), torch.zeros(2, 0).long(), torch.arange(count + 1) * 4)
    scores = (scale * torch.tensor([1.0, 1.0, 5.0, 1.0])).to(dtype).repeat(count)[:, None]
    p, penalties = Symmetric(5).project({"scores": scores}, batch, draws=Draws(seed=3))
    assert penalties["entropy"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (p.order[..., 0] == 2).all()
    counts = Counter(map(tuple, p.order[:, 0, 1:4].tolist()))
    assert len(counts) == 6
    assert sum((c - count / 6) ** 2 / (count / 6) for c in counts.values()) < 5 + 5 * 10**0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": torch.ones(2, 3)}, ValueError, "positions must be (B, n, d), got (2, 3)"),
        ({"positions": None}, ValueError, "positions must be (B, n, d), got None"),
        ({"velocities": torch.ones(2, N, 2)}, ValueError, "velocities must be (B, n, d) = (2, 5, 3), got (2, 5, 2)"),
        ({"velocities": [0.0]}, TypeError, "velocities must be a Tensor, got list"),
        ({"edges": torch.ones(2, N, N)}, ValueError, "edges must be (B, n, n, C) = (2, 5, 5, *), got (2, 5, 5)"),
        ({"edges": torch.ones(2, N, N, 1).to("meta")}, RuntimeError, "edges must be on cpu as the nodes are, got meta"),
    ],
)
def test_point_clouds_of_other_shapes(change, error, message):
    batch = clouds()
    batch.check()
    with pytest.raises(error, match=f"^{re.escape(f'PointClouds: {message}')}$"):
        batch.replace(**change).check()
