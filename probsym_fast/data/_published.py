"""Raw files of sets that PyTorch Geometric knows: fetched whole or not at all, read without running their code."""

from __future__ import annotations

import os
import secrets
import shutil
import zlib
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from probsym_fast._untrusted import check_zip, open_regular, reason


def fetch(dataset: type, root: Path, name: str, files: list[str]) -> None:
    """Download the raw files of `dataset(root, name)` of torch_geometric to root/name/raw, where PyG looks for them.

    PyG downloads and unpacks into a temporary folder beside; the files then take their places, also those of older files.
    A failure, an interrupt included, leaves the root as it was. PyG verifies no checksum: who reads the files checks their
    content. Raises ConnectionError where they cannot be had, ValueError where what came does not hold them.
    """

    class Download(dataset):  # without PyG's processing
        has_process = False

        def load(self, *arguments: Any) -> None:
            """Nothing to load yet."""

    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            Download(str(temporary), name)
        except (BadZipFile, EOFError, zlib.error, FileNotFoundError) as error:  # the last: unpacked, but not there
            text = f"expected to download a zip archive of {files}, got {type(error).__name__}: {error}"
            raise ValueError(f"{name}: {text}") from error
        except (OSError, HTTPException) as error:
            raise ConnectionError(f"{name}: the published files cannot be downloaded: {error}") from error
        raw = temporary / name / "raw"
        if missing := [file for file in files if not (raw / file).is_file()]:
            raise ValueError(f"{name}: expected to download a zip archive of {files}, got one without {missing}")
        place = root / name / "raw"
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(raw / file, place / file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mending(name: str, own_root: bool) -> str:
    """What makes a compact file anew: of raw files in a root of the user's own, the command knows nothing."""
    if own_root:
        return "delete the file (the next use rebuilds it from the raw files)"
    return f"delete the file or run `probsym data get {name} --force`"


def read(path: Path, name: str, own_root: bool) -> Any:
    """What torch.save wrote: tensors, numbers, strings and containers; no code of the file is run.

    Raises FileNotFoundError that names the command that fetches the set `name`, ValueError for a file of another kind with
    what mends it (own_root: the file is in a root of the user's own, where the command fetches nothing).
    """
    command = f"probsym data get {name}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be the published file, found nothing; download it with `{command}`, or pass the folder of a copy"
        )
    try:
        with open_regular(path) as file:
            if file.read(4) == b"PK\x03\x04":  # older files of torch's are no zip archives
                check_zip(file)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage may show anywhere
        text = type(error).__name__ if isinstance(error, UnpicklingError) else reason(error)
        mend = f"delete {path} and " + ("call again with download=True" if own_root else f"run `{command} --force`")
        raise ValueError(f"{path}: expected tensors in torch's file format, got {text}; to fix it, {mend}") from None


def integers(what: str, value: Any, shape: tuple[int | None, ...], end: int | None = None) -> Tensor:
    """`value`, if it is an integer tensor of that shape (None: any length), with all numbers in 0..end - 1 where given.

    Raises ValueError that begins with `what`.
    """
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must be an integer tensor, got {got}")
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        raise ValueError(f"{what} must be {shape}, got {tuple(value.shape)}".replace("None", "*"))
    if end is not None and value.numel() and (value.min() < 0 or value.max() >= end):
        wrong = value[(value < 0) | (value >= end)][0].item()
        raise ValueError(f"{what} must be in 0..{end - 1}, got {wrong}")
    return value
