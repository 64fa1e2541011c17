"""Files that are written whole or not at all."""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a disk that takes no more


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
        with naming_file(path), open(temporary, "xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
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
