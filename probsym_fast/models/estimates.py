"""The mean over samples with its standard error, sampling until the error is small enough."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from probsym_fast._checks import as_number, check_counts, under_vmap
from probsym_fast.groups import Batch, Draws
from probsym_fast.models.passes import Pass

LEAST_BLOCKS = 8  # before `estimate` may stop: the standard error of two blocks is 0 wherever they agree


class Estimate(NamedTuple):
    """prediction: the mean over samples. standard_error: of each entry, of the same shape; NaN after a single block.

    samples: the number of samples drawn.
    """

    prediction: Tensor
    standard_error: Tensor
    samples: int


@torch.no_grad()
def estimate(
    model: nn.Module, batch: Batch, samples: int, draws: Draws, tolerance: float | None, step: int
) -> Estimate:
    """`Symmetrized.estimate`.

    Means of blocks of samples are independent, so the variance of their mean is theirs divided by their number. Accumulated
    with Chan's formula in float32 or better.
    """
    samples, step = check_counts("estimate", samples=samples, step=step)
    if model.training:
        raise RuntimeError("estimate: the model must be in eval mode, got training mode")
    if model.samples_mesh is not None:
        raise ValueError(f"estimate: the model's samples_mesh must be None, got {model.samples_mesh}")
    if tolerance is not None:
        if (number := as_number(tolerance)) is None:
            raise TypeError(f"estimate: tolerance must be a number, got {type(tolerance).__name__} {tolerance!r}")
        if not number >= 0:
            raise ValueError(f"estimate: tolerance must be at least 0, got {number}")
        if under_vmap():
            raise RuntimeError(
                f"estimate: tolerance must be None under vmap, where no single error ends it, got {number}"
            )
        tolerance = number
    block = model.distribution.group.block(draws.kind)
    samples, step = (-(-count // block) * block for count in (samples, step))
    mean = squares = error = None
    done = 0  # blocks
    while done * block < samples:
        count = min(step, samples - done * block)
        each, _ = model.chunks.run(Pass(model, batch, count, draws=draws.starting(done * block), reduce="none"))
        dtype, n = each.dtype, count // block
        each = each.to(torch.promote_types(dtype, torch.float32)).unflatten(0, (n, block)).mean(1)
        here = each.mean(0)
        spread = (each - here).square().sum(0)
        if mean is None:
            mean, squares = here, spread
        else:
            total, difference = done + n, here - mean
            mean = mean + difference * (n / total)
            squares = squares + spread + difference.square() * (done * n / total)
        done += n
        error = (squares / (done - 1) / done).sqrt() if done > 1 else torch.full_like(mean, torch.nan)
        if tolerance is not None and done >= LEAST_BLOCKS and float(error.max()) <= tolerance:
            break
    return Estimate(mean.to(dtype), error, done * block)
