"""A timm model as it is, trained or not: its backbone on tokens and its classifier."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.models.backbones.timm_models import taken
from probsym_fast.models.backbones.vision import POOLED, VisionBackbone
from probsym_fast.models.backbones.whole import Stem, WholeVisionBackbone, features_of

OWNER = "timm_backbone"


def copy_of(model: Any) -> Any:
    """The same model in modules of its own, whose parameters and buffers are those of the given one."""
    return deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def stem_and_grid(model: Any) -> tuple[Stem | None, tuple[int, int] | None]:
    """Its `taken` and its grid; no grid where timm's model has no image size. ValueError for a model that is not taken."""
    stem = taken(model)
    if isinstance(stem, str):
        raise ValueError(
            f"{OWNER}: name must be a model of timm that runs on tokens, got {type(model).__name__}: {stem}"
        )
    if stem is not None:
        return stem, stem.grid
    grid = model.patch_embed.grid_size
    return None, None if grid is None else (int(grid[0]), int(grid[1]))


def dropout_of(model: Any, stem: Stem | None, read: str) -> float:
    """The share of patches that the model drops in training, for a backbone by its blocks; whole ones drop theirs themselves.

    ValueError where it is more than 0 and every token is read.
    """
    rate = float(getattr(getattr(model, "patch_drop", None), "prob", 0.0))
    if rate and read not in POOLED:
        raise ValueError(
            f"{OWNER}: patch_dropout must be 0 with read {read!r}, which returns every token, got {rate} of the given"
            f" {type(model).__name__}; set its patch_drop.prob = 0"
        )
    return 0.0 if stem else rate


def backbone_of(
    model: Any,
    stem: Stem | None,
    grid: tuple[int, int],
    read: str,
    rates: tuple[float, float],
    checkpointing: bool,
    all_tokens: bool,
    drops_always: bool,
) -> VisionBackbone | WholeVisionBackbone:
    """The backbone of a timm model, with its parameters. On another grid than its own positions are resampled copies."""
    kind, copied = type(model).__name__, copy_of(model)
    checkpointing = checkpointing or bool(getattr(model, "grad_checkpointing", False))
    own = stem.grid if stem else model.patch_embed.grid_size
    if grid != own:
        _resize(copied, stem, grid, kind)
    if stem is None:
        made: Any = VisionBackbone(copied, math.prod(grid), grid, read, rates, checkpointing, all_tokens, drops_always)
        return made.train(model.training)
    try:
        whole = WholeVisionBackbone(copied, replace(stem, grid=grid), read, checkpointing)
    except (RuntimeError, AssertionError) as error:  # its positions are for its own grid
        if grid == own:
            raise
        raise ValueError(f"{OWNER}: grid must be the model's own, {own}, for {kind}, got {grid}") from error
    return whole.train(model.training)


def _resize(model: Any, stem: Stem | None, shape: tuple[int, int], kind: str) -> None:
    """Resamples positions to the grid, as timm does."""
    if hasattr(model, "set_input_size"):
        patch = stem.stride if stem else model.patch_embed.patch_size
        model.set_input_size(img_size=(shape[0] * patch[0], shape[1] * patch[1]))
    elif stem is None:
        raise ValueError(
            f"{OWNER}: grid must be the model's own for {kind}, which this timm cannot resize, got {shape}"
        )


class TwoHeads(nn.Module):
    """The classifiers of a distilled model, of class and distillation token: (..., 2, D) -> (..., classes), their mean."""

    linear = True

    def __init__(self, head: nn.Module, head_dist: nn.Module):
        super().__init__()
        self.head, self.head_dist = head, head_dist

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x[..., 0, :]) + self.head_dist(x[..., 1, :])) / 2


def classifier_of(model: Any) -> nn.Module:
    """From what a backbone with read "features" returns to the model's logits: its classifier, not a copy.

    nn.Identity where it has none (num_classes=0). ValueError where its logits are no function of these features.
    """
    kind, stem = type(model).__name__, taken(model)
    if isinstance(stem, str):
        raise ValueError(f"ClassReadout: model must be one of timm that runs on tokens, got {kind}: {stem}")
    if stem is None:
        return TwoHeads(model.head, model.head_dist) if hasattr(model, "dist_token") else model.head
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    candidates = [x for x in (head, getattr(head, "fc", None)) if isinstance(x, nn.Module)]
    features, _ = features_of(model, stem)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            wanted, pooled = model.forward_head(features), model.forward_head(features, pre_logits=True)
            for candidate in candidates:
                if _gives(candidate, pooled, wanted):
                    return candidate
    except NotImplementedError:  # a model without classes
        pass
    finally:
        for module, mode in modes:
            module.training = mode
    raise ValueError(f"ClassReadout: model must have a classifier on its pooled features, got {kind}")


def _gives(head: nn.Module, x: Tensor, wanted: Tensor) -> bool:
    try:
        found = head(x)
    except (RuntimeError, ValueError, IndexError):  # it takes another shape
        return False
    return isinstance(found, Tensor) and (found.is_meta or torch.equal(found, wanted))
