"""How far a model is from equivariant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checkpointing import restored_buffers
from probsym_fast._checks import check_count, check_type
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
    """`|f(g x) - g f(x)| / |g f(x)|` over random elements g: root mean squares over all entries and `moves` uniform elements.

    Both sides of a `Symmetrized` model draw their own noise, so that the error of an equivariant one is that of two means
    over `samples`: it falls as 1 / sqrt(samples). It runs without gradients, in the model's mode, and leaves the
    model's buffers as they are.

    model: a `Symmetrized`, or any function of a batch that returns the prediction; then `group` and `output` must be given.
    batch: `Graphs`, `PointClouds` or another one with the methods `moved` (g x) and `carried` (g f(x)).
    group: that g is drawn from; None: the model's own.
    output: layout of the prediction, as `Group.act` has it: "np" positions, "nv" vectors, "nc" values of nodes, "c"
        invariant. None: what the model's readout declares (`layout`).
    seed: of g and the noise. scale: that the root mean square of the difference is divided by, in place of |g f(x)|.

    Raises TypeError for other types, ValueError where group or output is not known, and what the model raises.
    """
    owner = "equivariance_error"
    check_batch(owner, batch, "moved", "carried")
    samples, moves = check_count(owner, "samples", samples), check_count(owner, "moves", moves)
    ours = model if isinstance(model, Symmetrized) else None
    if not callable(model):
        raise TypeError(f"{owner}: model must be a Symmetrized or a function, got {type(model).__name__}")
    if ours is not None:
        group = ours.distribution.group if group is None else group
        output = getattr(ours.readout, "layout", None) if output is None else output
    for name, value, kind in (("group", group, Group), ("output", output, str)):
        if value is None:
            raise ValueError(f"{owner}: {name} must be given: the model does not define it")
        check_type(owner, name, value, kind, f"a {kind.__name__}")
    difference = size = 0.0
    assert group is not None
    movable: Any = batch  # `check_batch` found the two methods
    f: Callable[..., Tensor] = partial(_prediction, ours, samples) if ours is not None else lambda x, _: model(x)
    with restored_buffers(*([model] if isinstance(model, nn.Module) else [])):
        for k in range(moves):
            g = group.uniform(batch, 1, Draws(seeded(seed, "moved by", k)))
            expected = movable.carried(group, g, f(batch, seeded(seed, "here", k)), output)
            found = f(movable.moved(group, g), seeded(seed, "there", k))
            difference += (found - expected).double().square().mean().item() / moves
            size += expected.double().square().mean().item() / moves
    return difference**0.5 / (size**0.5 if scale is None else scale)


def _prediction(model: Symmetrized, samples: int, batch: Any, generator: torch.Generator) -> Tensor:
    return model(batch, samples, generator)[0]
