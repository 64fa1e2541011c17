"""Runs over two and four processes against one: data, parameters and samples in parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from probsym_fast.training import run as training
from probsym_fast.training.logs import history
from probsym_fast.training.parallel import Layout, layout
from probsym_fast.training.settings import Training
from tests.helpers.spread import RUNS, UNEVEN, task
from tests.helpers.tiny import COUNTS


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_a_run_over_several_processes_is_the_run_of_one(tmp_path, monkeypatch, processes):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.helpers.spread", str(tmp_path / "several"), str(processes)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(COUNTS, "valid", UNEVEN)
    near = {"rtol": 1e-4, "atol": 1e-6}
    for name in RUNS:
        expected = training.fit(task(tmp_path / "one" / name, name, 1))
        one, several = tmp_path / "one" / name, tmp_path / "several" / name
        for which in ("last", "best"):
            a, b = checkpoint(several, which), checkpoint(one, which)
            torch.testing.assert_close(a["state_dict"], b["state_dict"], **near)
            assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
            moments = [state["optimizer_states"][0]["state"] for state in (a, b)]
            torch.testing.assert_close(moments[0], moments[1], **near)
        found, wanted = history(several), history(one)
        assert found.keys() == wanted.keys()
        for quantity, values in wanted.items():
            assert found[quantity] == pytest.approx(values, rel=1e-4), (name, quantity)
        assert (several / "results.json").is_file()
        best = training.test(task(several, name, 1))  # a checkpoint is as of one process
        assert best["test_mse"] == pytest.approx(expected["test_mse"], rel=1e-4)
    states = [checkpoint(tmp_path / "several" / name)["state_dict"] for name in ("resumed", "fsdp")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({"strategy": "ddp"}, 4, [Layout(4, 1, 0), Layout(4, 1, 1), Layout(4, 1, 2), Layout(4, 1, 3)]),
        ({"strategy": "samples"}, 2, [Layout(1, 2, 0), Layout(1, 2, 0)]),
        (
            {"strategy": "samples", "sample_devices": 2},
            4,
            [Layout(2, 2, 0), Layout(2, 2, 0), Layout(2, 2, 1), Layout(2, 2, 1)],
        ),
    ],
)
def test_layouts(settings, processes, expected):
    assert [layout(Training(**settings), rank, processes) for rank in range(processes)] == expected


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"batch": 10}, 4, "training.batch must be a multiple of the 4 devices, got 10"),
        ({"strategy": "samples", "sample_devices": 3}, 4, "training.sample_devices must divide the 4 processes, got 3"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(settings, processes, message):
    with pytest.raises(ValueError, match=f"^config: {message}$"):
        layout(Training(**settings), 0, processes)


def test_sample_devices_are_refused_where_nothing_shares_samples():
    with pytest.raises(ValueError, match=r"training.sample_devices must be null when training.strategy is fsdp, got 2"):
        Training(strategy="fsdp", sample_devices=2)
