"""Frames of clouds: all signs, equivariance also of degenerate clouds, padding, weights, continuity, gradients."""

import itertools
import re

import pytest
import torch
from torch import nn

from probsym_fast import PointClouds, Symmetrized, equivariance_error, models
from probsym_fast.distributions import Frame, MinimalFrame, WeightedFrame
from probsym_fast.groups import Draws, Euclidean, Motion, Orthogonal, SpecialEuclidean, SpecialOrthogonal, Symmetric
from tests.conftest import assert_near
from tests.groups.test_groups import N, S
from tests.helpers.strangers import Molecules

GROUPS = [
    Orthogonal(3),
    SpecialOrthogonal(3),
    Euclidean(3),
    SpecialEuclidean(3),
    Euclidean(2),
    SpecialOrthogonal(2),
    SpecialEuclidean(4),
]


def cloud(x: torch.Tensor) -> PointClouds:
    x = x.double()
    return PointClouds(x, torch.zeros_like(x), x.new_ones(*x.shape[:2], x.shape[1], 1))


def clouds(count=2, d=3, seed=0) -> PointClouds:
    return cloud(torch.randn(count, N, d, generator=torch.Generator().manual_seed(seed)))


def frames(g) -> torch.Tensor:
    return g.frame if isinstance(g, Motion) else g


def model(distribution) -> Symmetrized:
    torch.manual_seed(0)
    d = distribution.linear.d
    net = models.MessagePassing(in_features=2 * d, edge_features=1, out_features=d, width=8, layers=1)
    parts = net, models.NodeVectors(), models.NodeReadout(displacement=True)
    return Symmetrized(*parts, distribution, draws="stratified").double().eval()


def weighted(model, batch, seed=0):
    """The mean over all frames of a WeightedFrame."""
    samples = model.distribution.count(batch)
    return model(batch, samples, seed=seed, reduce="weighted")[0]


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_principal_axes_with_all_signs(group):
    batch, linear = clouds(d=group.d), getattr(group, "linear", group)
    count = 2 ** (group.d - linear.special)
    g = Frame(group)(batch, 2 * count, Draws(seed=1, kind="stratified"))[0]
    axes = frames(g)
    assert_near(axes.mT @ axes, torch.eye(group.d, dtype=axes.dtype).expand_as(axes))
    if linear.special:
        assert (torch.linalg.det(axes) > 0).all()
    relative = (axes[:, :1].mT @ axes).diagonal(dim1=-2, dim2=-1).round()
    for block in relative.split(count, 1):
        assert all(len(signs.unique(dim=0)) == count for signs in block)  # each exactly once
    y = axes.mT @ (batch.positions - batch.positions.mean(1, keepdim=True)).mT[:, None]
    covariance = y @ y.mT / N
    assert (covariance - torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert (covariance.diagonal(dim1=-2, dim2=-1).diff() < 0).all()  # by descending variance
    single = frames(Frame(group)(batch.to(torch.float32), S, Draws(seed=1))[0])
    assert single.dtype == torch.float32
    f = model(Frame(group))
    assert equivariance_error(f, batch, samples=count, moves=3) < 1e-5
    assert equivariance_error(f, batch, samples=1, moves=3) > 1e-3


@pytest.mark.parametrize("kind", ["independent", "antithetic", "stratified"])
def test_single_samples_have_random_signs(kind):
    batch = cloud(clouds(1).positions.expand(8000, -1, -1))
    axes = Frame(Orthogonal(3))(batch, 2, Draws(seed=2, kind=kind))[0]
    for place in range(2):
        signs = (axes[0, 0] * axes[:, place]).sum(-2).round()
        counts = ((signs + 1) / 2 * torch.tensor([1, 2, 4])).sum(-1).unique(return_counts=True)[1]
        assert len(counts) == 8 and (counts - 1000).abs().max() < 5 * 1000**0.5
    if kind == "antithetic":
        assert (axes[:, 0] + axes[:, 1]).abs().max() < 1e-5


CUBE = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
DEGENERATE = {  # the points, and how many of their axes are free, from the first
    "cube": (CUBE, (0, 3)),
    "disc": (CUBE * torch.tensor([1, 1, 0.2]), (0, 2)),
    "line": (torch.linspace(-1, 2, 8)[:, None] * torch.tensor([1.0, 0, 0]), (1, 3)),
    "one point": (torch.zeros(8, 3), (0, 3)),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((Frame, name) for name in DEGENERATE), (WeightedFrame, "line"), (WeightedFrame, "one point")],
)
def test_frames_of_degenerate_clouds_are_equivariant(kind, name):
    """Equal axes are uniform in their space: the frames of h x are distributed as h times those of x."""
    points, (first, last) = DEGENERATE[name]
    count = 8000
    h = Orthogonal(3).uniform(clouds(1), 1, Draws(seed=8))[0, 0]
    x = points.double() @ h.mT
    g = kind(SpecialOrthogonal(3))(cloud(x.expand(count, -1, -1)), 1, Draws(seed=3))[0][:, 0]
    local = h.mT @ g  # in the axes of the points
    free = local[:, first:last, first:last]
    moments = (free.flatten(1).mT @ free.flatten(1)) / count
    assert ((moments.diagonal() - 1 / (last - first)).abs() < 5 / count**0.5).all()
    assert free.mean(0).abs().max() < 5 / count**0.5
    for i in {0, 1, 2} - set(range(first, last)):
        assert (local[:, i, i].abs() - 1).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [Frame, WeightedFrame])
