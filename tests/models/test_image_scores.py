"""Scores of images, and the confidence of class logits."""

import re

import pytest
import torch

from probsym_fast.models import ImageScores, confidence
from tests.conftest import assert_near


def test_any_leading_axes():
    """Images do not interact, and may be as small as one pixel; more pixels and channels count."""
    x = torch.randn(2, 3, 3, 12, 9, dtype=torch.float64)
    net = ImageScores(3, 4, 2).double()
    found = net(x)
    assert found.shape == (2, 3) and net(x[0, 0][None]).shape == (1,) and net(x[..., :1, :1]).shape == (2, 3)
    assert_near(found, torch.stack([net(image[None])[0] for image in x.flatten(0, 1)]).view(2, 3))
    assert found.std() > 1e-4
    torch.autograd.gradcheck(net, x[:1, :1].clone().requires_grad_())


@pytest.mark.parametrize("grid", [1, 2, 4])
@pytest.mark.parametrize("size", [(9, 12), (16, 16), (1, 3)])
def test_means_over_regions(grid, size):
    x, net = torch.randn(2, 1, *size, dtype=torch.float64), ImageScores(1, 4, 2, grid).double()
    features = net.net(torch.nn.functional.pad(x, (1, 1, 1, 1)))
    means = torch.nn.functional.adaptive_avg_pool2d(features, grid)
    assert_near(net(x), net.score(means.flatten(1))[:, 0])


def test_places_count_with_a_grid():
    """An image whose halves are exchanged: far from the border the mean over all places does not see it."""
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    x[..., 8:14, 8:14] = 1
    there = x.roll(8, -1)
    for grid, seen in ((1, False), (4, True)):
        net = ImageScores(1, 4, 2, grid).double()
        assert (float((net(x) - net(there)).detach().abs()) > 1e-6) == seen


def test_confidence():
    logits = torch.randn(4, 3, 5, requires_grad=True)
    found = confidence(logits)
    assert found.dtype == torch.float64
    assert_near(found, logits.detach().double().softmax(-1).max(-1).values)
    found.sum().backward()
    assert logits.grad.abs().max() > 0
    sure = confidence(torch.tensor([[25.0, 0.0], [30.0, 0.0]]))  # both 1 in float32
    assert sure[0] < sure[1] < 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ImageScores(0), ValueError, "ImageScores: channels must be at least 1, got 0"),
        (lambda: ImageScores(width=2.0), TypeError, "ImageScores: width must be an int, got float 2.0"),
        (lambda: ImageScores(3)(1), TypeError, "ImageScores: x must be a Tensor, got int"),
        (
            lambda: ImageScores(3)(torch.zeros(2, 1, 4, 4)),
            ValueError,
            "ImageScores: x must be (..., 3, H, W), got (2, 1, 4, 4)",
        ),
        (
            lambda: ImageScores(3)(torch.zeros(3, 4, 4)),
            ValueError,
            "ImageScores: x must be (..., 3, H, W), got (3, 4, 4)",
        ),
        (
            lambda: ImageScores(1)(torch.zeros(2, 1, 4, 4).double()),
            TypeError,
            "ImageScores: x must be torch.float32 as the weights are, got torch.float64",
        ),
        (
            lambda: confidence(torch.zeros(2, 1)),
            ValueError,
            "confidence: logits must be (..., K) with K >= 2, got (2, 1)",
        ),
        (lambda: confidence([1.0]), TypeError, "confidence: logits must be a Tensor, got list"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
