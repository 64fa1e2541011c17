"""Throughput, latency, memory, tax and the prediction's variance against the number of samples."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from probsym_fast._memory import peak_memory
from probsym_fast._progress import announced
from probsym_fast.models.backbones.fused import paths_of
from probsym_fast.models.predictions import real_leaves
from probsym_fast.ops import using_backend
from probsym_fast.profiling.arguments import TIMED, check_backends, check_values
from probsym_fast.profiling.cases import Case, chunks_like, kept, prepared
from probsym_fast.profiling.results import NEW, OWN, Profile, Row, set_gains
from probsym_fast.profiling.steps import Steps, inference_steps, training_steps
from probsym_fast.profiling.timing import interleave, machine

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

    what: a `Symmetrized` with a `batch`, or a task (`tasks.load(NAME)`), which gives its first training batch, loss,
        precision and clipping. For a `Symmetrized` the loss is the mean square of the prediction, summed over its leaves.
    weights: a checkpoint of the task, such as a run's checkpoints/best.ckpt; None: new weights.
    modes: "training", "inference", or "variance", which is inference that measures only the variance.
    chunks: as in `models.chunks.Chunks`: None is all samples at once, "auto" keeps within the model's limit. Without a
        list: the model's own.
    draws: kinds as in `groups.Draws`; without a list: the model's own.
    device: None: the batch's device; for a task the GPU if there is one.
    seconds: time for each timed row, which runs at least three rounds.
    repeats: predictions per variance, at least two; its error needs three.
    path: a JSON file, written after every row, so that an interrupted profile keeps its finished rows.

    A row that runs out of memory has no figures. The model is restored afterwards (`kept`). Raises TypeError for other
    types, FileNotFoundError for a missing checkpoint, ValueError for a checkpoint that is damaged or of another model, a
    value out of range, a missing device, or a backend that no op has there. Raises RuntimeError if an op lacks the backend.
    """
    samples, chunks, seconds, repeats = check_values(samples, modes, chunks, backends, draws, seconds, repeats)
    case = prepared(what, batch, device, weights)
    model, name, where = case.model, case.name, case.batch.device
    check_backends(backends, where)
    wanted = list(product(modes, backends, chunks or [model.chunks.size], draws or [model.draws], samples))
    which = str(weights) if weights is not None else OWN if what is model else NEW
    found = Profile(name, case.batch.size, machine(where), [], which, repeats)
    try:
        with announced(f"profile {name}: {len(wanted)} rows", len(wanted)) as advance:
            for values in wanted:
                row = Row(*values)
                with kept(model), using_backend(row.backend):
                    model.chunks, model.draws = chunks_like(model, row.chunk), row.draws
                    measure(row, case, seconds, repeats)
                found.rows.append(row)
                set_gains(found.rows)
                if path is not None:
                    found.save(path)
                advance(1)
    except BaseException:  # usually KeyboardInterrupt
        if path is not None and found.rows:
            kept_rows = f"{len(found.rows)} of {len(wanted)} rows"
            print(f"profile {name}: ended early; {kept_rows} are in {path}", file=sys.stderr, flush=True)
        raise
    return found


def measure(row: Row, case: Case, seconds: float, repeats: int) -> None:
    """Fills the row; leaves it empty if memory runs out."""
    model, batch = case.model, case.batch
    try:
        steps = steps_of(row.mode, case, row.samples)
        with paths_of(model.backbone) as paths:
            steps.step()  # creates optimiser states, finds "auto" chunks
        row.path = "; ".join(paths) or None
        if row.mode in TIMED:
            model.zero_grad()  # frees the last step's gradients
            row.peak = peak_memory(steps.step, batch.device)
            times = interleave({"step": steps.step, "bare": steps.bare}, batch.device, seconds, rounds=3)
            row.low, row.latency, row.high = statistics.quantiles(times["step"], n=4)
            row.throughput = batch.size / row.latency
            row.tax = row.latency / statistics.median(times["bare"])
        if row.mode != "training":
            row.variance, row.error = variance_of([steps.step() for _ in range(repeats)])
        with torch.set_grad_enabled(row.mode == "training"):
            row.at_once = model.chunks.size_for(row.samples)
    except torch.OutOfMemoryError:
        row.clear()


def variance_of(predictions: Sequence[Any]) -> tuple[float, float | None]:
    """Variance over R predictions, averaged over all entries of their leaves, and its standard error (None for R = 2).

    variance = sum over r of q_r / (R - 1), where q_r is the mean square of prediction r minus the mean of all. Predictions
    are independent, their entries may not be; so the error is that of the mean of the q_r. Two predictions are equally far
    from their mean: their q_r are equal and give no error.
    """
    each = torch.stack([torch.cat([x.double().flatten() for x in real_leaves(y)]) for y in predictions])
    squares, count = (each - each.mean(0)).square().mean(1), len(each)
    error = squares.std().item() * count**0.5 / (count - 1) if count > 2 else None
    return squares.sum().item() / (count - 1), error


def steps_of(mode: str, case: Case, samples: int) -> Steps:
    if mode != "training":  # float32, as in the tasks' tests
        return inference_steps(case.model, case.batch, samples)
    return training_steps(case.model, case.batch, samples, case.loss, **case.settings)