def test_padding_is_ignored(kind):
    x = torch.randn(1, N, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.full((1, 2, 3), 50.0)], 1).double()
    batch = Molecules(padded, torch.tensor([N]))
    f, group = kind(Euclidean(3)), Euclidean(3)
    for count in (0, 1):  # no point, or one
        few = frames(kind(Orthogonal(3))(Molecules(padded, torch.tensor([count])), 3, Draws(seed=1))[0])
        assert_near(few.mT @ few, torch.eye(3, dtype=few.dtype).expand_as(few))
    if kind is Frame:
        found, expected = (f(b, 4, Draws(seed=1))[0] for b in (batch, cloud(x)))
        assert_near(found.frame.abs(), expected.frame.abs())
        assert_near(found.shift, expected.shift)
        return
    found, weights, _ = f.elements_and_weights(batch, f.count(batch), Draws(seed=1))
    other, same, _ = f.elements_and_weights(cloud(x), f.count(cloud(x)), Draws(seed=1))
    kept = weights[0] > 0
    order = [w[w > 0].sort().values for w in (weights[0], same[0])]
    assert kept.sum() <= 2 * N**2 and (order[0][-8:] - order[1][-8:]).abs().max() < 1e-4
    moved = [
        (w[0, :, None, None] * group.act(g, x, "np", inverse=True)[0].abs()).sum(0)
        for g, w in ((found, weights), (other, same))
    ]
    assert (moved[0] - moved[1]).abs().max() < 1e-4


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_weighted_means_are_equivariant(group):
    """To the noise of 1e-6, under the group and under permutations of the points."""
    f, batch = model(WeightedFrame(group)), clouds(d=group.d)
    exact = lambda x: weighted(f, x)  # noqa: E731
    assert equivariance_error(exact, batch, group=group, output="np", moves=3) < 1e-4
    assert equivariance_error(exact, batch, group=Symmetric(N), output="np", moves=2) < 1e-4
    w = f.distribution.elements_and_weights(batch, f.distribution.count(batch))[1]
    assert_near(w.sum(1), torch.ones(2, dtype=w.dtype))


def test_weights_are_squared_volumes():
    """Of pairs of points in space, by the cross product; one frame has the axes of its pair."""
    batch = clouds(1)
    f = WeightedFrame(SpecialEuclidean(3), smooth=0.0)
    some = itertools.permutations(range(N), 2)
    g, weights, penalties = f.elements_and_weights(batch, N**2)
    y = batch.positions[0] - batch.positions[0].mean(0)
    volumes = {(i, j): torch.linalg.cross(y[i], y[j]).square().sum() for i, j in some}
    total = sum(volumes.values())
    assert penalties == {} and f.count(batch) == N**2
    for (i, j), volume in volumes.items():
        k = i * N + j
        assert_near(weights[0, k], volume / total)
        local = g.frame[0, k].mT @ torch.stack([y[i], y[j]], 1)
        assert local[0, 0] > 0 and local[1, 1] > 0 and local[1:, 0].abs().max() < 1e-12 and local[2].abs().max() < 1e-12
    assert weights[0, :: N + 1].max() < 1e-20


