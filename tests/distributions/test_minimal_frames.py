"""Minimal frames: one for a cloud without symmetry, as many as its symmetry asks for, equivariant for every cloud."""

import math
import re

import pytest
import torch

from probsym_fast import PointClouds, equivariance_error
from probsym_fast.distributions import MinimalFrame
from probsym_fast.groups import Draws, Euclidean, Orthogonal, SpecialEuclidean, SpecialOrthogonal, Symmetric
from tests.conftest import assert_near
from tests.distributions.test_frames import GROUPS, cloud, clouds, frames, model


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_one_frame_that_moves_with_the_cloud(group):
    batch, linear = clouds(d=group.d), getattr(group, "linear", group)
    g = frames(MinimalFrame(group)(batch, 3, Draws(seed=1))[0])
    assert_near(g, g[:, :1].expand_as(g))
    assert_near(g.mT @ g, torch.eye(group.d).double().expand_as(g))
    h = linear.uniform(batch, 1, Draws(seed=2))
    moved = frames(MinimalFrame(group)(cloud(batch.positions @ h[:, 0].mT + 1), 3, Draws(seed=3))[0])
    if isinstance(group, Orthogonal):  # translations count
        moved = frames(MinimalFrame(group)(cloud(batch.positions @ h[:, 0].mT), 3, Draws(seed=3))[0])
    assert_near(moved, h @ g)
    if linear.special:
        assert_near(torch.linalg.det(g), torch.ones(2, 3).double())


def test_a_square_has_eight_frames_or_four():
    corners = torch.tensor([[[1.0, 1], [1, -1], [-1, 1], [-1, -1]]])
    for group, count in ((Orthogonal(2), 8), (SpecialOrthogonal(2), 4)):
        g = MinimalFrame(group)(cloud(corners), 400, Draws(seed=0))[0]
        rows, counts = g[0].flatten(1).mul(1e6).round().unique(dim=0, return_counts=True)
        assert len(rows) == count and counts.min() > 400 / count / 2


DEGENERATE = {
    "points on a line": torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]]),
    "an octahedron": torch.cat([torch.eye(3), -torch.eye(3)])[None],
    "one point": torch.zeros(1, 1, 3),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clouds_are_equivariant(name):
    batch, f = cloud(DEGENERATE[name]), model(MinimalFrame(SpecialEuclidean(3)))
    few, many = (equivariance_error(f, batch, samples=S, moves=8, scale=1.0) for S in (8, 2048))
    assert math.isfinite(many) and (many < 0.2 * few or few < 1e-9)


def test_padding_and_gradients():
    p = MinimalFrame(Euclidean(3))
    x = torch.randn(1, 4, 3).double().requires_grad_()
    padded = PointClouds(torch.cat([x, x.new_full((1, 3, 3), 50.0)], 1), num_nodes=torch.tensor([4]))
    assert_near(frames(p(padded, 2, Draws(seed=0))[0]), frames(p(cloud(x), 2, Draws(seed=0))[0]))
    torch.autograd.gradcheck(lambda x: frames(p(PointClouds(x), 1, Draws(seed=0))[0]), x)


def test_errors():
    with pytest.raises(TypeError, match=re.escape("MinimalFrame: group must be Orthogonal, SpecialOrthogonal,")):
        MinimalFrame(Symmetric(3))
