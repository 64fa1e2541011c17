"""Checks of the arguments of profiles and traces, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from probsym_fast._checks import as_number, check_count
from probsym_fast.draws import check_kind
from probsym_fast.models.chunks import check_sizes
from probsym_fast.ops._op import BACKENDS

TIMED = ("training", "inference")
MODES = (*TIMED, "variance")


def check_values(
    samples: Any, modes: Any, chunks: Any, backends: Any, draws: Any, seconds: Any, repeats: Any
) -> tuple[list[int], list[int | str | None] | None, float, int]:
    """samples, chunks, seconds and repeats as Python numbers. Raises as `profile`."""
    check_lists({"samples": samples, "modes": modes, "chunks": chunks, "backends": backends, "draws": draws})
    samples = [check_count("profile", "samples", count) for count in samples]
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"profile: modes must be of {MODES}, got {mode!r}")
    if chunks is not None:
        chunks = [check_sizes("profile", "each of chunks", size)[0] for size in chunks]
    repeats = check_count("profile", "repeats", repeats, least=2)
    if (duration := as_number(seconds)) is None:
        raise TypeError(f"profile: seconds must be a number, got {seconds!r}")
    if not 0 < duration < math.inf:
        raise ValueError(f"profile: seconds must be finite and > 0, got {duration}")
    return samples, chunks, duration, repeats


def check_lists(given: dict[str, Any]) -> None:
    """Raises TypeError for lists of the wrong type, ValueError for empty lists and unknown draws."""
    for name, values in given.items():
        if values is None and name in ("chunks", "draws"):  # None: use the model's
            continue
        words = {"samples": "ints", "chunks": "ints, 'auto' and None"}.get(name, "strings")
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        if not listed or (words == "strings" and not all(isinstance(x, str) for x in values)):
            raise TypeError(f"profile: {name} must be a list of {words}, got {values!r}")
        if not values:
            raise ValueError(f"profile: {name} must hold one value or more, got {values!r}")
    for kind in given["draws"] or ():
        check_kind("profile", kind, "each of draws")


def checked_device(device: torch.device | str) -> torch.device:
    """The device. Raises ValueError unless it is a CPU or a GPU that torch sees."""
    there = ("cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count())))
    wanted = "cuda:0" if str(device) == "cuda" else str(device)
    if wanted not in there:
        raise ValueError(f"profile: device must be one of {there}, got {str(device)!r}")
    return torch.device(device)


def check_backends(names: Sequence[str], device: torch.device) -> None:
    """Raises ValueError for a name that is no op's backend on this device."""
    there = {name for (_, kind), found in BACKENDS.items() if kind == device.type for name in found}
    for name in names:
        if name not in (known := ("auto", *sorted(there))):
            raise ValueError(f"profile: backends must be of {known} on {device.type}, got {name!r}")
