"""Tasks: one experiment each, with its data, loss, measure and configurations."""

from __future__ import annotations

from probsym_fast.tasks import config as configuration
from probsym_fast.tasks.nbody import NBodyConfig, NBodyTask
from probsym_fast.tasks.task import Task

TASKS: dict[str, tuple[type, type[Task]]] = {"nbody": (NBodyConfig, NBodyTask)}


def load(name: str, overrides: list[str] | None = None) -> Task:
    """The task of a configuration file (or packaged name) with command-line overrides (`["--seed", "2"]`).

    Raises ValueError for unknown files, tasks, keys and values.
    """
    path = configuration.find(name)
    values = configuration.read(path)
    task = values.get("task")
    if task not in TASKS:
        raise ValueError(f"config: task in {path} must be one of {', '.join(TASKS)}, got {task!r}")
    kind, make = TASKS[task]
    values.setdefault("name", path.stem)
    return make(configuration.parse(kind, values, overrides or []))


__all__ = ["TASKS", "NBodyConfig", "NBodyTask", "Task", "load"]
