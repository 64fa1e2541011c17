"""Throughput, latency, memory, tax and the prediction's variance against the number of samples."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from probsym_fast._checks import check_count
from probsym_fast._memory import peak_memory
from probsym_fast._progress import announced
from probsym_fast.models import Symmetrized
from probsym_fast.models.chunks import Chunks
from probsym_fast.ops import using_backend
from probsym_fast.profiling.arguments import TIMED, check_backends, check_lists, check_values, checked_device
from probsym_fast.profiling.results import NEW, OWN, Profile, Row, set_gains
from probsym_fast.profiling.steps import Loss, Steps, inference_steps, move, training_steps
from probsym_fast.profiling.timing import interleave, machine
from probsym_fast.profiling.trace import named

SAMPLES = (1, 2, 4, 8, 16, 32, 64)


def profile(
    what: Any,
    batch: Any = None,
    *,
    weights: str | Path | None = None,
    samples: Sequence[int] = SAMPLES,
    modes: Sequence[str] = TIMED,
    chunks: Sequence[int | str | None] | None = None,
    backends: Sequence[str] = ("auto",),
    draws: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    seconds: float = 1.0,
    repeats: int = 16,
    path: str | Path | None = None,
) -> Profile:
    """Measures a model or task at every number of samples, in every mode, with every backend, chunk and kind of draws.

    what: a `Symmetrized` and a `batch` for it, or a task (`tasks.load(NAME)`), whose first training batch, loss, precision
    and clipping are taken. A training step of a model alone has the mean square of its prediction as loss. weights: a
    checkpoint of the task's, such as a run's checkpoints/best.ckpt; None: new ones. modes: of "training", "inference" and
    "variance", which is inference whose variance alone is measured. chunks: as in `models.chunks.Chunks`, where None is all
    samples at once and "auto" keeps within the model's limit; draws: kinds as in `groups.Draws`; without a list of them the
    model's. device: None: the batch's, of a task the GPU if there is one. seconds: given to each row that is timed, at least
    three rounds.
    repeats: predictions that the variance is taken over, at least two; its error takes three.
    path: a JSON file that is written after every row: what is interrupted keeps the rows that were done.

    A row that runs out of memory has no figures. The model is then as it was (`kept`). Raises TypeError for other
    kinds, FileNotFoundError for a checkpoint that is not there, ValueError for one that is damaged or of another model, for
    values out of range, a device that is not there and a backend that nothing has on it, RuntimeError where an op lacks the
    backend.
    """
    samples, chunks, seconds, repeats = check_values(samples, modes, chunks, backends, draws, seconds, repeats)
    model, batch, loss, settings, name = prepared(what, batch, device, weights)
    check_backends(backends, batch.device)
    cases = list(product(modes, backends, chunks or [model.chunks.size], draws or [model.draws], samples))
    which = str(weights) if weights is not None else OWN if what is model else NEW
    found = Profile(name, batch.size, machine(batch.device), [], which, repeats)
    try:
        with announced(f"profile {name}: {len(cases)} rows", len(cases)) as advance:
            for case in cases:
                row = Row(*case)
                with kept(model), using_backend(row.backend):
                    model.chunks, model.draws = chunks_like(model, row.chunk), row.draws
                    measure(row, model, batch, loss, settings, seconds, repeats)
                found.rows.append(row)
                set_gains(found.rows)
                if path is not None:
                    found.save(path)
                advance(1)
    except BaseException:  # an interrupt above all
        if path is not None and found.rows:
            kept_rows = f"{len(found.rows)} of {len(cases)} rows"
            print(f"profile {name}: ended early; {kept_rows} are in {path}", file=sys.stderr, flush=True)
        raise
    return found


@contextmanager
def kept(model: Symmetrized) -> Iterator[None]:
    """Behind it the model has the weights, buffers, gradients, modes, chunks and draws of before; gradients start empty."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(part, part.training) for part in model.modules()]
    chunks, draws = model.chunks, model.draws
    model.zero_grad()
    try:
        yield
    finally:
        model.chunks, model.draws = chunks, draws
        model.load_state_dict(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training


def chunks_like(model: Symmetrized, size: int | str | None) -> Chunks:
    """New chunks of the size; "auto" within the memory that the model's may take."""
    return Chunks(size, model.chunks.memory if size == "auto" else None)


def measure(
    row: Row, model: Symmetrized, batch: Any, loss: Loss, settings: dict[str, Any], seconds: float, repeats: int
) -> None:
    """Fills the row; leaves it empty where memory ends."""
    try:
        steps = steps_of(row.mode, model, batch, row.samples, loss, settings)
        if row.mode in TIMED:
            steps.step()  # optimiser states are made, "auto" chunks found
            model.zero_grad()  # a step's gradients are its own, not the last one's
            row.peak = peak_memory(steps.step, batch.device)
            times = interleave({"step": steps.step, "bare": steps.bare}, batch.device, seconds, rounds=3)
            row.low, row.latency, row.high = statistics.quantiles(times["step"], n=4)
            row.throughput = batch.size / row.latency
            row.tax = row.latency / statistics.median(times["bare"])
        if row.mode != "training":
            row.variance, row.error = variance_of([steps.step() for _ in range(repeats)])
        with torch.set_grad_enabled(row.mode == "training"):
            row.at_once = model.chunks.now(row.samples)
    except torch.OutOfMemoryError:
        row.clear()


def variance_of(predictions: Sequence[Tensor]) -> tuple[float, float | None]:
    """The variance over R predictions, mean over their entries, and its standard error, None for two.

    variance = sum over r of q_r / (R - 1), where q_r is the mean square of prediction r less the mean of all. Entries may
    depend on each other, predictions do not: the error is that of the mean of the q_r. Two predictions lie equally far from
    their mean: their q_r are equal and tell no error.
    """
    each = torch.stack([x.double() for x in predictions]).flatten(1)
    squares, count = (each - each.mean(0)).square().mean(1), len(each)
    error = squares.std().item() * count**0.5 / (count - 1) if count > 2 else None
    return squares.sum().item() / (count - 1), error


def trace(
    what: Any,
    batch: Any = None,
    *,
    path: str | Path,
    weights: str | Path | None = None,
    samples: int = 4,
    chunk: int | str | None = OWN,
    backend: str = "auto",
    draws: str | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Writes one training step as a trace for Perfetto (ui.perfetto.dev): every op, and the model's parts, by name.

    The arguments are those of `profile`, one value of each list; chunk OWN and draws None: the model's. The model is then as
    it was (`kept`). Raises as `profile` does, and OSError where the path cannot be written.
    """
    samples = check_count("profile", "samples", samples)
    check_lists({"backends": [backend], "draws": None if draws is None else [draws]})
    model, batch, loss, settings, _ = prepared(what, batch, device, weights)
    check_backends([backend], batch.device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if batch.device.type == "cuda" else [])]
    with kept(model), using_backend(backend):
        model.chunks, model.draws = (
            chunks_like(model, model.chunks.size if chunk == OWN else chunk),
            draws or model.draws,
        )
        step = training_steps(model, batch, samples, loss, **settings).step
        step()
        with named(model), torch_profile(activities=activities) as record:
            step()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}.json")
    try:
        record.export_chrome_trace(str(whole))
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def prepared(
    what: Any, batch: Any, device: Any, weights: str | Path | None = None
) -> tuple[Symmetrized, Any, Loss, dict[str, Any], str]:
    """Model and batch on the device, loss, and what else a training step takes; a name."""
    if isinstance(what, Symmetrized):
        if batch is None:
            raise TypeError("profile: batch must be given with a model, got None")
        if weights is not None:
            raise TypeError(f"profile: weights must be None with a model, which has its own, got {str(weights)!r}")
        device = batch.device if device is None else checked_device(device)
        square = lambda y, penalties: y.float().square().mean() + sum(penalties.values())  # noqa: E731
        return what.to(device), move(batch, device), square, {}, "model"
    if not (hasattr(what, "loader") and hasattr(what, "inputs")):
        raise TypeError(f"profile: what must be a Symmetrized or a task that is trained, got {type(what).__name__}")
    from probsym_fast.training.configuration import full_name

    config = what.config
    device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    model = (what.model() if weights is None else trained(what, weights)).to(device)
    batch, target = what.inputs(move(next(iter(what.loader("train"))), device))

    def loss(prediction: Any, penalties: Any) -> Tensor:
        return what.loss(prediction, target) + config.training.entropy * sum(penalties.values())

    precision = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.training.precision)
    settings = {"clip": config.training.clip, "autocast": precision}
    return model, batch, loss, settings, full_name(config)


def trained(task: Any, weights: str | Path) -> Symmetrized:
    """The task's model with the weights of a checkpoint."""
    from probsym_fast.training.run import trained_model

    return trained_model(task, Path(weights))


def steps_of(mode: str, model: Symmetrized, batch: Any, samples: int, loss: Loss, settings: dict[str, Any]) -> Steps:
    if mode != "training":  # in float32, as the tasks test
        return inference_steps(model, batch, samples)
    return training_steps(model, batch, samples, loss, **settings)
