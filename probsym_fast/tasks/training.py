"""Training and testing of any task with Lightning: logs, checkpoints, resume, plots in one run folder."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from probsym_fast.data._store import write_atomically
from probsym_fast.tasks import config as configuration
from probsym_fast.tasks.plots import plot_losses
from probsym_fast.tasks.task import Task, seeded


@dataclass
class Training:
    """How a task is trained.

    Args:
        epochs: passes over the training set.
        batch: graphs a step.
        lr: learning rate of Adam.
        weight_decay: weight decay of Adam.
        entropy: weight of the permutation's entropy in the loss.
        patience: stop when the validation measure has not improved for so many validations; null: never.
        validate_every: epochs between validations and checkpoints.
        precision: as Lightning's Trainer takes it, "32-true" or "bf16-mixed".
        accelerator: "auto", "cpu" or "gpu".
        devices: number of devices, or "auto".
        deterministic: ask torch for deterministic algorithms.
        progress: show a progress bar.
    """

    epochs: int = 10_000
    batch: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-12
    entropy: float = 0.1
    patience: int | None = None
    validate_every: int = 1
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str = 1
    deterministic: bool = True
    progress: bool = True


class TrainingModule(L.LightningModule):
    """Loss = task's loss + entropy weight * penalty; noise of each step from (seed, step) alone."""

    def __init__(self, task: Task):
        super().__init__()
        self.task, self.model = task, task.model()
        self.training_settings: Training = task.config.training
        self.shown = (f"train/{task.measure}", f"valid/{task.measure}")

    def forward(self, inputs: Any, samples: int, generator: torch.Generator | None = None):
        return self.model(inputs, samples, generator)

    def on_train_epoch_start(self) -> None:
        # dropout draws from the global generator: its state at an epoch's start is the same when resumed
        torch.manual_seed(self.task.config.seed * 1_000_003 + self.current_epoch)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs, target = self.task.inputs(batch)
        generator = seeded(self.task.config.seed, "train", self.global_step, self.device)
        prediction, penalties = self.model(inputs, self.task.config.samples.train, generator)
        loss = self.task.loss(prediction, target)
        self._log("train", loss, len(target), on_step=False, on_epoch=True, prog_bar=True)
        for name, value in penalties.items():
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=len(target))
            loss = loss + self.training_settings.entropy * value
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        inputs, target = self.task.inputs(batch)
        generator = seeded(self.task.config.seed, "valid", index, self.device)
        prediction, _ = self.model(inputs, self.task.config.samples.valid, generator)
        self._log("valid", self.task.loss(prediction, target), len(target), prog_bar=True)

    def _log(self, stage: str, loss: torch.Tensor, size: int, **where: bool) -> None:
        self.log(f"{stage}/{self.task.measure}", loss, batch_size=size, **where)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.training_settings
        return torch.optim.Adam(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


class LossPlot(Callback):
    """Draws the losses into the run's folder when training ends, interrupted or not."""

    def __init__(self, folder: Path, measure: str):
        self.folder, self.measure = folder, measure

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            plot_losses(self.folder, self.measure)


class ProgressLines(ProgressBar):
    """A line a validation, where there is no terminal for a bar; the loop's state is Lightning's."""

    def disable(self) -> None:
        self.enabled = False

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
            return
        measures = {name: value for name, value in trainer.callback_metrics.items() if name in module.shown}
        text = "  ".join(f"{name} {value:.5f}" for name, value in sorted(measures.items()))
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}", file=sys.stderr, flush=True)


def run_folder(config: Any) -> Path:
    """Where a configuration's run lives: `folder`, or runs/<task>/<name>/seed<seed>."""
    return Path(config.folder) if config.folder else Path("runs") / config.task / config.name / f"seed{config.seed}"


def fit(task: Task, *, resume: bool = False) -> dict[str, Any]:
    """Trains, tests the best checkpoint, and returns the report's figures.

    Raises FileExistsError where the run's folder exists (and `resume` is not asked for), FileNotFoundError where there is
    nothing to resume.
    """
    config = task.config
    folder = run_folder(config)
    last = folder / "checkpoints" / "last.ckpt"
    if resume:
        load_checkpoint(last)
        _same_configuration(folder, config)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"fit: the run folder {folder} exists already; continue it with --resume, or name another with --folder"
        )
    else:
        _write(folder / "config.yaml", configuration.dump(config))
    L.seed_everything(config.seed, workers=True, verbose=False)
    module = TrainingModule(task)
    trainer = _trainer(task, folder)
    trainer.fit(module, task.loader("train"), task.loader("valid"), ckpt_path=str(last) if resume else None)
    if trainer.interrupted:
        raise KeyboardInterrupt(f"stopped; continue with --resume (run folder {folder})")
    return test(task)


def test(task: Task) -> dict[str, Any]:
    """Loads the best checkpoint of the task's run, tests it, writes results.json and plots, and returns the figures."""
    folder = run_folder(task.config)
    module = TrainingModule(task)
    best = folder / "checkpoints" / "best.ckpt"
    try:
        module.load_state_dict(load_checkpoint(best)["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"test: {best} does not fit the configured model: {error}") from error
    wanted = task.config.training.accelerator
    device = "cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    model = module.model.to(device).eval()
    with torch.no_grad():
        results = task.report(model, folder)
    _write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents on the CPU. FileNotFoundError where there is none, ValueError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} must exist, found nothing there; train first with `probsym fit`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each raise their own
        raise ValueError(
            f"checkpoint: {path} must be a whole checkpoint, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(state, dict) or "state_dict" not in state:
        raise ValueError(f"checkpoint: {path} must hold a state_dict, got {type(state).__name__}")
    return state


def _trainer(task: Task, folder: Path) -> L.Trainer:
    settings: Training = task.config.training
    monitor = f"valid/{task.measure}"
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder / "checkpoints",
            filename="best",
            monitor=monitor,
            save_top_k=1,
            save_last=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
            every_n_epochs=settings.validate_every,
        ),
        LossPlot(folder, task.measure),
    ]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(monitor, patience=settings.patience))
    if settings.progress:
        callbacks.append(RichProgressBar() if sys.stderr.isatty() else ProgressLines())
    for noise in (".*does not have many workers.*", ".*treespec, LeafSpec.*", "Checkpoint directory .* is not empty"):
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return L.Trainer(
        max_epochs=settings.epochs,
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=settings.precision,
        deterministic=settings.deterministic,
        check_val_every_n_epoch=settings.validate_every,
        callbacks=callbacks,
        logger=[
            CSVLogger(folder, name="logs", flush_logs_every_n_steps=20),
            TensorBoardLogger(folder, name="tensorboard"),
        ],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _same_configuration(folder: Path, config: Any) -> None:
    """ValueError where a resumed run's model or data would differ; epochs and the like may."""
    before = configuration.read(folder / "config.yaml")
    now = configuration.read_text(configuration.dump(config))
    for key in before.keys() | now.keys():
        if key not in ("training", "folder", "samples") and before.get(key) != now.get(key):
            raise ValueError(f"resume: {key} was {before.get(key)!r} in {folder}, got {now.get(key)!r}")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
