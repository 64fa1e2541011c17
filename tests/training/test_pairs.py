"""Two processes, of which one or both are killed or run out of memory, and what the other one then does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.test_faults import assert_same_run, checkpoint

LOST = "Fault: fit: another training process died (its own output may say why): "


@pytest.fixture(scope="module")
def sessions(tmp_path_factory) -> tuple[Path, dict]:
    """The runs' folder, and how every session ended."""
    folder = tmp_path_factory.mktemp("pairs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.broken_pairs", str(folder), "1"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "outcomes.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "killed"), [("ddp", 5), ("samples", 1), ("fsdp", 1)])
def test_a_run_of_two_processes_that_are_killed_is_the_run_that_was_not(sessions, name, killed):
    folder, outcomes = sessions[0], sessions[1][name]
    for whole in ("whole", "last"):
        assert [status for status, _ in outcomes[whole]] == [0, 0], outcomes[whole]
    deaths = [outcomes[f"kill {k}"] for k in range(killed)]
    for death in deaths:
        statuses = [status for status, _ in death]
        assert signal.SIGKILL in statuses
        for status, told in death:
            if status != signal.SIGKILL:  # it ended by itself, within the time that is left to it
                assert os.waitstatus_to_exitcode(status) == 1
                assert LOST in told and ("continue with --resume" in told or "there is no checkpoint" in told), told
    if name == "ddp":
        both = [[status for status, _ in death].count(signal.SIGKILL) == 2 for death in deaths]
        assert any(both) and not all(both)
    assert_same_run(folder / name, folder / f"{name}_whole")


@pytest.mark.slow
def test_memory_that_ends_in_the_backward_pass_of_one_process_is_told_in_both(sessions):
    folder, outcomes = sessions[0], sessions[1]["errors"]
    (first, lost), (second, told) = outcomes["backward"]
    assert first == second == 256
    assert LOST in lost
    wanted = "samples.chunk must be a number when a backward pass cannot be repeated (2 processes)"
    assert f"Fault: fit: {wanted}, got 'auto', which ran out of memory at 2 in step 1, epoch 1; there is no" in told
    assert [status for status, _ in outcomes["backward resumed"]] == [0, 0]
    near(folder / "backward", folder / "ddp_all")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "samples"])
def test_processes_with_other_chunks_train_the_same_run(sessions, name):
    """Process 1 has smaller ones and still lacks memory once in the forward pass, where nobody waits for it."""
    folder, outcomes = sessions[0], sessions[1]["errors"]
    assert [status for status, _ in outcomes[f"{name} uneven"]] == [0, 0], outcomes[f"{name} uneven"]
    assert "out of memory with 2 samples at once; 1 from now on" in outcomes[f"{name} uneven"][1][1]
    near(folder / f"{name}_uneven", folder / f"{name}_all")


@pytest.mark.slow
def test_chunks_that_are_found_are_refused_where_every_chunk_gathers_parameters(sessions):
    folder, outcomes = sessions[0], sessions[1]["errors"]
    for status, told in outcomes["refused"]:
        assert status == 256
        wanted = "a number or null when training.strategy is fsdp, got 'auto'"
        assert f"ValueError: config: samples.chunk must be {wanted}" in told
    assert not (folder / "refused").exists()


def near(found: Path, expected: Path) -> None:
    a, b = (checkpoint(folder)["state_dict"] for folder in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
