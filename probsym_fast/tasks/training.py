"""Training and testing of any task with Lightning: logs, checkpoints, resume, plots in one run folder."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from probsym_fast.data._store import write_atomically
from probsym_fast.models import Symmetrized
from probsym_fast.tasks import config as configuration
from probsym_fast.tasks.allocator import keep_freed_memory
from probsym_fast.tasks.config import COUNT, NOT_NEGATIVE, POSITIVE, Limit, between, one_of
from probsym_fast.tasks.plots import plot_losses
from probsym_fast.tasks.task import Computation, Task, seeded


@dataclass
class Training:
    """How a task is trained.

    Args:
        epochs: passes over the training set.
        batch: graphs a step, on all devices together.
        lr: learning rate of Adam.
        weight_decay: weight decay of Adam.
        warmup: epochs over which the learning rate rises linearly from 0; then it is constant.
        clip: largest norm of the gradient; null: any.
        entropy: weight of the permutation's entropy in the loss.
        patience: stop when the validation measure has not improved for so many validations; null: never.
        validate_every: epochs between validations and checkpoints; at most all epochs.
        precision: "32-true" or "bf16-mixed".
        accelerator: "auto", "cpu" or "gpu".
        devices: number of devices, or "auto".
        deterministic: ask torch for deterministic algorithms.
        progress: show a progress bar.
    """

    epochs: int = 10_000
    batch: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-12
    warmup: int = 0
    clip: float | None = None
    entropy: float = 0.1
    patience: int | None = None
    validate_every: int = 1
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str = 1
    deterministic: bool = True
    progress: bool = True


TRAINING_LIMITS = {
    "seed": between(0, 2**32 - 1),
    "training.epochs": COUNT,
    "training.batch": COUNT,
    "training.lr": POSITIVE,
    "training.weight_decay": NOT_NEGATIVE,
    "training.warmup": NOT_NEGATIVE,
    "training.clip": POSITIVE,
    "training.entropy": NOT_NEGATIVE,
    "training.patience": COUNT,
    "training.validate_every": COUNT,
    "training.precision": one_of("32-true", "bf16-mixed"),
    "training.accelerator": one_of("auto", "cpu", "gpu"),
    "training.devices": Limit('at least 1, or "auto"', lambda x: x == "auto" or (not isinstance(x, str) and x >= 1)),
}
MAY_CHANGE = (  # keys that a resumed run may set anew
    "folder",
    "data",
    "samples.test",
    "samples.trials",
    *(
        f"training.{key}"
        for key in ("epochs", "patience", "validate_every", "accelerator", "devices", "deterministic", "progress")
    ),
)
CHECKPOINT = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step")


class Stopped(Exception):
    """Training was ended by a signal; `status` is the exit status that says so."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"stopped; continue with --resume (run folder {folder})")
        self.status = 128 + number


class TrainingModule(L.LightningModule):
    """Loss = task's loss + entropy weight * penalty; noise of each step from (seed, step, process) alone."""

    def __init__(self, task: Task):
        super().__init__()
        self.task, self.model = task, task.model()
        self.training_settings: Training = task.config.training
        self.shown = (f"train/{task.measure}", f"valid/{task.measure}")

    def forward(self, inputs: Any, samples: int, generator: torch.Generator | None = None):
        return self.model(inputs, samples, generator)

    def on_train_epoch_start(self) -> None:
        # dropout draws from the global generator: its state at an epoch's start is the same when resumed
        torch.manual_seed(self.task.config.seed * 1_000_003 + self.current_epoch + 2**53 * self.global_rank)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs, target = self.task.inputs(batch)
        step = self.global_step * self.trainer.world_size + self.global_rank
        generator = seeded(self.task.config.seed, "train", step, self.device)
        prediction, penalties = self.model(inputs, self.task.config.samples.train, generator)
        loss = self.task.loss(prediction, target)
        self._log("train", loss, prediction, target, on_step=False, on_epoch=True)
        for name, value in penalties.items():
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=len(target), sync_dist=True)
            loss = loss + self.training_settings.entropy * value
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        inputs, target = self.task.inputs(batch)
        step = index * self.trainer.world_size + self.global_rank
        generator = seeded(self.task.config.seed, "valid", step, self.device)
        prediction, _ = self.model(inputs, self.task.config.samples.valid, generator)
        self._log("valid", self.task.loss(prediction, target), prediction, target)

    def _log(self, stage: str, loss: torch.Tensor, prediction: Any, target: Any, **where: bool) -> None:
        measures = self.task.measures(prediction.detach(), target) | {self.task.measure: loss}
        for name, value in measures.items():
            shown = name == self.task.measure
            self.log(f"{stage}/{name}", value, batch_size=len(target), sync_dist=True, prog_bar=shown, **where)

    def configure_optimizers(self) -> torch.optim.Optimizer | dict[str, Any]:
        settings = self.training_settings
        optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        if not settings.warmup:
            return optimizer
        steps = settings.warmup * len(self.task.loader("train"))
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        if self.training_settings.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training_settings.clip)
            self.log("train/gradient_norm", norm, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)


