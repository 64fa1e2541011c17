"""The patch embeddings of timm's models that are one convolution."""

from __future__ import annotations

from typing import Any

from torch import nn

from probsym_fast._checks import check_type
from probsym_fast.models.backbones.whole import STEMS


def patch_embedding(model: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution of a timm model's patch embedding, and the norm that follows.

    Raises TypeError for what is no module. ValueError unless it is a convolution whose kernels tile the image, and perhaps a
    norm of each token; it says what the model has in its place.
    """
    owner = "ImageTokens"
    check_type(owner, "model", model, nn.Module, "an nn.Module")
    kind, modules = type(model).__name__, dict(model.named_modules())
    name = next((name for name in STEMS if name in modules), None)
    if name is None:
        raise ValueError(f"{owner}: model must have a patch embedding of timm, got {kind} without {' or '.join(STEMS)}")
    stem: Any = modules[name]
    if reason := why_not(stem):
        raise ValueError(
            f"{owner}: the patch embedding must be one convolution that tiles the image, got {kind}: {reason}"
        )
    return stem.proj, stem.norm


def why_not(stem: Any) -> str:
    """Why a patch embedding is no convolution that tiles the image, with a norm at most; "" if it is."""
    from timm.layers import patch_embed

    kind = type(stem).__name__
    if type(stem) not in (patch_embed.PatchEmbed, patch_embed.PatchEmbedWithSize):
        return f"a {kind}, which is more than that"
    convolution = stem.proj
    if type(convolution) is not nn.Conv2d:
        return f"a {type(convolution).__name__}"
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    if kernel != stride:
        return f"kernels of {kernel[0]} x {kernel[1]} pixels at every {stride[0]} x {stride[1]}"
    if padding not in ((0, 0), "valid") or convolution.dilation != (1, 1) or convolution.groups != 1:
        return f"a convolution with padding {padding}, dilation {convolution.dilation} and {convolution.groups} groups"
    if type(stem.norm) not in (nn.Identity, *_norms_of_tokens()):
        return f"a convolution and a {type(stem.norm).__name__}, which is no norm of each token"
    return ""


def _norms_of_tokens() -> list[type]:
    """Norms of the last axis."""
    from timm import layers

    names = "LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"  # not in every timm
    return [nn.LayerNorm, nn.RMSNorm, *(getattr(layers, name) for name in names if hasattr(layers, name))]
