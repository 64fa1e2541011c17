"""The symmetrization tax: a full training step over the step of the bare backbone on random inputs, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.harness import compare
from probsym_fast import tasks
from probsym_fast.groups import Graphs
from probsym_fast.tasks.allocator import keep_freed_memory


@dataclass
class Case:
    """A full step, the bare backbone's, and what stands between them."""

    step: Callable[[], Any]
    bare: Callable[[], Any]
    distribution: Callable[[], Any]


def case(name: str, device: str, dense: nn.Module | None = None, overrides: list[str] | None = None) -> Case:
    """Of a configuration. dense: the bare backbone's first layers, where they stand in the embedding (an MLP's first linear
    map on the flattened matrix)."""
    keep_freed_memory()  # as training does, for both sides
    torch.manual_seed(0)
    task = tasks.load(name, overrides)
    config = task.config
    model = task.model().to(device).train()
    batch = task.dataset("train")[torch.arange(config.training.batch)]
    inputs, target = task.inputs(move(batch, device))
    samples = config.samples.train
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        prediction, penalties = model(inputs, samples)
        loss = task.loss(prediction, target)
        for value in penalties.values():
            loss = loss + config.training.entropy * value
        loss.backward()
        if config.training.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.training.clip)
        optimizer.step()

    def distribution():
        model.zero_grad()
        g, penalties = model.distribution(inputs, samples)
        tokens = model.embed(inputs, model.distribution.group, g)
        sums = [x.sum() for x in tokens if isinstance(x, torch.Tensor) and x.requires_grad]
        sum([*penalties.values(), *sums], torch.zeros((), device=device)).backward()

    with torch.no_grad():
        g, _ = model.distribution(inputs, samples)
        embedded = model.embed(inputs, model.distribution.group, g)
    backbone = nn.Sequential(dense, model.backbone).to(device) if dense is not None else model.backbone
    if dense is None:
        given = [torch.randn(x.shape, device=device) if isinstance(x, torch.Tensor) else x for x in embedded]
    else:
        given = [torch.randn(*embedded[0].shape[:-1], dense.in_features, device=device)]
    wanted = torch.randn_like(backbone(*given))
    bare_optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-4, fused=True)

    def bare():
        bare_optimizer.zero_grad()
        nn.functional.mse_loss(backbone(*given), wanted).backward()
        if config.training.clip:
            nn.utils.clip_grad_norm_(backbone.parameters(), config.training.clip)
        bare_optimizer.step()

    return Case(step, bare, distribution)


def move(batch: Any, device: str) -> Any:
    if isinstance(batch, Graphs):
        return batch.to(device)
    return tuple(move(x, device) for x in batch) if isinstance(batch, tuple) else batch.to(device)


CASES: dict[str, Callable[[str], Case]] = {
    "n-body GNN-PS": lambda device: case("nbody/gnn_O3_ps", device),
    "n-body Transformer-PS": lambda device: case("nbody/transformer_S5xO3_ps", device),
    "EXP-classify MLP-PS": lambda device: case("exp_classify/mlp_ps", device, nn.Linear(64 * 66, 2048)),
    "EXP-classify GIN-ID-PS": lambda device: case("exp_classify/gin_ps", device),
}
PUBLIC = {  # ms of the public code's step on two cores
    "n-body GNN-PS": 600,
    "n-body Transformer-PS": 2260,
    "EXP-classify MLP-PS": 2260,
    "EXP-classify GIN-ID-PS": 1480,
}


@pytest.mark.parametrize("name", CASES)
def test_training_step(name, device, seconds, record):
    this = CASES[name](device)
    variants = {"step": this.step, "bare backbone": this.bare, "distribution and embedding": this.distribution}
    rows = compare(f"{name}, training step", variants, device=device, reference="bare backbone", seconds=3 * seconds)
    rows[0].extra = {"tax": round(1 / rows[0].ratio, 2)}
    if device == "cpu":
        rows[0].extra |= {
            "public code ms": PUBLIC[name],
            "public / ours": round(PUBLIC[name] / rows[0].median / 1e3, 1),
        }
    record(rows, this.bare)
