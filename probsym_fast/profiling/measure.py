"""Throughput, latency, memory, tax and the prediction's variance against the number of samples."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsym_fast._memory import peak_memory
from probsym_fast._progress import announced
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
    except BaseException:  # an interrupt above all
        if path is not None and found.rows:
            kept_rows = f"{len(found.rows)} of {len(wanted)} rows"
            print(f"profile {name}: ended early; {kept_rows} are in {path}", file=sys.stderr, flush=True)
        raise
    return found


def measure(row: Row, case: Case, seconds: float, repeats: int) -> None:
    """Fills the row; leaves it empty where memory ends."""
    model, batch = case.model, case.batch
    try:
        steps = steps_of(row.mode, case, row.samples)
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
            row.at_once = model.chunks.size_for(row.samples)
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


def steps_of(mode: str, case: Case, samples: int) -> Steps:
    if mode != "training":  # in float32, as the tasks test
        return inference_steps(case.model, case.batch, samples)
    return training_steps(case.model, case.batch, samples, case.loss, **case.settings)
