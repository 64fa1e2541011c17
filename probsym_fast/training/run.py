"""Trains and tests any task with Lightning; logs, checkpoints and plots go to one run folder."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from probsym_fast._files import remove_leftovers, unfinished, write_atomically
from probsym_fast._untrusted import reason
from probsym_fast.models import Symmetrized
from probsym_fast.training import configuration
from probsym_fast.training.allocator import keep_freed_memory
from probsym_fast.training.callbacks import StopOnSignal, Stopped
from probsym_fast.training.checkpoints import best_so_far, last_checkpoint, load_checkpoint, with_weights
from probsym_fast.training.classes import check_objects, objects
from probsym_fast.training.faults import Fault, faults_reported
from probsym_fast.training.loading import EpochSampler
from probsym_fast.training.module import TrainingModule
from probsym_fast.training.optimisation import horizon
from probsym_fast.training.ownership import LOCK, is_first_process, owned
from probsym_fast.training.parallel import check_chunks, layout
from probsym_fast.training.plots import plot_losses
from probsym_fast.training.settings import LOGGERS, TRAINING_LIMITS, Training, may_change
from probsym_fast.training.task import Computation, Task
from probsym_fast.training.trainer import check_devices, make_trainer

CHECKPOINT = {  # entries of a checkpoint, besides Lightning's version
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
}


def run_folder(config: Any) -> Path:
    """The folder of a configuration's run: `folder`, or runs/<full name>/seed<seed>."""
    return Path(config.folder or Path("runs") / configuration.full_name(config) / f"seed{config.seed}")


def fit(
    task: Task, *, resume: bool = False, loggers: Sequence[Logger] = (), callbacks: Sequence[Callback] = ()
) -> dict[str, Any] | None:
    """Trains, tests the best checkpoint, and returns the report's figures (None in all processes but the first).

    Model, data and trainer are built before anything is written. Resuming a run without a checkpoint starts it over.
    Whatever ends a run, even SIGKILL, its last checkpoint is intact, and `resume` gives the same numbers as a run that was
    never interrupted.

    loggers, callbacks: objects of Lightning, besides those of `training.logger` and `training.callbacks`. Loggers that are
    not known by name also get the configuration, as hyperparameters.

    Raises FileExistsError if the run folder exists (without `resume`) or another process owns it, FileNotFoundError if
    there is nothing to resume, ValueError if configuration or checkpoint do not match, or a logger or callback cannot
    be made. Raises Stopped after SIGINT or SIGTERM. Raises Fault if a file cannot be written, a data-loader worker or another
    process dies, or the loss is not finite.
    """
    check_objects("loggers", loggers, Logger)
    check_objects("callbacks", callbacks, Callback)
    with owned(run_folder(task.config)):
        return _fit(task, resume, loggers, callbacks)


def _fit(task: Task, resume: bool, loggers: Sequence[Logger], callbacks: Sequence[Callback]) -> dict[str, Any] | None:
    config, settings = task.config, task.config.training
    folder = run_folder(config)
    if resume:
        check_recorded(folder, config, may_change(settings))
    elif is_first_process() and not set(folder.iterdir()) <= {folder / LOCK, *unfinished(folder)}:
        raise FileExistsError(
            f"fit: run folder {folder} already exists; continue it with --resume, or choose another with --folder"
        )
    check_devices(settings)
    classes = [one for one in settings.logger if one not in LOGGERS]
    loggers = [*objects("training.logger", classes, Logger, save_dir=str(folder)), *loggers]
    callbacks = [*objects("training.callbacks", settings.callbacks, Callback), *callbacks]
    keep_freed_memory()
    L.seed_everything(config.seed, workers=True, verbose=False)
    last = _announced(last_checkpoint(folder), folder) if resume else None
    module = TrainingModule(task, fresh=last is None)
    state = None if last is None else load_checkpoint(last)
    steps = 0 if last is None or state is None else _check_checkpoint(last, state, module)
    if settings.compile:
        module.model.backbone.compile()  # in place, which keeps the names of the weights
    loaders = task.loader("train"), task.loader("valid")
    if is_first_process():
        task.loader("test")  # finds missing or damaged data before the training
    horizon(settings, len(loaders[0]))  # raises for an impossible schedule
    stop = StopOnSignal(folder)
    trainer = make_trainer(task, folder, stop, steps, state, loggers, callbacks)
    del state  # the trainer frees it after restoring
    module.layout = layout(settings, trainer.global_rank, trainer.world_size)
    check_chunks(module.model, settings, module.layout)
    for loader in loaders:
        cast(EpochSampler, loader.sampler).share = module.layout.share
    with faults_reported(folder):
        if is_first_process():
            remove_leftovers(folder)
        record(folder, config)
        for logger in loggers:
            logger.log_hyperparams(asdict(config))
        try:
            trainer.fit(module, *loaders, ckpt_path=last)
            if stop.number:
                raise Stopped(stop.number, folder)
        except SystemExit as error:  # Lightning's response to a signal before the first step, or to a second one
            terminated = trainer.received_sigterm or stop.number == signal.SIGTERM
            raise Stopped(signal.SIGTERM if terminated else signal.SIGINT, folder) from error
        finally:
            if is_first_process():
                plot_losses(folder, task.measure, task.monitor)
        return _test(task) if is_first_process() else None


def test(task: Task) -> dict[str, Any]:
    """Tests the best checkpoint of the task's run, writes results.json and plots, and returns the figures.

    Raises FileExistsError if another process owns the run folder, and as `Task.trained`.
    """
    with owned(run_folder(task.config)):
        return _test(task)


