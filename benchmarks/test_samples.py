"""Many samples: memory and time against S, in chunks and at once; a step over two processes against one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import compare
from probsym_fast import tasks
from probsym_fast._memory import peak_memory
from probsym_fast._steps import training_steps
from probsym_fast.models import samples as sharing
from probsym_fast.models.chunks import Chunks
from probsym_fast.profile import prepared
from probsym_fast.tasks.allocator import keep_freed_memory

SAMPLES = 1, 4, 16, 64
CASES: dict[str, tuple[str, list[str], int]] = {  # configuration, changes, samples of a chunk
    "n-body GNN-PS": ("nbody/gnn_O3_ps", ["--training.batch=32"], 4),
    "n-body GNN-GA": ("nbody/gnn_O3_ga", ["--training.batch=32"], 4),
    "n-body Transformer-PS": ("nbody/transformer_S5xO3_ps", ["--training.batch=16"], 4),
    "EXP-classify MLP-PS": ("exp_classify/mlp_ps", ["--training.batch=8"], 16),
    "PATTERN ViT-tiny-PS": ("pattern/small_ps", ["--training.batch=1", "--graphs.train=64"], 8),
}
SPREAD = "n-body GNN-PS", "n-body Transformer-PS"
S = 20  # over the processes, as published
PROCESSES = 2


def steps_of(name: str, device: str, samples: int, *changes: str) -> tuple[Any, Callable[[], None]]:
    """The model and its training step."""
    keep_freed_memory()  # as training does
    configuration, others, _ = CASES[name]
    model, batch, loss, settings, _ = prepared(tasks.load(configuration, [*others, *changes]), None, device)
    return model, training_steps(model, batch, samples, loss, **settings).step


@pytest.mark.parametrize("name", CASES)
def test_samples(name, device, seconds, record):
    """Peak and time of a training step, all samples at once and in chunks; asked for: at S = 64 a peak of at most 1.1 times
    that of one chunk, and a time of at most 1.4 times that of all at once."""
    chunk, variants = CASES[name][2], {}

    def add(label: str, samples: int, size: int | None) -> None:
        model, step = steps_of(name, device, samples)
        model.chunks = Chunks(size)
        variants[label] = step

    for samples in sorted({*SAMPLES, chunk}):
        add(f"S = {samples}", samples, None)
        if samples > chunk:
            add(f"S = {samples}, chunks of {chunk}", samples, chunk)
    for step in variants.values():
        step()  # optimiser states are made
    peaks = {label: peak_memory(step, device) for label, step in variants.items()}
    reference = f"S = {chunk}"
    rows = compare(f"{name}, training step", variants, device=device, reference=reference, seconds=seconds)
    medians = {row.variant: row.median for row in rows}
    for row in rows:
        row.extra = {"peak MB": round(peaks[row.variant] / 1e6, 2)}
        whole, chunked, _ = row.variant.partition(",")
        if chunked:
            row.extra |= {
                "peak / one chunk": round(peaks[row.variant] / peaks[reference], 2),
                "peak / at once": round(peaks[row.variant] / peaks[whole], 2),
                "time / at once": round(row.median / medians[whole], 2),
            }
    record(rows, variants["S = 1"])


def ways(name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What each process does: a part of the batch, a part of the samples, the same without their reduction."""
    parts = int(CASES[name][1][0].partition("=")[2]) // PROCESSES
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("samples",))
    for way in ("DDP", "sample parallel", "sample parallel, its reduction left out"):
        model, batch, loss, settings, _ = prepared(
            tasks.load(CASES[name][0], [f"--training.batch={parts}"] if way == "DDP" else CASES[name][1]), None, "cpu"
        )
        model.samples_mesh = None if way == "DDP" else mesh
        spread = DistributedDataParallel(model)
        spread.chunks = model.chunks  # all that a step reads of the model itself
        yield way, training_steps(spread, batch, S, loss, **settings).step


class Left(sharing._Sum):
    """No sum: every process goes on with its own part."""

    @classmethod
    def apply(cls, x: torch.Tensor, group: Any) -> torch.Tensor:
        return x


def work(rank: int, name: str, threads: int, meeting: str, pipe: Any) -> None:
    """A process that runs the step it is told, and tells when it is done."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=PROCESSES)
    whole, steps = sharing._Sum, dict(ways(name))
    pipe.send(list(steps))
    while (way := pipe.recv()) is not None:
        sharing._Sum = Left if way.endswith("left out") else whole
        steps[way]()
        pipe.send(way)
    distributed.destroy_process_group()


@contextmanager
def processes(name: str, threads: int, meeting: str) -> Iterator[dict[str, Callable[[], None]]]:
    """Steps that all processes take together, by the way they share the work."""
    context = multiprocessing.get_context("spawn")
    pipes, running = [], []
    try:
        for rank in range(PROCESSES):
            here, there = context.Pipe()
            running.append(context.Process(target=work, args=(rank, name, threads, meeting, there), daemon=True))
            running[-1].start()
            there.close()  # so that a process that dies ends the wait for it
            pipes.append(here)
        found, *_ = [pipe.recv() for pipe in pipes]  # all are ready

        def together(way: str) -> None:
            for pipe in pipes:
                pipe.send(way)
            for pipe in pipes:
                pipe.recv()

        yield {way: lambda way=way: together(way) for way in found}
        for pipe in pipes:
            pipe.send(None)
        for process in running:
            process.join(30)
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes(name, device, seconds, record, tmp_path):
    """A step over two processes against one process with the same threads in all; efficiency: time of one over theirs."""
    if device != "cpu":
        pytest.skip("needs two devices")
    before = torch.get_num_threads()
    threads = max(1, before // PROCESSES)
    torch.set_num_threads(threads * PROCESSES)
    try:
        _, one = steps_of(name, device, S)
        with processes(name, threads, str(tmp_path / "meeting")) as together:
            alone = f"one process, {threads * PROCESSES} threads"
            variants = {alone: one, **together}
            case = f"{name}, S = {S}, {PROCESSES} processes of {threads} threads, training step"
            rows = compare(case, variants, device=device, reference=alone, seconds=2 * seconds)
            medians = {row.variant: row.median for row in rows}
            for row in rows[1:]:
                row.extra = {"efficiency": round(row.ratio, 2)}
            without = medians["sample parallel, its reduction left out"]
            rows[2].extra["reduction / step"] = f"{1 - without / medians['sample parallel']:.1%}"
            record(rows, one)
    finally:
        torch.set_num_threads(before)
