"""Training in processes of its own: stopped by signals, and on two devices."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from probsym_fast.training.logs import history
from tests.training.test_training import fit, overrides, small_data, weights  # noqa: F401

# `probsym` on few clouds, which notes what is written, and sends itself a signal in the second step of an epoch
SCRIPT = """
import os, sys
from probsym_fast import cli
from probsym_fast.data import NBody
from probsym_fast.tasks import nbody, nbody_report
from probsym_fast.training import run as training

def dataset(self, split):
    return NBody(split, self.config.data, self.config.count if split == "train" else 40)

step, write = training.TrainingModule.training_step, training._write
number, epoch, note = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
arguments = list(sys.argv[1:])
sys.argv[1:] = [str(number), str(epoch), note, *arguments]  # a process for another device starts with the same

def stop(self, batch, index):
    if number and self.current_epoch == epoch and index == 1:
        os.kill(os.getpid(), number)
    return step(self, batch, index)

def noted(path, text):
    with open(note, "a") as file:
        file.write(path.name + "\\n")
    write(path, text)

training.TrainingModule.training_step, training._write = stop, noted
nbody.NBodyTask.dataset, nbody_report.SAMPLE_COUNTS = dataset, (1, 2)
sys.exit(cli.main(arguments))
"""


def probsym(folder: Path, *flags: str, number: int = 0, epoch: int = 0, **more: object) -> subprocess.CompletedProcess:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    stop = [str(number), str(epoch), str(folder.parent / "written.txt")]
    arguments = ["fit", "-c", "nbody/gnn_O3_ps", *flags, *overrides(folder, **more)]
    return subprocess.run(
        [sys.executable, str(script), *stop, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "epoch", "status"), [(signal.SIGTERM, 2, 143), (signal.SIGINT, 0, 130)])
def test_a_run_stopped_by_a_signal_continues_to_the_same_numbers(tmp_path, capsys, number, epoch, status):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = probsym(broken, number=number, epoch=epoch, training__epochs=4)
    assert done.returncode == status, done.stderr
    assert done.stderr.strip().endswith(f"probsym: stopped; continue with --resume (run folder {broken})")
    assert not (broken / "results.json").exists()
    if epoch:
        assert len(history(broken)["valid/mse"]) == epoch
        assert (broken / "plots" / "losses.png").read_bytes().endswith(b"IEND\xaeB`\x82")
        assert weights(broken).keys() == weights(broken, "best").keys()
    assert fit(broken, training__epochs=4, resume=True) == fit(whole, training__epochs=4)
    assert ("starting from the beginning" in capsys.readouterr().err) == (epoch == 0)
    expected, found = weights(whole), weights(broken)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert history(broken) == history(whole)


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    results = []
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run"):
        folder.parent.mkdir()
        done = probsym(folder, training__epochs=2, training__devices=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("run folder") == done.stdout.count("figures:") == 1
        assert sorted((folder.parent / "written.txt").read_text().split()) == ["config.yaml", "results.json"]
        assert len(list((folder / "logs").iterdir())) == 1
        results.append(json.loads((folder / "results.json").read_text()))
    assert results[0] == results[1]
