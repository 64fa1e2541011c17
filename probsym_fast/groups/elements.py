"""Batches (B, S) of elements of any group: selecting some of their samples, and products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from probsym_fast._autocast import promoted, without_autocast
from probsym_fast.ops import Permutation


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the wider of their dtypes, under autocast too: neither elements nor what they move are rounded."""
    dtype = promoted(a.dtype, b.dtype)
    with without_autocast(a.device):
        return a.to(dtype) @ b.to(dtype)


def narrow(g: Any, start: int, count: int) -> Any:
    """Samples start, ..., start + count - 1 of the elements g (B, S): (B, count), views. Gradients: as g's.

    g: a tensor (B, S, ...), a `Permutation`, a tuple of these (`Motion`, elements of a product), or None for a part without
    an element. Raises TypeError for anything else.
    """
    if g is None:
        return None
    if isinstance(g, Tensor):
        return g.narrow(1, start, count)
    if isinstance(g, Permutation):
        return g.narrow(start, count)
    if isinstance(g, tuple):
        parts = (narrow(part, start, count) for part in g)
        return type(g)(*parts) if hasattr(g, "_fields") else tuple(parts)
    raise TypeError(f"narrow: g must be a Tensor, a Permutation or a tuple of these, got {type(g).__name__}")


def taken(g: Any, index: Tensor) -> Any:
    """The samples index (B, S) int64 of the elements g (B, M): (B, S). g: as in `narrow`. Gradients: as g's."""
    if g is None:
        return None
    if isinstance(g, Tensor):
        return g.gather(1, index.view(*index.shape, *[1] * (g.ndim - 2)).expand(*index.shape, *g.shape[2:]))
    if isinstance(g, Permutation):
        parts = {name: taken(getattr(g, name), index) for name in g.by_sample}
        return replace(g, **parts, checked=True)
    if isinstance(g, tuple):
        some = (taken(part, index) for part in g)
        return type(g)(*some) if hasattr(g, "_fields") else tuple(some)
    raise TypeError(f"taken: g must be a Tensor, a Permutation or a tuple of these, got {type(g).__name__}")


def tensors(g: Any) -> Iterator[Tensor]:
    """All tensors (B, S, ...) in the elements g."""
    if isinstance(g, Tensor):
        yield g
    elif isinstance(g, Permutation):
        yield from (getattr(g, name) for name in g.by_sample)
    elif isinstance(g, tuple):
        for part in g:
            yield from tensors(part)


def samples_of(g: Any) -> int:
    """S of the elements g. TypeError if they hold no tensor."""
    first = next(tensors(g), None)
    if first is None:
        raise TypeError(f"samples_of: g must hold tensors (B, S, ...), got {type(g).__name__}")
    return first.shape[1]
