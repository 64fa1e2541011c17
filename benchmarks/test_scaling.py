"""Steps over several processes: two against one, and the part of one among many, on one device."""

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
from benchmarks.steps import steps_of
from probsym_fast.models import processes as sharing

SPREAD = {"n-body GNN-PS": ("nbody/gnn_O3_ps", 100), "n-body Transformer-PS": ("nbody/transformer_S5xO3_ps", 50)}
S = 20  # over the processes, as published
PROCESSES = 2
PARTS = {  # configuration, changes, graphs a batch, samples a graph
    "n-body GNN-PS": ("nbody/gnn_O3_ps", [], 64, 64),
    "n-body Transformer-PS": ("nbody/transformer_S5xO3_ps", [], 64, 32),
    "EXP-classify MLP-PS": ("exp_classify/mlp_ps", [], 64, 32),
    "PATTERN ViT-tiny-PS": ("pattern/small_ps", ["--graphs.train=64"], 64, 8),
}
LAYOUTS = (1, 1), (8, 1), (1, 8), (64, 1), (8, 8)  # processes along the data, along the samples


def ways(name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The work of each process: a part of the batch, a part of the samples, or the latter without the reduction."""
    configuration, batch = SPREAD[name]
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("samples",))
    for way in ("DDP", "sample parallel", "sample parallel, its reduction left out"):
        own = batch // PROCESSES if way == "DDP" else batch
        model, step, _ = steps_of(configuration, [f"--training.batch={own}"], "cpu", S, DistributedDataParallel)
        model.samples_mesh = None if way == "DDP" else mesh
        yield way, step


class Left(sharing._Sum):
    """No sum: every process keeps its own part."""

    @classmethod
    def apply(cls, x: torch.Tensor, group: Any) -> torch.Tensor:
        return x


def work(rank: int, name: str, threads: int, meeting: str, pipe: Any) -> None:
    """A process that runs each requested step and reports when it is done."""
    torch.set_num_threads(threads)
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
    """Steps that all processes take together, by how they share the work."""
    context = multiprocessing.get_context("spawn")
    pipes, running = [], []
    try:
        for rank in range(PROCESSES):
            here, there = context.Pipe()
            running.append(context.Process(target=work, args=(rank, name, threads, meeting, there), daemon=True))
            running[-1].start()
            there.close()  # so that waiting for a dead process ends
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
    """Two processes against one, with the same total of threads; efficiency: time of one over time of two."""
    if device != "cpu":
        pytest.skip("needs two devices")
    before = torch.get_num_threads()
    threads = max(1, before // PROCESSES)
    torch.set_num_threads(threads * PROCESSES)
    try:
        configuration, batch = SPREAD[name]
        _, one, _ = steps_of(configuration, [f"--training.batch={batch}"], device, S)
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


class Part:
    """A mock mesh of `processes` along the samples, seen from the first one; sends nothing."""

    ndim = 1

    def __init__(self, processes: int, device: str):
        self.size, self.device_type = lambda: processes, device

    def get_local_rank(self) -> int:
        return 0

    def get_group(self) -> None:
        return None


@pytest.mark.parametrize("name", PARTS)
def test_parts(name, device, seconds, record, monkeypatch):
    """The part of a step that one of 8 or 64 devices computes, on this device; communication is only counted, in bytes.

    efficiency: of the devices if communication were free. needs: the bandwidth that hides sending the gradients (ring,
    float32) in the backward pass and optimiser.
    """
    monkeypatch.setattr(sharing, "_Sum", Left)
    configuration, changes, graphs, samples = PARTS[name]
    variants, gradients = {}, 0
    for data, along in LAYOUTS:
        own = [*changes, f"--training.batch={graphs // data}"]
        model, step, forward = steps_of(configuration, own, device, samples)
        model.samples_mesh = Part(along, device) if along > 1 else None
        variants[f"{data} x {along}"], variants[f"{data} x {along}, forward"] = step, forward
        gradients = 4 * sum(p.numel() for p in model.parameters())
    whole = "1 x 1"
    case = f"{name}, {graphs} graphs, S = {samples}, one process of data x samples"
    rows = compare(case, variants, device=device, reference=whole, seconds=seconds, whole=True)
    medians = {row.variant: row.median for row in rows}
    for (data, along), row in zip(LAYOUTS, rows[::2], strict=True):
        count = data * along
        if count > 1:
            sent = 2 * (count - 1) / count * gradients
            hiding = row.median - medians[f"{row.variant}, forward"]
            row.extra = {
                "efficiency": round(medians[whole] / row.median / count, 2),
                "sends MB": round(sent / 1e6, 2),
                "needs GB/s": float(f"{sent / hiding / 1e9:.2g}"),
            }
    record(rows, variants[whole])
