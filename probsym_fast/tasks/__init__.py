"""Tasks: one experiment each, with its data, loss, measure and configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probsym_fast.tasks import config as configuration
from probsym_fast.tasks.automorphism import Automorphism, AutomorphismConfig
from probsym_fast.tasks.comparison import Comparison, ComparisonConfig
from probsym_fast.tasks.digits import DigitsConfig, DigitsTask
from probsym_fast.tasks.exp_classify import ExpClassify, ExpClassifyConfig
from probsym_fast.tasks.nbody import NBodyConfig, NBodyTask
from probsym_fast.tasks.sample_size import SampleSize, SampleSizeConfig
from probsym_fast.tasks.separation import Separation, SeparationConfig
from probsym_fast.tasks.task import Computation, Experiment, Task
from probsym_fast.tasks.vision import VisionConfig, vision

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
    path = configuration.find(name)
    values = configuration.read(path)
    task = values.get("task")
    if task not in TASKS:
        raise ValueError(f"config: task in {path} must be one of {', '.join(TASKS)}, got {task!r}")
    kind, make = TASKS[task]
    values.setdefault("name", configuration.name_of(path, task))
    if values.get("folder") == ".":
        values["folder"] = str(path.parent)
    return make(configuration.parse(kind, values, overrides or []))


__all__ = ["TASKS", "Computation", "Experiment", "Task", "load"]
