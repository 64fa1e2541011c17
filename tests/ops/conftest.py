"""Runs tests/ops/triton/interpreted in processes of their own, since triton reads TRITON_INTERPRET when it is imported."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.cuda_on_host import once

ROOT = Path(__file__).parents[2]
INTERPRETED = "tests/ops/triton/interpreted"
HALVES = "embed or readout", "not (embed or readout)"  # of about the same length; -k reads the names of files, too
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else [ROOT / INTERPRETED]


def run_interpreted(half: str, folder: Path) -> Path:
    """A file with the exit status and what was printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", INTERPRETED, "-k", half]
    settings = {"cwd": ROOT, "env": os.environ | {"TRITON_INTERPRET": "1"}, "capture_output": True, "text": True}
    ran = subprocess.run(command, check=False, **settings)
    path = folder / "outcome.json"
    path.write_text(json.dumps([ran.returncode, ran.stdout[-4000:] + ran.stderr[-2000:]]))
    return path


@pytest.fixture(scope="session")
def interpreted(request, tmp_path_factory):
    """half -> a future of its outcome, of the halves whose tests are selected: begun by the first test that uses this, so
    that they run beside the compilations, and once for all processes of pytest-xdist."""
    wanted = {x.callspec.params["half"] for x in request.session.items if "half" in getattr(x, "fixturenames", ())}
    tmp_path_factory.getbasetemp()  # made here, not in two threads

    def outcome(half: str) -> list:
        name = f"interpreted {HALVES.index(half)}"
        return json.loads(once(tmp_path_factory, name, lambda folder: run_interpreted(half, folder)).read_text())

    with ThreadPoolExecutor(len(HALVES)) as pool:
        yield {half: pool.submit(outcome, half) for half in wanted}
