"""Callbacks: early stopping, signals, progress."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar

if TYPE_CHECKING:  # it imports this file
    from probsym_fast.training.module import TrainingModule


class Stopped(Exception):
    """A signal ended the training; `status` is the matching exit status."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"stopped; continue with --resume (run folder {folder})")
        self.status = 128 + number


class StopOnSignal(Callback):
    """SIGINT and SIGTERM end training after the current step, so that no file is cut off; a second one ends it at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number: int | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # the trainer restores the handlers
            before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

            def note(number: int, frame: FrameType | None) -> None:
                self.number = number
                signal.signal(number, before[number])

            for number in before:
                signal.signal(number, note)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.number is not None, all=False):
            raise Stopped(self.number or signal.SIGTERM, self.folder)


class StopAtStep(Callback):
    """Ends a run after `steps` steps, even within an epoch, with a validation and a checkpoint.

    The trainer's own max_steps would make a resumed run count its epochs differently.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step >= self.steps:  # resumed with nothing left to do
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.steps:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True  # validates on stopping


class Patience(EarlyStopping):
    """Early stopping whose patience may change in a resumed run."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.wait_count >= self.patience:  # resumed after it had run out
            trainer.should_stop = True


class ProgressLines(ProgressBar):
    """Prints a line per validation, for when there is no terminal to draw a bar on."""

    enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.enabled or not validated(trainer):
            return
        training = cast("TrainingModule", module)
        measures = {name: value for name, value in trainer.callback_metrics.items() if name in training.shown}
        text = "  ".join(f"{name} {value:.5f}" for name, value in sorted(measures.items()))
        steps = training.training_settings.steps
        if steps is None:
            place = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        else:
            place = f"step {trainer.global_step}/{steps}"
        print(f"{place}  {text}", file=sys.stderr, flush=True)


def validated(trainer: L.Trainer) -> bool:
    """Whether the epoch now ending has been validated."""
    every = trainer.check_val_every_n_epoch
    assert every is not None  # `make_trainer` sets it
    return (trainer.current_epoch + 1) % every == 0
