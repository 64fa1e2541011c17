"""Equivariance error of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from probsym_fast._checkpointing import restored_buffers
from probsym_fast._checks import as_number, check_count, check_type, under_vmap
from probsym_fast.batches import Batch, check_batch
from probsym_fast.draws import Draws, seeded
from probsym_fast.groups import Group
from probsym_fast.models import Symmetrized
from probsym_fast.models.predictions import leaves, spread


@torch.no_grad()
def equivariance_error(
    model: Symmetrized | Callable[[Any], Any],
    batch: Batch,
    samples: int | None = None,
    *,
    group: Group | None = None,
    output: Any = None,
    seed: int = 0,
    moves: int = 1,
    scale: float | None = None,
) -> float:
    """`|f(g x) - g f(x)| / |g f(x)|` for random g: root mean squares over all entries and `moves` uniform elements.

    In a `Symmetrized` model, f(g x) and f(x) draw separate noise. If it is equivariant, they differ only as two means over
    `samples` do, and the error falls as 1 / sqrt(samples). Of a prediction with several tensors it is the largest of their
    errors. Runs without gradients, in the model's current mode, and restores the model's buffers.

    model: a `Symmetrized`, or any function from a batch to the prediction; the latter needs `group` and `output`.
    batch: `Graphs`, `PointClouds` or another batch with the methods `moved` (g x) and `carried` (g f(x)).
    samples: of each prediction; None: as in `Symmetrized.forward`.
    group: the group of g; None: the model's own.
    output: layout of the prediction, as in `Group.act`: "np" positions, "nv" vectors, "nc" values of nodes, "c" invariant.
        Of a dict, a tuple or another pytree one layout for all, or the same structure of layouts. None: the `layout` of
        the model's readout.
    seed: seed of g and of the noise. scale: divides the root mean square of the difference, in place of |g f(x)|.
    Of positions |g f(x)| is the distance from the mean of their nodes.

    Raises TypeError for other types, ValueError if group or output is unknown, RuntimeError under torch.vmap, and what the
    model raises.
    """
    owner = "equivariance_error"
    if under_vmap():
        raise RuntimeError(
            f"{owner}: must be called outside torch.vmap, since it returns one float, got a call under it"
        )
    check_batch(owner, batch, "moved", "carried")
    samples = None if samples is None else check_count(owner, "samples", samples)
    moves = check_count(owner, "moves", moves)
    ours = model if isinstance(model, Symmetrized) else None
    if not callable(model):
        raise TypeError(f"{owner}: model must be a Symmetrized or a function, got {type(model).__name__}")
    if ours is not None:
        group = ours.distribution.group if group is None else group
        output = getattr(ours.readout, "layout", None) if output is None else output
    if scale is not None and (as_number(scale) is None or not 0 < scale < math.inf):
        raise ValueError(f"{owner}: scale must be a finite number > 0 or None, got {scale!r}")
    for name, value in (("group", group), ("output", output)):
        if value is None:
            raise ValueError(f"{owner}: {name} must be given: the model does not define it")
    check_type(owner, "group", group, Group, "a Group")
    assert group is not None
    if ours is not None and ours.reduce == "none":
        raise ValueError(f"{owner}: the model's reduce must give one prediction, got 'none'")
    movable: Any = batch  # `check_batch` has checked for both methods
    theirs: Any = model
    f: Callable[..., Any] = partial(_prediction, ours, samples) if ours is not None else lambda x, _: theirs(x)
    errors: list[_Error] = []
    with restored_buffers(*([model] if isinstance(model, nn.Module) else [])):
        for k in range(moves):
            g = group.anywhere(batch, 1, Draws(seeded(seed, "moved by", k)))
            here, there = f(batch, seeded(seed, "here", k)), f(movable.moved(group, g), seeded(seed, "there", k))
            _check_predictions(here, there)
            layouts = leaves(spread(owner, "output", output, here))
            errors = errors or [_Error(layout, moves) for layout in layouts]
            for error, x, y, layout in zip(errors, leaves(here), leaves(there), layouts, strict=True):
                error.add(y, movable.carried(group, g, x, layout))
    return float(torch.tensor([error.relative(scale) for error in errors], dtype=torch.float64).max())  # NaN if one is


class _Error:
    """Mean squares of the differences, and of what was expected, over the moves."""

    def __init__(self, layout: str, moves: int):
        self.layout, self.moves, self.difference, self.size = layout, moves, 0.0, 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        self.difference += _mean_square(found - expected) / self.moves
        nodes = [axis for axis, letter in enumerate(self.layout, 1) if letter == "n"]
        if "p" in self.layout and nodes:  # positions are compared by the extent of a cloud, wherever it is
            expected = expected - expected.mean(nodes, keepdim=True)
        self.size += _mean_square(expected) / self.moves

    def relative(self, scale: float | None) -> float:
        if self.difference == 0:
            return 0.0
        scale = self.size**0.5 if scale is None else scale
        return math.inf if scale == 0 else self.difference**0.5 / scale


def _mean_square(x: Tensor) -> float:
    return x.abs().double().square().mean().item() if x.numel() else 0.0


def _check_predictions(here: Any, there: Any) -> None:
    """Raises unless both are tensors of one shape, or pytrees of them with one structure."""
    for y in (here, there):
        way_out = "; return the prediction only, such as model(x)[0]" if _has_penalties(y) else ""
        if way_out or not all(isinstance(x, Tensor) for x in leaves(y)) or not leaves(y):
            got = f"{type(y).__name__}{way_out}"
            raise TypeError(f"equivariance_error: model must return a Tensor, or a pytree of tensors, got {got}")
    if (a := pytree.tree_structure(here)) != (b := pytree.tree_structure(there)):
        raise ValueError(f"equivariance_error: predictions of both batches must have one structure, got {a} and {b}")
    for x, y in zip(leaves(here), leaves(there), strict=True):
        if x.shape != y.shape:
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"equivariance_error: predictions of both batches must have one shape, got {got}")


def _has_penalties(y: Any) -> bool:
    """Whether y looks like (prediction, penalties)."""
    pair = isinstance(y, tuple) and len(y) == 2 and isinstance(y[1], dict)
    return pair and all(getattr(x, "ndim", None) == 0 for x in leaves(y[1]))


def _prediction(model: Symmetrized, samples: int | None, batch: Any, generator: torch.Generator) -> Any:
    return model(batch, samples, generator)[0]
