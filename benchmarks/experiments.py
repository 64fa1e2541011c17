"""Gathers what a sweep gave into one file, which docs/results.md and its figures read.

    probsym sweep -c tables/exp_classify_gin --folder runs/gin --threads 1
    python -m benchmarks.experiments runs/gin -c tables/exp_classify_gin -o benchmarks/results/experiments/FILE.json

Runs that have not finished are left out, and so are those of names and seeds that the sweep no longer has. A file that is
there keeps the runs that the folder lacks.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from probsym_fast._files import write_atomically
from probsym_fast.tasks.comparison import results_of
from probsym_fast.tasks.costs import Costs
from probsym_fast.training import configuration
from probsym_fast.training.logs import history

POINTS = 100  # of a curve, at most
COSTS = ("cpu_seconds", "memory", "commit")


def gather(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> seed -> figures, costs and validation curves of the finished runs in a sweep's folder."""
    costs, wanted = Costs(folder), _wanted(folder)
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/seed*/results.json")):
        run, (name, seed) = path.parent, path.parts[-3:-1]
        if wanted is not None and (name, seed) not in wanted:
            continue
        cost = costs.get(f"{name}/{seed}")
        found.setdefault(name, {})[seed] = {
            **{key: _short(value) for key, value in results_of(run).items()},
            **({} if cost is None else {key: getattr(cost, key) for key in COSTS}),
            **({} if cost is None or cost.complete else {"complete": False}),
            "curves": {key: _thin(x) for key, x in history(run).items() if key.startswith("valid/")},
        }
    return found


def _wanted(folder: Path) -> set[tuple[str, str]] | None:
    """Name and seed of every run in the sweep's configuration; None: it has not recorded one."""
    if not (path := folder / "config.yaml").is_file():
        return None
    config = configuration.read(path)
    return {(name, f"seed{seed}") for name in config["runs"] for seed in config["seeds"]}


def _thin(curve: dict[int, float]) -> dict[str, list[float]]:
    """At most POINTS of the values by epoch (counted from 1), the last among them."""
    epochs = sorted(curve)
    kept = epochs[::-1][:: -(-len(epochs) // POINTS)][::-1]
    return {"epochs": [epoch + 1 for epoch in kept], "values": [_short(curve[epoch]) for epoch in kept]}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _text(configuration: str, runs: dict[str, Any]) -> str:
    """JSON with a line for each list."""
    text = json.dumps({"configuration": configuration, "runs": runs}, indent=1)
    return re.sub(r"\[[^]]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a sweep's folder")
    parser.add_argument("-c", "--configuration", required=True, help="what the sweep ran, as its -c names it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    if arguments.output.is_file():
        there = json.loads(arguments.output.read_text(encoding="utf-8"))
        if there["configuration"] != arguments.configuration:
            parser.error(
                f"{arguments.output} must be of {arguments.configuration}, got runs of {there['configuration']}"
            )
        runs = there["runs"]
    for name, seeds in gather(arguments.folder).items():
        runs[name] = dict(sorted((runs.get(name, {}) | seeds).items()))
    write_atomically(arguments.output, lambda file: file.write(_text(arguments.configuration, runs).encode()))


if __name__ == "__main__":
    main()
