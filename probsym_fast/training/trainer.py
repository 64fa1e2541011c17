"""Sets up Lightning's trainer from a task's configuration."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from probsym_fast.training.callbacks import Patience, ProgressLines, StopAtStep, StopOnSignal
from probsym_fast.training.checkpoints import AtomicCheckpointIO, Checkpoints, KeptWeights
from probsym_fast.training.faults import StopOnNonFinite
from probsym_fast.training.logs import CsvLogger, EpochRows
from probsym_fast.training.parallel import strategy
from probsym_fast.training.settings import Training
from probsym_fast.training.task import Task


def check_devices(settings: Training) -> None:
    """Raises ValueError if the machine lacks the devices, or cannot train in this precision. Warns if that is slow."""
    count = torch.cuda.device_count()
    on_cpu = settings.accelerator == "cpu" or not count
    if settings.accelerator == "gpu" and not count:
        raise ValueError("config: training.accelerator must be auto or cpu when torch sees no GPU, got 'gpu'")
    if settings.accelerator != "cpu" and not isinstance(settings.devices, str) and settings.devices > count > 0:
        raise ValueError(
            f"config: training.devices must be at most {count}, the number of GPUs, got {settings.devices}"
        )
    if settings.precision == "16-mixed" and on_cpu:
        raise ValueError("config: training.precision must be 32-true or bf16-mixed on the CPU, got '16-mixed'")
    if settings.precision == "bf16-mixed" and on_cpu and not _multiplies_bf16():
        warnings.warn(
            "probsym_fast: training.precision bf16-mixed is much slower than 32-true on this CPU, which has no fast bfloat16"
            " products; set training.precision to 32-true.",
            RuntimeWarning,
            stacklevel=2,
        )


def _multiplies_bf16() -> bool:
    """Whether torch multiplies bfloat16 on this CPU by oneDNN, which needs AVX-512 or AMX; without it products are loops."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def make_trainer(
    task: Task,
    folder: Path,
    stop: StopOnSignal,
    steps: int = 0,
    state: dict[str, Any] | None = None,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> L.Trainer:
    """The trainer of a run in this folder; it writes nothing there before it trains.

    steps, state: of the checkpoint to resume from; the trainer gets the state instead of reading the file.
    loggers, callbacks: besides those known by name, and those of every training. A progress bar among them is the only one.
    """
    settings: Training = task.config.training
    validate_every = min(settings.validate_every, settings.epochs)
    own: list[Callback] = [
        Checkpoints(folder / "checkpoints", "best", task.monitor),
        Checkpoints(folder / "checkpoints", "last"),  # last: its file includes the other's state
        stop,
        StopOnNonFinite(),
        EpochRows(),
    ]
    if settings.steps is not None:
        own.append(StopAtStep(settings.steps))
    if settings.patience is not None:
        own.append(Patience(task.monitor.key, mode=task.monitor.direction, patience=settings.patience))
    if settings.keep_every is not None:
        own.append(KeptWeights(folder / "checkpoints", settings.keep_every))
    if settings.progress and not any(isinstance(one, ProgressBar) for one in callbacks):
        own.append(RichProgressBar(console_kwargs={"stderr": True}) if sys.stderr.isatty() else ProgressLines())
    named = {
        "csv": CsvLogger(folder, steps),
        # later steps are logged again
        "tensorboard": TensorBoardLogger(folder, name="tensorboard", version="", purge_step=steps),
    }
    for noise in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        "Checkpoint directory .* is not empty",
        ".*is smaller than the logging interval.*",  # epoch means are logged anyway
    ):
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return L.Trainer(
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=strategy(settings),
        precision=cast(Any, settings.precision),  # of Lightning's literals
        deterministic=settings.deterministic,
        check_val_every_n_epoch=validate_every,
        use_distributed_sampler=False,  # EpochSampler splits the batches itself
        callbacks=[*own, *callbacks],
        logger=[*(logger for name, logger in named.items() if name in settings.logger), *loggers],
        plugins=[AtomicCheckpointIO(state)],
        log_every_n_steps=settings.log_every or 1,
        num_sanity_val_steps=0,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )
