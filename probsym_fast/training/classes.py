"""Loggers and callbacks that a configuration names by their classes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from typing import Any

Entry = str | dict[str, Any]


def names_class(entry: Entry) -> bool:
    """Whether it is a dotted path, or a mapping of `class_path` and, where the class takes arguments, `init_args`."""
    if isinstance(entry, dict):
        whole = entry.keys() <= {"class_path", "init_args"} and isinstance(entry.get("init_args", {}), dict)
        entry = entry.get("class_path", "") if whole else ""
    return isinstance(entry, str) and "." in entry and all(part.isidentifier() for part in entry.split("."))


def objects(key: str, entries: Sequence[Entry], kind: type, **defaults: Any) -> list[Any]:
    """An object of each class in the entries, for which `names_class` holds.

    defaults: for the constructors that have these arguments. Raises ValueError, with the key, for a class that cannot be
    imported, that is not a `kind`, or whose constructor raises.
    """
    found = []
    for entry in entries:
        path, given = (entry, {}) if isinstance(entry, str) else (entry["class_path"], entry.get("init_args", {}))
        module, _, name = path.rpartition(".")
        try:
            made = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"config: {key} must name classes that can be imported, got {path}: {error}") from error
        if not (isinstance(made, type) and issubclass(made, kind)):
            raise ValueError(f"config: {key} must name subclasses of {kind.__module__}.{kind.__name__}, got {path}")
        try:
            own = {name: value for name, value in defaults.items() if name in signature(made).parameters}
            found.append(made(**own | given))
        except Exception as error:  # whatever the constructor raises
            text = f"must hold classes that can be made, got {path} with {given}"
            raise ValueError(f"config: {key} {text}: {type(error).__name__}: {error}") from error
    return found


def check_objects(name: str, given: Sequence[object], kind: type) -> None:
    """Raises TypeError, with the argument's name, unless it is a sequence of `kind`."""
    if not isinstance(given, Sequence) or not all(isinstance(one, kind) for one in given):
        raise TypeError(f"fit: {name} must be a list of {kind.__module__}.{kind.__name__}, got {given!r}")
