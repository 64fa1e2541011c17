"""Predictions: a Tensor, or a pytree of them (dict, tuple, NamedTuple, registered dataclass, nested), leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def mapped(function: Callable[..., Any], prediction: Any, *others: Any) -> Any:
    """function(leaf, *the others' leaves) in the prediction's structure."""
    if isinstance(prediction, Tensor):
        return function(prediction, *others)
    return pytree.tree_map(function, prediction, *others)


def leaves(prediction: Any) -> list[Any]:
    return [prediction] if isinstance(prediction, Tensor) else pytree.tree_leaves(prediction)


def real_leaves(prediction: Any) -> list[Tensor]:
    """The floating-point and complex leaves, complex ones (...) as (..., 2) reals."""
    found = (x for x in leaves(prediction) if is_inexact(x))
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in found]


def is_inexact(x: Any) -> bool:
    """Whether x is a floating-point or complex Tensor."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def check_prediction(owner: str, prediction: Any) -> None:
    """TypeError unless all leaves, at least one, are floating-point or complex tensors; names the first other one."""
    found = leaves(prediction)
    if found and all(map(is_inexact, found)):
        return
    path, x = next(((path, x) for path, x in named_leaves(prediction) if not is_inexact(x)), ("", prediction))
    got = str(x.dtype) if isinstance(x, Tensor) else f"{'an empty ' if not found else ''}{type(x).__name__}"
    raise TypeError(
        f"{owner}: prediction{path} must be a floating-point or complex Tensor (or a pytree of them), got {got}"
    )


def named_leaves(prediction: Any) -> Iterator[tuple[str, Any]]:
    """(key path, leaf), such as ("['energy']", x); for types without key paths ("leaf 0", x)."""
    try:
        for path, x in pytree.tree_flatten_with_path(prediction)[0]:
            yield pytree.keystr(path), x
    except ValueError:
        yield from ((f" (leaf {k})", x) for k, x in enumerate(leaves(prediction)))


def spread(owner: str, name: str, given: Any, prediction: Any) -> Any:
    """The str `given` for every leaf of the prediction, or a structure of them, each for all that it has in its place.

    ValueError where the structures differ, TypeError for leaves that are no str.
    """
    if isinstance(given, str):
        return mapped(lambda _: given, prediction)
    if not all(isinstance(one, str) for one in leaves(given)):
        path, one = next((path, one) for path, one in named_leaves(given) if not isinstance(one, str))
        raise TypeError(f"{owner}: {name}{path} must be a str, got {type(one).__name__}")
    try:
        return pytree.tree_map(lambda one, part: mapped(lambda _: one, part), given, prediction)
    except ValueError as error:
        paths = [path for path, _ in named_leaves(prediction)]
        raise ValueError(f"{owner}: {name} must have the structure of the prediction, {paths}, got {given}") from error
