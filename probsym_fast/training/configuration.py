"""Configurations: a YAML file per row of the published tables, read into the task's dataclass. Any key can be overridden."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser
from yaml import YAMLError

from probsym_fast.training import yaml_files
from probsym_fast.training.yaml_files import dump_yaml
from probsym_fast.training.yaml_files import read_text as read_text

CONFIGS = files("probsym_fast") / "tasks" / "configs"
EXTENDED = 16  # longest chain of files that extend one another


class Limit(NamedTuple):
    """What a value must be, in words, and the test for it."""

    words: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Limit:
    return Limit(f"at least {least}", lambda x: x >= least)


COUNT = at_least(1)
POSITIVE = Limit("finite and > 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Limit("finite and >= 0", lambda x: 0 <= x < math.inf)
SHARE = Limit("at least 0 and below 1", lambda x: 0 <= x < 1)


def between(least: int, most: int) -> Limit:
    return Limit(f"in {least}..{most}", lambda x: least <= x <= most)


def one_of(*values: str) -> Limit:
    return Limit(f"one of {', '.join(values)}", lambda x: x in values)


def check(config: Any, limits: Mapping[str, Limit]) -> None:
    """Raises ValueError for the first value outside its key's Literal or limit (by dotted key).

    Null is allowed if the key's type allows it.
    """
    _check_literals(config, "")
    for key, limit in limits.items():
        value = attrgetter(key)(config)
        if value is not None and not limit.holds(value):
            raise ValueError(f"config: {key} must be {limit.words}, got {value!r}")


def _check_literals(config: Any, prefix: str) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            _check_literals(value, f"{prefix}{name}.")
        elif get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"config: {prefix}{name} must be one of {', '.join(get_args(hint))}, got {value!r}")


def available() -> list[str]:
    """Names of the packaged configurations, such as "nbody/gnn_O3_ps"."""
    root = Path(str(CONFIGS))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find(name: str, what: str = "config:") -> Path:
    """The file of a configuration, given a path or a packaged name. what: start of the error message."""
    got = f"{name[:100]!r}{'...' if len(name) > 100 else ''}"
    for path in (Path(name), Path(str(CONFIGS)) / f"{name}.yaml"):
        try:
            if path.is_file():
                return path
        except (OSError, ValueError) as error:  # no valid file name
            raise ValueError(
                f"{what} must be a file or a configuration's name, got {got}: {getattr(error, 'strerror', error)}"
            ) from error
    raise ValueError(
        f"{what} must be a file or one of `probsym info`'s configurations, got {got}{meant(name, available())}"
    )


def meant(name: str, known: Iterable[str]) -> str:
    """The end of an error message: similar names, if any."""
    near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def name_of(path: Path, task: str) -> str:
    """A configuration's name: its file's stem, prefixed by the packaged folder unless that is the task."""
    root, path = Path(str(CONFIGS)).resolve(), path.resolve()
    own = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return str(own.with_suffix("")).removeprefix(f"{task}/")


def full_name(config: Any) -> str:
    """task/name, or just the name if it has a slash. For a packaged configuration, what `find` takes."""
    return str(config.name) if "/" in config.name else f"{config.task}/{config.name}"


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the configuration that its key `extends` names, if any. Raises as `layers`."""
    return merged(layers(path))


