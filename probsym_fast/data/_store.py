"""Where generated and downloaded data lives; files are written whole or not at all, and checked when read."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import numpy as np

from probsym_fast._untrusted import check_zip, open_regular

METADATA = "metadata"  # name of the array that holds the metadata, JSON in UTF-8
CHECKSUM = "sha256"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a disk that takes no more


def cache_dir() -> Path:
    """The data folder: $PROBSYM_CACHE, else $XDG_CACHE_HOME/probsym_fast, else ~/.cache/probsym_fast."""
    if own := os.environ.get("PROBSYM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "probsym_fast"


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Create or replace the file `path` with what `writer(file)` writes to a binary file.

    The bytes go to a temporary file in the same folder (made if need be), reach the disk, and are then
    renamed: a reader sees the old file or the new one, never a part. Of several writers at once the last one
    wins. Whatever `writer` raises, an interrupt included, is passed on; `path` is then as it was and the
    temporary file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with named(path), open(temporary, "xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of a full disk name the file that is written within, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise


def unfinished(folder: Path) -> list[Path]:
    """The temporary files in the folder (not below it) whose writers were killed, or are at work."""
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name)]


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of killed writers in the folder and those right below it; nobody else may write there."""
    places = [folder, *(path for path in folder.glob("*") if path.is_dir())]
    for path in (path for place in places for path in unfinished(place)):
        path.unlink(missing_ok=True)


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write named arrays and JSON-able metadata to an .npz file, atomically, with a SHA-256 of both.

    Raises ValueError where an array is called "metadata", TypeError where one holds Python objects.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if METADATA in arrays:
        raise ValueError(f'save_arrays: arrays must not use the name "{METADATA}", got {sorted(arrays)}')
    if objects := sorted(name for name, array in arrays.items() if array.dtype.hasobject):
        raise TypeError(f"save_arrays: arrays must hold numbers or strings, got Python objects in {objects}")
    metadata = json.loads(json.dumps(dict(metadata)))
    text = json.dumps({**metadata, CHECKSUM: _checksum(arrays, metadata)})
    stored = {**arrays, METADATA: np.frombuffer(text.encode(), np.uint8)}
    write_atomically(path, lambda file: np.savez(file, **stored))


def load_arrays(
    path: str | Path,
    shapes: Mapping[str, tuple[int | None, ...]],
    metadata: Mapping[str, Any] | None = None,
    *,
    mend: str = "delete the file",
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read and check a file of `save_arrays`.

    Args:
        path: the file.
        shapes: name -> shape of every array that must be there; None stands for any length.
        metadata: entries the stored metadata must have, with these values.
        mend: what the reader of an error message should do, in the imperative.

    Returns the arrays and the metadata. Raises FileNotFoundError where there is no file, and ValueError with
    the path, what was expected, what came and `mend` where it is unreadable, incomplete, changed or of
    another kind.
    """

    def refusal(expected: object, got: object) -> ValueError:
        return ValueError(f"{path}: expected {expected}, got {got}; to mend it, {mend}")

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
    """ValueError, or zipfile's errors, where the archive's arrays could be larger than the file; numpy would make room."""
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
