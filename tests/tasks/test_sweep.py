"""Sweeps: stopped, failed and finished runs, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from probsym_fast import cli, tasks
from probsym_fast.tasks.sweep import lower_priority

# the tiny task; its first process sends the sweep a signal in its second step, and it fails where `name` says so
MODULE = """
import os, signal, time
from pathlib import Path
from probsym_fast import tasks
from probsym_fast.training import run
from tests.helpers.tiny import Tiny, TinyConfig

step, mark = run.TrainingModule.training_step, Path(__file__).with_name("signalled")

def noted(self, batch, index):
    if index == 1 and self.current_epoch == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)
    return step(self, batch, index)

run.TrainingModule.training_step = noted

class SweptTiny(Tiny):
    def model(self, fresh=True):
        if self.config.name == "broken":
            raise ValueError("config: name must be whole, got 'broken'")
        return super().model(fresh)

tasks.register("swept_tiny", TinyConfig)(SweptTiny)
"""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Runs `probsym sweep` with these names of the second run."""
    (tmp_path / "swept_module.py").write_text(MODULE)
    (tmp_path / "swept_tiny.yaml").write_text(
        "task: swept_tiny\ntraining: {epochs: 2, batch: 8, accelerator: cpu, progress: false}\n"
    )
    monkeypatch.setattr(tasks.TASKS, "_added", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    monkeypatch.delitem(sys.modules, "swept_module", raising=False)

    def run(name):
        one = {"config": str(tmp_path / "swept_tiny.yaml")}
        runs = {"first_row": one, "second_row": one | {"name": name}}
        config = {
            "task": "comparison",
            "runs": runs,
            "seeds": [1],
            "measure": "test_mse",
            "folder": str(tmp_path / "runs"),
        }
        (tmp_path / "swept.yaml").write_text(json.dumps(config))
        return cli.main(
            ["sweep", "-c", str(tmp_path / "swept.yaml"), "--import", "swept_module", "--threads", "1", "--nice", "1"]
        )

    return run


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").is_file(), reason="processors are not shared between sessions first"
)
def test_runs_give_way_to_other_sessions():
    """By their session, too: the niceness of a process counts only within it."""
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        lower_priority(process.pid, 7)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == wanted
        nice = Path(f"/proc/{process.pid}/autogroup").read_text().split()[-1]
        process.kill()
    assert int(nice) == wanted


SPENT = 1e6  # seconds


def spend(folder: Path, run: str) -> None:
    """Makes a run's recorded time larger."""
    costs = json.loads((folder / "costs.json").read_text())
    costs[run]["cpu_seconds"] += SPENT
    (folder / "costs.json").write_text(json.dumps(costs))


def test_a_sweep_goes_on_after_a_signal_and_after_a_failure(swept, tmp_path, capsys):
    folder = tmp_path / "runs"
    assert swept("broken") == 143
    assert "the same command continues" in capsys.readouterr().err
    assert (folder / "first_row/seed1/checkpoints/last.ckpt").is_file()
    assert not (folder / "second_row").exists() and not (folder / "first_row/seed1/results.json").exists()
    spend(folder, "first_row/seed1")  # goes on

    assert swept("broken") == 1
    captured = capsys.readouterr().err
    assert (
        "1 of the runs failed: second_row, seed 1; see" in captured
        and "second_row, seed 1: ended with status 1" in captured
    )
    assert "name must be whole" in (folder / "logs/second_row-seed1.log").read_text()
    table = (folder / "table.md").read_text().splitlines()
    assert table[2].startswith("| first_row | 0.") and "| 1 of 1 |" in table[2]
    assert table[3].startswith("| second_row |  | 0 of 1 |")
    assert not (folder / "results.json").exists()
    done = (folder / "first_row/seed1/results.json").stat().st_mtime_ns
    spend(folder, "second_row/seed1")  # has not begun

    assert swept("whole") == 0
    assert (folder / "first_row/seed1/results.json").stat().st_mtime_ns == done
    values = json.loads((folder / "results.json").read_text())["values"]
    assert values["first_row"] == values["second_row"], "the run that was stopped ends as the one that was not"
    costs = json.loads((folder / "costs.json").read_text())
    assert {key: cost["status"] for key, cost in costs.items()} == {"first_row/seed1": 0, "second_row/seed1": 0}
    assert all(cost["cpu_seconds"] > 0 and cost["memory"] > 50 for cost in costs.values())
    assert {key: cost["cpu_seconds"] > SPENT for key, cost in costs.items()} == {
        "first_row/seed1": True,
        "second_row/seed1": False,
    }
    assert "1 of 1" in (folder / "table.md").read_text().splitlines()[3]


def test_refused(tmp_path, capsys):
    for flags, text in (
        (["-c", "digits/vit_tiny"], "sweep: config must be a comparison (task: comparison), got task 'digits'"),
        (["-c", "pattern/small_methods", "--jobs", "0"], "sweep: jobs must be at least 1, got 0"),
        (["-c", "pattern/small_methods", "--threads", "0"], "sweep: threads must be at least 1, got 0"),
        (["-c", "pattern/small_methods", "--nice", "-1"], "sweep: niceness must be at least 0, got -1"),
    ):
        assert cli.main(["sweep", *flags, f"--folder={tmp_path / 'runs'}"]) == 1
        assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
