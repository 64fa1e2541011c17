"""Digits in fixed poses, and their random poses in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import Dataset

from probsym_fast.batches import Images
from probsym_fast.draws import seeded
from probsym_fast.groups import move_images

POSES = "upright", "C4", "D4", "SO2", "O2"


def posed(pixels: Tensor, poses: str, generator: torch.Generator) -> Tensor:
    """Each image (M, C, H, W) moved by a uniform element of its own: none, a quarter turn, any angle, or also reflected.

    Angles by bilinear interpolation on the image's own pixels, as is the habit with rotated MNIST: corners that leave are
    lost, and 0 comes in. `posed` of `posed` images interpolates twice.
    """
    if poses == "upright":
        return pixels
    count = len(pixels)
    draws = torch.rand(2, count, generator=generator, dtype=torch.float64)
    flip = (draws[1] < 0.5) & (poses in ("D4", "O2"))
    if poses in ("C4", "D4"):
        plane = (4 * draws[0]).long() + 4 * flip
    else:
        angle, sign = 2 * math.pi * draws[0], 1 - 2 * flip.double()
        rows = [angle.cos(), -angle.sin() * sign, angle.sin(), angle.cos() * sign]
        plane = torch.stack(rows, -1).view(count, 2, 2).to(pixels.dtype)
    return move_images(pixels, plane[:, None])[:, 0]


class PosedImages(Dataset):
    """Images (M, C, H, W) with labels (M,) int64; an index tensor gives (Images, labels (B,)).

    An image's `key` is its number. augment: the poses by which an image moves each time it is read, new in each epoch.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, augment: str = "upright", seed: int = 0):
        self.pixels, self.labels, self.augment, self.seed = pixels, labels, augment, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> tuple[Images, Tensor]:
        pixels = self.pixels[index]
        if self.augment != "upright":
            order = int((index * torch.arange(1, len(index) + 1)).sum())  # identifies the batch; differs between epochs
            pixels = posed(pixels, self.augment, seeded(self.seed, "augment", order))
        return Images(pixels, key=index.clone()), self.labels[index]
