"""Reads YAML configurations, also untrusted ones: UTF-8 everywhere, no duplicate keys, work bounded by the size."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from probsym_fast._untrusted import read_bytes

LARGEST = 1 << 18  # bytes per file
DEEPEST = 32  # levels of keys and lists
NODES = 20_000  # keys, values and lists, with aliases expanded
_NUMBERS = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBER = re.compile(  # decimal or 0x, with a bounded number of digits
    r"0x[0-9a-fA-F]{1,32}|[-+]?((0|[1-9][\d_]{0,39})(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
PLAIN = (str, int, float, bool, type(None))  # allowed values


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError, with the file, for anything else or what `read_text` refuses."""
    try:
        return read_text(read_bytes(path, LARGEST).decode("utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"config: {path} must be readable YAML, got {type(error).__name__}: {text}") from error


def read_text(text: str) -> dict[str, Any]:
    """The mapping in a YAML text, of strings, numbers, booleans, nulls, lists and mappings.

    Raises YAMLError for invalid YAML. Raises ValueError, with key and line, for a duplicate key, a key that is not a
    string, a value of another type, more than DEEPEST levels, or more than NODES values with aliases expanded.
    """
    values = yaml.load(text, _Loader)  # a SafeLoader
    if not isinstance(values, dict):
        raise ValueError(f"expected keys and values, got {type(values).__name__}")
    return values


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML in ASCII."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str):
        super().__init__(text)
        self._level = 0
        self._count = 0  # nodes so far, with aliases expanded
        self._weights: dict[int, int] = {}  # id of a complete node -> its number of nodes
        self._kept: list[Node | None] = []  # keeps ids unique

    def compose_node(self, parent: Any, index: Any) -> Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._weights:
                raise ValueError(f"an alias inside its own anchor, line {line}")
            self._add(self._weights[id(node)], line)
            return node
        self._level += 1
        if self._level > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels, line {line}")
        before = self._count
        self._add(1, line)
        node = super().compose_node(parent, index)
        self._level -= 1
        self._weights[id(node)] = self._count - before
        self._kept.append(node)
        return node

    def _add(self, count: int, line: int) -> None:
        self._count += count
        if self._count > NODES:
            raise ValueError(f"more than {NODES} values with aliases expanded, line {line}")

    def construct_mapping(self, node: Node, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, MappingNode):
            raise ValueError(f"expected keys and values, line {node.start_mark.line + 1}")
        lines: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(name, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"expected keys that are strings, got {key!r} in line {line}; quote it")
            if key in lines:
                raise ValueError(f"expected every key once, got {key!r} in lines {lines[key]} and {line}")
            lines[key] = line
            if isinstance(value, ScalarNode):
                self._check_value(key, value)
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep=deep)

    def construct_sequence(self, node: SequenceNode, deep: bool = False) -> list[Any]:
        for value in node.value:
            if isinstance(value, ScalarNode):
                self._check_value("a list", value)
        return super().construct_sequence(node, deep=deep)

    def _check_value(self, key: str, node: ScalarNode) -> None:
        line = node.start_mark.line + 1
        if node.tag in _NUMBERS and node.style is None and not _NUMBER.fullmatch(node.value):
            raise ValueError(
                f"{key} must be a number without a leading 0 or a colon, or a string in quotes, got {node.value[:40]}"
                f" in line {line}"
            )
        try:
            value = self.construct_object(node, deep=True)
        except (ValueError, OverflowError, yaml.YAMLError) as error:
            raise ValueError(f"{key} in line {line}: {error}") from error
        if not isinstance(value, PLAIN):
            raise ValueError(
                f"{key} must be a string, a number or a boolean, got {type(value).__name__} in line {line}"
            )
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{key} must hold no NUL character, got one in line {line}")


def _refused(loader: _Loader, node: Node) -> Any:
    raise ValueError(f"expected plain values, got {node.tag} in line {node.start_mark.line + 1}")


for _tag in ("set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refused)
