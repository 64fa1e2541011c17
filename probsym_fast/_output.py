"""Standard output and error that end no command: a reader may go away, a terminal may lack a character."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # a pipe without a reader, a terminal that was closed, no output at all


class _Patient:
    """A text stream whose reader may go away; what is written then is dropped."""

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
            self._drop()  # a full disk is reported once, not again when Python ends
            if error.errno not in GONE:
                raise

    def _drop(self) -> None:
        """What is buffered goes nowhere too, also when Python flushes the stream at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_output() -> Iterator[None]:
    """Within it a closed pipe is no error, and a character that the encoding lacks is written as its escape ("\\xb1")."""
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
