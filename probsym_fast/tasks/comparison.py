"""Compares configurations, each trained with several seeds, in a table and a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from probsym_fast._files import write_atomically
from probsym_fast.tasks.by_samples import Figures, by_samples, digits_of, plot, table
from probsym_fast.tasks.plots import plot_runs
from probsym_fast.training import configuration
from probsym_fast.training.configuration import Limit
from probsym_fast.training.logs import history
from probsym_fast.training.ownership import LOCK
from probsym_fast.training.run import check_recorded, fit, record
from probsym_fast.training.settings import Run, may_change
from probsym_fast.training.task import Computation, Experiment, Task

PlannedRun = tuple[str, dict[str, Any], int, Path]  # label, keys, seed, folder
FIRST = "@first"  # as a value of a run's key: the folder of the first run
OWN = ("seed", "folder")  # keys that the comparison sets for every run
# names used in the comparison's folder
TAKEN = (
    *("first", "plots", "logs", "samples.md", "table.md", "costs.json", "config.yaml", "results.json"),
    *(LOCK, ".", ".."),
)
LONGEST = 200  # bytes of a folder's name, which log files extend
PLACES = ("config", "data", "backbone.weights")  # keys that may hold a path


def _is_run(keys: Any) -> bool:
    return isinstance(keys, dict) and isinstance(keys.get("config"), str)


def _is_folder_name(name: Any) -> bool:
    if not isinstance(name, str) or not name.isprintable() or name in TAKEN or name != name.strip():
        return False
    return 0 < len(name.encode()) <= LONGEST and not {"/", "\\", "|"} & set(name)  # | divides the cells of a table


LIMITS = {
    "first": Limit("a run with a config", _is_run),
    "runs": Limit(
        "at least one run, each with a config, the name of one", lambda x: len(x) > 0 and all(map(_is_run, x.values()))
    ),
    "seeds": Limit("at least one seed, none twice", lambda x: 0 < len(x) == len(set(x))),
}


@dataclass
class ComparisonConfig(Run):
    """Runs of several configurations, everything else equal.

    Args:
        task: "comparison".
        first: a run, in the form of one in `runs`, that is trained once before the others so that they can start from its
            weights; null: none.
        runs: name: {config: NAME, key: value, ...}; nested keys with dots; the value "@first" is the first run's folder.
            Names must be folder names; the comparison sets seed and folder.
        common: keys and values for every run that does not set them, such as data: FOLDER.
        seeds: seeds to train every configuration with.
        measure: figure of the runs' results to compare.
        seed: seed of the first run.
        folder: folder of the runs; null: runs/<full name>/seed<seed>. Finished runs are kept and stopped ones continue,
            if their configuration still matches; runs and seeds may be added.
    """

    task: Literal["comparison"] = "comparison"
    first: dict[str, Any] | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    measure: str = "test_accuracy"
    folder: str | None = None


class Comparison(Computation):
    """Mean and spread of a measure over the seeds, one row per configuration.

    Where runs test with more numbers of samples (`also_test`), `samples.md` and plots/samples.png have all their figures
    against the number of samples, with mean and deviation over the seeds.
    """

    continues = True

    def __init__(self, config: ComparisonConfig, load: Callable[[str, list[str]], Experiment]):
        configuration.check(config, LIMITS)
        for name in config.runs:
            if not _is_folder_name(name):
                raise ValueError(
                    f"config: runs must have plain folder names without | and other than {', '.join(TAKEN)}, got {name!r}"
                )
        groups = {"common": config.common} | {f"runs.{name}": keys for name, keys in config.runs.items()}
        for group, keys in groups.items():
            _check_keys(group, keys, config.first is not None)
        if config.first is not None:
            _check_keys("first", config.first, False)
        runs = {name: _absolute(keys) for name, keys in config.runs.items()}
        first = _absolute(config.first) if config.first else None
        self.config = replace(config, first=first, runs=runs, common=_absolute(config.common))
        self.load = load
        for label, keys, seed, where in self.runs(Path("unused")):  # reads all of them before training any
            figures = self._task(keys, seed, where).figures
            if label != "first" and figures and config.measure not in figures:
                raise ValueError(
                    f"config: measure must be one of {', '.join(figures)} for {label}, got {config.measure!r}"
                )

    def runs(self, folder: Path) -> Iterator[PlannedRun]:
        """(label, keys, seed, folder) of every run, in training order."""
        config = self.config
        if config.first:
            yield "first", config.first, config.seed, folder / "first"
        for seed in config.seeds:
            for name, own in config.runs.items():
                keys = {key: value for key, value in config.common.items() if key not in own} | own
                yield f"{name}, seed {seed}", keys, seed, folder / name / f"seed{seed}"

    @staticmethod
    def arguments(keys: dict[str, Any], seed: int, folder: Path) -> tuple[str, list[str]]:
        """The configuration and the flags of a run, as `probsym fit -c` takes them."""
        first = folder.parent.parent / "first"
        values = {key: str(first) if value == FIRST else value for key, value in keys.items()}
        values |= {"seed": seed, "folder": str(folder)}
        name = values.pop("config")
        flags = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
        return name, [f"--{key}={value}" for key, value in flags]

    def _task(self, keys: dict[str, Any], seed: int, folder: Path) -> Task:
        name, flags = self.arguments(keys, seed, folder)
        task = self.load(name, flags)
        if not isinstance(task, Task):
            raise ValueError(f"config: runs must be experiments that train a model, got {name}")
        return task

    def check_there(self, folder: Path) -> None:
        """Raises ValueError if a finished or stopped run has another configuration."""
        for _, keys, seed, where in self.runs(folder):
            task, path = self._task(keys, seed, where), where / "config.yaml"
            if (where / "results.json").is_file():
                before = configuration.flat(configuration.read(path)) if path.is_file() else {}
                # keys with the first run's folder, which may have moved along
                moved = [k for k, v in keys.items() if v == FIRST and Path(str(before.get(k))).name == "first"]
                check_recorded(where, task.config, ["folder", *moved])
            elif path.is_file():
                check_recorded(where, task.config, may_change(task.config.training))

    def run(self, folder: Path) -> dict[str, Any]:
        config = self.config
        self.check_there(folder)
        record(folder, config)
        values: dict[str, list[float]] = {name: [] for name in config.runs}
        curves: dict[str, list[dict[int, float]]] = {name: [] for name in config.runs}
        for label, keys, seed, where in self.runs(folder):
            task = self._task(keys, seed, where)
            results = _trained(task, label, where)
            if label == "first":
                continue
            name = where.parent.name
            values[name].append(self.figure(results))
            curves[name].append(history(where).get(task.monitor.key, {}))
        measure = ", ".join(x for x in (config.measure, task.unit(config.measure)) if x)
        plot_runs(folder / "plots" / "comparison.png", values, curves, measure, f"validation {task.monitor.name}")
        if self.write_samples(folder):
            plot(folder / "plots" / "samples.png", self.by_samples(folder))
        spread = {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}
        return {
            "measure": config.measure,
            "seeds": config.seeds,
            "values": values,
            "mean": {name: x.mean().item() for name, x in spread.items()},
            "std": {name: x.std(correction=min(1, len(x) - 1)).item() for name, x in spread.items()},
        }

    def by_samples(self, folder: Path) -> Figures:
        """The finished runs' figures against the number of samples in the test."""
        found = []
        for label, keys, seed, where in self.runs(folder):
            if label != "first" and (where / "results.json").is_file():
                samples = getattr(self._task(keys, seed, where).config, "samples", None)
                if samples is not None:
                    found.append((where.parent.name, samples.test, results_of(where)))
        return by_samples(found)

    def write_samples(self, folder: Path) -> bool:
        """Writes `samples.md`, the table of `by_samples`; False where no run was tested with other numbers of samples."""
        if figures := self.by_samples(folder):
            write_atomically(folder / "samples.md", lambda file: file.write(table(figures).encode()))
        return bool(figures)

    def figure(self, results: dict[str, Any]) -> float:
        """The measure in a run's results. ValueError if it is not there."""
        if self.config.measure not in results:
            raise ValueError(f"config: measure must be one of {', '.join(results)}, got {self.config.measure!r}")
        return results[self.config.measure]

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [
            ("measure", f"{results['measure'].replace('_', ' ')}, {len(results['seeds'])} seeds, mean +- deviation")
        ]
        for name, mean in results["mean"].items():
            deviation = results["std"][name]
            digits = digits_of(mean, deviation)
            each = ", ".join(f"{value:.{digits}f}" for value in results["values"][name])
            rows.append((name, f"{mean:.{digits}f} +- {deviation:.{digits}f}   ({each})"))
        return rows