def layers(path: Path, extending: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The mapping in a YAML file, preceded by those of the configurations that it extends, base first.

    extending: the files that led to this one. Raises ValueError, with the file and the key, for what `yaml_files.read`
    refuses, and for an `extends` that names no configuration, forms a cycle, or chains more than EXTENDED files.
    """
    values = yaml_files.read(path)
    base = values.pop("extends", None)
    if base is None:
        return [values]
    what = f"config: extends in {path}"
    if not isinstance(base, str):
        raise ValueError(f"{what} must be a file or a configuration's name, got {base!r}")
    following, way = find(base, what), (*extending, path)
    if any(following.samefile(one) for one in way):
        raise ValueError(f"{what} must not form a cycle, got {base!r}, which extends this file")
    if len(way) == EXTENDED:
        raise ValueError(f"{what} must lead through at most {EXTENDED} files, got one more, {base!r}")
    return [*layers(following, way), values]


def merged(
    some: list[dict[str, Any]], of_method: Mapping[str, dict[str, Any]] | None = None, method: str | None = None
) -> dict[str, Any]:
    """The layers merged, each over those before it.

    of_method: values that belong to a method, such as one sample for canonicalization. Those of the method that is chosen go
    under the layer that names it, and over the layers before that. method: named after all layers, on the command line.
    """
    named = [k for k, values in enumerate(some) if isinstance(values.get("method"), str)]
    place = len(some) if method is not None else named[-1] if named else 0
    chosen = method if method is not None else some[place].get("method") if named else None
    found: dict[str, Any] = {}
    for k, values in enumerate([*some, {}]):
        if k == place and chosen is not None:
            found = _merged(found, (of_method or {}).get(chosen, {}))
        found = _merged(found, values)
    return found


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """base updated by the values, key by key in nested mappings."""
    out = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = _merged(base[key], value) if both else value
    return out


def parse(kind: type, values: dict[str, Any], overrides: list[str], path: Path | None = None) -> Any:
    """The dataclass `kind` from a mapping and command-line overrides `--key value` (nested: `--samples.train 4`).

    `--key+ value` adds to a list, and `--key.name value` sets an entry of a mapping. path: the mapping's file, named in
    errors. Raises ValueError for an unknown key (suggesting similar ones) and for a value of the wrong type.
    """
    parser, given = _kept_parser(kind), None
    values, overrides = _with_entries(kind, values, overrides)
    try:
        _check_keys(kind, values, "")
        given = parser.parse_object(values)
    except (ArgumentError, ValueError) as error:
        where = "" if path is None else f", in {path}"
        raise ValueError(f"config: {_in_words(kind, error)}{where}") from error
    for flag in overrides:
        if flag.startswith("--"):
            _check_flag(kind, flag[2:].split("=")[0].removesuffix("+"))
    try:
        return kind(**vars(parser.instantiate(parser.parse_args(overrides, namespace=given))))
    except ArgumentError as error:
        raise ValueError(f"config: {_in_words(kind, error)}") from error


def _with_entries(kind: type, values: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """values with the entries of mappings that are overridden, and the other overrides."""
    mappings = {name for name, hint in get_type_hints(kind).items() if hint == dict[str, Any]}
    values, others, left = dict(values), [], iter(overrides)
    for flag in left:
        name, _, entry = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and entry and name in mappings):
            others.append(flag)
            continue
        entry, equals, text = entry.partition("=")
        value = text if equals else next(left, "--")
        if value.startswith("--"):
            raise ValueError(f"config: {name}.{entry} must have a value, got none")
        if value_of(name, overrides) is not None:
            raise ValueError(f"config: {name} must be given whole or by its entries, got --{name} and --{name}.{entry}")
        before = values.get(name) or {}
        if not isinstance(before, dict):
            raise ValueError(f"config: {name} must be a mapping, got {before!r}")
        try:
            values[name] = before | read_text(f"{entry}: {value}")
        except (ValueError, YAMLError) as error:
            raise ValueError(f"config: {name}.{entry} must be readable YAML, got {value!r}") from error
    return values, others


PARSED = re.compile(r'Parser key "(?P<key>[\w.]+)": .*(?:Got|Given) value: (?P<got>.*)')
NOUNS = {
    int: "int",
    float: "number",
    str: "string",
    bool: "true or false",
    list: "list",
    dict: "mapping",
    NoneType: "null",
}


def _in_words(kind: type, error: Exception) -> str:
    """An error of the parser for a key: what it must be and what was given. Another error as it is."""
    text = " ".join(str(error).split()).removeprefix("config: ")
    if not (found := PARSED.search(text)):
        return text
    hint: Any = kind
    for name in found["key"].split("."):
        hints = get_type_hints(hint) if is_dataclass(hint) else {}
        if name not in hints:  # below a mapping
            return text
        hint = hints[name]
    got = "null" if found["got"] == "None" else found["got"]
    return f"{found['key']} must be {_described(hint)}, got {got}"


def _described(hint: Any) -> str:
    """ "an int or null", "one of ps, ga", "a list of ints"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_described, get_args(hint)))
    noun = NOUNS.get(get_origin(hint) or hint)
    if noun is None:  # of a task from elsewhere
        return getattr(hint, "__name__", str(hint))
    if get_origin(hint) is list and (of := get_args(hint)[0]) in NOUNS:
        noun += f" of {NOUNS[of]}s"
    if hint in (bool, NoneType):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def value_of(key: str, overrides: list[str]) -> str | None:
    """The last value of a key on the command line."""
    found = None
    for k, flag in enumerate(overrides):
        if flag == f"--{key}" and k + 1 < len(overrides):
            found = overrides[k + 1]
        elif flag.startswith(f"--{key}="):
            found = flag.partition("=")[2]
    return found


