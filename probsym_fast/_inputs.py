"""How an embedding passes inputs to a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def embedded(embed: nn.Module, batch: Any, group: Any, g: Any) -> tuple[tuple, dict[str, Any]]:
    """The backbone's positional and keyword arguments: what embed(batch, group, g) returns.

    A Tensor is the only argument, a tuple holds the positional arguments, a dict the keyword arguments. Raises
    TypeError for anything else, lists included, and for keys that are no strings.
    """
    given = embed(batch, group, g)
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, tuple):
        return given, {}
    if isinstance(given, dict):
        if unnamed := [key for key in given if not isinstance(key, str)]:
            raise TypeError(
                f"{type(embed).__name__}: the keys of the backbone's inputs must be str, got {unnamed[0]!r}"
            )
        return (), given
    raise TypeError(
        f"{type(embed).__name__}: an embedding must return a Tensor, a tuple (positional inputs) or a dict (keyword inputs),"
        f" got {type(given).__name__}"
    )
