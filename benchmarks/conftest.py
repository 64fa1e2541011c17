"""Options of the benchmarks, the table at the end, and the results file per machine, rewritten after every case."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Row, machine
from probsym_fast._files import write_atomically

RESULTS = Path(__file__).parent / "results"
ROWS: list[Row] = []


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="device to run on")
    parser.addoption("--seconds", type=float, default=4.0, help="time per case")
    parser.addoption("--without-compiled", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.addoption("--save-results", action="store_true", help="write <machine>.json and .md after every case")
    parser.addoption(
        "--results", type=Path, default=RESULTS, help="folder for the results (default: benchmarks/results)"
    )
    parser.addoption("--part", default="", help="name of a part of the benchmarks, which gets its own results files")


def pytest_configure(config):
    harness.COMPILED = not config.getoption("--without-compiled")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device must be cpu when no CUDA device is visible, got cuda")


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def seconds(request) -> float:
    return request.config.getoption("--seconds")


@pytest.fixture
def record(benchmark, pytestconfig):
    """Adds rows to the table and saves it; pytest-benchmark also times the given function."""

    def add(rows: list[Row], function) -> list[Row]:
        add.rows(rows)
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        benchmark.pedantic(function, rounds=3, warmup_rounds=1)
        return rows

    def add_rows(rows: list[Row]) -> None:
        ROWS.extend(rows)
        if pytestconfig.getoption("--save-results"):
            save(pytestconfig)

    add.rows = add_rows
    return add


def table(rows: list[Row]) -> str:
    lines = [
        "| case | variant | median ms | quartiles | host ms | ratio | share of limit | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        quartiles = f"{r.low * 1e3:.3g} to {r.high * 1e3:.3g}"
        host, share = f"{r.host * 1e3:.3g}" if r.host else "", f"{r.share:.1%}" if r.share else ""
        extra = ({"kernels ms": f"{r.busy * 1e3:.3g}"} if r.busy else {}) | r.extra
        note = ", ".join(f"{k} {v}" for k, v in extra.items())
        lines.append(
            f"| {r.case} | {r.variant} | {r.median * 1e3:.3g} | {quartiles} | {host} | {r.ratio:.3g} | {share} | {note} |"
        )
    return "\n".join(lines)


def heading(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def save(config) -> Path:
    """Writes all rows so far, so that a killed run keeps them. Returns the path of the table."""
    facts = machine(config.getoption("--device"))
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['device']}-{facts['threads']}-threads".lower()).strip("-")
    slug = "-".join(filter(None, (slug, config.getoption("--part"))))
    folder = config.getoption("--results")
    text = json.dumps({"machine": facts, "rows": [asdict(r) for r in ROWS]}, indent=1)
    write_atomically(folder / f"{slug}.json", lambda f: f.write(text.encode()))
    about = "ratio: median of the case's reference over this one, same run."
    if config.getoption("--device") == "cuda":
        about += " Times are the GPU's own; host ms: until the work of one call is queued."
    page = f"# {facts['device']}\n\n{heading(facts)}\n\n{about}\n\n{table(ROWS)}\n"
    write_atomically(folder / f"{slug}.md", lambda f: f.write(page.encode()))
    return folder / f"{slug}.md"


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    facts = machine(config.getoption("--device"))
    terminalreporter.write_line(f"\n{heading(facts)}\n\n{table(ROWS)}\n")
    if config.getoption("--save-results"):
        terminalreporter.write_line(f"results: {save(config)}")
