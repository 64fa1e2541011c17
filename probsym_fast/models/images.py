"""Embeddings of images: patch tokens of a vision transformer, and moved images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast import ops
from probsym_fast._autocast import product_dtype, promoted
from probsym_fast._checks import check_count, check_counts, check_dtype
from probsym_fast.batches import Images, check_batch
from probsym_fast.groups import Group, move_images, plane_of
from probsym_fast.groups.images import check_sides
from probsym_fast.models.backbones.patch_embeddings import patch_embedding
from probsym_fast.ops.embed_image import PAD_MODES


class ImageTokens(nn.Module):
    """Moved images cut into patches: tokens (B, S, L, width) of the L patches, row by row.

    `tokens[b, s, l] = weight . patch_l(g^-1 . x_b) + bias` by `ops.embed_image`, which does not form the moved images. For a
    group of the plane (`groups.plane_of`), and images whose sides are multiples of the patch's. The weight is that of an
    nn.Conv2d, and initialised as one.

    Args:
        width: D. patch: pixels along each side of a patch, or (rows, columns). channels: of the images.
        pad_mode: what turned images show where the image ends, unless the turns are by 90 degrees: "zeros" (the mean of
            normalised images), or "replicate", the nearest pixel of its border.
        size: (rows, columns) of the images, or one number, for a backbone of so many patches. None: any.

    Raises TypeError where the pixels lack the dtype of the weights (autocast: any floating dtype), ValueError for groups that
    do not act on the plane and sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        patch: int | tuple[int, int],
        channels: int = 3,
        *,
        pad_mode: str = "zeros",
        bias: bool = True,
        size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        owner = "ImageTokens"
        width, channels = check_counts(owner, width=width, channels=channels)
        P, Q = sides(owner, "patch", patch)
        self.pad_mode = checked_pad_mode(owner, pad_mode)
        self.size = None if size is None else sides(owner, "size", size)
        bound = 1 / math.sqrt(channels * P * Q)
        self.weight = nn.Parameter(torch.empty(width, channels, P, Q).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None
        self.norm: nn.Module = nn.Identity()

    @classmethod
    def of(cls, model: nn.Module, *, pad_mode: str = "zeros", size: int | tuple[int, int] | None = None) -> ImageTokens:
        """The patch embedding of a timm model, with its norm if it has one: the model's own parameters, not copies.

        Raises ValueError where it is no convolution whose patches tile the image, and says what it is.
        """
        convolution, norm = patch_embedding(model)
        weight: Any = convolution.weight  # a parameter
        bias: Any = convolution.bias
        D, C, P, Q = weight.shape
        with torch.device("meta"):
            found = cls(D, (P, Q), C, pad_mode=pad_mode, bias=bias is not None, size=size)
        found.weight, found.bias, found.norm = weight, bias, norm
        return found.train(model.training)

    def extra_repr(self) -> str:
        D, C, P, Q = self.weight.shape
        size = "" if self.size is None else f", size={self.size}"
        return (
            f"width={D}, patch=({P}, {Q}), channels={C}, pad_mode={self.pad_mode!r}, bias={self.bias is not None}{size}"
        )

    def forward(self, batch: Images, group: Group, g: Any) -> tuple[Tensor]:
        check_batch("ImageTokens", batch, "pixels")
        check_dtype("ImageTokens", self.weight.dtype, pixels=batch.pixels)
        if self.size is not None and (found := tuple(batch.pixels.shape[2:])) != self.size:
            raise ValueError(
                f"ImageTokens: pixels must be images of {self.size[0]} x {self.size[1]}, got {found[0]} x {found[1]}; for"
                " images of another size make the model with an example, psf.symmetrize(net, group, example)"
            )
        check_sides(group, *batch.pixels.shape[2:])
        plane = plane_of(group, g, promoted(self.weight.dtype, torch.float32))
        dtype = product_dtype(self.weight)
        pixels, weight = batch.pixels.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        tokens = ops.embed_image(pixels, plane, weight, bias, pad_mode=self.pad_mode)
        return (self.norm(tokens),)


class MovedImages(nn.Module):
    """Moved images g^-1 . x, (B, S, C, H, W), for networks on pixels such as a CNN in `Folded`.

    side: the longer side of the images is averaged to at most so many pixels first, for a small network of scores.
    pad_mode: as in `ImageTokens`. See `groups.move_images` for interpolation and gradients.

    Raises ValueError for groups that do not act on the plane.
    """

    def __init__(self, side: int | None = None, pad_mode: str = "zeros"):
        super().__init__()
        self.side = None if side is None else check_count("MovedImages", "side", side)
        self.pad_mode = checked_pad_mode("MovedImages", pad_mode)

    def extra_repr(self) -> str:
        return f"side={self.side}, pad_mode={self.pad_mode!r}"

    def forward(self, batch: Images, group: Group, g: Any) -> tuple[Tensor]:
        check_batch("MovedImages", batch, "pixels")
        x = batch.pixels
        longest = max(x.shape[2:])
        if self.side is not None and longest > self.side:
            H, W = (max(1, round(size * self.side / longest)) for size in x.shape[2:])
            x = F.adaptive_avg_pool2d(x, (H, W))
        return (moved(group, g, x, self.pad_mode, inverse=True),)


def moved(group: Group, g: Any, x: Tensor, pad_mode: str, inverse: bool = False) -> Tensor:
    """g . x or g^-1 . x, of images (B, [S,] C, H, W), with that border: (B, S, C, H, W)."""
    plane = plane_of(group, g, promoted(x.dtype, torch.float32))
    if not plane.is_floating_point():  # exact, without a border; the group checks that quarter turns have squares
        return group.act(g, x, "chw", inverse=inverse)
    return move_images(x, plane, inverse=inverse, pad_mode=pad_mode)


def sides(owner: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of one number or two."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{owner}: {name} must be a number or two, got {len(pair)}: {value!r}")
    rows, columns = (check_count(owner, name, size) for size in pair)
    return rows, columns


def checked_pad_mode(owner: str, pad_mode: str) -> str:
    if pad_mode not in PAD_MODES:
        raise ValueError(f"{owner}: pad_mode must be one of {PAD_MODES}, got {pad_mode!r}")
    return pad_mode
