"""Progress on stderr while a data set is generated or downloaded."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any


@contextmanager
def announced(text: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Prints a line before and after; on a terminal with rich installed, also a progress bar.

    Yields a function to call with the amount done since the last call. total: None if unknown.
    """
    print(f"{text} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    bar: Any = nullcontext()
    advance: Callable[[int], object] = int  # no bar: does nothing
    if sys.stderr.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True), transient=True)
        advance = partial(bar.advance, bar.add_task(text.partition(":")[0], total=total))
    with bar:
        yield advance
    print(f"{text}: done in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
