"""Runs over several processes, one after the other: `torchrun ... -m tests.helpers.spread FOLDER`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from probsym_fast.tasks.nbody import Samples
from probsym_fast.training import run as training
from tests.helpers.tiny import COUNTS, Tiny, TinyConfig, tiny

BASE = {"epochs": 2, "batch": 8, "clip": 0.5, "lr": 0.05}
RUNS: dict[
    str, dict[str, Any]
] = {  # name: settings; noise that every process along the data would draw anew only alone
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "samples": {"strategy": "samples", "noise": 0.7, "samples": 3},
    "one_sample": {"strategy": "samples", "noise": 0.7, "samples": 1},
    "both": {"strategy": "samples", "sample_devices": 2, "samples": 5},
}
UNEVEN = 17  # the last batch of 8 has one vector


def task(folder: Path, name: str, devices: int, **more: Any) -> Tiny:
    settings = {**BASE, **RUNS[name], "devices": devices, **more}
    noise, samples = settings.pop("noise", 0.0), settings.pop("samples", 2)
    if devices == 1:
        settings.pop("sample_devices", None)
    made = tiny(folder, noise=noise, **settings)
    config: TinyConfig = replace(made.config, samples=Samples(samples, samples, samples, 1))
    return Tiny(config)


def main(folder: Path, devices: int) -> None:
    COUNTS["valid"] = UNEVEN
    for name in RUNS:
        training.fit(task(folder / name, name, devices))
    training.fit(task(folder / "resumed", "fsdp", devices, epochs=1))
    training.fit(task(folder / "resumed", "fsdp", devices), resume=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
