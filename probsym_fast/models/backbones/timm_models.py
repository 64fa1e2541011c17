"""What `timm_backbone` takes of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

KINDS = "a ViT, BEiT or EVA of timm"


def unsuitable(model: Any) -> str | None:
    """Why the model's blocks cannot take tokens; None if they can.

    `VisionBackbone` repeats the forward pass of these classes around their own blocks. Another class may do more there.
    """
    from timm.models import beit, deit, eva
    from timm.models import vision_transformer as vit
    from timm.models import vision_transformer_relpos as relpos

    kinds = (
        vit.VisionTransformer,
        deit.VisionTransformerDistilled,
        beit.Beit,
        eva.Eva,
        relpos.VisionTransformerRelPos,
    )
    kind = type(model).__name__
    if type(model) not in kinds:
        if any(type(module).__name__ == "PatchMerging" for module in model.modules()):
            return f"{kind} merges its patches between blocks"
        if any(isinstance(part, nn.Conv2d) and "patch_embed" not in key for key, part in model.named_modules()):
            return f"{kind} has convolutions besides a patch embedding"
        return f"{kind} is not a plain sequence of blocks"
    if not len(model.blocks):
        return "it has no blocks"
    if on_grid(model) and not isinstance(model, beit.Beit):  # else `to_empty` would leave them undefined
        for module in model.modules():
            if module._non_persistent_buffers_set and not hasattr(module, "init_non_persistent_buffers"):
                return f"{kind} needs a newer timm, which can compute its positions again"
    return None


def on_grid(model: Any) -> bool:
    """Whether the positions are defined on a grid only: relative or rotary ones."""
    return type(model).__name__ in ("Beit", "VisionTransformerRelPos") or getattr(model, "rope", None) is not None


def drops_patches(model: Any) -> bool:
    """Whether tokens may be left out: not where positions are relative, in tables for all tokens."""
    return type(model).__name__ not in ("Beit", "VisionTransformerRelPos")
