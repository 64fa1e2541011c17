"""How a task is trained: the keys below `training` of its configuration, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from probsym_fast.training.configuration import COUNT, NOT_NEGATIVE, POSITIVE, Limit, at_least, between, one_of


@dataclass(frozen=True)
class Monitor:
    """The validation measure that picks the best checkpoint and ends a training early.

    name: of the loss or of one of the task's measures. direction: "min" where lower is better, "max" where higher is.
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
    """What every experiment's configuration has.

    Args:
        name: of the run; its full name is <task>/<name>, or just the name where it has a slash, as in `probsym info`.
        seed: of weights, order, noise and dropout.
        folder: of the run; null: runs/<full name>/seed<seed>; ".": where the file with this key lies.
    """

    name: str = "custom"
    seed: int = 1
    folder: str | None = None


@dataclass
class Training:
    """How a task is trained.

    Args:
        epochs: passes over the training set; with `steps` only the most there may be.
        batch: graphs a batch, on all devices together.
        steps: end after so many steps of the optimiser, within an epoch too; null: after the epochs.
        accumulate: batches a step; a step's gradient is the sum of theirs over `accumulate`, also in an epoch's last step,
            which may have fewer (Lightning's rule).
        optimizer: "adam" (weight decay added to the gradient) or "adamw" (decoupled weight decay).
        lr: learning rate of Adam and AdamW.
        lr_pretrained: learning rate of the backbone's parameters; null: lr.
        weight_decay: weight decay, of all parameters.
        warmup: epochs over which the learning rates rise linearly from 0.
        warmup_steps: the same in steps of the optimiser; one of the two.
        decay: behind the warm-up: "none" constant, "linear" to 0 at the end of the run (the first of steps and epochs).
        clip: largest norm of the gradient; null: any.
        entropy: weight of the permutation's entropy in the loss.
        patience: stop when what picks the best checkpoint has not improved in so many validations in a row; null: never. It
            counts validations: with `validate_every` 1 these are epochs, with 10 a patience of 100 takes 1,000 epochs.
        validate_every: epochs between validations and checkpoints, at most all epochs; with `steps` also behind the last.
        keep_every: epochs between weights that are kept as checkpoints/epoch<number>.ckpt besides best and last; null: none.
        precision: of training: "32-true", "bf16-mixed" or "16-mixed" (on a GPU); validation and test are in float32.
        compile: compile the backbone with torch.compile.
        workers: processes that load batches; 0: none but the training process.
        log_every: steps between logged losses and learning rates ("step/..."); null: only the means of epochs.
        accelerator: "auto", "cpu" or "gpu".
        devices: number of devices (of every machine), or "auto"; a process each.
        nodes: number of machines; with more than one, and wherever wished, started by torchrun.
        strategy: how several devices share the work: "ddp" a part of every batch each, "fsdp" that, and each keeps a part of
            the parameters (FSDP2), "samples" a part of the samples of the same batch each.
        sample_devices: with "samples", how many devices share one batch, the others take other parts; null: all of them.
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
                f"config: training.sample_devices must be null where training.strategy is {self.strategy},"
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
    "accelerator",
    "devices",
    "nodes",
    "strategy",
    "sample_devices",
    "deterministic",
    "progress",
)
MAY_CHANGE = (  # keys that a resumed run may set anew
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
    """The (dotted) keys that a resumed run may set anew.

    Not the steps, which say where a run ends within an epoch, and, where the learning rate decays, not the epochs: the steps
    already done would have had another learning rate.
    """
    return set(MAY_CHANGE) - ({"training.epochs"} if settings.decay != "none" else set())


SAMPLES_LIMITS = {
    **{f"samples.{key}": COUNT for key in ("train", "valid", "test", "trials")},
    "samples.chunk": Limit('at least 1, "auto" or null', lambda x: x == "auto" or (not isinstance(x, str) and x >= 1)),
    "samples.memory": POSITIVE,
}


@dataclass
class Samples:
    """Group elements a graph.

    Args:
        train: in training.
        valid: in validation.
        test: in the test.
        trials: times the test is repeated with other noise.
        draws: "independent" noise, "antithetic" pairs z and -z, or "stratified" rotations too.
        chunk: how many run at once, whose memory is then all that is taken; null: all; "auto": all where they fit, else the
            most that do, found by measuring (not with training.strategy fsdp).
        memory: GB that the samples at once may take with "auto"; null: what the GPU has (on a CPU: any).
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
