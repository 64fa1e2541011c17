"""Checkpoints: when they are written, atomically, and how they are read."""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from probsym_fast._files import write_atomically
from probsym_fast._untrusted import load_tensors, reason
from probsym_fast.training.callbacks import validated
from probsym_fast.training.logs import sync_rows
from probsym_fast.training.settings import Monitor

Model = TypeVar("Model", bound=nn.Module)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: after a crash the file is the old one or the new one, never a part.

    state: the checkpoint to resume from, already read and checked.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        super().__init__()
        self._state = state

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """The given state on the first call, without reading the file again; afterwards `load_checkpoint(path)`."""
        state, self._state = self._state, None
        return load_checkpoint(Path(path)) if state is None else state

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError(f"AtomicCheckpointIO: storage_options must be None, got {storage_options!r}")
        buffer = BytesIO()  # in memory first: torch reports a full disk as an internal error
        torch.save(checkpoint, buffer)
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))


class Checkpoints(ModelCheckpoint):
    """Keeps best.ckpt by the monitor, or last.ckpt without one: after every validation.

    last.ckpt is also written after an epoch without a validation, if the one before is `SECONDS` old.

    A resumed run may have moved to another folder or validate at other epochs. If it now monitors another measure, its
    first checkpoint counts as the best so far.
    """

    SECONDS = 120.0

    def __init__(self, folder: Path, filename: str, monitor: Monitor | None = None):
        super().__init__(
            folder,
            filename=filename,
            monitor=monitor.key if monitor else None,
            mode=monitor.direction if monitor else "min",
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
        )

    @property
    def state_key(self) -> str:
        return f"checkpoint {self.filename}"

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._written = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if validated(trainer) or self._due(trainer):
            sync_rows(trainer)  # a checkpoint's log is there before it
            super().on_train_epoch_end(trainer, module)
            self._written = time.monotonic()

    def _due(self, trainer: L.Trainer) -> bool:
        if self.monitor is not None:
            return False
        old = time.monotonic() - self._written >= self.SECONDS
        return trainer.strategy.reduce_boolean_decision(old, all=False)  # the same in all processes

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["monitor"] != self.monitor:
            return
        moved = {name: self._here(path) for name, path in state.items() if name.endswith("_path")}
        scores = {self._here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict({**state, **moved, "best_k_models": scores, "dirpath": self.dirpath})

    def _here(self, path: str) -> str:
        assert self.dirpath is not None  # given to __init__
        return str(Path(self.dirpath) / Path(path).name) if path else path


class KeptWeights(Callback):
    """Keeps the weights after every `every` epochs, as epoch<number>.ckpt."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            path = kept_weights(self.folder, trainer.current_epoch + 1)
            trainer.save_checkpoint(path, weights_only=True)


def kept_weights(folder: Path, epochs: int) -> Path:
    """Path of the weights after `epochs` epochs, in a folder of checkpoints."""
    return folder / f"epoch{epochs}.ckpt"


def best_so_far(state: dict[str, Any]) -> dict[str, Any] | None:
    """Epoch, monitor and value that picked a best checkpoint; None if it does not say."""
    kept = state.get("callbacks", {}).get("checkpoint best", {})
    if kept.get("best_model_score") is None:
        return None
    return {"epoch": state["epoch"] + 1, "monitor": kept["monitor"], "value": float(kept["best_model_score"])}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU. Raises FileNotFoundError if it is missing, ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} must exist, found nothing there; train first with `probsym fit`")
    try:
        state = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} must be an intact checkpoint, got {error}") from None
    if not isinstance(state, dict) or "state_dict" not in state:
        raise ValueError(f"checkpoint: {path} must hold a state_dict, got {type(state).__name__}")
    return state


def with_weights(model: Model, path: Path, state: dict[str, Any]) -> Model:
    """The model with the weights in `state`, read from `path`. Raises ValueError if they do not match the model."""
    module = nn.Module()
    module.model = model  # the names are those of a TrainingModule
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} must match the configured model, got {reason(error)}") from error
    return model


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to continue from: last.ckpt, else best.ckpt, else None.

    Only best.ckpt exists if the run was killed between its first two checkpoints; it is just as complete.
    """
    for name in ("last", "best"):
        if (path := folder / "checkpoints" / f"{name}.ckpt").exists():
            return path
    return None
