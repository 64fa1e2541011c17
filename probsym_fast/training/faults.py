"""Faults that end a training from outside, and their messages: full disks, dead processes, a loss that is not finite."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from probsym_fast._files import FULL
from probsym_fast.training.checkpoints import last_checkpoint, load_checkpoint
from probsym_fast.training.loading import WorkerDied

UNWRITABLE = FULL | {errno.EROFS}  # raised only by writing
CLOSED = {errno.EACCES, errno.EPERM}  # also raised by reading and other calls
NONE = 2**62  # no step


class Fault(RuntimeError):
    """A training that ended but can continue from its last checkpoint; the message says why it ended."""


@contextmanager
def faults_reported(folder: Path) -> Iterator[None]:
    """Turns a failed write or a dead process into a Fault that says what is left of the run."""
    try:
        yield
    except Fault as error:
        raise Fault(f"{error}; {left(folder)}") from error.__cause__
    except (OSError, RuntimeError) as error:
        why = _unwritable(error, folder) or _dead(error)
        if why is None:
            raise
        raise Fault(f"fit: {why} {str(error).strip()}; {left(folder)}") from error


def _unwritable(error: Exception, folder: Path) -> str | None:
    """The start of the message for a failed write; None for other errors. CLOSED errors count only inside the folder."""
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes | Path) else None
    inside = path is not None and path.absolute().is_relative_to(folder.absolute())
    # errors of torch's shared memory and of loader workers have no number
    full = number in UNWRITABLE or os.strerror(errno.ENOSPC) in str(error)
    if not (full or (number in CLOSED and inside)):
        return None
    if path is None:
        return "every disk in use (run folder, temporary files, shared memory) must be writable and have space, got"
    return f"{path} must be writable, got"


def _dead(error: Exception) -> str | None:
    """The start of the message for a dead process; None for other errors."""
    if isinstance(error, WorkerDied) or str(error).startswith("DataLoader worker (pid"):  # torch's own message
        return "a data-loader worker died (out of memory?):"
    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)  # gloo has no error type of its own
    if isinstance(error, distributed.DistError) or gloo:
        return "another training process died (its own output may say why):"
    return None


def left(folder: Path) -> str:
    """What an ended run has kept, in words."""
    last = last_checkpoint(folder)
    if last is None:
        return f"there is no checkpoint in {folder} yet"
    try:
        epochs = load_checkpoint(last)["epoch"] + 1
    except (OSError, ValueError) as error:
        return str(error)
    except LookupError:
        return f"{last} holds no epoch"
    return f"{last} is intact (epoch {epochs}): continue with --resume"


class StopOnNonFinite(Callback):
    """Ends a training whose loss is not finite, or whose weights are not finite when a checkpoint is due.

    A single process on the CPU checks before every backward pass. Elsewhere the first bad step is recorded on the device and
    read every `every` steps and at the end of an epoch, so that no step waits for the device.
    """

    def __init__(self, every: int = 100):
        self.every = every
        self._first: Tensor | None = None  # (): the first bad step, from 1; NONE: none

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        loss, step = loss.detach(), trainer.global_step + 1
        if self._at_once(trainer, loss):
            if not loss.isfinite():
                raise _not_finite("loss", loss.item(), step, trainer)
            return
        if self._first is None:
            self._first = torch.full_like(loss, NONE, dtype=torch.int64)
        self._first = torch.where(loss.isfinite() | (self._first != NONE), self._first, step)

    @staticmethod
    def _at_once(trainer: L.Trainer, loss: Tensor) -> bool:
        return loss.device.type == "cpu" and trainer.world_size == 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look(trainer)
        with torch.no_grad():
            whole = torch.stack([_local(p).isfinite().all() for p in module.parameters()]).all()
        if trainer.strategy.reduce_boolean_decision(not whole, all=False):
            raise _not_finite("weights", "nan or inf", trainer.global_step, trainer)

    def _look(self, trainer: L.Trainer) -> None:
        first = NONE if self._first is None else int(self._first)
        if trainer.strategy.reduce_boolean_decision(first != NONE, all=False):
            raise _not_finite("loss", "nan or inf", trainer.global_step if first == NONE else first, trainer)


def too_large(chunk: int, trainer: L.Trainer) -> Fault:
    """The fault for an out-of-memory error, with chunks "auto", in a backward pass that cannot be repeated."""
    why = f"precision {trainer.precision}" if trainer.world_size == 1 else f"{trainer.world_size} processes"
    wanted = f"samples.chunk must be a number when a backward pass cannot be repeated ({why})"
    place = f"step {trainer.global_step + 1}, epoch {trainer.current_epoch + 1}"
    return Fault(f"fit: {wanted}, got 'auto', which ran out of memory at {chunk} in {place}")


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _not_finite(name: str, got: object, step: int, trainer: L.Trainer) -> Fault:
    place = f"step {step}, epoch {trainer.current_epoch + 1}"
    return Fault(f"fit: {name} must be finite, got {got} in {place}; a smaller training.lr or a training.clip may help")
