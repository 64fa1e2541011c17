"""Pretrains a vision transformer on real images without a download: scikit-learn's handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from probsym_fast.batches import Images
from probsym_fast.distributions import Identity
from probsym_fast.draws import seeded
from probsym_fast.groups import Symmetric
from probsym_fast.models import GraphReadout, Symmetrized
from probsym_fast.tasks.vision import BACKBONE_LIMITS, Backbone
from probsym_fast.training import configuration
from probsym_fast.training.settings import TRAINING_LIMITS, Run, Samples, Training
from probsym_fast.training.task import Task

SIDE, CLASSES = 8, 10  # pixels, digits
SPLITS = {
    "test": slice(0, 297),
    "valid": slice(297, 597),
    "train": slice(597, None),
}  # of 1797, in a fixed random order
TURN, ZOOM, SHIFT = (
    math.pi / 12,
    0.15,
    1 / 4,
)  # largest rotation, scaling and shift (of half the side) of a training image


class ImageTokens(nn.Module):
    """An image cut into grid x grid patches: (B, 1, grid^2, width)."""

    def __init__(self, side: int, width: int, grid: int):
        super().__init__()
        if side % grid:
            raise ValueError(f"ImageTokens: grid must divide the side of {side} pixels, got {grid}")
        self.patches = nn.Conv2d(1, width, side // grid, side // grid)

    def forward(self, batch: Images, group: Any, g: Any) -> tuple[Tensor]:
        return (self.patches(batch.pixels).flatten(2).mT[:, None],)


class Digits(Dataset):
    """Images in -1..1 with labels; an index tensor gives (Images, labels (B,) int64). moved: random affine maps."""

    def __init__(self, pixels: Tensor, labels: Tensor, moved: bool):
        self.pixels, self.labels, self.moved = pixels, labels, moved

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> tuple[Images, Tensor]:
        pixels = self.pixels[index]
        if self.moved:
            order = int((index * torch.arange(1, len(index) + 1)).sum())  # identifies the batch; differs between epochs
            turn, x_zoom, y_zoom, *move = torch.rand(5, len(index), generator=seeded(0, "moved", order)) * 2 - 1
            cos, sin = (TURN * turn).cos(), (TURN * turn).sin()
            x_zoom, y_zoom = 1 + ZOOM * x_zoom, 1 + ZOOM * y_zoom
            rows = [cos * x_zoom, -sin * y_zoom, SHIFT * move[0], sin * x_zoom, cos * y_zoom, SHIFT * move[1]]
            maps = torch.stack(rows, 1).view(-1, 2, 3)
            where = F.affine_grid(maps, list(pixels.shape), align_corners=False)
            pixels = F.grid_sample(pixels + 1, where, align_corners=False) - 1  # -1, black, outside the image
        return Images(pixels), self.labels[index]


@dataclass
class DigitsConfig(Run):
    """A vision transformer on scikit-learn's digits: 1,797 images of 8 x 8 pixels. Others can start from its weights.

    Args:
        task: "digits".
        backbone: the vision transformer; its grid must divide 8.
        seed: seed of weights, order, shifts and dropout.
        training: optimiser, epochs, devices.
    """

    samples: ClassVar[Samples] = Samples(1, 1, 1, 1)  # without a symmetry all samples are equal

    task: Literal["digits"] = "digits"
    backbone: Backbone = field(default_factory=lambda: Backbone("vit_tiny_patch16_224", pretrained=False, grid=4))
    training: Training = field(default_factory=lambda: Training(epochs=40, batch=100, optimizer="adamw", entropy=0.0))


class DigitsTask(Task):
    """Cross-entropy; the report gives the accuracy on 297 images."""

    measure = "cross_entropy"
    figures = ("test_accuracy",)

    def __init__(self, config: DigitsConfig):
        configuration.check(config, {**BACKBONE_LIMITS, **TRAINING_LIMITS})
        if SIDE % config.backbone.grid:
            raise ValueError(f"config: backbone.grid must divide {SIDE}, got {config.backbone.grid}")
        self.config = config

    def model(self, fresh: bool = True) -> Symmetrized:
        backbone = self.config.backbone.build("pooled", fresh)
        embed = ImageTokens(SIDE, backbone.width, self.config.backbone.grid)
        return Symmetrized(backbone, embed, GraphReadout(backbone.width, CLASSES), Identity(Symmetric(1)))

    def dataset(self, split: str) -> Digits:
        from sklearn.datasets import load_digits

        pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
        pixels = pixels.float().view(-1, 1, SIDE, SIDE) / 8 - 1  # 0..16 to -1..1
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[SPLITS[split]]
        return Digits(pixels[order], labels[order], moved=split == "train")

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (prediction.argmax(1) == target).float().mean()}

    @torch.no_grad()
    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        device, test = next(model.parameters()).device, self.dataset("test")
        images, labels = test[torch.arange(len(test))]
        prediction, _ = model(images.to(device))
        return {"test_accuracy": (prediction.argmax(1).cpu() == labels).double().mean().item()}

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        return [("test accuracy", f"{results['test_accuracy']:.1%}")]