def _check_keys(where: str, keys: dict[str, Any], with_first: bool) -> None:
    """Raises ValueError for keys that the comparison sets, and for an "@..." other than the first run."""
    for key, value in keys.items():
        if key in OWN:
            raise ValueError(
                f"config: {where} must be without {' and '.join(OWN)}, which the comparison sets, got {key}"
            )
        for mark in _marks(value):
            if value != FIRST or not with_first:
                wanted = "a value" if not with_first else f"a value or, not below other values, {FIRST}"
                raise ValueError(f"config: {where}.{key} must be {wanted} (`first` {_given(with_first)}), got {mark!r}")


def _given(with_first: bool) -> str:
    return "is given" if with_first else "is not there"


def _marks(value: Any) -> list[str]:
    """Strings in a value that begin with @."""
    if isinstance(value, str):
        return [value] if value.startswith("@") else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [mark for part in parts for mark in _marks(part)]


def _absolute(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys, with paths made absolute."""

    def fixed(key: str, value: Any) -> Any:
        is_path = key in PLACES and isinstance(value, str) and value != FIRST
        return str(Path(value).absolute()) if is_path and (key != "config" or Path(value).is_file()) else value

    return {key: fixed(key, value) for key, value in keys.items()}


def _trained(task: Task, name: str, folder: Path) -> dict[str, Any]:
    """The results of the run, which is trained first unless it is finished."""
    if not (folder / "results.json").is_file():
        begun = (folder / "config.yaml").is_file()
        print(f"{name}: {'continued' if begun else 'trained'} in {folder}", file=sys.stderr, flush=True)
        fit(task, resume=begun)
    return results_of(folder)


def results_of(folder: Path) -> dict[str, Any]:
    """The figures of a finished run. ValueError for a damaged file."""
    done = folder / "results.json"
    try:
        results = json.loads(done.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise TypeError(f"expected figures by name, got {type(results).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        text = "must hold the run's figures; delete it to test the run again"
        raise ValueError(f"comparison: {done} {text}, got {type(error).__name__}: {error}") from error
    return results
