"""Batches of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probsym_fast._batch import Batch
from probsym_fast._checks import check_key


@dataclass(eq=False)
class Images(Batch):
    """B images of C channels, rows from top to bottom.

    pixels: (B, C, H, W), floating point. mask: (B, H, W) labels (integers) or values of the pixels, or None. key: (B,) int64
    in 0..2^43 - 1, or None: names of the images for noise of a fixed seed, `Normal(fixed=seed)` of a `Learned`. Nothing
    else reads it: draws of `Uniform`, `Energy` and `RotationEnergy` depend on the seed and an image's place in the batch.

    Groups of the plane move pixels and mask about the image's centre (`groups.Group`).
    """

    pixels: Tensor
    mask: Tensor | None = None
    key: Tensor | None = None

    axes: ClassVar = {
        "pixels": {0: "batch", 2: "height", 3: "width"},
        "mask": {0: "batch", 1: "height", 2: "width"},
        "key": {0: "batch"},
    }
    fixed: ClassVar = ("height", "width")
    layouts: ClassVar = {"pixels": "chw", "mask": "hw"}

    def check(self) -> None:
        """Raises TypeError where a field is no Tensor or of a wrong dtype, RuntimeError for devices, ValueError for sizes.

        Also ValueError for a key out of range (on a GPU only in debug mode).
        """
        owner = "Images"
        for name, axes in (("pixels", ("B", "C", "H", "W")), ("mask", ("B", "H", "W")), ("key", ("B",))):
            if isinstance(x := getattr(self, name), Tensor) and x.ndim != len(axes):
                raise ValueError(
                    f"{owner}: {name} must have {len(axes)} axes ({', '.join(axes)}), got {tuple(x.shape)}"
                )
        super().check()
        if 0 in self.pixels.shape[1:]:
            raise ValueError(f"{owner}: pixels must have a channel and a pixel or more, got {tuple(self.pixels.shape)}")
        if not self.pixels.is_floating_point():
            raise TypeError(f"{owner}: pixels must be floating point, got {self.pixels.dtype}")
        if self.key is not None:
            if self.key.dtype != torch.int64:
                raise TypeError(f"{owner}: key must be an int64 Tensor, got {self.key.dtype}")
            check_key(owner, self.key)
