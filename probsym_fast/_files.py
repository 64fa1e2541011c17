"""Atomic writes, and cleaning up after interrupted ones."""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a full disk


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Creates or replaces the file `path` with what `writer(file)` writes to a binary file.

    The bytes go to a temporary file in the same folder (created if missing), are synced to disk, and are then renamed. A
    reader sees the old file or the new one, never a part; with several writers the last one wins. If `writer` raises or
    is interrupted, `path` is unchanged and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming_file(path), open(temporary, "xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Adds the file's name to full-disk errors raised inside, because the system leaves it out."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise


def unfinished(folder: Path) -> list[Path]:
    """Temporary files directly in the folder, whose writers were killed or are still running."""
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name)]


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of killed writers from the folder and its subfolders. No other process may write there."""
    places = [folder, *(path for path in folder.glob("*") if path.is_dir())]
    for path in (path for place in places for path in unfinished(place)):
        path.unlink(missing_ok=True)
