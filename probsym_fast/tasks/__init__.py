"""Tasks: one experiment each, with its data, loss, measure and configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from probsym_fast.tasks.automorphism import Automorphism, AutomorphismConfig
from probsym_fast.tasks.comparison import Comparison, ComparisonConfig
from probsym_fast.tasks.digits import DigitsConfig, DigitsTask
from probsym_fast.tasks.exp_classify import ExpClassify, ExpClassifyConfig
from probsym_fast.tasks.nbody import NBodyConfig, NBodyTask
from probsym_fast.tasks.sample_size import SampleSize, SampleSizeConfig
from probsym_fast.tasks.separation import Separation, SeparationConfig
from probsym_fast.tasks.vision import VisionConfig, vision
from probsym_fast.training import configuration
from probsym_fast.training.task import Computation, Experiment, Task

TASKS: dict[str, tuple[type, Callable[[Any], Experiment]]] = {
    "nbody": (NBodyConfig, NBodyTask),
    "separation": (SeparationConfig, Separation),
    "exp_classify": (ExpClassifyConfig, ExpClassify),
    "sample_size": (SampleSizeConfig, SampleSize),
    "automorphism": (AutomorphismConfig, Automorphism),
    "vision": (VisionConfig, vision),
    "digits": (DigitsConfig, DigitsTask),
    "comparison": (ComparisonConfig, lambda config: Comparison(config, load)),
}


def load(name: str, overrides: list[str] | None = None) -> Experiment:
    """The experiment of a configuration file (or packaged name) with command-line overrides (`["--seed", "2"]`).

    The folder "." in a file is the one where the file lies, so that a run folder may be moved.
    Raises ValueError for unknown files, tasks, keys and values.
    """
    path, layers, kind, make = _found(name)
    overrides = overrides or []
    if (method := configuration.value_of("method", overrides)) is not None:
        layers.append({"method": method})
    values = configuration.merged(layers, getattr(kind, "of_method", None))
    values.setdefault("name", configuration.name_of(path, values["task"]))
    if values.get("folder") == ".":
        values["folder"] = str(path.parent)
    config = configuration.parse(kind, values, overrides, path)
    try:
        return make(config)
    except ValueError as error:
        raise configuration.with_file(error, path, values, overrides) from None


def config_type(name: str) -> type:
    """The dataclass of a configuration file's (or packaged name's) task. Raises ValueError as `load`."""
    return _found(name)[2]


def _found(name: str) -> tuple[Path, list[dict[str, Any]], type, Callable[[Any], Experiment]]:
    """Path and layers of the configuration, and its task's entry in TASKS."""
    path = configuration.find(name)
    layers = configuration.layers(path)
    task = configuration.merged(layers).get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"config: task in {path} must be one of {', '.join(TASKS)}, got {task!r}")
    return path, layers, *TASKS[task]


__all__ = ["TASKS", "Computation", "Experiment", "Task", "load"]
