"""The tax of symmetrized energies and forces: a full training step over that of the bare network on as many clouds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.harness import compare
from probsym_fast.data.geometries import geometry
from probsym_fast.tasks.energies import Energies, EnergiesConfig
from probsym_fast.training.allocator import keep_freed_memory

MOLECULES, SAMPLES = 32, 8
METHODS = {"PS": "ps", "GA": "ga", "principal axes": "pca"}
NUMBERS = {"H": 1, "C": 6, "O": 8}


def step(method: str, molecules: int, samples: int, device: str) -> Callable[[], None]:
    """A training step on ethanol at random: forward, forces, loss, backward, clipping and Adam."""
    from torch_geometric.data import Data

    symbols, positions = geometry("ethanol")
    torch.manual_seed(0)
    z, pos = torch.tensor([NUMBERS[symbol] for symbol in symbols]), torch.tensor(positions)
    fields = [(pos + 0.1 * torch.randn_like(pos), torch.randn(()), torch.randn_like(pos)) for _ in range(molecules)]
    graphs = [Data(z=z, pos=x, energy=energy, force=force) for x, energy, force in fields]
    config = EnergiesConfig(method=method)  # type: ignore[arg-type]
    if method in config.of_method:
        config.samples.train = config.samples.valid = config.samples.test = 1
    task = Energies(config, dict.fromkeys(("train", "valid", "test"), graphs))
    model = task.model().to(device).train()
    batch, target = (x.to(device) for x in task.dataset("train")[torch.arange(molecules)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        prediction, penalties = model(batch, samples)
        (task.loss(prediction, target) + config.training.entropy * sum(penalties.values())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.clip)
        optimizer.step()

    return run


def test_energies_and_forces(device, seconds, record):
    """The bare network has the same tokens and no group; it takes B S = 256 molecules."""
    pytest.importorskip("torch_geometric")
    keep_freed_memory()  # as training does, for all sides
    variants = {name: step(method, MOLECULES, SAMPLES, device) for name, method in METHODS.items()}
    variants["bare network"] = step("none", MOLECULES * SAMPLES, 1, device)
    settings = {"reference": "bare network", "seconds": 5 * seconds, "whole": True}
    case = f"energies and forces, ethanol, B = {MOLECULES}, S = {SAMPLES}, training step"
    rows = compare(case, variants, device=device, **settings)
    for row in rows:
        row.extra = {"tax": round(1 / row.ratio, 2)}
    record(rows, variants["PS"])
