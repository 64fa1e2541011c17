"""What the runs of a sweep took."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from resource import struct_rusage

from probsym_fast._files import write_atomically


@dataclass(frozen=True)
class Cost:
    """What a run took, over all its processes since it was begun.

    seconds: of wall time. cpu_seconds: of all cores. memory: the largest resident set, MB. status: of the last process, 0
    where the run is finished. commit: of the code, "+" for changes not in it, several where the processes' differ; "" outside
    a git checkout. complete: False once the sweep ended before a process of the run: what that one took is not counted.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int = 0
    status: int = 0
    commit: str = ""
    complete: bool = True


class Costs:
    """The costs of a sweep's runs by their folder's name, kept in `costs.json`. Safe for several threads."""

    def __init__(self, folder: Path):
        """Raises ValueError for a damaged file."""
        self.path, self._lock = folder / "costs.json", threading.Lock()
        self._all: dict[str, Cost] = {}
        if self.path.is_file():
            try:
                self._all = {key: Cost(**x) for key, x in json.loads(self.path.read_text(encoding="utf-8")).items()}
            except (ValueError, TypeError, AttributeError) as error:
                text = "must hold the runs' costs; delete it to go on without them"
                raise ValueError(f"sweep: {self.path} {text}, got {type(error).__name__}: {error}") from error

    def get(self, key: str) -> Cost | None:
        with self._lock:
            return self._all.get(key)

    def begin(self, key: str, continued: bool) -> Cost:
        """Notes that a process of a run starts, and returns what those before it took."""
        with self._lock:
            past = self._all.get(key, Cost(complete=not continued)) if continued else Cost()
            self._all[key] = replace(past, complete=False)  # unless this sweep lives to `end` it
            self._write()
        return past

    def end(self, key: str, past: Cost, seconds: float, used: struct_rusage, status: int, commit: str) -> None:
        with self._lock:
            self._all[key] = Cost(
                seconds=round(past.seconds + seconds, 1),
                cpu_seconds=round(past.cpu_seconds + used.ru_utime + used.ru_stime, 1),
                memory=max(past.memory, round(used.ru_maxrss / 1024)),
                status=status,
                commit=" ".join(sorted({*past.commit.split(), *commit.split()})),
                complete=past.complete,
            )
            self._write()

    def _write(self) -> None:
        text = json.dumps({key: asdict(cost) for key, cost in self._all.items()}, indent=2) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))


def span(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def commit() -> str:
    """Of the checkout that the package lies in."""
    place = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run(
            [*place, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
