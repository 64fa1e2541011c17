"""Weights from local files, resampled to a vision backbone's number of tokens."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._untrusted import load_tensors, reason
from probsym_fast.models.backbones.vision import VisionBackbone
from probsym_fast.models.backbones.whole import WholeVisionBackbone

Net = VisionBackbone | WholeVisionBackbone
RUN = "model.backbone."  # where the checkpoints of `probsym fit` keep the backbone
PARALLEL = "module."  # prefix of DistributedDataParallel
WHOLE = "model."  # prefix of a `WholeVisionBackbone`
TABLE = "relative_position_bias_table"
WRAPPED = ("state_dict", "model", "model_ema", "module")  # where checkpoints keep their tensors
HEADS = ("patch_embed", "head", "head_dist")


def train_extra(function: str, name: str) -> ModuleType:
    """Imports the module `name`; ModuleNotFoundError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        text = f'{function}: {name} must be installed, got no {error.name}; pip install "probsym_fast[train]"'
        raise ModuleNotFoundError(text, name=error.name) from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a local file by timm's names, on the CPU. Runs no code from the file.

    path: .safetensors; a torch checkpoint, bare or under one of WRAPPED; a checkpoint of `probsym fit`, whose
    backbone is taken; or a run folder, for its best checkpoint. Strips the prefixes of torch.compile ("_orig_mod.") and
    DistributedDataParallel ("module.", on every name). Raises FileNotFoundError, and ValueError for a damaged file or one
    without tensors.
    """
    path = Path(path)
    file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"timm_backbone: weights must be a file or a run folder, found no file {file}")
    try:
        if file.suffix == ".safetensors":
            state = train_extra("timm_backbone", "safetensors.torch").load_file(file)
        else:
            state = load_tensors(file)
    except (ModuleNotFoundError, OSError):
        raise
    except Exception as error:  # safetensors has its own errors
        text = str(error) if isinstance(error, ValueError) else reason(error)
        raise ValueError(f"timm_backbone: weights must be an intact checkpoint, got {file}: {text}") from None
    for key in WRAPPED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"timm_backbone: weights must hold tensors by name, got {file} with {type(state).__name__}")
    state = {str(name).replace("_orig_mod.", ""): value for name, value in state.items()}  # of torch.compile
    if all(name.startswith(PARALLEL) for name in state):
        state = {name[len(PARALLEL) :]: value for name, value in state.items()}
    if any(name.startswith(RUN) for name in state):
        state = {name[len(RUN) :]: value for name, value in state.items() if name.startswith(RUN)}
    if all(name.startswith(WHOLE) for name in state):
        state = {name[len(WHOLE) :]: value for name, value in state.items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"timm_backbone: weights must hold tensors, got {name} of {type(value).__name__} in {file}"
            )
    return state


def load_weights(backbone: Net, path: str | Path, model: Any, own: tuple[int, int]) -> None:
    """Loads the tensors of `read_weights(path)` into the backbone, with positions resampled to its tokens.

    model: timm's, with parts that the backbone lacks; the file may hold them. own: the grid of timm's weights. Where the
    names are others, such as those of the authors of DINOv3, CLIP or PE, timm converts them.

    A file does not record its grid. Positions of as many tokens as the backbone has stay as they are, unless the file also
    has a patch embedding and the positions fit timm's grid, which is another one. Others are resampled: for a backbone on a
    grid from a square, even those of a sequence; for a backbone on a sequence along it. Raises ValueError for missing and
    unexpected names, and for the first tensor of another shape, that is not floating point, or not finite in the
    backbone's dtype.
    """
    net: nn.Module = backbone.model if isinstance(backbone, WholeVisionBackbone) else backbone  # with timm's names
    wanted = net.state_dict()
    if isinstance(backbone, WholeVisionBackbone):
        passed = _firsts(HEADS) | {backbone.stem + "."}
    else:
        passed = _firsts(HEADS) | (_firsts(model.state_dict()) - _firsts(wanted))

    def kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if not f"{name}.".startswith(tuple(passed))}

    state = read_weights(path)
    image, found = "patch_embed." in _firsts(state), kept(state)
    if wanted.keys() != found.keys() and wanted.keys() == (converted := kept(_converted(state, model))).keys():
        image, found = False, converted  # resampled already
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        text = ", ".join(
            f"{kind} {_listed(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        )
        raise ValueError(f"timm_backbone: weights must hold the backbone's names, got {path} with {text}")
    for name, target in wanted.items():
        _check_values(name, found[name], target.dtype, path)
    found = {
        name: _fitted(name, found[name], target, backbone, own if image else None) for name, target in wanted.items()
    }
    for name, target in wanted.items():
        if found[name].shape != target.shape:
            raise ValueError(
                f"timm_backbone: weights must hold {name} of shape {tuple(target.shape)}, "
                f"got {tuple(found[name].shape)} in {path}"
            )
    net.load_state_dict(found)


def _converted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The tensors under timm's names, by timm's own function for the architecture; {} where it has none or fails."""
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    try:
        return {} if convert is None else dict(convert(dict(state), model))
    except Exception:  # not of a form that timm knows
        return {}


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, prefix + old tokens, D) -> (1, prefix + new tokens, D): timm's bicubic resampling with antialiasing.

    old, new: (rows, columns) of the tokens; (1, tokens) resamples along the sequence. The prefix is unchanged.
    """
    from timm.layers import resample_abs_pos_embed

    prefix = positions.shape[1] - math.prod(old)
    return resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)


def _check_values(name: str, value: Tensor, dtype: torch.dtype, path: str | Path) -> None:
    if not value.is_floating_point():
        raise ValueError(f"timm_backbone: weights must be floating point, got {name} of {value.dtype} in {path}")
    wrong = ~value.to(dtype).isfinite()
    if wrong.any():
        got = f"{name} with {int(wrong.sum())} of {value.numel()} NaN or infinite"
        raise ValueError(f"timm_backbone: weights must be finite in {dtype}, got {got} in {path}")


def _fitted(name: str, value: Tensor, target: Tensor, backbone: Net, own: tuple[int, int] | None) -> Tensor:
    """The tensor resampled to the backbone's tokens, or unchanged if it cannot be. own: the grid it has if that fits."""
    if value.ndim != target.ndim or value.shape[-1] != target.shape[-1]:
        return value
    if name == "pos_embed":
        old = value.shape[1] - (target.shape[1] - backbone.tokens)
        if backbone.grid is None:
            return value if old in (0, backbone.tokens) else resample_positions(value, (1, old), (1, backbone.tokens))
        if own is None or math.prod(own) != old:
            own = backbone.grid if value.shape == target.shape else _square(old)
        return value if own is None or own == backbone.grid else resample_positions(value, own, backbone.grid)
    if name.endswith(TABLE) and value.shape != target.shape:
        if (side := _square(len(value) - 3 * backbone.prefix_tokens)) and side[0] % 2:  # (2 h - 1)(2 w - 1) offsets
            from timm.layers import resize_rel_pos_bias_table

            assert backbone.grid is not None  # relative positions lie on one
            return resize_rel_pos_bias_table(value, backbone.grid, tuple(target.shape))
    return value


def _square(count: int) -> tuple[int, int] | None:
    """The sides of a square of so many tokens, if there is one."""
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


def _firsts(names: Iterable[str]) -> set[str]:
    """The first parts of the names, each with a point."""
    return {name.split(".")[0] + "." for name in names}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
