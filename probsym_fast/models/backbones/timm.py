"""Vision backbones by name: timm's architectures for any number of tokens, with timm's or local weights."""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from probsym_fast._checks import as_number, check_count
from probsym_fast.models.backbones.checkpoints import load_weights, resample_positions, train_extra
from probsym_fast.models.backbones.timm_given import backbone_of, dropout_of, stem_and_grid
from probsym_fast.models.backbones.timm_models import drops_patches, on_grid, taken
from probsym_fast.models.backbones.vision import POOLED, VisionBackbone
from probsym_fast.models.backbones.whole import Stem, WholeVisionBackbone

READS = ("pooled", "features", "tokens", "diagonal")
RESERVED = ("num_classes", "features_only", "patch_drop_rate")  # arguments of timm without meaning here


def timm_backbone(
    name: str | nn.Module,
    pretrained: bool = False,
    *,
    grid: int | tuple[int, int] | None = None,
    tokens: int | None = None,
    read: Literal["pooled", "features", "tokens", "diagonal"] = "pooled",
    patch_dropout: float | tuple[float, float] | None = None,
    patch_dropout_always: bool = False,
    checkpointing: bool = False,
    weights: str | Path | None = None,
    all_tokens: bool = False,
    **timm_arguments: Any,
) -> VisionBackbone | WholeVisionBackbone:
    """A vision transformer of timm on given tokens (..., L, D), any leading axes, such as (B, S, grid^2, D).

    timm's VisionTransformer (ViT, DeiT, AugReg, DINO, DINOv2, CLIP, SigLIP, ...), Beit (BEiT, BEiTv2), Eva (EVA, EVA-02,
    DINOv3, PE, RoPE-ViT, ...) and VisionTransformerRelPos by their blocks; other models that keep the number of their tokens
    (CaiT, XCiT, MLP-Mixer, ...) whole. docs/backbones.md lists all. Skips the patch embedding and the classifier. Class,
    distillation and register tokens, positions, blocks, norms and pool are timm's, under timm's names.

    Args:
        name: timm's name, with or without the tag of the weights, such as "vit_base_patch16_224.augreg_in21k". Or a model
            of timm, such as a trained classifier: the backbone shares its parameters, and training it trains the model. On
            another grid than the model's own, positions are resampled copies. It takes no weights and timm_arguments.
        pretrained: load timm's weights, from the Hugging Face hub or its cache.
        grid: L = grid^2 tokens, or (rows, columns), row by row; default: the model's own grid. Positions are resampled as
            in timm (BEiT, RelPos: the tables of relative positions; Eva: rotary positions are made for the grid).
        tokens: L tokens in a sequence, not necessarily a square. Positions are resampled along the sequence of the model's
            own tokens, row by row, with the same filter (without pretrained: initialised from N(0, 0.02^2)). Relative and
            rotary positions lie on the grid: these models take squares, as grid = sqrt(tokens). For a line give
            grid=(1, tokens).
        read: "pooled" (..., D): timm's pool (class token, average, ...) and fc_norm of the tokens after the final norm.
            "features": what timm's classifier takes, which differs only in a distilled DeiT: two tokens, (..., 2, D).
            "tokens" (..., L, D): the patch tokens after the final norm, as timm's forward_features returns them (a model with
            fc_norm has no norm there). "diagonal" (..., grid, D): of these the tokens (i, i), on a square grid.
        patch_dropout: share of the patch tokens dropped, drawn per row of tokens, only in training. (low, high): the share
            itself is drawn from U(low, high) in each forward pass. Only with a read of the pooled tokens; not with BEiT,
            RelPos and whole models. None: that of the given model (`patch_drop_rate` of timm), 0 for a name.
        patch_dropout_always: drop patches in eval mode too, with torch's global generator; predictions are then random. As in
            the public code of Kim et al., to compare with its figures.
        checkpointing: keep only the inputs of the blocks for the backward pass, which computes the rest again. Also on where
            the given model has it on (`set_grad_checkpointing` of timm).
        weights: local weights of the same architecture, see `read_weights`. Positions of another grid are resampled (a file
            does not record that its tokens form a sequence: for a grid, a square number of them counts as one).
        all_tokens: compute the last block also for the tokens that are not read (same result, for comparison).
        timm_arguments: passed to timm.create_model, such as drop_path_rate or global_pool.

    If few tokens are read, the last block costs little more than its keys and values. Raises ValueError for unknown and
    unsuitable models, unknown tags, and settings and weights that do not fit. TypeError for settings of another type,
    ModuleNotFoundError without timm. Source: Kim et al. 2023 (arXiv 2306.02866).
    """
    timm = train_extra("timm_backbone", "timm")
    low, high = _rates(0.0 if patch_dropout is None else patch_dropout)
    shape = _shape(grid)
    tokens = None if tokens is None else check_count("timm_backbone", "tokens", tokens)
    _check_settings(read, grid, tokens, (low, high), pretrained, weights, timm_arguments)
    if isinstance(name, nn.Module) and (wrong := _of_names(pretrained, tokens, weights, timm_arguments)):
        raise ValueError(f"timm_backbone: {wrong} must not be given with a model, got it with {type(name).__name__}")
    if patch_dropout_always and high == 0:
        raise ValueError(f"timm_backbone: patch_dropout_always must be False where patch_dropout is 0, got {True}")
    if isinstance(name, nn.Module):
        given, own = stem_and_grid(name)
        place = shape or own
        if place is None:
            raise ValueError(f"timm_backbone: grid must be given for a {type(name).__name__} of any size, got None")
        _check_model(name, given, type(name).__name__, read, None, place, high)
        if patch_dropout is None:
            low = high = dropout_of(name, given, read)
        return backbone_of(name, given, place, read, (low, high), checkpointing, all_tokens, patch_dropout_always)
    _check_name(timm, name)
    try:
        with torch.device("meta"):  # the architecture, at no cost
            model = timm.create_model(name, **timm_arguments)
    except Exception as error:  # timm asserts, or its modules raise
        text = f"{type(error).__name__}: {error}"
        raise ValueError(f"timm_backbone: {name} must take the arguments, got {timm_arguments}: {text}") from error
    stem = taken(model)
    if isinstance(stem, str):
        raise ValueError(f"timm_backbone: name must be a model of timm that runs on tokens, got {name!r}: {stem}")
    old = stem.grid if stem else tuple(model.patch_embed.grid_size)
    stride = stem.stride if stem else [size // side for size, side in zip(model.patch_embed.img_size, old, strict=True)]
    if tokens is not None and (stem or on_grid(model)) and math.isqrt(tokens) ** 2 == tokens:
        shape, tokens = (math.isqrt(tokens),) * 2, None
    _check_model(model, stem, name, read, tokens, shape or old, high)
    if shape is not None and (stem is None or "img_size" in inspect.signature(type(model).__init__).parameters):
        sides = [side * size for side, size in zip(shape, stride, strict=True)]
        timm_arguments["img_size"] = sides[0] if sides[0] == sides[1] else tuple(sides)
    if stem is None and getattr(model, "rope", None) is not None:  # tables for one grid are made once
        timm_arguments.setdefault("dynamic_img_size", False)
    native = model
    try:
        model = timm.create_model(name, pretrained=pretrained, **timm_arguments)
    except Exception as error:  # from the hub, its transport, safetensors or torch
        text = f"{type(error).__name__}: {error}"
        raise ValueError(f"timm_backbone: {name} must load (a local file: weights=path), got {text}") from error
    if stem is not None:
        whole = WholeVisionBackbone(model, replace(stem, grid=shape or old), read, checkpointing)
        if weights is not None:
            load_weights(whole, weights, model, old)
        return whole
    shape = tuple(model.patch_embed.grid_size) if tokens is None else None
    L = math.prod(model.patch_embed.grid_size) if tokens is None else tokens
    if tokens is not None and model.pos_embed is not None:  # no grid: a ViT or DeiT
        positions = resample_positions(model.pos_embed.data, (1, math.prod(old)), (1, tokens))
        model.pos_embed = nn.Parameter(positions)
        if not pretrained:
            nn.init.trunc_normal_(model.pos_embed, std=0.02)
    backbone = VisionBackbone(model, L, shape, read, (low, high), checkpointing, all_tokens, patch_dropout_always)
    if weights is not None:
        load_weights(backbone, weights, model if tokens is None else native, old)
    return backbone


def _of_names(pretrained: bool, tokens: int | None, weights: Any, timm_arguments: dict[str, Any]) -> str:
    """The first argument that only a name takes; "" if there is none."""
    others = {"pretrained": pretrained, "tokens": tokens is not None, "weights": weights is not None}
    return next((name for name, is_given in (others | timm_arguments).items() if is_given is not False), "")


def _check_name(timm: ModuleType, name: str) -> None:
    """TypeError unless name is a string, ValueError unless timm has the architecture and the tag, if given."""
    if not isinstance(name, str):
        raise TypeError(f"timm_backbone: name must be a str, got {type(name).__name__} {name!r}")
    architecture, kind, known = name.split(".")[0], "model", timm.list_models()
    if architecture in known:
        try:
            timm.models.get_pretrained_cfg(name)
            return
        except RuntimeError:  # the architecture has no such tag
            kind, known = "tag", timm.list_pretrained(f"{architecture}.*")
    wanted = "a model of timm" if kind == "model" else f"{architecture}, with or without a tag of timm"
    near = difflib.get_close_matches(architecture if kind == "model" else name, known, n=4, cutoff=0.5)
    near = near or (known[:4] if kind == "tag" else [])
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"timm_backbone: name must be {wanted}, got {name!r}{hint}")


