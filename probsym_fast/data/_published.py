"""Raw files of sets in PyTorch Geometric: downloads them atomically and reads them without running their code."""

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
    """Downloads the raw files of torch_geometric's `dataset(root, name)` to root/name/raw, where PyG looks for them.

    PyG downloads and unpacks into a temporary folder; the files are then moved into place and replace older ones. A failure
    or an interrupt leaves the root unchanged. PyG verifies no checksum, so readers must check the content. Raises
    ConnectionError if the download fails, ValueError if it does not contain the files.
    """

    class Download(dataset):  # without PyG's processing
        has_process = False

        def load(self, *arguments: Any) -> None:
            """Nothing is processed, so there is nothing to load."""

    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            Download(str(temporary), name)
        except (BadZipFile, EOFError, zlib.error, FileNotFoundError) as error:  # FileNotFoundError: not in the archive
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
    """How to rebuild a compact file; the command cannot rebuild one in a root of the user's own."""
    if own_root:
        return "delete the file (the next use rebuilds it from the raw files)"
    return f"delete the file or run `probsym data get {name} --force`"


def read(path: Path, name: str, own_root: bool) -> Any:
    """What torch.save wrote: tensors, numbers, strings and containers. Runs no code from the file.

    own_root: the file is in a root of the user's own, where the command downloads nothing. Raises FileNotFoundError with
    the command that downloads the set `name`, and ValueError for other content, with a way to fix it.
    """
    command = f"probsym data get {name}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be the published file, found nothing; download it with `{command}`, or pass the folder of a copy"
        )
    try:
        with open_regular(path) as file:
            if file.read(4) == b"PK\x03\x04":  # older torch files are not zip archives
                check_zip(file)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage may show anywhere
        text = type(error).__name__ if isinstance(error, UnpicklingError) else reason(error)
        mend = f"delete {path} and " + ("call again with download=True" if own_root else f"run `{command} --force`")
        raise ValueError(f"{path}: expected tensors in torch's file format, got {text}; to fix it, {mend}") from None


def integers(what: str, value: Any, shape: tuple[int | None, ...], end: int | None = None) -> Tensor:
    """Returns `value` if it is an integer tensor of this shape (None: any length), with entries in 0..end - 1 if given.

    Otherwise raises ValueError, with `what` at the start of the message.
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
