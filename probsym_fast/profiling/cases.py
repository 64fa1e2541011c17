"""What is measured: a model, a batch and a loss, from a given model or a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsym_fast.models import Symmetrized
from probsym_fast.models.chunks import Chunks
from probsym_fast.models.predictions import real_leaves
from probsym_fast.profiling.arguments import checked_device
from probsym_fast.profiling.steps import Loss, move


@dataclass(frozen=True)
class Case:
    """A model and a batch on one device, and the training loss.

    settings: further arguments of `steps.training_steps`.
    """

    name: str
    model: Symmetrized
    batch: Any
    loss: Loss
    settings: dict[str, Any] = field(default_factory=dict)


def prepared(what: Any, batch: Any, device: Any, weights: str | Path | None = None) -> Case:
    """The case of a task (`Task.case`), or of a model and a batch with the mean squares of the prediction as loss.

    device: None: the batch's device; for a task the GPU if there is one. weights: a checkpoint, only for a task.
    """
    if isinstance(what, Symmetrized):
        if batch is None:
            raise TypeError("profile: batch must be given with a model, got None")
        if weights is not None:
            raise TypeError(f"profile: weights must be None with a model, which has its own, got {str(weights)!r}")
        device = batch.device if device is None else checked_device(device)
        return Case("model", what.to(device), move(batch, device), _squares)
    if not hasattr(what, "case"):
        raise TypeError(f"profile: what must be a Symmetrized or a task that trains a model, got {type(what).__name__}")
    device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return what.case(device, None if weights is None else Path(weights))


def _squares(prediction: Any, penalties: Mapping[str, Tensor]) -> Tensor:
    """The sum of the penalties and of the mean square of each leaf of the prediction."""
    squares: Any = [x.float().square().mean() for x in real_leaves(prediction)]
    return sum([*squares[1:], *penalties.values()], squares[0])


@contextmanager
def kept(model: Symmetrized) -> Iterator[None]:
    """Restores weights, buffers, gradients, modes, chunks and draws of the model on exit. Inside, gradients start empty."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(part, part.training) for part in model.modules()]
    chunks, draws = model.chunks, model.draws
    model.zero_grad()
    try:
        yield
    finally:
        model.chunks, model.draws = chunks, draws
        model.load_state_dict(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training


def chunks_like(model: Symmetrized, size: int | str | None) -> Chunks:
    """New chunks of this size; "auto" keeps the model's memory limit."""
    return Chunks(size, model.chunks.memory if size == "auto" else None)
