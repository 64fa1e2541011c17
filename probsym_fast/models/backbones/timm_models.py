"""What `timm_backbone` takes of timm."""

from __future__ import annotations

from typing import Any

from probsym_fast.models.backbones.whole import Stem, stem_of

GRIDS = ("Beit", "VisionTransformerRelPos")  # classes with tables of relative positions


def taken(model: Any) -> Stem | str | None:
    """None: by its blocks, in `VisionBackbone`, which repeats the forward pass of some classes around their own blocks.

    A Stem: whole, in `WholeVisionBackbone`. A str: not, and why. The model may be on the meta device.
    """
    from timm.models import beit, deit, eva
    from timm.models import vision_transformer as vit
    from timm.models import vision_transformer_relpos as relpos

    by_blocks = (
        vit.VisionTransformer,
        deit.VisionTransformerDistilled,
        beit.Beit,
        eva.Eva,
        relpos.VisionTransformerRelPos,
    )
    whole = type(model) not in by_blocks
    found = stem_of(model) if whole else None
    if isinstance(found, str):
        return found
    if not whole and not len(model.blocks):
        return "it has no blocks"
    if (whole or on_grid(model)) and not isinstance(model, beit.Beit):  # else `to_empty` would leave them undefined
        for module in model.modules():
            if module._non_persistent_buffers_set and not hasattr(module, "init_non_persistent_buffers"):
                return f"{type(model).__name__} needs a newer timm, which can compute {type(module).__name__} again"
    return found


def on_grid(model: Any) -> bool:
    """Whether the positions of a model taken by blocks are defined on a grid only: relative or rotary ones."""
    return type(model).__name__ in GRIDS or getattr(model, "rope", None) is not None


def drops_patches(model: Any) -> bool:
    """Whether tokens of a model taken by blocks may be left out: not where tables of positions are for all tokens."""
    return type(model).__name__ not in GRIDS
