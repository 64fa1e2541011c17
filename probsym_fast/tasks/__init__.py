"""Tasks: one experiment each, with data, loss, measures and configurations."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probsym_fast.tasks.registry import TASKS, register
from probsym_fast.training import configuration
from probsym_fast.training.settings import Run, Samples, Training
from probsym_fast.training.task import Computation, Experiment, Task

if TYPE_CHECKING:
    from probsym_fast.tasks.energies import Energies, EnergiesConfig
    from probsym_fast.tasks.ready_made import (
        GraphClassification,
        GraphClassificationConfig,
        GraphRegression,
        GraphRegressionConfig,
        NodeClassification,
        NodeClassificationConfig,
    )

READY_MADE = {  # class -> its module, imported when it is first asked for
    **dict.fromkeys(("Energies", "EnergiesConfig"), "energies"),
    **dict.fromkeys(("GraphClassification", "GraphClassificationConfig"), "ready_made"),
    **dict.fromkeys(("GraphRegression", "GraphRegressionConfig"), "ready_made"),
    **dict.fromkeys(("NodeClassification", "NodeClassificationConfig"), "ready_made"),
}


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


__all__ = [
    "TASKS",
    "Computation",
    "Energies",
    "EnergiesConfig",
    "Experiment",
    "GraphClassification",
    "GraphClassificationConfig",
    "GraphRegression",
    "GraphRegressionConfig",
    "NodeClassification",
    "NodeClassificationConfig",
    "Run",
    "Samples",
    "Task",
    "Training",
    "load",
    "register",
]

if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> Any:
        if name not in READY_MADE:
            raise AttributeError(f"module 'probsym_fast.tasks' has no attribute {name!r}")
        return getattr(import_module(f"probsym_fast.tasks.{READY_MADE[name]}"), name)