def with_file(error: ValueError, path: Path, values: dict[str, Any], overrides: list[str]) -> ValueError:
    """The error of a key, with the file if it holds the key. With overrides the error may be theirs: it names no file."""
    key = str(error).removeprefix("config: ").split(" ")[0]
    return error if overrides or key not in flat(values) else ValueError(f"{error}, in {path}")


def parser_of(kind: type, prog: str = "probsym fit -c CONFIG") -> ArgumentParser:
    """A parser with an argument for every key of the dataclass, documented by its docstring."""
    parser = ArgumentParser(exit_on_error=False, prog=prog, usage="%(prog)s [--KEY VALUE ...]")
    parser.add_class_arguments(kind)
    groups = {f"--{f.name}" for f in fields(kind) if _field(kind, f.name)}
    for action in parser._actions:
        if groups & set(action.option_strings):  # a file for a whole group, which `parse` refuses
            action.help = SUPPRESS
    return parser


@functools.cache
def _kept_parser(kind: type) -> ArgumentParser:
    """Of a kind once: making it takes as long as parsing, and a comparison parses many."""
    return parser_of(kind)


def dump(config: Any) -> str:
    """YAML of every key of a configuration, defaults included."""
    return dump_yaml(asdict(config))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys and values, flattened to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def by_key(config: Any, prefix: str = "") -> dict[str, Any]:
    """The value of every dotted key of a configuration; a mapping is one value."""
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        found |= by_key(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found


def _check_keys(kind: type, values: dict[str, Any], prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        nested = _field(kind, prefix + key)
        if nested:
            if not isinstance(value, dict):
                raise ValueError(f"config: {prefix}{key} must hold keys and values, got {value!r}")
            _check_keys(nested, value, f"{prefix}{key}.")
        elif value is None and type(None) not in get_args(hints[key]):
            raise ValueError(f"config: {prefix}{key} must not be null")


def _check_flag(kind: type, dotted: str) -> None:
    nested: type | None = kind
    parts = dotted.split(".")
    for k in range(len(parts)):
        if nested is None:
            raise ValueError(f"config: {'.'.join(parts[:k])} is a single value, got the key {dotted!r} under it")
        nested = _field(nested, ".".join(parts[: k + 1]))
    if nested is not None:
        first = fields(nested)[0].name
        raise ValueError(
            f"config: {dotted} must be set key by key, such as --{dotted}.{first}, got one value for the whole section"
        )


def _field(kind: type, dotted: str) -> type | None:
    """The nested dataclass at a key; None for a plain value. Raises ValueError for an unknown key."""
    known = {f.name: f for f in fields(kind)}
    name = dotted.split(".")[-1]
    if name not in known:
        hint = meant(name, known)
        raise ValueError(f"config: unknown key {dotted!r}, expected one of {', '.join(known)}{hint}")
    found = get_type_hints(kind)[name]
    return found if isinstance(found, type) and is_dataclass(found) else None
