"""Training steps of the experiments, for the benchmarks of samples and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from probsym_fast import tasks
from probsym_fast.profiling.cases import prepared
from probsym_fast.profiling.steps import training_steps
from probsym_fast.training.allocator import keep_freed_memory


def steps_of(
    configuration: str, changes: list[str], device: str, samples: int, spread: Callable[[Any], nn.Module] | None = None
) -> tuple[Any, Callable[[], None], Callable[[], Any]]:
    """The model, its training step, and its forward pass with the loss. spread: wraps the model for training."""
    keep_freed_memory()  # as training does
    case = prepared(tasks.load(configuration, changes), None, device)
    model, batch, loss = case.model, case.batch, case.loss
    trained = model
    if spread is not None:
        trained = spread(model)
        trained.chunks = model.chunks  # the only attribute of the model that a step reads
    return (
        model,
        training_steps(trained, batch, samples, loss, **case.settings).step,
        lambda: loss(*trained(batch, samples)),
    )