class StopOnSignal(Callback):
    """SIGINT and SIGTERM end training after the step at hand, where no file is half written; a second one at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number: int | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # the trainer restores the handlers
            before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

            def note(number: int, frame: FrameType | None) -> None:
                self.number = number
                signal.signal(number, before[number])

            for number in before:
                signal.signal(number, note)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.number is not None, all=False):
            raise Stopped(self.number or signal.SIGTERM, self.folder)


class Checkpoints(ModelCheckpoint):
    """best.ckpt by the measure, or last.ckpt without one; a resumed run may have moved, or validate at other epochs."""

    def __init__(self, folder: Path, filename: str, every: int, monitor: str | None = None):
        super().__init__(
            folder,
            filename=filename,
            monitor=monitor,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
            every_n_epochs=every,
        )

    @property
    def state_key(self) -> str:
        return f"checkpoint {self.filename}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        moved = {name: self._here(path) for name, path in state.items() if name.endswith("_path")}
        scores = {self._here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict({**state, **moved, "best_k_models": scores, "dirpath": self.dirpath})

    def _here(self, path: str) -> str:
        return str(Path(self.dirpath) / Path(path).name) if path else path


class Patience(EarlyStopping):
    """Early stopping whose patience may change in a resumed run."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "patience": self.patience})


class ProgressLines(ProgressBar):
    """A line a validation, where there is no terminal for a bar; the loop's state is Lightning's."""

    enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.enabled or (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
            return
        measures = {name: value for name, value in trainer.callback_metrics.items() if name in module.shown}
        text = "  ".join(f"{name} {value:.5f}" for name, value in sorted(measures.items()))
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}", file=sys.stderr, flush=True)


def run_folder(config: Any) -> Path:
    """Where a configuration's run lives: `folder`, or runs/<task>/<name>/seed<seed>."""
    return Path(config.folder) if config.folder else Path("runs") / config.task / config.name / f"seed{config.seed}"


def is_first_process() -> bool:
    """False in the processes that train on further devices; the first one alone writes and tests."""
    return rank_zero_only.rank == 0


def fit(task: Task, *, resume: bool = False) -> dict[str, Any] | None:
    """Trains, tests the best checkpoint, and returns the report's figures (None in all processes but the first).

    Model, data and trainer are built before anything is written. A run without a checkpoint is resumed at its beginning.
    Raises FileExistsError where the run's folder exists (and `resume` is not asked for), FileNotFoundError where there is
    nothing to resume, ValueError where configuration or checkpoint do not fit, Stopped after SIGINT or SIGTERM.
    """
    config, settings = task.config, task.config.training
    folder = run_folder(config)
    if resume:
        _same_configuration(folder, config)
    elif is_first_process() and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"fit: the run folder {folder} exists already; continue it with --resume, or name another with --folder"
        )
    _check_devices(settings)
    keep_freed_memory()
    L.seed_everything(config.seed, workers=True, verbose=False)
    module = TrainingModule(task)
    last = _last_checkpoint(folder, module) if resume else None
    loaders = task.loader("train"), task.loader("valid")
    stop = StopOnSignal(folder)
    trainer = _trainer(task, folder, stop)
    if settings.batch % trainer.world_size:
        raise ValueError(
            f"config: training.batch must be a multiple of the {trainer.world_size} devices, got {settings.batch}"
        )
    for loader in loaders:
        loader.sampler.share = trainer.global_rank, trainer.world_size
    if is_first_process():
        _write(folder / "config.yaml", configuration.dump(_recorded(config)))
    try:
        trainer.fit(module, *loaders, ckpt_path=last)
        if stop.number:
            raise Stopped(stop.number, folder)
    except SystemExit as error:  # Lightning's answer to a signal before the first step, or to a second one
        terminated = trainer.received_sigterm or stop.number == signal.SIGTERM
        raise Stopped(signal.SIGTERM if terminated else signal.SIGINT, folder) from error
    finally:
        if is_first_process():
            plot_losses(folder, task.measure)
    return test(task) if is_first_process() else None


