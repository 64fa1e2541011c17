"""Equivariance error of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checkpointing import restored_buffers
from probsym_fast._checks import as_number, check_count, check_type, under_vmap
from probsym_fast.batches import Batch, check_batch
from probsym_fast.draws import Draws, seeded
from probsym_fast.groups import Group
from probsym_fast.models import Symmetrized


@torch.no_grad()
def equivariance_error(
    model: Symmetrized | Callable[[Any], Tensor],
    batch: Batch,
    samples: int = 1,
    *,
    group: Group | None = None,
    output: str | None = None,
    seed: int = 0,
    moves: int = 1,
    scale: float | None = None,
) -> float:
    """`|f(g x) - g f(x)| / |g f(x)|` for random g: root mean squares over all entries and `moves` uniform elements.

    In a `Symmetrized` model, f(g x) and f(x) draw separate noise. If it is equivariant, they differ only as two means over
    `samples` do, and the error falls as 1 / sqrt(samples). Runs without gradients, in the model's current mode, and restores
    the model's buffers.

    model: a `Symmetrized`, or any function from a batch to the prediction; the latter needs `group` and `output`.
    batch: `Graphs`, `PointClouds` or another batch with the methods `moved` (g x) and `carried` (g f(x)).
    group: the group of g; None: the model's own.
    output: layout of the prediction, as in `Group.act`: "np" positions, "nv" vectors, "nc" values of nodes, "c" invariant.
        None: the `layout` of the model's readout.
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
    samples, moves = check_count(owner, "samples", samples), check_count(owner, "moves", moves)
    ours = model if isinstance(model, Symmetrized) else None
    if not callable(model):
        raise TypeError(f"{owner}: model must be a Symmetrized or a function, got {type(model).__name__}")
    if ours is not None:
        group = ours.distribution.group if group is None else group
        output = getattr(ours.readout, "layout", None) if output is None else output
    if scale is not None and (as_number(scale) is None or not 0 < scale < math.inf):
        raise ValueError(f"{owner}: scale must be a finite number > 0 or None, got {scale!r}")
    for name, value, kind in (("group", group, Group), ("output", output, str)):
        if value is None:
            raise ValueError(f"{owner}: {name} must be given: the model does not define it")
        check_type(owner, name, value, kind, f"a {kind.__name__}")
    assert group is not None and output is not None
    nodes = [axis for axis, letter in enumerate(output, 1) if letter == "n"]
    movable: Any = batch  # `check_batch` has checked for both methods
    theirs: Any = model
    f: Callable[..., Tensor] = partial(_prediction, ours, samples) if ours is not None else lambda x, _: theirs(x)
    difference = size = 0.0
    with restored_buffers(*([model] if isinstance(model, nn.Module) else [])):
        for k in range(moves):
            g = group.anywhere(batch, 1, Draws(seeded(seed, "moved by", k)))
            here, there = f(batch, seeded(seed, "here", k)), f(movable.moved(group, g), seeded(seed, "there", k))
            _check_predictions(here, there)
            expected = movable.carried(group, g, here, output)
            difference += (there - expected).double().square().mean().item() / moves
            if "p" in output and nodes:  # positions are compared by the extent of a cloud, wherever it is
                expected = expected - expected.mean(nodes, keepdim=True)
            size += expected.double().square().mean().item() / moves
    if difference == 0:
        return 0.0
    scale = size**0.5 if scale is None else scale
    return math.inf if scale == 0 else difference**0.5 / scale


def _check_predictions(here: Any, there: Any) -> None:
    """Raises unless both are Tensors of one shape."""
    for y in (here, there):
        if not isinstance(y, Tensor):
            got = f"{type(y).__name__}; return the prediction only, such as model(x)[0]"
            raise TypeError(f"equivariance_error: model must return a Tensor, got {got}")
    if here.shape != there.shape:
        got = f"{tuple(here.shape)} and {tuple(there.shape)}"
        raise ValueError(f"equivariance_error: predictions of both batches must have one shape, got {got}")


def _prediction(model: Symmetrized, samples: int, batch: Any, generator: torch.Generator) -> Tensor:
    return model(batch, samples, generator)[0]
