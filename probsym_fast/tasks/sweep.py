"""Runs a comparison unattended: a process for every run, at low priority, and a table that grows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from probsym_fast._files import write_atomically
from probsym_fast.tasks.by_samples import mean_and_deviation
from probsym_fast.tasks.comparison import Comparison, results_of
from probsym_fast.training.callbacks import Stopped
from probsym_fast.training.ownership import owned
from probsym_fast.training.run import compute, run_folder

STOPS = signal.SIGINT, signal.SIGTERM


def lower_priority(pid: int, niceness: int) -> None:
    """Adds niceness, that of this process included, to the first process of a session.

    Where Linux shares processors between sessions first (autogroup in sched(7)), the niceness of a process counts only within
    its session. So the session gets it, too. Nothing is raised: the process may have ended, or priorities are not ours to
    change.
    """
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, wanted)
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(wanted))


@dataclass(frozen=True)
class Cost:
    """What a run took, over all its processes since it was begun.

    seconds: of wall time. cpu_seconds: of all cores. memory: the largest resident set, MB. status: of the last process, 0
    where the run is finished. commit: of the code, "+" for changes not in it; "" outside a git checkout.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int = 0
    status: int = 0
    commit: str = ""


class Sweep:
    """Trains the runs of a `Comparison` that are not finished, `jobs` at a time, each by `probsym fit` in its own process.

    Stopped runs continue from their last checkpoint. A run that fails is reported and the others go on. The comparison's
    folder gets `table.md`, `costs.json`, `logs/` and `samples.md` (`Comparison`), written after every run, and at the end
    what the comparison writes.

    niceness: added to that of this process. threads: of torch and OpenMP in each process; None: theirs. modules: imported by
    the runs first, as `probsym fit --import` does.
    """

    def __init__(
        self,
        comparison: Comparison,
        *,
        jobs: int = 1,
        niceness: int = 10,
        threads: int | None = None,
        modules: Sequence[str] = (),
    ):
        for name, value, least in (("jobs", jobs, 1), ("niceness", niceness, 0), ("threads", threads, 1)):
            if value is not None and value < least:
                raise ValueError(f"sweep: {name} must be at least {least}, got {value}")
        self.comparison, self.folder = comparison, run_folder(comparison.config)
        self.jobs, self.niceness, self.threads, self.modules = jobs, niceness, threads, modules
        self.costs: dict[str, Cost] = {}
        self._commit, self._lock = _commit(), threading.Lock()
        self._live: set[subprocess.Popen] = set()
        self._stopped: int | None = None

    def run(self) -> dict[str, Any]:
        """Runs what is not finished and returns the comparison's results.

        Raises ValueError if a finished or stopped run has another configuration, FileExistsError if another process owns the
        folder, RuntimeError after the others if a run failed, and Stopped after SIGINT or SIGTERM, which the runs get too.
        """
        with owned(self.folder):
            self.comparison.check_there(self.folder)
            self.costs = self._read_costs()
            before = {number: signal.signal(number, self._stop) for number in STOPS}
            try:
                failed = self._all()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self._stopped:
            raise Stopped(self._stopped, self.folder)
        if failed:
            raise RuntimeError(
                f"sweep: {len(failed)} of the runs failed: {', '.join(failed)}; see {self.folder / 'logs'}"
            )
        return compute(self.comparison)

    def _all(self) -> list[str]:
        """Labels of the runs that failed."""
        runs = list(self.comparison.runs(self.folder))
        failed: list[str] = []
        done = [label for label, _, _, where in runs if (where / "results.json").is_file()]
        print(f"sweep: {len(runs)} runs, {len(done)} finished, in {self.folder}", file=sys.stderr, flush=True)
        if runs and runs[0][0] == "first":  # the others may start from it
            failed += self._some(runs[:1])
            runs = runs[1:]
        return failed if failed or self._stopped else self._some(runs)

    def _some(self, runs: list[tuple[str, dict[str, Any], int, Path]]) -> list[str]:
        waiting = [run for run in runs if not (run[3] / "results.json").is_file()]
        failed, total = [], len(waiting)
        start = time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            pending = {pool.submit(self._one, *run): run[0] for run in waiting}
            while pending:
                finished, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)  # wakes up for signals
                for future in finished:
                    label, status = pending.pop(future), future.result()
                    if status is None:  # not begun after a signal
                        continue
                    failed += [label] if status else []
                    self._write()
                    left = (time.monotonic() - start) / (total - len(pending)) * len(pending)
                    text = "finished" if status == 0 else f"ended with status {status}"
                    print(f"{label}: {text}; {len(pending)} to go, about {_span(left)}", file=sys.stderr, flush=True)
        return failed

    def _one(self, label: str, keys: dict[str, Any], seed: int, where: Path) -> int | None:
        name, flags = self.comparison.arguments(keys, seed, where)
        begun = (where / "config.yaml").is_file()
        command = [sys.executable, "-m", "probsym_fast.cli", "fit", "-c", name]
        command += [part for module in self.modules for part in ("--import", module)]
        command += [*(["--resume"] if begun else []), *flags]
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        path = self.folder / "logs" / f"{self._key(where).replace('/', '-')}.log"
        path.parent.mkdir(exist_ok=True)
        start = time.monotonic()
        with open(path, "ab") as log:
            with self._lock:
                if self._stopped:
                    return None
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | threads,
                    start_new_session=True,  # a terminal's Ctrl-C reaches it through `_stop` only
                )
                self._live.add(process)
            if self._stopped:  # the signal came in between
                process.terminate()
            lower_priority(process.pid, self.niceness)
            print(f"{label}: {'continued' if begun else 'started'}, log in {path}", file=sys.stderr, flush=True)
            _, code, used = os.wait4(process.pid, 0)  # with what it used
            with self._lock:
                process.returncode = os.waitstatus_to_exitcode(code)
                self._live.discard(process)
        status = process.returncode
        past = self.costs.get(self._key(where), Cost()) if begun else Cost()
        self.costs[self._key(where)] = Cost(
            seconds=round(past.seconds + time.monotonic() - start, 1),
            cpu_seconds=round(past.cpu_seconds + used.ru_utime + used.ru_stime, 1),
            memory=max(past.memory, round(used.ru_maxrss / 1024)),
            status=status,
            commit=self._commit,
        )
        return status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Runs end after their current step, with a checkpoint; a second signal ends them at once."""
        self._stopped = number
        for process in list(self._live):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    def _key(self, where: Path) -> str:
        return where.relative_to(self.folder).as_posix()

    def _read_costs(self) -> dict[str, Cost]:
        path = self.folder / "costs.json"
        return {key: Cost(**x) for key, x in json.loads(path.read_text()).items()} if path.is_file() else {}

    def _write(self) -> None:
        text = json.dumps({key: asdict(cost) for key, cost in self.costs.items()}, indent=2) + "\n"
        write_atomically(self.folder / "costs.json", lambda file: file.write(text.encode()))
        write_atomically(self.folder / "table.md", lambda file: file.write(self.table().encode()))
        self.comparison.write_samples(self.folder)

    def table(self) -> str:
        """A row of Markdown per configuration, over its finished runs; times and memory are means per run."""
        config = self.comparison.config
        rows = [
            f"| configuration | {config.measure.replace('_', ' ')} | runs | wall time | CPU time | memory, MB | commit |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in config.runs:
            places = [where for _, _, _, where in self.comparison.runs(self.folder) if where.parent.name == name]
            done = [where for where in places if (where / "results.json").is_file()]
            figure = mean_and_deviation([self.comparison.figure(results_of(where)) for where in done])
            costs = [cost for where in done if (cost := self.costs.get(self._key(where)))]
            cells = [name, figure, f"{len(done)} of {len(places)}"]
            if costs:
                mean = [sum(getattr(c, key) for c in costs) / len(costs) for key in ("seconds", "cpu_seconds")]
                commits = sorted({c.commit for c in costs})
                cells += [*map(_span, mean), str(max(c.memory for c in costs)), " ".join(commits)]
            else:
                cells += [""] * 4
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows) + "\n"


def _span(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _commit() -> str:
    """Of the checkout that the package lies in."""
    place = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run(
            [*place, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
