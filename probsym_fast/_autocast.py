"""Autocast: steps that it must leave in their own dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this type of device; a meta device has none."""
    # torch 2.11 compiles no is_autocast_available
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def allows_bf16(device: torch.device) -> bool:
    """Whether autocast to bfloat16 is on for this type of device."""
    return autocasts(device) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def product_dtype(weight: Tensor) -> torch.dtype:
    """Of the products with a weight: under autocast on a GPU autocast's, as of torch's convolutions; else the weight's own.

    Kernels of a CPU compute at least in float32.
    """
    on_gpu = weight.device.type == "cuda" and weight.dtype == torch.float32 and autocasts(weight.device)
    return torch.get_autocast_dtype("cuda") if on_gpu else weight.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products keep the dtype of their inputs. Free where autocast is off."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """torch.promote_types, without a call of torch where both are one dtype."""
    return a if a == b else torch.promote_types(a, b)