def _test(task: Task) -> dict[str, Any]:
    folder = run_folder(task.config)
    if (folder / "config.yaml").is_file():
        keys = configuration.flat(asdict(task.config))
        of_test = {key for key in keys if key.startswith(("training.", "samples."))}  # which do not change the model
        check_recorded(folder, task.config, may_change(task.config.training) | of_test, "test")
    model, state = _best(task)
    with torch.no_grad():
        results = task.report(model, folder)
    results["best_checkpoint"] = best_so_far(state)
    _write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def compute(experiment: Computation) -> dict[str, Any]:
    """Runs an experiment that trains no model of its own, writes its folder, and returns the figures.

    Raises FileExistsError if another process owns the folder, or if it holds another configuration. Experiments that
    `continue` check the configuration themselves.
    """
    folder = run_folder(experiment.config)
    with owned(folder):
        return _compute(experiment, folder)


def _compute(experiment: Computation, folder: Path) -> dict[str, Any]:
    path, text = folder / "config.yaml", configuration.dump(_recorded(experiment.config))
    recorded = configuration.read(path) if path.is_file() else None
    if recorded is not None and recorded.get("task") == experiment.config.task:  # missing keys get defaults
        recorded = configuration.read_text(
            configuration.dump(configuration.parse(type(experiment.config), recorded, []))
        )
    other = recorded is not None and recorded != configuration.read_text(text)
    if other and not experiment.continues:
        raise FileExistsError(f"the run folder {folder} holds another configuration; choose a new one with --folder")
    results = experiment.run(folder)
    record(folder, experiment.config)  # last: an experiment that raises leaves no configuration
    _write(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def best_model(task: Task) -> Symmetrized:
    """The model of the run's best checkpoint, in eval mode. Raises as `Task.trained`."""
    return _best(task)[0]


def _best(task: Task) -> tuple[Symmetrized, dict[str, Any]]:
    """`best_model`, and its checkpoint's contents."""
    wanted = task.config.training.accelerator
    device = "cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    path = run_folder(task.config) / "checkpoints" / "best.ckpt"
    state = load_checkpoint(path)
    return with_weights(task.model(fresh=False), path, state).to(device).eval(), state


def _announced(last: Path | None, folder: Path) -> Path | None:
    """The checkpoint to continue from; prints a note unless it is last.ckpt."""
    if is_first_process() and last is None:
        print(f"resume: there is no checkpoint in {folder} yet; starting from the beginning", file=sys.stderr)
    elif is_first_process() and last is not None and last.stem != "last":
        print(f"resume: there is no last.ckpt in {folder}; continuing from {last.name}", file=sys.stderr)
    return last


def _check_checkpoint(last: Path, state: dict[str, Any], module: TrainingModule) -> int:
    """Tries the checkpoint's state on the module and returns its steps. Raises ValueError if it does not match."""
    if missing := [name for name in CHECKPOINT if name not in state]:
        raise ValueError(f"checkpoint: {last} must hold {', '.join(CHECKPOINT)}, got none of {', '.join(missing)}")
    for name, kind in CHECKPOINT.items():
        if name != "state_dict" and (not isinstance(state[name], kind) or (kind is int and state[name] < 0)):
            got = state[name] if isinstance(state[name], int) else type(state[name]).__name__
            raise ValueError(f"checkpoint: {last} must hold {name} of type {kind.__name__}, got {got}")
    try:
        module.load_state_dict(state["state_dict"])
        optimizer = module.configure_optimizers()
        optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
        optimizer.load_state_dict(state["optimizer_states"][0])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {last} must match the configured model, got {reason(error)}") from error
    if (done := state["epoch"] + 1) > module.training_settings.epochs:
        raise ValueError(
            f"resume: training.epochs must be at least {done}, the epochs already done, got {module.training_settings.epochs}"
        )
    return state["global_step"]


def record(folder: Path, config: Any) -> None:
    """Writes the run's config.yaml, from the first process only."""
    if is_first_process():
        _write(folder / "config.yaml", configuration.dump(_recorded(config)))


def _recorded(config: Any) -> Any:
    """The configuration as config.yaml stores it: valid from any working directory, even after the folder moves."""
    changes: dict[str, Any] = {"folder": "."}
    if data := getattr(config, "data", None):
        changes["data"] = str(Path(data).absolute())
    backbone: Any = getattr(config, "backbone", None)
    if weights := getattr(backbone, "weights", None):
        changes["backbone"] = replace(backbone, weights=str(Path(weights).absolute()))
    return replace(config, **changes)


def check_recorded(folder: Path, config: Any, free: Collection[str], owner: str = "resume") -> None:
    """Raises FileNotFoundError if there is no run, ValueError if a (dotted) key differs that is not in `free`."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: {path} must exist, found nothing there; train first with `probsym fit`")
    values = configuration.read(path)
    if values.get("task") != config.task:
        raise ValueError(f"{owner}: task must be {values.get('task')!r} as in {path}, got {config.task!r}")
    recorded = configuration.parse(type(config), values, [], path)  # missing keys get defaults
    before, now = (
        configuration.flat(configuration.read_text(configuration.dump(_recorded(c)))) for c in (recorded, config)
    )
    for key in sorted((before | now).keys() - set(free)):
        was, given = before.get(key), now.get(key)
        if was != given:
            raise ValueError(f"{owner}: {key} must be {was!r} as in {path}, got {given!r}")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


__all__ = [
    "TRAINING_LIMITS",
    "Fault",
    "Stopped",
    "Training",
    "TrainingModule",
    "best_model",
    "check_recorded",
    "compute",
    "fit",
    "is_first_process",
    "load_checkpoint",
    "record",
    "run_folder",
    "test",
]
