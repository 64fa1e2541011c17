"""Sweeps whose runs, disk or own process fail. The runs are a script that does in a moment what its plan says."""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from probsym_fast.tasks import configuration, sweep
from probsym_fast.tasks.comparison import Comparison, ComparisonConfig
from probsym_fast.tasks.costs import Cost, Costs, span
from probsym_fast.training import run as training
from probsym_fast.training.ownership import LOCK
from tests.helpers.tiny import Tiny, TinyConfig

SCRIPT = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

folder = Path(next(x for x in sys.argv if x.startswith("--folder=")).removeprefix("--folder="))
plan = json.loads(Path({plan!r}).read_text())
steps = plan.get("/".join(folder.parts[-2:]), {{}})
with open({log!r}, "a") as file:
    print("/".join(folder.parts[-2:]), "--resume" in sys.argv, file=file)
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(plan["config"].replace("SEED", folder.name.removeprefix("seed")))
if "signal" in steps:
    os.kill(os.getppid() if steps["to"] == "sweep" else os.getpid(), steps["signal"])
    time.sleep(steps.get("seconds", 0))
if status := steps.get("status", 0):
    sys.exit(status)
(folder / "results.json").write_text(json.dumps({{"test_mse": steps.get("mse", 0.5)}}))
"""
SMALL = {"training": {"epochs": 1, "batch": 8, "accelerator": "cpu", "progress": False}}


def load(name, flags):
    given = [flag for flag in flags if flag.startswith(("--seed", "--folder"))]
    return Tiny(configuration.parse(TinyConfig, SMALL, given))


class Faked:
    """Sweeps of scripted runs."""

    def __init__(self, path: Path, monkeypatch):
        self.path, self.folder, self.log = path, path / "runs", path / "log.txt"
        script = path / "script.py"
        script.write_text(SCRIPT.format(python=sys.executable, plan=str(path / "plan.json"), log=str(self.log)))
        script.chmod(0o755)
        monkeypatch.setattr(sweep.sys, "executable", str(script))

    def run(self, names=("A", "B"), seeds=(1,), first=None, jobs=1, runs=None, **plan) -> str:
        """Sweeps, with what some run does: A_1={...}; returns table.md."""
        steps = {f"{key.rpartition('_')[0]}/seed{key.rpartition('_')[2]}": value for key, value in plan.items()}
        steps |= {f"{self.folder.name}/first": plan["first_run"]} if "first_run" in plan else {}
        config = TinyConfig(folder=".", seed=12345, training=load("", []).config.training)
        text = configuration.dump(config).replace("12345", "SEED")
        (self.path / "plan.json").write_text(json.dumps(steps | {"config": text}))
        made = ComparisonConfig(
            first=first,
            runs=runs or {name: {"config": "tiny"} for name in names},
            seeds=list(seeds),
            measure="test_mse",
            folder=str(self.folder),
        )
        self.sweep = sweep.Sweep(Comparison(made, load), jobs=jobs)
        self.sweep.run()
        return (self.folder / "table.md").read_text()

    def begun(self) -> list[str]:
        """The runs that were begun, in their order, with whether they were continued."""
        return self.log.read_text().splitlines() if self.log.is_file() else []


@pytest.fixture
def faked(tmp_path, monkeypatch):
    return Faked(tmp_path, monkeypatch)


def test_several_at_once_and_seeds_that_are_added(faked):
    faked.run("ABC", (1, 2), jobs=3, A_1={"mse": 0.25})
    assert len(faked.begun()) == 6
    table = faked.run("ABC", (1, 2, 3), jobs=3)
    assert sorted(faked.begun()[6:]) == ["A/seed3 False", "B/seed3 False", "C/seed3 False"]
    assert table.splitlines()[2].startswith("| A | 0.42 ± 0.14 | 3 of 3 | ")  # 0.25, 0.5, 0.5
    (faked.folder / "table.md").unlink()
    assert faked.run("ABC", (1, 2)).splitlines()[2].startswith("| A | 0.38 ± 0.18 | 2 of 2 | ")
    assert len(faked.begun()) == 9, "nothing is left to run, and the table is there all the same"


def test_what_starts_from_a_first_that_failed_is_left_out(faked, capsys):
    first, runs = {"config": "tiny"}, {"A": {"config": "tiny", "name": "@first"}, "B": {"config": "tiny"}}
    message = r"^sweep: 1 of the runs failed: first; 2 that start from the first were not begun; see .*logs$"
    with pytest.raises(RuntimeError, match=message):
        faked.run(first=first, runs=runs, seeds=(1, 2), first_run={"status": 3})
    assert "first: ended with status 3; 0 to go" in capsys.readouterr().err
    assert [line.split()[0] for line in faked.begun()[1:]] == ["B/seed1", "B/seed2"]


def test_a_run_that_is_killed(faked, capsys):
    with pytest.raises(RuntimeError, match="1 of the runs failed: A, seed 1; see"):
        faked.run(A_1={"signal": signal.SIGKILL, "to": "run"})
    assert "A, seed 1: ended by signal 9 (out of memory?); 1 to go" in capsys.readouterr().err
    assert json.loads((faked.folder / "costs.json").read_text())["A/seed1"]["status"] == -9


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_sweep(faked, number):
    before = signal.signal(number, handler := lambda *_: None)  # the tests may run where it is ignored
    try:
        with pytest.raises(training.Stopped) as stopped:
            faked.run(A_1={"signal": number, "to": "sweep", "seconds": 30})
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert stopped.value.status == 128 + number and faked.begun() == ["A/seed1 False"]
    faked.run()
    assert faked.begun()[1:] == ["A/seed1 True", "B/seed1 False"]


def test_a_signal_that_is_ignored_stays_so(faked):
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        faked.run(A_1={"signal": signal.SIGHUP, "to": "sweep"})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(faked.begun()) == 2


def test_an_error_of_the_sweep_ends_it_at_once_and_keeps_the_costs(faked, monkeypatch):
    """Not after all other runs."""
    write = Comparison.write_samples

    def full(self, folder):
        if (folder / "A/seed1/results.json").is_file():
            raise OSError(28, "No space left on device", str(folder / "samples.md"))
        return write(self, folder)

    monkeypatch.setattr(Comparison, "write_samples", full)
    with pytest.raises(OSError, match="No space left"):
        faked.run("ABCDEFG")
    assert len(faked.begun()) <= 2, "the next may have begun before the error"
    assert json.loads((faked.folder / "costs.json").read_text())["A/seed1"]["complete"]
    monkeypatch.undo()


def test_a_run_in_another_process_is_waited_for(faked, capsys):
    """One that a killed sweep has left, or one by `probsym fit`."""
    where = faked.folder / "A/seed1"
    where.mkdir(parents=True)
    lock = FileLock(where / LOCK, thread_local=False)  # released by the timer
    lock.acquire()

    def ends() -> None:
        (where / "config.yaml").write_text(training.configuration.dump(load("", ["--seed=1", "--folder=."]).config))
        (where / "results.json").write_text('{"test_mse": 0.125}')
        lock.release()

    timer = threading.Timer(0.7, ends)
    timer.start()
    table = faked.run()
    timer.join()
    assert "A, seed 1: waits for another process, which trains it" in capsys.readouterr().err
    assert faked.begun() == ["B/seed1 False"] and "| A | 0.1250 | 1 of 1 |  |" in table


def test_times_that_miss_a_part_say_so(faked):
    """Of a run whose sweep was killed, and of one that was begun by `probsym fit`."""
    for name in "AB":
        (faked.folder / name / "seed1").mkdir(parents=True)
        config = load("", ["--seed=1", "--folder=."]).config
        (faked.folder / name / "seed1" / "config.yaml").write_text(configuration.dump(config))
    costs = Costs(faked.folder)
    past = costs.begin("A/seed1", False)
    assert past == Cost() and not Costs(faked.folder).get("A/seed1").complete
    rows = faked.run("ABC").splitlines()
    assert all(row.split("|")[4].startswith(" ≥ ") for row in rows[2:4]), rows
    assert "≥" not in rows[4]


def test_a_run_has_the_commits_of_all_its_processes(faked, monkeypatch):
    found = iter(["b", "a+", "a+", "a+"])
    monkeypatch.setattr(sweep, "commit", lambda: next(found))
    with suppress(RuntimeError):
        faked.run(A_1={"status": 1})
    rows = faked.run().splitlines()
    assert rows[2].endswith("| a+ b |") and rows[3].endswith("| a+ |")


def test_damaged_costs_are_named(faked):
    faked.run()
    for text in ("{", '{"A/seed1": {"hours": 3}}', "[]"):
        (faked.folder / "costs.json").write_text(text)
        with pytest.raises(ValueError, match=r"^sweep: .*costs.json must hold the runs' costs; delete it to go on"):
            faked.run()
    assert len(faked.begun()) == 2


def test_a_second_sweep_in_the_folder_is_refused(faked):
    faked.folder.mkdir()
    with FileLock(faked.folder / LOCK), pytest.raises(FileExistsError, match="must be used by one process at a time"):
        faked.run()
    assert not faked.begun()


def test_outside_a_checkout_there_is_no_commit(monkeypatch):
    from probsym_fast.tasks import costs

    monkeypatch.setattr(costs, "__file__", os.devnull)
    assert costs.commit() == ""


def test_spans():
    assert [span(x) for x in (9.6, 75, 3600, 9000)] == ["10 s", "1 min 15 s", "1 h 00 min", "2 h 30 min"]