def test(task: Task) -> dict[str, Any]:
    """Loads the best checkpoint of the task's run, tests it, writes results.json and plots, and returns the figures."""
    model, folder = best_model(task), run_folder(task.config)
    with torch.no_grad():
        results = task.report(model, folder)
    _write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def compute(experiment: Computation) -> dict[str, Any]:
    """Runs an experiment without training of its own: config.yaml, plots and results.json in its folder, and the figures.

    Raises FileExistsError where the folder holds another configuration.
    """
    folder = run_folder(experiment.config)
    path, text = folder / "config.yaml", configuration.dump(_recorded(experiment.config))
    if path.is_file() and configuration.read(path) != configuration.read_text(text):
        raise FileExistsError(f"the run folder {folder} holds another configuration; name a new one with --folder")
    results = experiment.run(folder)
    _write(path, text)  # behind the run: one that is refused leaves no configuration behind
    _write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def best_model(task: Task) -> Symmetrized:
    """The model of the run's best checkpoint, in eval mode. Raises ValueError where it does not fit."""
    module = TrainingModule(task)
    best = run_folder(task.config) / "checkpoints" / "best.ckpt"
    try:
        module.load_state_dict(load_checkpoint(best)["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"test: {best} does not fit the configured model: {error}") from error
    wanted = task.config.training.accelerator
    device = "cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    return module.model.to(device).eval()


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


def _last_checkpoint(folder: Path, module: TrainingModule) -> Path | None:
    """last.ckpt, loaded into the module on trial; None where the run was stopped before its first checkpoint."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists() and not any(last.parent.glob("*.ckpt")):
        if is_first_process():
            print(f"resume: there is no checkpoint in {folder} yet; starting from the beginning", file=sys.stderr)
        return None
    state = load_checkpoint(last)
    if missing := [name for name in CHECKPOINT if name not in state]:
        raise ValueError(f"checkpoint: {last} must hold {', '.join(CHECKPOINT)}, got none of {', '.join(missing)}")
    try:
        module.load_state_dict(state["state_dict"])
        optimizer = module.configure_optimizers()
        optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
        optimizer.load_state_dict(state["optimizer_states"][0])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {last} must fit the configured model, got {error}") from error
    if (done := state["epoch"] + 1) > module.training_settings.epochs:
        raise ValueError(
            f"resume: training.epochs must be at least the {done} done, got {module.training_settings.epochs}"
        )
    return last


def _check_devices(settings: Training) -> None:
    count = torch.cuda.device_count()
    if settings.accelerator == "gpu" and not count:
        raise ValueError("config: training.accelerator must be auto or cpu where torch sees no GPU, got 'gpu'")
    if settings.accelerator != "cpu" and settings.devices != "auto" and settings.devices > count > 0:
        raise ValueError(
            f"config: training.devices must be at most {count}, the GPUs there are, got {settings.devices}"
        )


def _trainer(task: Task, folder: Path, stop: StopOnSignal) -> L.Trainer:
    settings: Training = task.config.training
    validate_every = min(settings.validate_every, settings.epochs)
    monitor = f"valid/{task.measure}"
    callbacks: list[Callback] = [
        Checkpoints(folder / "checkpoints", "best", validate_every, monitor),
        Checkpoints(folder / "checkpoints", "last", validate_every),  # behind the other: it holds its state
        stop,
    ]
    if settings.patience is not None:
        callbacks.append(Patience(monitor, patience=settings.patience))
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
        check_val_every_n_epoch=validate_every,
        use_distributed_sampler=False,  # EpochSampler takes its share itself
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


def _recorded(config: Any) -> Any:
    """The configuration as a run's folder keeps it: good from any working directory, also where the folder is moved."""
    data = getattr(config, "data", None)
    return replace(config, folder=".", **({"data": str(Path(data).absolute())} if data else {}))


def _same_configuration(folder: Path, config: Any) -> None:
    """FileNotFoundError where there is no run, ValueError where a key differs that a resumed run may not change."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"resume: {path} must exist, found nothing there; train first with `probsym fit`")
    before = configuration.flat(configuration.read(path))
    now = configuration.flat(configuration.read_text(configuration.dump(config)))
    for key in (before | now).keys() - set(MAY_CHANGE):
        was, given = before.get(key), now.get(key)
        if was != given:
            raise ValueError(f"resume: {key} must be {was!r} as in {path}, got {given!r}")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
