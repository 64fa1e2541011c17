"""Several configurations trained with several seeds each, side by side: a table and a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from probsym_fast.tasks import config as configuration
from probsym_fast.tasks.config import Limit
from probsym_fast.tasks.plots import history, plot_runs
from probsym_fast.tasks.task import Computation, Experiment, Task
from probsym_fast.tasks.training import fit

FIRST = "@first"  # in a run's keys: the folder of the run that is trained first
LIMITS = {
    "first": Limit("a run with a config", lambda x: "config" in x),
    "runs": Limit(
        "at least one run, each with a config", lambda x: len(x) > 0 and all("config" in run for run in x.values())
    ),
    "seeds": Limit("at least one seed, none twice", lambda x: 0 < len(x) == len(set(x))),
}


@dataclass
class ComparisonConfig:
    """Runs of several configurations, everything else equal.

    Args:
        task: "comparison".
        name: names the run's folder.
        first: a run that is trained once before the others, which may start from its weights, given as one of `runs`; null:
            none.
        runs: name: {config: NAME, key: value, ...}; nested keys with dots; the value "@first" is the first run's folder.
        common: keys and values of every run, such as data: FOLDER.
        seeds: every configuration is trained with each.
        measure: the figure of the runs' results that is compared; higher is better.
        seed: of the first run.
        folder: of the runs; null: runs/<task>/<name>/seed<seed>. Runs that are done are kept, one that was stopped goes on.
    """

    task: Literal["comparison"] = "comparison"
    name: str = "custom"
    first: dict[str, Any] | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    measure: str = "test_accuracy"
    seed: int = 1
    folder: str | None = None


class Comparison(Computation):
    """Mean and spread of a measure over the seeds, a configuration a row."""

    def __init__(self, config: ComparisonConfig, load: Callable[[str, list[str]], Experiment]):
        configuration.check(config, LIMITS)
        self.config, self.load = config, load
        runs = [self._run(keys) for keys in config.runs.values()] + ([config.first] if config.first else [])
        for keys in runs:  # all of them are read before any is trained
            self._task(keys, config.seeds[0], Path("unused"))

    def _run(self, keys: dict[str, Any]) -> dict[str, Any]:
        return keys | self.config.common

    def _task(self, keys: dict[str, Any], seed: int, folder: Path, first: Path | None = None) -> Task:
        values = {**keys, "seed": seed, "folder": str(folder)}
        name = values.pop("config")
        values = {
            key: str(first) if value == FIRST else value for key, value in values.items() if first or value != FIRST
        }
        task = self.load(
            name, [f"--{key}={json.dumps(value) if value is None else value}" for key, value in values.items()]
        )
        if not isinstance(task, Task):
            raise ValueError(f"config: runs must be experiments that are trained, got {name}")
        return task

    def run(self, folder: Path) -> dict[str, Any]:
        config, first = self.config, None
        if config.first:
            first = folder / "first"
            _trained(self._task(config.first, config.seed, first), "first", first)
        values: dict[str, list[float]] = {name: [] for name in config.runs}
        curves: dict[str, list[dict[int, float]]] = {name: [] for name in config.runs}
        for seed in config.seeds:
            for name, keys in config.runs.items():
                where = folder / name / f"seed{seed}"
                task = self._task(self._run(keys), seed, where, first)
                results = _trained(task, f"{name}, seed {seed}", where)
                if config.measure not in results:
                    raise ValueError(f"config: measure must be one of {', '.join(results)}, got {config.measure!r}")
                values[name].append(results[config.measure])
                curves[name].append(history(where).get(f"valid/{task.measure}", {}))
        plot_runs(folder / "plots" / "comparison.png", values, curves, config.measure, f"validation {task.measure}")
        spread = {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}
        return {
            "measure": config.measure,
            "seeds": config.seeds,
            "values": values,
            "mean": {name: x.mean().item() for name, x in spread.items()},
            "std": {name: x.std(correction=min(1, len(x) - 1)).item() for name, x in spread.items()},
        }

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [
            ("measure", f"{results['measure'].replace('_', ' ')}, {len(results['seeds'])} seeds, mean +- deviation")
        ]
        for name, mean in results["mean"].items():
            each = ", ".join(f"{value:.4f}" for value in results["values"][name])
            rows.append((name, f"{mean:.4f} +- {results['std'][name]:.4f}   ({each})"))
        return rows


def _trained(task: Task, name: str, folder: Path) -> dict[str, Any]:
    """The results of the run, trained now unless it was."""
    done = folder / "results.json"
    if not done.is_file():
        begun = (folder / "config.yaml").is_file()
        print(f"{name}: {'continued' if begun else 'trained'} in {folder}", file=sys.stderr, flush=True)
        fit(task, resume=begun)
    results: dict[str, Any] = json.loads(done.read_text())
    return results
