"""Training settings: the keys under `training` in a configuration, and their limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from probsym_fast.training.classes import Entry, names_class
from probsym_fast.training.configuration import COUNT, NOT_NEGATIVE, POSITIVE, Limit, at_least, between, one_of


@dataclass(frozen=True)
class Monitor:
    """The validation measure that picks the best checkpoint and ends a training early.

    name: the loss or one of the task's measures. direction: "min" if lower is better, "max" if higher is.
    """

    name: str
    direction: str = "min"

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            raise ValueError(f"Monitor: direction must be min or max, got {self.direction!r}")

    @property
    def key(self) -> str:
        """Its name in the logs."""
        return f"valid/{self.name}"


@dataclass
class Run:
    """Keys that every experiment has.

    Args:
        name: name of the run; its full name is <task>/<name>, or just the name if it has a slash, as in `probsym info`.
        seed: seed of weights, order, noise and dropout.
        folder: run folder; null: runs/<full name>/seed<seed>; ".": the folder of the file with this key.
    """

    name: str = "custom"
    seed: int = 1
    folder: str | None = None


LOGGERS: list[Entry] = ["csv", "tensorboard"]  # known by name
CLASSES = "dotted paths of classes, or mappings of class_path and init_args"


@dataclass
class Training:
    """How a task is trained.

    Args:
        epochs: passes over the training set; with `steps`, an upper limit.
        batch: graphs per batch, over all devices.
        steps: number of optimiser steps after which to stop, even within an epoch; null: no limit.
        accumulate: batches per optimiser step. The gradient is their sum divided by `accumulate`, even if an epoch's last
            step has fewer batches (Lightning's rule).
        optimizer: "adam" (weight decay added to the gradient) or "adamw" (decoupled weight decay).
        lr: learning rate of Adam and AdamW.
        lr_pretrained: learning rate of the backbone's parameters; null: lr.
        weight_decay: weight decay, of all parameters.
        warmup: epochs over which the learning rates rise linearly from 0.
        warmup_steps: the same in optimiser steps; set at most one of the two.
        decay: after the warm-up: "none" is constant, "linear" falls to 0 at the end of the run (steps or epochs, whichever
            comes first).
        clip: largest gradient norm; null: no clipping.
        entropy: weight of the permutation's entropy in the loss.
        patience: validations without an improvement of the monitored measure before training stops; null: never. With
            `validate_every` 10, a patience of 100 takes 1,000 epochs.
        validate_every: epochs between validations and checkpoints, at most all epochs; with `steps` also after the last step.
        keep_every: epochs between weights kept as checkpoints/epoch<number>.ckpt, besides best and last; null: none.
        precision: training precision: "32-true", "bf16-mixed" or "16-mixed" (GPU only); validation and test use float32.
            On CPUs without AVX-512 or AMX bf16-mixed is very slow, and the run warns.
        compile: compile the backbone with torch.compile.
        workers: processes that load batches; 0: the training process loads them.
        log_every: steps between logged losses and learning rates ("step/..."); null: log only epoch means.
        logger: what logs: "csv" (logs/metrics.csv, from which losses are plotted), "tensorboard", and dotted paths of
            Lightning logger classes. One with arguments is a mapping of `class_path` and `init_args`. `save_dir` is the run
            folder unless given.
        callbacks: Lightning callbacks, as dotted paths or mappings of the same kind, besides those of the training.
        accelerator: "auto", "cpu" or "gpu".
        devices: devices per machine, or "auto"; one process per device.
        nodes: number of machines; more than one needs torchrun.
        strategy: how devices share the work: "ddp" splits every batch, "fsdp" also splits the parameters (FSDP2), "samples"
            splits the samples of one batch.
        sample_devices: with "samples", how many devices share one part of a batch; null: all of them.
        deterministic: ask torch for deterministic algorithms.
        progress: show a progress bar.
    """

    epochs: int = 10_000
    batch: int = 100
    steps: int | None = None
    accumulate: int = 1
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3
    lr_pretrained: float | None = None
    weight_decay: float = 1e-12
    warmup: int = 0
    warmup_steps: int = 0
    decay: Literal["none", "linear"] = "none"
    clip: float | None = None
    entropy: float = 0.1
    patience: int | None = None
    validate_every: int = 1
    keep_every: int | None = None
    precision: str = "32-true"
    compile: bool = False
    workers: int = 0
    log_every: int | None = None
    logger: list[Entry] = field(default_factory=LOGGERS.copy)
    callbacks: list[Entry] = field(default_factory=list)
    accelerator: str = "auto"
    devices: int | str = 1
    nodes: int = 1
    strategy: Literal["ddp", "fsdp", "samples"] = "ddp"
    sample_devices: int | None = None
    deterministic: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if self.warmup and self.warmup_steps:
            raise ValueError(
                "config: one of training.warmup (epochs) and training.warmup_steps must be 0,"
                f" got {self.warmup} and {self.warmup_steps}"
            )
        if self.sample_devices is not None and self.strategy != "samples":
            raise ValueError(
                f"config: training.sample_devices must be null when training.strategy is {self.strategy},"
                f" got {self.sample_devices}"
            )


TRAINING_LIMITS = {
    "seed": between(0, 2**32 - 1),
    "training.epochs": COUNT,
    "training.steps": COUNT,
    "training.batch": COUNT,
    "training.accumulate": COUNT,
    "training.lr": POSITIVE,
    "training.lr_pretrained": POSITIVE,
    "training.weight_decay": NOT_NEGATIVE,
    "training.warmup": NOT_NEGATIVE,
    "training.warmup_steps": NOT_NEGATIVE,
    "training.clip": POSITIVE,
    "training.entropy": NOT_NEGATIVE,
    "training.patience": COUNT,
    "training.validate_every": COUNT,
    "training.keep_every": COUNT,
    "training.precision": one_of("32-true", "bf16-mixed", "16-mixed"),
    "training.workers": at_least(0),
    "training.log_every": COUNT,
    "training.logger": Limit(
        f"a list of {', '.join(map(str, LOGGERS))}, {CLASSES}",
        lambda x: all(one in LOGGERS or names_class(one) for one in x),
    ),
    "training.callbacks": Limit(f"a list of {CLASSES}", lambda x: all(map(names_class, x))),
    "training.nodes": COUNT,
    "training.sample_devices": COUNT,
    "training.accelerator": one_of("auto", "cpu", "gpu"),
    "training.devices": Limit('at least 1, or "auto"', lambda x: x == "auto" or (not isinstance(x, str) and x >= 1)),
}
_FREE = (
    "epochs",
    "patience",
    "validate_every",
    "keep_every",
    "compile",
    "workers",
    "log_every",
    "logger",
    "callbacks",
    "accelerator",
    "devices",
    "nodes",
    "strategy",
    "sample_devices",
    "deterministic",
    "progress",
)
MAY_CHANGE = (  # keys that a resumed run may change
    "folder",
    "data",
    "backbone.weights",
    "samples.test",
    "samples.trials",
    "also_test",
    "samples.chunk",
    "samples.memory",
    *(f"training.{key}" for key in _FREE),
)


def may_change(settings: Training) -> set[str]:
    """The (dotted) keys that a resumed run may change.

    `steps` is not among them. `epochs` is not if the learning rate decays: the finished steps would have had other rates.
    """
    return set(MAY_CHANGE) - ({"training.epochs"} if settings.decay != "none" else set())


SAMPLES_LIMITS = {
    **{f"samples.{key}": COUNT for key in ("train", "valid", "test", "trials")},
    "samples.chunk": Limit('at least 1, "auto" or null', lambda x: x == "auto" or (not isinstance(x, str) and x >= 1)),
    "samples.memory": POSITIVE,
}


@dataclass
class Samples:
    """Group elements per graph.

    Args:
        train: samples in training.
        valid: samples in validation.
        test: samples in the test.
        trials: number of tests, each with new noise.
        draws: "independent" noise, "antithetic" pairs z and -z, or "stratified", which also stratifies rotations.
        chunk: samples per pass, which bounds the memory; null: all; "auto": as many as fit, found by measuring (not with
            training.strategy fsdp).
        memory: GB that one pass may take with "auto"; null: all of the GPU's memory (no limit on a CPU).
    """

    train: int = 20
    valid: int = 20
    test: int = 20
    trials: int = 5
    draws: Literal["independent", "antithetic", "stratified"] = "independent"
    chunk: int | str | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and self.chunk != "auto":
            raise ValueError(f"config: samples.memory must be null unless samples.chunk is auto, got {self.memory}")

    def settings(self) -> dict[str, Any]:
        """The arguments of `Symmetrized`."""
        memory = None if self.memory is None else round(self.memory * 1e9)
        return {"draws": self.draws, "chunk": self.chunk, "memory": memory}
