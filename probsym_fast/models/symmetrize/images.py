"""The parts around a network on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.batches import Images
from probsym_fast.groups import Group
from probsym_fast.models.backbones.folded import Folded
from probsym_fast.models.backbones.patch_embeddings import patch_embedding
from probsym_fast.models.backbones.timm import timm_backbone
from probsym_fast.models.backbones.timm_given import stem_and_grid
from probsym_fast.models.backbones.vision import POOLED, VisionBackbone
from probsym_fast.models.backbones.whole import WholeVisionBackbone
from probsym_fast.models.image_readouts import ClassReadout, MaskReadout, TokenReadout
from probsym_fast.models.images import ImageTokens, MovedImages

OURS = VisionBackbone | WholeVisionBackbone


class ImageParts:
    """The parts for images."""

    def __init__(self, net, images: Images, tokens, output, out_features):
        self.net, self.images, self.output, self.out_features = net, images, output, out_features
        ours = isinstance(net, OURS)
        if tokens is None:
            tokens = "patches" if ours or _on_patches(net) else "pixels"
        self.tokens = tokens
        if tokens == "pixels" and output == "tokens":
            raise ValueError(f"symmetrize: tokens must be 'patches' for output 'tokens', got {tokens!r}")
        if (tokens == "pixels" or output == "tokens") and out_features is not None:
            got = f"{out_features} for {type(net).__name__}"
            raise ValueError(f"symmetrize: out_features must be None for a network with outputs of its own, got {got}")
        if output == "masks" and tokens == "patches" and out_features is None:
            raise ValueError("symmetrize: out_features must be given for output 'masks' of tokens, got None")
        if tokens == "patches":
            self.patch = self._patch()
            H, W = images.pixels.shape[2:]
            self.grid = H // self.patch[0], W // self.patch[1]
            self.made = net if ours else timm_backbone(net, grid=self.grid, read=self._read())
            if ours and (net.read in POOLED) != (output == "invariant"):
                wanted = "pooled" if output == "invariant" else "tokens"
                raise ValueError(f"symmetrize: net must have read={wanted!r} for output {output!r}, got {net.read!r}")

    def _read(self) -> Any:
        return "features" if self.output == "invariant" else "tokens"

    def _patch(self) -> tuple[int, int]:
        """(rows, columns) of a patch's pixels."""
        sizes, net = tuple(self.images.pixels.shape[2:]), self.net
        if isinstance(net, OURS):
            rows, columns = net.grid or (0, 0)
            if not rows or sizes[0] % rows or sizes[1] % columns:
                raise ValueError(f"symmetrize: net must have a grid that divides images of {sizes}, got {net.grid}")
            return sizes[0] // rows, sizes[1] // columns
        P, Q = patch_embedding(net)[0].kernel_size
        if sizes[0] % P or sizes[1] % Q:
            raise ValueError(f"symmetrize: example must have whole patches of {P} x {Q} pixels, got images of {sizes}")
        return P, Q

    def embed(self) -> nn.Module:
        if self.tokens == "pixels":
            return MovedImages()
        H, W = self.images.pixels.shape[2:]
        if isinstance(self.net, OURS):
            return ImageTokens(self.net.width, self.patch, self.images.pixels.shape[1], size=(H, W))
        return ImageTokens.of(self.net, size=(H, W))

    def backbone(self) -> nn.Module:
        return Folded(self.net) if self.tokens == "pixels" else self.made

    def readout(self, y: Tensor, pool: str) -> nn.Module:
        if self.tokens == "patches":
            return self._of_tokens()
        if self.output == "invariant" and y.ndim == 3:
            return ClassReadout()
        if self.output == "masks" and y.ndim == 5:
            return MaskReadout()
        wanted = "(B, S, C)" if self.output == "invariant" else "(B, S, classes, H, W)"
        raise ValueError(f"symmetrize: net must return {wanted} for output {self.output!r}, got {tuple(y.shape)}")

    def _of_tokens(self) -> nn.Module:
        size, width = self.out_features, self.made.out_width
        if self.output == "tokens":
            return TokenReadout(self.grid)
        if self.output == "masks":
            return MaskReadout(width, size, self.patch, grid=self.grid)
        if size is not None:
            return ClassReadout(nn.Linear(width, size))
        return ClassReadout() if isinstance(self.net, OURS) else ClassReadout.of(self.net)


def check_moves_images(group: Group) -> None:
    """ValueError for a group, or a factor of one, that moves no axis of images."""
    axes = "".join(Images.layouts.values())
    for factor in getattr(group, "factors", (group,)):
        if factor.moves is not None and not set(factor.moves) & set(axes):
            wanted = "a group that acts on images, such as Cyclic(4), Dihedral(4) or SpecialOrthogonal(2)"
            raise ValueError(f"symmetrize: group must be {wanted}, got {factor}, which moves the axes {factor.moves!r}")


def _on_patches(net: nn.Module) -> bool:
    """Whether it is a model of timm whose tokens are a convolution's."""
    try:
        patch_embedding(net)
        stem_and_grid(net)
    except ValueError:
        return False
    return True


def example_for(net: nn.Module) -> Images:
    """One image of a timm model's size. ValueError for any other network."""
    found: Any = getattr(net, "pretrained_cfg", None)
    settings = found if isinstance(found, dict) else {}
    embedding: Any = getattr(net, "patch_embed", None)
    own = getattr(embedding, "img_size", None)
    in_front = hasattr(embedding, "backbone")  # a CNN, whose features proj takes
    known = own is not None and isinstance(getattr(embedding, "proj", None), nn.Conv2d) and not in_front
    if not (known or "input_size" in settings):
        got = f"None for {type(net).__name__}"
        raise ValueError(f"symmetrize: example must be given for networks other than image models of timm, got {got}")
    size = settings.get("input_size", (3, *(own or ())))
    first = settings.get("first_conv")
    convolution = embedding.proj if known else dict(net.named_modules()).get(first if isinstance(first, str) else "")
    channels = getattr(convolution, "in_channels", size[0])
    like = next(net.parameters())
    return Images(torch.zeros(1, channels, *(own or size[1:]), dtype=like.dtype, device=like.device))