def _rates(patch_dropout: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of one rate or two."""
    pair = tuple(patch_dropout) if isinstance(patch_dropout, tuple | list) else (patch_dropout, patch_dropout)
    rates = tuple(rate for rate in map(as_number, pair) if rate is not None)
    if len(rates) < len(pair):
        raise TypeError(f"timm_backbone: patch_dropout must be a number or two, got {patch_dropout!r}")
    if len(rates) != 2:
        raise ValueError(f"timm_backbone: patch_dropout must be a number or two, got {len(rates)}: {patch_dropout!r}")
    return rates


def _shape(grid: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(rows, columns) of one number or two."""
    if grid is None:
        return None
    pair = (grid, grid) if not isinstance(grid, tuple | list) else tuple(grid)
    if len(pair) != 2:
        raise ValueError(f"timm_backbone: grid must be a number or two, got {len(pair)}: {grid!r}")
    rows, columns = (check_count("timm_backbone", "grid", side) for side in pair)
    return rows, columns


def _check_settings(
    read: str,
    grid: int | tuple[int, int] | None,
    tokens: int | None,
    rates: tuple[float, float],
    pretrained: bool,
    weights: str | Path | None,
    timm_arguments: dict[str, Any],
) -> None:
    def refuse(name: str, wanted: str, got: Any) -> None:
        raise ValueError(f"timm_backbone: {name} must be {wanted}, got {got}")

    if read not in READS:
        refuse("read", f"one of {', '.join(READS)}", repr(read))
    if grid is not None and tokens is not None:
        refuse("grid or tokens", "None", f"{grid} and {tokens}")
    if not 0 <= rates[0] <= rates[1] < 1:
        refuse("patch_dropout", "0 <= low <= high < 1", rates)
    if rates[1] > 0 and read not in POOLED:
        refuse("patch_dropout", f"0 with read {read!r}, which returns every token", rates)
    if pretrained and weights is not None:
        refuse("pretrained", "False with weights", f"{pretrained} and {str(weights)!r}")
    reserved = RESERVED if grid is None and tokens is None else (*RESERVED, "img_size")
    if given := [key for key in reserved if key in timm_arguments]:
        refuse("timm_arguments", f"without {', '.join(reserved)}", given)


def _check_model(
    model: Any, stem: Stem | None, name: str, read: str, tokens: int | None, grid: tuple[int, int], dropout: float
) -> None:
    """Raises where the settings do not suit this model."""
    if read in POOLED and not getattr(model, "global_pool", "fixed"):
        raise ValueError(f"timm_backbone: global_pool must be given for read {read!r}, got {model.global_pool!r}")
    if tokens is not None and (stem or on_grid(model)):
        raise ValueError(
            f"timm_backbone: tokens must be a square for {name}, whose positions lie on a grid, got {tokens}; "
            f"for a line give grid=(1, {tokens})"
        )
    if read == "diagonal" and (tokens is not None or grid[0] != grid[1]):
        got = f"{tokens} tokens in a sequence" if tokens is not None else grid
        raise ValueError(f"timm_backbone: grid must be square for read 'diagonal', got {got}")
    if dropout and (stem or not drops_patches(model)):
        reason = "which runs whole" if stem else "whose positions are relative"
        raise ValueError(f"timm_backbone: patch_dropout must be 0 for {name}, {reason}, got {dropout}")
