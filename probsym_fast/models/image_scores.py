"""A small network that scores images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_counts, check_dtype, check_type

SPREAD = 0.1  # of the first scores: the smaller, the nearer is p to uniform


class ImageScores(nn.Module):
    """One score per image, (..., C, H, W) -> (...), by a small convolutional network, for `distributions.Energy`:

        scores = ImageScores(channels=3)
        p = Energy(Dihedral(4), scores, MovedImages(side=32))

    `layers` convolutions of 3 x 3 pixels and stride 2, with width, 2 width, 4 width, ... channels; each is normalised over its
    image (`nn.GroupNorm` of one group) and passes a GELU. Then the mean over the places and a linear map, whose weights
    begin small, so that p is nearly uniform. Images do not interact. An image of 32 x 32 pixels takes 0.7 million
    multiplications.

    Gradients: weights and images. Raises TypeError for counts that are no ints and images of another dtype than the
    weights, ValueError for counts below 1 and for images of another shape.
    """

    def __init__(self, channels: int = 3, width: int = 16, layers: int = 3):
        super().__init__()
        self.channels, width, layers = check_counts("ImageScores", channels=channels, width=width, layers=layers)
        sizes = [self.channels, *(width * 2**k for k in range(layers))]
        blocks = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU()]
        self.net = nn.Sequential(*blocks)
        self.score = nn.Linear(sizes[-1], 1)
        with torch.no_grad():
            self.score.weight.mul_(SPREAD)

    def forward(self, x: Tensor) -> Tensor:
        check_type("ImageScores", "x", x, Tensor, "a Tensor")
        if x.ndim < 4 or x.shape[-3] != self.channels:
            raise ValueError(f"ImageScores: x must be (..., {self.channels}, H, W), got {tuple(x.shape)}")
        check_dtype("ImageScores", self.score.weight.dtype, x=x)
        features = self.net(x.flatten(0, -4)).mean((-2, -1))
        return self.score(features)[:, 0].unflatten(0, x.shape[:-3])
