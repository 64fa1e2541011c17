"""The mean over samples with its standard error, sampling until the error is small enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probsym_fast._autocast import promoted
from probsym_fast._checks import as_number, check_counts, under_vmap
from probsym_fast.groups import Batch, Draws
from probsym_fast.models.passes import Pass
from probsym_fast.models.predictions import leaves, mapped
from probsym_fast.models.reductions import Reduction

REDUCTIONS = "mean", "weighted"
STEP = 8
LEAST_BLOCKS = 8  # before `estimate` may stop: the standard error of two blocks is 0 wherever they agree


class Estimate(NamedTuple):
    """prediction: the mean over samples. standard_error: of each entry, in the same structure and shapes.

    It is 0 where the samples are exact, such as a whole `Orbit`, and NaN after a single block of others. For a complex entry
    it is that of the distance |.| in the plane: the root of the summed squares of the real and the imaginary part's errors.
    samples: the number of samples drawn.
    """

    prediction: Any
    standard_error: Any
    samples: int


class Moments:
    """Mean and variance of blocks that come in parts, (n, ...) each; Chan's formula, in float32 or better."""

    def __init__(self, dtype: torch.dtype, exact: bool):
        self.dtype, self.exact, self.blocks = dtype, exact, 0
        self.mean = self.squares = torch.zeros(())

    def add(self, part: Tensor) -> None:
        n, here = part.shape[0], part.mean(0)
        spread = (part - here).abs().square().sum(0)
        if self.blocks == 0:
            self.mean, self.squares = here, spread
        else:
            total, difference = self.blocks + n, here - self.mean
            self.mean = self.mean + difference * (n / total)
            self.squares = self.squares + spread + difference.abs().square() * (self.blocks * n / total)
        self.blocks += n

    @property
    def prediction(self) -> Tensor:
        return self.mean.to(self.dtype)

    @property
    def error(self) -> Tensor:
        """The standard error of the mean; 0 for an exact one, NaN for one other block."""
        if self.exact:
            return torch.zeros_like(self.squares)
        if self.blocks == 1:
            return torch.full_like(self.squares, torch.nan)
        return (self.squares / (self.blocks - 1) / self.blocks).sqrt()


@torch.no_grad()
def estimate(
    model: nn.Module, batch: Batch, samples: int | None, draws: Draws, tolerance: float | None, step: int | None
) -> Estimate:
    """`Symmetrized.estimate`.

    Means of blocks of samples are independent, so the variance of their mean is theirs divided by their number. With weights,
    or noise that all samples of a call share, a step is a block: a call of its own. One block is enough where it is exact.
    """
    if samples is None and (samples := _exact(model)) is None:
        name = type(model.distribution).__name__
        raise TypeError(f"estimate: samples must be an int where elements are drawn at random ({name}), got None")
    samples, step = check_counts("estimate", samples=samples, step=_step(model) if step is None else step)
    if model.training:
        raise RuntimeError("estimate: the model must be in eval mode, got training mode")
    if model.samples_mesh is not None:
        raise ValueError(f"estimate: the model's samples_mesh must be None, got {model.samples_mesh}")
    if model.reduce not in REDUCTIONS:
        raise ValueError(f"estimate: the model's reduce must be one of {REDUCTIONS}, got {model.reduce!r}")
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
    calls = model.reduce == "weighted" or getattr(model.distribution, "shares_noise", False)  # each step is one
    block = min(step, samples) if calls else _block(model, draws)
    samples, step = (-(-count // block) * block for count in (samples, block if calls else step))
    exact = _is_exact(model, block)
    if exact:  # another block would be the same
        samples = step = block
    reduction = model._reduction(None, None, None) if calls else Reduction("none")
    reduction.check(batch, step, model.distribution)
    moments: Any = None  # `Moments` in the prediction's structure
    done = 0  # samples
    while done < samples:
        count = min(step, samples - done)
        noise = draws.fork(done // step) if calls else draws.starting(done)
        one = Pass(model, batch, count, draws=noise, reduction=reduction)
        found, _ = model.chunks.run(one)
        done += count
        moments = mapped(lambda x: Moments(x.dtype, exact), found) if moments is None else moments
        for each, x in zip(leaves(moments), leaves(found), strict=True):
            x = x.to(promoted(x.dtype, torch.float32))
            each.add(x[None] if calls else x.unflatten(0, (-1, block)).mean(1))
        if tolerance is not None and done >= LEAST_BLOCKS * block:
            errors = [each.error for each in leaves(moments)]
            if max((float(error.max()) for error in errors if error.numel()), default=0.0) <= tolerance:
                break
    prediction, error = (mapped(lambda x, name=name: getattr(x, name), moments) for name in ("prediction", "error"))
    return Estimate(prediction, error, done)


def _is_exact(model: Any, samples: int) -> bool:
    """Whether the mean over this many samples has no noise."""
    of_samples = getattr(model.distribution, "is_exact", None)
    return of_samples is not None and of_samples(samples, model.reduce == "weighted")


def _exact(model: Any) -> int | None:
    """The number of samples of a forward pass where none is given, if their mean has no noise."""
    samples = getattr(model.distribution, "default_samples", 1)
    return samples if _is_exact(model, samples) else None


def _block(model: Any, draws: Draws) -> int:
    """Samples that depend on each other."""
    of_samples = model.distribution if hasattr(model.distribution, "block") else model.distribution.group
    return of_samples.block(draws.kind)


def _step(model: Any) -> int:
    """Samples of a step where none are given."""
    most = getattr(model.distribution, "most", None) if model.reduce == "weighted" else None
    return STEP if most is None else min(STEP, most)
