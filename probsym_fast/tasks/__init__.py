"""Tasks: one experiment each, with data, loss, measures and configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from probsym_fast.training import configuration
from probsym_fast.training.task import Computation, Experiment, Task

NAMES = {  # task -> its module, configuration and constructor
    "nbody": ("nbody", "NBodyConfig", "NBodyTask"),
    "separation": ("separation", "SeparationConfig", "Separation"),
    "exp_classify": ("exp_classify", "ExpClassifyConfig", "ExpClassify"),
    "sample_size": ("sample_size", "SampleSizeConfig", "SampleSize"),
    "automorphism": ("automorphism", "AutomorphismConfig", "Automorphism"),
    "vision": ("vision", "VisionConfig", "vision"),
    "digits": ("digits", "DigitsConfig", "DigitsTask"),
    "comparison": ("comparison", "ComparisonConfig", "Comparison"),
}


Entry = tuple[type, Callable[[Any], Experiment]]


class _Tasks(MutableMapping[str, Entry]):
    """Name of a task -> (dataclass of its configuration, what makes the task).

    A module of this package is imported when its task is asked for. Tasks of your own can be added.
    """

    def __init__(self) -> None:
        self._added: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        if name in self._added:
            return self._added[name]
        where, config, make = NAMES[name]
        module = import_module(f"probsym_fast.tasks.{where}")
        made = getattr(module, make)
        return getattr(module, config), partial(made, load=load) if name == "comparison" else made

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._added[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._added[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**NAMES, **self._added})

    def __len__(self) -> int:
        return len({**NAMES, **self._added})


TASKS = _Tasks()


def load(name: str, overrides: list[str] | None = None) -> Experiment:
    """The experiment of a configuration file (or packaged name) with command-line overrides (`["--seed", "2"]`).

    The folder "." in a file is the file's own, so that a run folder can be moved.
    Raises ValueError for unknown files, tasks, keys and values.
    """
    path, layers, kind, make = _found(name)
    overrides = overrides or []
    method = configuration.value_of("method", overrides)
    values = configuration.merged(layers, getattr(kind, "of_method", None), method)
    values.setdefault("name", configuration.name_of(path, values["task"]))
    if values.get("folder") == ".":
        values["folder"] = str(path.parent)
    config = configuration.parse(kind, values, overrides, path)
    try:
        return make(config)
    except ValueError as error:
        raise configuration.with_file(error, path, values, overrides) from None


def _found(name: str) -> tuple[Path, list[dict[str, Any]], type, Callable[[Any], Experiment]]:
    """Path and layers of a configuration, and the entry of its task in TASKS."""
    path = configuration.find(name)
    layers = configuration.layers(path)
    task = configuration.merged(layers).get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"config: task in {path} must be one of {', '.join(TASKS)}, got {task!r}")
    return path, layers, *TASKS[task]


__all__ = ["TASKS", "Computation", "Experiment", "Task", "load"]
