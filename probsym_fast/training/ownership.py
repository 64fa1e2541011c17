"""Locks: one process at a time owns a run folder."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

LOCK = ".lock"  # inside the folder, so that it moves along and two paths to one folder share it
PATIENCE = 0.2  # seconds to wait for an owner that is just ending


class InUse(FileExistsError):
    """Another process owns the run folder."""


def is_first_process() -> bool:
    """False in a training's other processes: only the first one owns the folder, writes and tests."""
    rank = os.environ.get("RANK", "")  # set by torchrun; Lightning reads it at import, perhaps before a fork
    ours = rank if rank.isdigit() else rank_zero_only.rank  # type: ignore[attr-defined]  # set by Lightning
    return int(ours) == 0


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it; does nothing in a training's other processes.

    The operating system holds the lock and releases it when the process ends, even by SIGKILL; a leftover lock file locks
    nothing. On exit the lock file is removed, and so are the folders made here that are still empty. Raises InUse at once if
    another process owns the folder, OSError with a file name if it is not writable or its file system has no locks.
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
            if os.getpid() == owner:  # not in a forked child
                with suppress(OSError):  # the file first: nobody may lock a file about to go
                    (folder / LOCK).unlink()
                lock.release()
    finally:
        if os.getpid() == owner:
            for path in made:
                with suppress(OSError):  # not empty, or gone
                    path.rmdir()


def owner_of(folder: Path) -> str | None:
    """The process that owns a folder, in words; None: no process does."""
    path = folder / LOCK
    if not path.is_file():
        return None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _owner(path)
    lock.release()
    return None


def _acquired(folder: Path, made: list[Path]) -> FileLock:
    """The acquired lock. Appends the folders that did not exist to `made`, innermost first."""
    path = folder / LOCK
    lock = FileLock(path)
    until = time.monotonic() + 10 * PATIENCE
    while True:
        made += [part for part in (folder, *folder.parents) if part not in made and not part.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE)
            break
        except Timeout:
            wanted = "must be used by one process at a time"
            raise InUse(f"run folder: {folder} {wanted}, got a second one while {_owner(path)} is running") from None
        except FileNotFoundError:  # its owner has just removed the folder
            if time.monotonic() > until:
                raise
        except OSError as error:
            error.filename = error.filename or str(path)  # a file system without locks names no file
            raise
    path.write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
    return lock


def _owner(path: Path) -> str:
    """The lock's owner, in words."""
    try:
        number, _, host = path.read_text(encoding="utf-8", errors="replace")[:300].partition(" ")
    except OSError:
        number = ""
    if not number.isascii() or not number.isdigit():
        return "another process"
    return f"process {number}" + ("" if host == platform.node() else f" on {host}")
