"""The data folder, and files of arrays that are verified when read."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from probsym_fast._files import write_atomically
from probsym_fast._untrusted import check_zip, open_regular

METADATA = "metadata"  # name of the array that holds the metadata, JSON in UTF-8
CHECKSUM = "sha256"


def cache_dir() -> Path:
    """The data folder: $PROBSYM_CACHE, else $XDG_CACHE_HOME/probsym_fast, else ~/.cache/probsym_fast."""
    if own := os.environ.get("PROBSYM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "probsym_fast"


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes named arrays and JSON-able metadata to an .npz file, atomically, with a SHA-256 of both.

    Raises ValueError if an array is named "metadata", TypeError if one holds Python objects.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if METADATA in arrays:
        raise ValueError(f'save_arrays: arrays must not use the name "{METADATA}", got {sorted(arrays)}')
    if objects := sorted(name for name, array in arrays.items() if array.dtype.hasobject):
        raise TypeError(f"save_arrays: arrays must hold numbers or strings, got Python objects in {objects}")
    metadata = json.loads(json.dumps(dict(metadata)))
    text = json.dumps({**metadata, CHECKSUM: _checksum(arrays, metadata)})
    stored: dict[str, Any] = {**arrays, METADATA: np.frombuffer(text.encode(), np.uint8)}
    write_atomically(path, lambda file: np.savez(file, **stored))


def load_arrays(
    path: str | Path,
    shapes: Mapping[str, tuple[int | None, ...]],
    metadata: Mapping[str, Any] | None = None,
    *,
    mend: str = "delete the file",
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads and checks a file of `save_arrays`.

    Args:
        path: the file.
        shapes: name -> shape of every required array; None is any length.
        metadata: entries that the stored metadata must have.
        mend: how to fix a bad file, in the imperative, for error messages.

    Returns the arrays and the metadata. Raises FileNotFoundError if the file is missing. Raises ValueError, with path,
    expectation, finding and `mend`, if it is unreadable, incomplete, changed or of another kind.
    """

    def refusal(expected: object, got: object) -> ValueError:
        return ValueError(f"{path}: expected {expected}, got {got}; to fix it, {mend}")

    try:
        _check_sizes(Path(path))
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # damage may show anywhere in zipfile, zlib, struct or numpy's header parser
        raise refusal("a readable .npz file", f"{type(error).__name__}: {error}") from error
    if missing := [name for name in (*shapes, METADATA) if name not in arrays]:
        raise refusal(f"arrays {sorted((*shapes, METADATA))}", f"{sorted(arrays)} without {missing}")
    try:
        stored = json.loads(arrays.pop(METADATA).tobytes())
        checksum = stored.pop(CHECKSUM)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise refusal(f"JSON metadata with {CHECKSUM}", f"{type(error).__name__}: {error}") from error
    if (found := _checksum(arrays, stored)) != checksum:
        raise refusal(f"{CHECKSUM} {checksum}", found)
    for name, value in (metadata or {}).items():
        if stored.get(name) != (value := json.loads(json.dumps(value))):
            raise refusal(f"metadata {name} = {value}", stored.get(name))
    for name, shape in shapes.items():
        got = arrays[name].shape
        if len(got) != len(shape) or any(n is not None and n != m for n, m in zip(shape, got, strict=True)):
            raise refusal(f"{name} of shape {shape}".replace("None", "*"), got)
    return arrays, stored


def _check_sizes(path: Path) -> None:
    """Raises ValueError or zipfile's errors if an array claims more bytes than the archive holds."""
    with open_regular(path) as file:
        names = check_zip(file)
        with ZipFile(file) as archive:
            for name in names:
                with archive.open(name) as entry:
                    version = np.lib.format.read_magic(entry)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(entry)
                    wanted, held = math.prod(shape) * dtype.itemsize, names[name] - entry.tell()
                    if not dtype.hasobject and wanted != held:
                        raise ValueError(f"expected {wanted} bytes of {name}, got {held}")


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of the metadata and of every array's name, dtype, shape and values."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