class Widths(nn.Module):
    """The largest first coordinate of the moved cloud, and its mean over samples."""

    def __init__(self, back: bool):
        super().__init__()
        self.back = back

    def forward(self, *given):
        if self.back:
            return given[0].mean(1)
        batch, group, g = given
        return group.act(g, batch.positions, "np", inverse=True)[..., :1].abs().amax(2)


def test_weighted_frames_are_continuous_where_principal_axes_jump():
    """The variances along two axes cross: the first principal axis turns by 90 degrees, the weighted mean hardly changes."""
    x = torch.tensor([[0.0, 0, 0, 0, 1, -1, 0.5], [3, 1, -1, -2, 1, -1, 0]]).T.double()
    x = x - x.mean(0)
    x = x @ torch.linalg.cholesky(torch.linalg.inv(x.T @ x / len(x)))  # the same variance along all axes

    def value(kind, t):
        f = Symmetrized(nn.Identity(), Widths(False), Widths(True), kind(Orthogonal(2)), draws="stratified")
        batch = cloud((x * torch.tensor([1.0, 1 + t]))[None])
        return float(f(batch, samples=4, seed=0)[0] if kind is Frame else weighted(f, batch))

    jump, change = (abs(value(kind, 1e-3) - value(kind, -1e-3)) for kind in (Frame, WeightedFrame))
    assert jump > 0.05 and change < 0.005


@pytest.mark.parametrize("kind", [Frame, WeightedFrame])
def test_gradients_to_the_positions(kind):
    """Those of the frames, against differences; finite for a cube and for one point."""
    f = kind(SpecialEuclidean(3))

    def moved(x):
        batch = cloud(x)
        if kind is Frame:
            g, w = f(batch, 4, Draws(seed=1))[0], torch.ones(1, 4)
        else:
            g, w, _ = f.elements_and_weights(batch, f.count(batch), Draws(seed=1))
        y = f.group.act(g, x, "np", inverse=True).square() * torch.arange(1, 4)
        return (w[..., None, None] * y).sum(1)

    x = torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(moved, x, atol=1e-4, rtol=1e-3)
    for points in (CUBE, torch.zeros(8, 3)):
        x = points[None].double().requires_grad_()
        moved(x).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: WeightedFrame(Symmetric(5)),
            TypeError,
            "WeightedFrame: group must be Orthogonal, SpecialOrthogonal, Euclidean or SpecialEuclidean, got Symmetric(5)",
        ),
        (lambda: Frame(Orthogonal(3), "1"), TypeError, "Frame: smooth must be a number, got str '1'"),
        (lambda: WeightedFrame(Orthogonal(3), -1), ValueError, "WeightedFrame: smooth must be finite and >= 0, got -1"),
        (
            lambda: Frame(Orthogonal(2))(clouds(), 1),
            ValueError,
            "Frame: positions must be (B, n, 2), got (2, 5, 3)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("kind", [Frame, MinimalFrame, WeightedFrame])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_positions_that_are_not_finite(kind, bad):
    """Are refused by name, but where they are padding."""
    group, message = SpecialEuclidean(3), "be finite, got NaN or infinity"
    x = clouds().positions.clone()
    x[1, N - 1, 2] = bad
    if bad == 1e200:  # finite, but its square is not
        message = "have finite squares, got 1.0e+200"
    with pytest.raises(ValueError, match=f"^{kind.__name__}: positions must {re.escape(message)}$"):
        kind(group)(PointClouds(x), 2)
    batch = PointClouds(x, num_nodes=torch.tensor([N, N - 1]))
    g = kind(group)(batch, 2)[0].frame
    assert_near(g.mT @ g, torch.eye(3, dtype=g.dtype).expand_as(g))
    if hasattr(kind, "elements_and_weights"):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: positions must {re.escape(message)}$"):
            kind(group).elements_and_weights(PointClouds(x), 2)
