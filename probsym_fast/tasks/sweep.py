"""Runs a comparison unattended: a process for every run, at low priority, and a table that grows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from probsym_fast._files import write_atomically
from probsym_fast.tasks.by_samples import mean_and_deviation
from probsym_fast.tasks.comparison import FIRST, Comparison, PlannedRun, results_of
from probsym_fast.tasks.costs import Costs, commit, span
from probsym_fast.training.callbacks import Stopped
from probsym_fast.training.ownership import owned, owner_of
from probsym_fast.training.run import compute, record, run_folder

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
POLL = 1.0  # seconds between looks at a run that another process trains


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


class Sweep:
    """Trains the runs of a `Comparison` that are not finished, `jobs` at a time, each by `probsym fit` in its own process.

    Stopped runs continue from their last checkpoint. A run that fails is reported and the others go on, but for those that
    start from a `first` that failed. A run that another process trains, perhaps one that a killed sweep has left, is waited
    for. The comparison's folder gets `config.yaml`, `costs.json`, `logs/`, `table.md` and `samples.md` (`Comparison`), the
    tables after every run, and at the end what the comparison writes.

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
        self.costs: Costs  # read by `run`, which owns the folder
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen] = set()
        self._stopped: int | None = None

    def run(self) -> dict[str, Any]:
        """Runs what is not finished and returns the comparison's results.

        Raises ValueError if a finished or stopped run has another configuration, FileExistsError if another process owns the
        folder, RuntimeError after the others if a run failed, and Stopped after SIGINT, SIGTERM or SIGHUP, which the runs get
        too.
        """
        with owned(self.folder):
            self.comparison.check_there(self.folder)
            self.costs = Costs(self.folder)
            record(self.folder, self.comparison.config)
            before = {number: signal.getsignal(number) for number in STOPS}
            before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}  # as nohup sets it
            for number in before:
                signal.signal(number, self._stop)
            try:
                failed, left_out = self._all()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self._stopped:
            raise Stopped(self._stopped, self.folder)
        if failed:
            also = f"; {left_out} that start from the first were not begun" if left_out else ""
            raise RuntimeError(
                f"sweep: {len(failed)} of the runs failed: {', '.join(failed)}{also}; see {self.folder / 'logs'}"
            )
        return compute(self.comparison)

    def _all(self) -> tuple[list[str], int]:
        """Labels of the runs that failed, and how many were not begun for want of the first."""
        runs = list(self.comparison.runs(self.folder))
        waiting = [run for run in runs if not _finished(run[3])]
        print(
            f"sweep: {len(runs)} runs, {len(runs) - len(waiting)} finished, in {self.folder}",
            file=sys.stderr,
            flush=True,
        )
        self._write()
        first = [run for run in waiting if run[0] == "first"]
        waiting = [run for run in waiting if run[0] != "first"]
        failed = self._some(first)
        begun = [run for run in waiting if not failed or FIRST not in run[1].values()]
        return failed + self._some(begun), len(waiting) - len(begun)

    def _some(self, runs: list[PlannedRun]) -> list[str]:
        """Labels of the runs that failed."""
        failed, start = [], time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            pending = {pool.submit(self._one, *run): run[0] for run in runs}
            try:
                while pending:
                    done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)  # wakes up for signals
                    for future in done:
                        label, status = pending.pop(future), future.result()
                        if status is None:  # not begun after a signal
                            continue
                        failed += [label] if status else []
                        self._write()
                        left = (time.monotonic() - start) / (len(runs) - len(pending)) * len(pending)
                        text = f"{label}: {_outcome(status)}; {len(pending)} to go, about {span(left)}"
                        print(text, file=sys.stderr, flush=True)
            except BaseException:
                if not self._stopped:  # a second signal would end the runs within their step
                    self._stop(signal.SIGTERM, None)  # nothing else starts, and the pool waits for what runs
                raise
        return failed

    def _one(self, label: str, keys: dict[str, Any], seed: int, where: Path) -> int | None:
        """The status of the run's process; None: it was not begun after a signal."""
        if not self._free(label, where):
            return None
        if _finished(where):  # by another process
            return 0
        name, flags = self.comparison.arguments(keys, seed, where)
        begun, key, now = (where / "config.yaml").is_file(), self._key(where), commit()
        command = [sys.executable, "-m", "probsym_fast.cli", "fit", "-c", name]
        command += [part for module in self.modules for part in ("--import", module)]
        command += [*(["--resume"] if begun else []), *flags]
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        path = self.folder / "logs" / f"{key.replace('/', '-')}.log"
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
                _terminate(process)
            past = self.costs.begin(key, begun)
            lower_priority(process.pid, self.niceness)
            print(f"{label}: {'continued' if begun else 'started'}, log in {path}", file=sys.stderr, flush=True)
            _, code, used = os.wait4(process.pid, 0)  # with what it used
            with self._lock:
                process.returncode = os.waitstatus_to_exitcode(code)
                self._live.discard(process)
        self.costs.end(key, past, time.monotonic() - start, used, process.returncode, now)
        return process.returncode

    def _free(self, label: str, where: Path) -> bool:
        """Waits until no other process trains the run; False after a signal."""
        reported = False
        while not self._stopped:
            if (owner := owner_of(where)) is None:
                return True
            if not reported:
                print(f"{label}: waits for {owner}, which trains it", file=sys.stderr, flush=True)
                reported = True
            time.sleep(POLL)
        return False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Runs end after their current step and go on from their last checkpoint; a second signal ends them at once."""
        self._stopped = number
        for process in list(self._live):
            _terminate(process)

    def _key(self, where: Path) -> str:
        return where.relative_to(self.folder).as_posix()

    def _write(self) -> None:
        write_atomically(self.folder / "table.md", lambda file: file.write(self.table().encode()))
        self.comparison.write_samples(self.folder)

    def table(self) -> str:
        """A row of Markdown per configuration, over its finished runs: mean times of a run, the largest memory.

        Times that miss a part have a "≥" (`Cost.complete`).
        """
        config = self.comparison.config
        rows = [
            f"| configuration | {config.measure.replace('_', ' ')} | runs | wall time | CPU time | memory, MB | commit |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in config.runs:
            places = [where for _, _, _, where in self.comparison.runs(self.folder) if where.parent.name == name]
            done = [where for where in places if _finished(where)]
            figure = mean_and_deviation([self.comparison.figure(results_of(where)) for where in done])
            costs = [cost for where in done if (cost := self.costs.get(self._key(where)))]
            cells = [name, figure, f"{len(done)} of {len(places)}"]
            if costs:
                mean = [sum(getattr(c, key) for c in costs) / len(costs) for key in ("seconds", "cpu_seconds")]
                commits = sorted({one for c in costs for one in c.commit.split()})
                least = "" if all(c.complete for c in costs) else "≥ "
                cells += [*(least + span(x) for x in mean), str(max(c.memory for c in costs)), " ".join(commits)]
            else:
                cells += [""] * 4
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows) + "\n"


def _finished(where: Path) -> bool:
    return (where / "results.json").is_file()


def _terminate(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # without `poll`, which would take the status that `wait4` waits for
        os.kill(process.pid, signal.SIGTERM)


def _outcome(status: int) -> str:
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
    return f"ended with status {status}" if status else "finished"
