"""Autocast: steps that it must leave in their own dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this type of device; a meta device has none."""
    # torch 2.11 compiles no is_autocast_available
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def allows_bf16(device: torch.device) -> bool:
    """Whether autocast to bfloat16 is on for this type of device."""
    return autocasts(device) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products keep the dtype of their inputs. Free where autocast is off."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """torch.promote_types, without a call of torch where both are one dtype."""
    return a if a == b else torch.promote_types(a, b)
