"""Options, the table at the end, and the results file of a machine."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Row, machine
from probsym_fast.data._store import write_atomically

RESULTS = Path(__file__).parent / "results"
ROWS: list[Row] = []


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the benchmarks run")
    parser.addoption("--seconds", type=float, default=4.0, help="time given to each case")
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/<machine>.json and .md")
    parser.addoption("--part", default="", help="of the benchmarks, with results files of its own")


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device must be cpu here: no CUDA device is visible")


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def seconds(request) -> float:
    return request.config.getoption("--seconds")


@pytest.fixture
def record(benchmark):
    """Adds rows to the table; pytest-benchmark keeps the first variant's own timing beside them."""

    def add(rows: list[Row], function) -> list[Row]:
        ROWS.extend(rows)
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        benchmark.pedantic(function, rounds=3, warmup_rounds=1)
        return rows

    add.rows = ROWS.extend  # rows alone
    return add


def table(rows: list[Row]) -> str:
    lines = [
        "| case | variant | median ms | quartiles | ratio | share of limit | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        quartiles = f"{r.low * 1e3:.3g} to {r.high * 1e3:.3g}"
        share = f"{r.share:.1%}" if r.share else ""
        note = ", ".join(f"{k} {v}" for k, v in r.extra.items())
        lines.append(
            f"| {r.case} | {r.variant} | {r.median * 1e3:.3g} | {quartiles} | {r.ratio:.3g} | {share} | {note} |"
        )
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    device = config.getoption("--device")
    facts = machine(device)
    heading = ", ".join(f"{name} {value}" for name, value in facts.items())
    terminalreporter.write_line(f"\n{heading}\n\n{table(ROWS)}\n")
    if config.getoption("--save-results"):
        slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['device']}-{facts['threads']}-threads".lower()).strip("-")
        slug = "-".join(filter(None, (slug, config.getoption("--part"))))
        text = json.dumps({"machine": facts, "rows": [asdict(r) for r in ROWS]}, indent=1)
        write_atomically(RESULTS / f"{slug}.json", lambda f: f.write(text.encode()))
        page = f"# {facts['device']}\n\n{heading}\n\nratio: median of the case's reference over this one, same run.\n\n"
        write_atomically(RESULTS / f"{slug}.md", lambda f: f.write((page + table(ROWS) + "\n").encode()))
        terminalreporter.write_line(f"results: {RESULTS.name}/{slug}.md")
