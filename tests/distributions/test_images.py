"""p(g|x) on images: predictions are invariant under the exact group, and a network learns the upright pose."""

import math

import pytest
import torch
from torch import nn

from probsym_fast import Draws, Images, Symmetrized
from probsym_fast.distributions import Energy, Identity, Orbit, RotationEnergy, Uniform
from probsym_fast.groups import Cyclic, Dihedral, SpecialOrthogonal
from probsym_fast.models import ClassReadout, Folded, ImageScores, MovedImages, confidence

GROUP = Dihedral(4)


def parts(side: int) -> tuple:
    """Of a classifier of 5 classes that is symmetric in nothing."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * (side - 2) ** 2, 5))
    return Folded(net), MovedImages(), ClassReadout()


def scores() -> ImageScores:
    net = ImageScores(1, 4)
    nn.init.normal_(net.score.weight)  # far from uniform
    return net


CASES = {
    "group averaging": (lambda: Uniform(GROUP), 8, {"draws": "stratified"}),
    "whole orbit": (lambda: Orbit(GROUP), 8, {}),
    "whole orbit, weighted": (lambda: Energy(GROUP, scores(), MovedImages(32)), 8, {"reduce": "weighted"}),
    "whole orbit, confidence as weights": (lambda: Orbit(GROUP), 8, {"reduce": "weighted", "score": confidence}),
    "canonical": (lambda: Energy(GROUP, scores(), MovedImages(32), best=True), 1, {}),
    "most confident of the orbit": (lambda: Orbit(GROUP), 8, {"reduce": "best", "score": confidence}),
    "canonical of SO(2), by quarter turns": (
        lambda: RotationEnergy(SpecialOrthogonal(2), scores(), MovedImages(32), n=8, best=True),
        1,
        {},
    ),
}


@pytest.mark.parametrize("side", [5, 8])
@pytest.mark.parametrize("case", CASES)
def test_predictions_are_invariant(case, side):
    """To 1e-5, and not because nothing depends on the image's pose."""
    make, samples, settings = CASES[case]
    batch = Images(torch.randn(6, 1, side, side, dtype=torch.float64))
    elements = GROUP.elements(batch)
    model = Symmetrized(*parts(side), make(), **settings).double().eval()
    bare = Symmetrized(*parts(side), Identity(GROUP)).double().eval()
    bare.load_state_dict(model.state_dict(), strict=False)
    expected = model(batch, samples, seed=1)[0]
    for k in range(1, 4 if "SO(2)" in case else 8):
        moved = batch.moved(GROUP, elements[:, k : k + 1])
        assert (model(moved, samples, seed=1)[0] - expected).abs().max() < 1e-5
        assert (bare(moved, 1)[0] - bare(batch, 1)[0]).abs().max() > 1e-2
    if hasattr(model.distribution, "candidates"):
        _, log_p, _ = model.distribution.candidates(batch, Draws(seed=1))
        two = log_p.topk(2).values
        assert (two[:, 0] - two[:, 1]).min() > 1e-6  # else the best is not defined


def test_elements_given_by_hand():
    """`apply_elements` with all of them is the whole orbit; with their scores the most probable one."""
    batch = Images(torch.randn(3, 1, 8, 8))
    model = Symmetrized(*parts(8), Energy(GROUP, scores(), MovedImages(32), best=True)).eval()
    g, log_p, _ = model.distribution.candidates(batch, Draws(seed=0))
    orbit = Symmetrized(*parts(8), Orbit(GROUP)).eval()
    orbit.load_state_dict(model.state_dict(), strict=False)
    assert (model.apply_elements(batch, g) - orbit(batch, 8)[0]).abs().max() < 1e-5
    best = model.apply_elements(batch, g, reduce="best", score=log_p)
    assert (best - model(batch, 1)[0]).abs().max() < 1e-5
    weighted = model.apply_elements(batch, g, reduce="weighted", weights=log_p.exp())
    assert (weighted - model(batch, 8, reduce="weighted")[0]).abs().max() < 1e-5


def upright(count: int, seed: int) -> torch.Tensor:
    """(count, 1, 16, 16): a bright bar from the centre upwards with a short arm to its right, on noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(count, 1, 16, 16, generator=generator)
    x[:, :, 2:9, 7:9] += 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    x[:, :, 3:5, 9:12] += 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    return x


def trained(p, steps: int, penalty: float = 0.0):
    """Only the penalties train it, on upright images."""
    torch.set_num_threads(1)  # tiny
    optimizer = torch.optim.Adam(p.parameters(), 1e-2)
    for step in range(steps):
        _, found = p(Images(upright(8, step)), 1, Draws(seed=step))
        optimizer.zero_grad()
        (found["prior"] + penalty * found["entropy"]).backward()
        optimizer.step()
    return p


def test_learns_the_upright_pose():
    """The prior has all at the identity; then the most probable element is the one that moved the image."""
    p = trained(Energy(GROUP, ImageScores(1, 8), MovedImages(32), prior=torch.eye(8)[0], best=True), 40, penalty=0.1)
    batch = Images(upright(64, 1000))
    h = GROUP.uniform(batch, 1, Draws(seed=1))
    with torch.no_grad():
        g, penalties = p(batch.moved(GROUP, h), 1, Draws(seed=2))
        _, at_rest = p(batch, 1, Draws(seed=2))
    assert (g == h).double().mean() > 0.95
    assert penalties["entropy"] < 1 and at_rest["prior"] < 0.3 < math.log(8) < penalties["prior"]


def test_learns_an_upright_angle():
    """With a von Mises prior of standard deviation about 18 degrees and steps of 30: to a few degrees, by refinement."""
    group = SpecialOrthogonal(2)
    p = trained(RotationEnergy(group, ImageScores(1, 8), MovedImages(), n=12, prior=10.0, best=True), 60)
    batch = Images(upright(64, 1000))
    h = group.uniform(batch, 1, Draws(seed=1))
    medians = []
    for p.refine in (True, False):
        with torch.no_grad():
            g, _ = p(batch.moved(group, h), 1, Draws(seed=2))
        back = h.mT @ g
        medians.append(torch.atan2(back[..., 1, 0], back[..., 0, 0]).abs().median().rad2deg().item())
    assert medians[0] < 4 and medians[0] < 0.8 * medians[1], medians


def test_starts_near_uniform():
    """But with scores that differ, so that the best element is defined."""
    p = Energy(Cyclic(4), ImageScores(), MovedImages(32)).log_probabilities(Images(torch.rand(8, 3, 32, 32))).exp()
    assert (p - 0.25).abs().max() < 0.025 and p.std(1).min() > 1e-7
