"""The tasks by name: the package's own, those of a program, and those of installed packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from probsym_fast.training.task import Experiment

NAMES = {  # task -> its module, configuration and constructor
    "nbody": ("nbody", "NBodyConfig", "NBodyTask"),
    "separation": ("separation", "SeparationConfig", "Separation"),
    "exp_classify": ("exp_classify", "ExpClassifyConfig", "ExpClassify"),
    "sample_size": ("sample_size", "SampleSizeConfig", "SampleSize"),
    "automorphism": ("automorphism", "AutomorphismConfig", "Automorphism"),
    "vision": ("vision", "VisionConfig", "vision"),
    "digits": ("digits", "DigitsConfig", "DigitsTask"),
    "rotated_mnist": ("rotated_mnist", "RotatedMNISTConfig", "RotatedMNIST"),
    "graph_regression": ("ready_made", "GraphRegressionConfig", "GraphRegression"),
    "graph_classification": ("ready_made", "GraphClassificationConfig", "GraphClassification"),
    "node_classification": ("ready_made", "NodeClassificationConfig", "NodeClassification"),
    "energies": ("energies", "EnergiesConfig", "Energies"),
    "molecules": ("molecules", "MoleculesConfig", "Molecules"),
    "comparison": ("comparison", "ComparisonConfig", "Comparison"),
}
GROUP = "probsym_fast.tasks"  # of entry points

Entry = tuple[type, Callable[[Any], Experiment]]
Made = TypeVar("Made", bound=Callable[..., Experiment])


class Tasks(MutableMapping[str, Entry]):
    """Name of a task -> (dataclass of its configuration, what makes the task).

    A module of this package is imported when its task is asked for. `register` adds a task of your own, as does
    `TASKS[name] = entry`. Installed packages add theirs by entry points of the group "probsym_fast.tasks", whose value is a
    task class with the attribute `Config`, or a pair as above. Entry points are read where a name is not known otherwise and
    where tasks are listed, and loaded where their task is asked for: a broken one leaves the others alone.
    """

    def __init__(self) -> None:
        self._added: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        if name in self._added:
            return self._added[name]
        if name not in NAMES:
            return _loaded(name, _installed().get(name, []))
        where, config, make = NAMES[name]
        module = import_module(f"probsym_fast.tasks.{where}")
        made = getattr(module, make)
        if name == "comparison":
            made = partial(made, load=import_module("probsym_fast.tasks").load)
        return getattr(module, config), made

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._added[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._added[name]

    def __iter__(self) -> Iterator[str]:
        installed = _installed()
        for name in sorted(installed.keys() & {*NAMES, *self._added}):
            points = ", ".join(map(_source, installed[name]))
            warnings.warn(f"tasks: {points} is ignored: the name {name!r} is taken", RuntimeWarning, stacklevel=2)
        return iter({**NAMES, **self._added, **installed})

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in NAMES or name in _installed()

    def __len__(self) -> int:
        return len({**NAMES, **self._added, **_installed()})


TASKS = Tasks()


def register(name: str, config: type | None = None) -> Callable[[Made], Made]:
    """Decorator: makes a task known as `task: NAME` in configurations.

    It takes a task class, or a function from the configuration to a task, and returns it unchanged. config: the dataclass of
    its configuration; None: the class's attribute `Config`.

        @psf.tasks.register("radius", RadiusConfig)
        class RadiusTask(psf.tasks.Task): ...

    A module that is run again may register its tasks again. Raises ValueError for a name that is taken, TypeError without a
    configuration.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register: name must be letters, digits and underscores, got {name!r}")

    def add(made: Made) -> Made:
        entry = _entry("register", made if config is None else (config, made))
        before = TASKS._added.get(name)
        if name in NAMES or (before is not None and _path(before[1]) != _path(made)):
            taken = f"{name!r}, which is {_path(TASKS[name][1])}"
            raise ValueError(f"register: name must be new, got {taken}")
        TASKS[name] = entry
        return made

    return add


def _path(made: Any) -> str:
    return f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', made)}"


def _entry(owner: str, value: Any) -> Entry:
    """A task class with `Config`, or a pair, as an entry of TASKS."""
    config, made = value if isinstance(value, tuple) and len(value) == 2 else (getattr(value, "Config", None), value)
    if not (isinstance(config, type) and hasattr(config, "__dataclass_fields__") and callable(made)):
        wanted = "a task class with the dataclass Config, or a pair (dataclass, what makes the task)"
        raise TypeError(f"{owner}: task must be {wanted}, got {value!r}")
    return config, made


def _installed() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _loaded(name: str, points: list[EntryPoint]) -> Entry:
    """The task of an entry point; KeyError if there is none."""
    if not points:
        raise KeyError(name)
    if len({point.value for point in points}) > 1:
        raise ValueError(f"tasks: {name!r} must be the name of one task, got {' and '.join(map(_source, points))}")
    source = _source(points[0])
    try:
        return _entry("tasks", points[0].load())
    except Exception as error:  # whatever its module raises
        raise ValueError(f"tasks: {source} must load, got {type(error).__name__}: {error}") from error


def _source(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist else ""
    return f"the entry point {point.name} = {point.value}{package}"
