"""Standard output and error that survive a reader that goes away or an encoding that lacks a character."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # a pipe without a reader, a closed terminal, no output at all


class _Patient:
    """A text stream that drops its output once its reader is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop()
            if error.errno in GONE:
                return len(text)
            raise

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop()  # reports a full disk once, not again when Python exits
            if error.errno not in GONE:
                raise

    def _drop(self) -> None:
        """Discards the buffer too, even when Python flushes the stream on exit."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_output() -> Iterator[None]:
    """Inside it, a closed pipe is not an error, and characters missing from the encoding are escaped ("\\xb1")."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and _Patient(stream) for stream in before)
    try:
        yield
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = before
