"""The benchmarks' own machinery: a killed run keeps its rows, shares are of the right limit, a GPU's time is its own."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.operations import operations_of
from probsym_fast.ops import OPS, linear_batch_norm_relu, vector_edge_convolution
from probsym_fast.ops.triton import _device_time
from tests.helpers.gpu_clock import Clock

ROOT = Path(__file__).parents[1]

CASES = """
import os, signal
from benchmarks import harness
from benchmarks.operations import operations_of
from probsym_fast.ops import linear_batch_norm_relu
from benchmarks.harness import compare

harness.bandwidth = harness.rate = lambda *_: 1e9  # a measurement of seconds, which is not what is tested

def case(name, device, record):
    variants = {"reference": lambda: sum(range(100)), "kernel": lambda: None}
    record(compare(name, variants, device=device, bytes=8, seconds=0.01), variants["kernel"])

def test_first(device, record):
    case("first", device, record)

def test_second(device, record):
    case("second", device, record)

def test_third(device, record):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_keeps_its_rows(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    out = tmp_path / "out" / "results"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.conftest",
        "-p",
        "no:cacheprovider",
        "test_cases.py",
    ]
    command += ["--save-results", "--results", str(out), "--part", "ops", "--rootdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stdout + done.stderr
    page, table = sorted(out.iterdir(), key=lambda path: path.suffix)
    assert page.name.endswith("-threads-ops.json") and table.suffix == ".md"
    rows = json.loads(page.read_text())["rows"]
    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant) for case in ("first", "second") for variant in ("reference", "kernel")
    ]
    assert all(0 < row["low"] <= row["median"] <= row["high"] and row["bytes"] == 8 for row in rows)
    lines = [line for line in table.read_text().splitlines() if line.startswith(("| first", "| second"))]
    assert len(lines) == 4 and all(line.count("|") == 9 for line in lines)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_gpus_time_is_its_own_and_the_hosts_stands_beside_it(clock):
    """Short kernels would wait for the host between them; steps as they follow one another keep these gaps."""
    found, host = _device_time.device_times(clock.run, 10)
    assert found == pytest.approx([2e-3] * 10) and host == pytest.approx(5e-3)
    (wait,) = clock.waits
    assert wait == pytest.approx(_device_time.CYCLES * 1.5 * 10 * 5e-3)
    found, host = _device_time.device_times(clock.run, 10, queued=False)
    assert found[1:] == pytest.approx([5e-3] * 9) and host == pytest.approx(5e-3)


def test_kernels_of_a_call(gpu):
    """Each with its launches a call, the longest first."""
    x = torch.randn(2**24, device=gpu)
    found = harness.kernels_of(lambda: [x.mul_(1.0), x.mul_(1.0), x[:8].add_(0.0)])
    assert [x["count"] for x in found] == [2, 1] and found[0]["seconds"] > found[1]["seconds"] > 0


def test_shares_on_a_gpu_are_of_the_rate_of_the_products_dtype(clock, monkeypatch):
    """Of half precision by the matrix units, ten times the rate of float32 here."""
    monkeypatch.setattr(harness, "rate", lambda device, dtype: 1e12 if dtype == torch.float32 else 1e13)
    monkeypatch.setattr(harness, "bandwidth", lambda device: 1e12)
    kernels = [{"kernel": "sum", "count": 2.0, "seconds": 7e-4}, {"kernel": "fill", "count": 1.0, "seconds": 1e-4}]
    monkeypatch.setattr(harness, "kernels_of", lambda run, calls: kernels)
    for dtype, share in ((torch.float32, 0.5), (torch.bfloat16, 0.05)):
        variants = {"reference": clock.run, "kernel": clock.run}
        rows = harness.compare("case", variants, device="cuda", operations=10**9, dtype=dtype, seconds=0)
        assert [row.share for row in rows] == pytest.approx([share] * 2)
        assert [row.host for row in rows] == pytest.approx([5e-3] * 2)
        assert [row.busy for row in rows] == pytest.approx([1.5e-3] * 2) and rows[0].kernels == kernels
    (row,) = harness.compare("case", {"step": clock.run}, device="cuda", reference="step", seconds=0, whole=True)
    assert row.median == pytest.approx(5e-3)


@pytest.mark.parametrize("needs_x", [True, False])
def test_operations_of_a_fused_op_are_those_of_its_products(needs_x):
    """As counted in its definition, which multiplies by torch's products."""
    x, linear = torch.randn(50, 7, requires_grad=needs_x), torch.randn(9, 7, requires_grad=True)

    def step(backend: str) -> None:
        linear_batch_norm_relu(x, linear, torch.ones(9), torch.zeros(9), backend=backend)[0].sum().backward()

    found = {backend: operations_of(partial(step, backend)) for backend in ("auto", "reference")}
    assert found["auto"] == found["reference"] == (2 + needs_x) * 2 * 50 * 7 * 9


@pytest.mark.skipif(
    OPS["vector_edge_convolution"].backends("cpu") == ("reference",), reason="the kernels are not built"
)
@pytest.mark.parametrize("needs_x", [True, False])
def test_operations_of_an_edge_convolution_are_those_of_its_maps(needs_x):
    """Of each node by four maps, with gradients; of each pair by that of the pool, without."""
    C, d, n, M, w = 3, 2, 6, 5, 4
    x, maps = torch.randn(C, d, n, M, requires_grad=needs_x), torch.randn(2, w, 2 * C, requires_grad=True)
    pool = torch.randn(w, w)

    def step() -> None:
        settings = {"neighbors": 3}
        vector_edge_convolution(x, *maps, pool, torch.ones(w), torch.zeros(w), **settings)[0].sum().backward()

    def products() -> None:
        pool @ torch.randn(w, n * n * d * M)
        (maps.reshape(4 * w, C) @ x.reshape(C, -1)).sum().backward()

    assert operations_of(step) == operations_of(products)
