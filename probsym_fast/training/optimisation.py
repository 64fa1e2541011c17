"""Optimiser and learning-rate schedule."""

from __future__ import annotations

from typing import Any

from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from probsym_fast.models import Symmetrized
from probsym_fast.training.settings import Training

OPTIMIZERS = {"adam": Adam, "adamw": AdamW}


def factor(step: int, warmup: int, decay: str, total: int) -> float:
    """Learning-rate factor of step `step` (from 0) of `total`.

    step / warmup during the warm-up. Then 1 with decay "none", max(0, total - step) / (total - warmup) with "linear".
    Raises ValueError if a linear decay has no steps (total <= warmup).
    """
    if decay == "linear" and total <= warmup:
        raise ValueError(f"factor: total must be more than the {warmup} warm-up steps, got {total}")
    if step < warmup:
        return step / warmup
    return 1.0 if decay == "none" else max(0, total - step) / (total - warmup)


def horizon(settings: Training, batches: int) -> tuple[int, int]:
    """(warm-up steps, total steps) of a run with `batches` batches per epoch.

    Raises ValueError if a linear decay would have no steps.
    """
    epoch = -(-batches // settings.accumulate)
    warmup, total = settings.warmup_steps or settings.warmup * epoch, settings.epochs * epoch
    if settings.steps is not None:
        total = min(total, settings.steps)
    if settings.decay == "linear" and warmup >= total:
        key = "warmup_steps" if settings.warmup_steps else "warmup"
        raise ValueError(
            f"config: training.{key} must be shorter than the run ({total} steps) when decay is linear, got {warmup} steps"
        )
    return warmup, total


def parameter_groups(model: Symmetrized, settings: Training) -> list[dict[str, Any]]:
    """One group of all parameters, or two if the backbone has its own learning rate: the rest and the backbone."""
    if settings.lr_pretrained is None:
        return [{"params": list(model.parameters())}]
    backbone = list(model.backbone.parameters())
    pretrained = {id(parameter) for parameter in backbone}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in pretrained]
    return [{"params": rest}, {"params": backbone, "lr": settings.lr_pretrained}]


def optimizer(model: Symmetrized, settings: Training) -> Optimizer:
    """Adam or AdamW over the groups; fused, unless gradients must be unscaled before the step so that they can be clipped."""
    unscaled = settings.precision == "16-mixed" and settings.clip is not None  # fused steps do their own unscaling
    return OPTIMIZERS[settings.optimizer](
        parameter_groups(model, settings), lr=settings.lr, weight_decay=settings.weight_decay, fused=not unscaled
    )


def schedule(optimizer: Optimizer, settings: Training, batches: int) -> LambdaLR:
    """The schedule of all groups, given the batches per epoch. Raises as `horizon`."""
    warmup, total = horizon(settings, batches)
    return LambdaLR(optimizer, lambda step: factor(step, warmup, settings.decay, total))
