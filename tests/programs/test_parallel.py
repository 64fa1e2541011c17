"""DistributedDataParallel with a static graph, and FSDP2: two processes have the averaged gradients of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path):
    """Of every row with weights. Starting processes takes most of the time, so all rows share them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.parallel_models", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        outcomes = json.loads((tmp_path / f"outcomes{rank}.json").read_text())
        assert outcomes and not {name: outcome for name, outcome in outcomes.items() if outcome != "equal"}
