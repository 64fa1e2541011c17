"""Gathers what a sweep gave into one file, which docs/results.md and its figures read.

    probsym sweep -c tables/exp_classify_gin --folder runs/gin --threads 1
    python -m benchmarks.experiments gather runs/gin -c tables/exp_classify_gin -o benchmarks/results/experiments/FILE.json
    python -m benchmarks.experiments costs benchmarks/results/experiments/*.json  # what the runs took, for the README there

Runs that have not finished are left out, and so are those of names and seeds that the sweep no longer has. A file that is
there keeps the runs that the folder lacks.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probsym_fast._files import write_atomically
from probsym_fast.tasks.comparison import results_of
from probsym_fast.tasks.costs import Costs, span
from probsym_fast.training import configuration
from probsym_fast.training.logs import history

POINTS = 100  # of a curve, at most
COSTS = ("seconds", "cpu_seconds", "memory", "commit")


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


def costs(paths: Iterable[Path]) -> str:
    """A Markdown table of what the runs in these files took; files whose runs have no costs are left out."""
    lines = ["| file | runs | CPU time of a run | wall time | memory, GB | commit |", "|---|---|---|---|---|---|"]
    for path in sorted(paths):
        record = json.loads(path.read_text(encoding="utf-8"))
        names = record.get("runs", {}) if isinstance(record, dict) else {}
        runs = [run for seeds in names.values() for run in seeds.values()]
        times, walls, memory = (
            [run[key] for run in runs if run.get(key)] for key in ("cpu_seconds", "seconds", "memory")
        )
        if not times:
            continue
        commits = sorted({commit for run in runs for commit in run.get("commit", "").split()})
        least = "" if all(run.get("complete", True) for run in runs) else "≥ "
        cells = [
            f"`{path.name}`",
            str(len(runs)),
            least + _range([span(f(times)) for f in (min, max)]),
            _range([span(f(walls)) for f in (min, max)]) if walls else "",
            _range([f"{f(memory) / 1000:.1f}" for f in (min, max)]) if memory else "",
            ", ".join(commits) or record.get("commit", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(ends: list[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("gather", help="writes what a sweep gave into a file")
    action.add_argument("folder", type=Path, help="a sweep's folder")
    action.add_argument("-c", "--configuration", required=True, help="what the sweep ran, as its -c names it")
    action.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    action.set_defaults(act=_write)
    action = actions.add_parser("costs", help="prints a table of what the runs in these files took")
    action.add_argument("files", type=Path, nargs="+")
    action.set_defaults(act=lambda arguments: print(costs(arguments.files), end=""))
    arguments = parser.parse_args()
    try:
        arguments.act(arguments)
    except ValueError as error:
        parser.error(str(error))


def _write(arguments: argparse.Namespace) -> None:
    runs: dict[str, dict[str, Any]] = {}
    if arguments.output.is_file():
        there = json.loads(arguments.output.read_text(encoding="utf-8"))
        if there["configuration"] != arguments.configuration:
            raise ValueError(
                f"{arguments.output} must be of {arguments.configuration}, got runs of {there['configuration']}"
            )
        runs = there["runs"]
    for name, seeds in gather(arguments.folder).items():
        runs[name] = dict(sorted((runs.get(name, {}) | seeds).items()))
    write_atomically(arguments.output, lambda file: file.write(_text(arguments.configuration, runs).encode()))


if __name__ == "__main__":
    main()
