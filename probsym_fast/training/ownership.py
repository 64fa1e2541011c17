"""A run folder belongs to one process at a time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

LOCK = ".lock"  # in the folder: it moves with the folder, and no two names of one folder get two locks
PATIENCE = 0.2  # seconds for an owner that is just ending


class InUse(FileExistsError):
    """Another process owns the run folder."""


def is_first_process() -> bool:
    """False in the processes that train on further devices: only the first one owns the folder, writes and tests."""
    rank = os.environ.get("RANK", "")  # of torchrun; Lightning reads it when it is imported, which may be before a fork
    ours = rank if rank.isdigit() else rank_zero_only.rank  # type: ignore[attr-defined]  # set by Lightning
    return int(ours) == 0


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the folder and owns it; InUse, at once, where another process does. Nothing in further processes of a training.

    The lock is the system's and ends with its process, even by SIGKILL; a lock file that is left over locks nothing. On
    exit the lock file is removed, and so are the folders that were made here, if they are still empty. Raises OSError with a
    file name where the folder cannot be written or its file system has no locks.
    """
    if not is_first_process():
        yield
        return
    made: list[Path] = []
    owner = os.getpid()
    try:
        lock = _acquired(folder, made)
        try:
            yield
        finally:
            if os.getpid() == owner:  # not in a process that was forked meanwhile
                with suppress(OSError):  # first the file, then the lock: nobody locks a file that is about to go
                    (folder / LOCK).unlink()
                lock.release()
    finally:
        if os.getpid() == owner:
            for path in made:
                with suppress(OSError):  # not empty, or gone
                    path.rmdir()


def _acquired(folder: Path, made: list[Path]) -> FileLock:
    """The lock, held. made: gets the folders that were not there, the innermost first."""
    path = folder / LOCK
    lock = FileLock(path)
    for attempt in range(3):
        made += [part for part in (folder, *folder.parents) if part not in made and not part.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE)
            break
        except Timeout:
            wanted = "must belong to one process at a time"
            raise InUse(f"run folder: {folder} {wanted}, got a second start while {_owner(path)} is at work") from None
        except FileNotFoundError:  # its owner, which had made it, has just removed it
            if attempt == 2:
                raise
        except OSError as error:
            error.filename = error.filename or str(path)  # a file system without locks does not say where
            raise
    path.write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
    return lock


def _owner(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        number, _, host = path.read_text(encoding="utf-8", errors="replace")[:300].partition(" ")
    except OSError:
        number = ""
    if not number.isascii() or not number.isdigit():
        return "another process"
    return f"process {number}" + ("" if host == platform.node() else f" on {host}")
