"""A small network that scores images."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast._checks import check_counts, check_dtype, check_type

SPREAD = 0.1  # of the first scores: the smaller, the nearer is p to uniform


class ImageScores(nn.Module):
    """One score per image, (..., C, H, W) -> (...), by a small convolutional network, for `distributions.Energy`:

        scores = ImageScores(channels=3)
        p = Energy(Dihedral(4), scores, MovedImages(side=32))

    `layers` convolutions of 3 x 3 pixels and stride 2, with width, 2 width, 4 width, ... channels; each is normalised over
    its image (`nn.GroupNorm` of one group) and passes a GELU. Then the means over grid x grid regions, as of
    `adaptive_avg_pool2d`, and a linear map of all of them, whose weights begin small, so that p is nearly uniform. Where
    things are says most about the pose: with grid 1 the map reads the mean over all places only. Images do not interact,
    and may have any size. An image of 32 x 32 pixels takes 0.7 million multiplications.

    Gradients: weights and images. Raises TypeError for counts that are no ints and images of another dtype than the
    weights, ValueError for counts below 1 and for images of another shape.
    """

    def __init__(self, channels: int = 3, width: int = 16, layers: int = 3, grid: int = 4):
        super().__init__()
        counts = check_counts("ImageScores", channels=channels, width=width, layers=layers, grid=grid)
        self.channels, width, layers, self.grid = counts
        sizes = [self.channels, *(width * 2**k for k in range(layers))]
        blocks: list[nn.Module] = []
        for before, after in pairwise(sizes):
            padding = 1 if blocks else 0  # `forward` pads the images
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=padding), nn.GroupNorm(1, after), nn.GELU()]
        self.net = nn.Sequential(*blocks)
        self.score = nn.Linear(sizes[-1] * self.grid**2, 1)
        with torch.no_grad():
            self.score.weight.mul_(SPREAD)

    def forward(self, x: Tensor) -> Tensor:
        check_type("ImageScores", "x", x, Tensor, "a Tensor")
        if x.ndim < 4 or x.shape[-3] != self.channels:
            raise ValueError(f"ImageScores: x must be (..., {self.channels}, H, W), got {tuple(x.shape)}")
        check_dtype("ImageScores", self.score.weight.dtype, x=x)
        images = F.pad(
            x.flatten(0, -4), (1, 1, 1, 1)
        )  # a copy: Inductor cannot save views of all sizes for the backward
        features = self.net(images)
        rows, columns = (regions(size, self.grid, features) for size in features.shape[2:])
        means = (rows @ features @ columns.mT).flatten(1)
        return self.score(means)[:, 0].unflatten(0, x.shape[:-3])


def regions(size: int, grid: int, like: Tensor) -> Tensor:
    """(grid, size): the weights of each place in the means over `grid` intervals, which overlap by at most one place.

    A product with it has a gradient that is the same in every run, which `adaptive_avg_pool2d` has not on a GPU.
    """
    k, place = torch.arange(grid, device=like.device)[:, None], torch.arange(size, device=like.device)
    first, end = k * size // grid, ((k + 1) * size + grid - 1) // grid
    inside = (place >= first) & (place < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)
