"""A task that trains in a moment: noisy vectors through a small network."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from probsym_fast.draws import seeded
from probsym_fast.models import Symmetrized
from probsym_fast.training import run as training
from probsym_fast.training.loading import EpochSampler, batches
from probsym_fast.training.settings import Samples, Training
from probsym_fast.training.task import Task

COUNTS = {"train": 24, "valid": 20, "test": 10}


@dataclass
class TinyConfig:
    """Args:
    task: "tiny".
    name: of the run.
    seed: of everything.
    dropout: of the backbone.
    noise: scale of the noise.
    folder: of the run.
    samples: noisy copies.
    training: how.
    """

    task: str = "tiny"
    name: str = "tiny"
    seed: int = 3
    dropout: float = 0.0
    noise: float = 0.0
    folder: str | None = None
    samples: Samples = field(default_factory=lambda: Samples(1, 1, 1, 1))
    training: Training = field(default_factory=Training)


class Rows(NamedTuple):
    """A batch of vectors, x (B, 3)."""

    x: torch.Tensor
    num_nodes = center = None

    @property
    def size(self) -> int:
        return self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def check(self) -> None: ...


class Vectors(torch.utils.data.Dataset):
    """An index tensor gives x (B, 3) and y (B, 1)."""

    def __init__(self, count: int, seed: int):
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: torch.Tensor) -> tuple[Rows, torch.Tensor]:
        return Rows(self.x[index]), self.y[index]


class Shift(nn.Module):
    """Adds noise, (B, S, 3), and a scale that is learned."""

    group = None

    def __init__(self, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale]), requires_grad=scale > 0)

    def forward(self, batch, samples, draws):
        return self.scale * draws.normal((batch.size, samples, 3), "shift").to(batch.x), {}


class Add(nn.Module):
    def forward(self, batch, group, g):
        return (batch.x[:, None] + g,)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 1)

    def forward(self, h, batch, group, g):
        return self.out(h).mean(1)


class Tiny(Task):
    """Mean squared error."""

    measure = "mse"

    def __init__(self, config: TinyConfig):
        self.config = config

    def model(self, fresh: bool = True) -> Symmetrized:
        backbone = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(self.config.dropout))
        return Symmetrized(backbone, Add(), Mean(), Shift(self.config.noise))

    def dataset(self, split: str) -> Vectors:
        return Vectors(COUNTS[split], len(split))

    def loader(self, split: str):
        settings, train, data = self.config.training, split == "train", self.dataset(split)
        sampler = EpochSampler(len(data), settings.batch, shuffle=train, drop_last=train, seed=self.config.seed)
        return batches(data, sampler, settings.workers)

    def inputs(self, batch: Any) -> tuple[Any, Any]:
        return batch

    def loss(self, prediction, target):
        return nn.functional.mse_loss(prediction, target)

    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        (batch, y), *_ = self.loader("test")
        prediction, _ = model(batch, 1, seeded(self.config.seed, "test", 0))
        return {"test_mse": self.loss(prediction, y).item()}


def tiny(folder: Path, kind: type[Tiny] = Tiny, *, dropout: float = 0.0, noise: float = 0.0, **settings: Any) -> Tiny:
    """The task with these settings of the training; three batches of 8 an epoch unless told otherwise."""
    small = {"epochs": 2, "batch": 8, "accelerator": "cpu", "progress": False}
    return kind(
        replace(
            TinyConfig(), folder=str(folder), dropout=dropout, noise=noise, training=Training(**{**small, **settings})
        )
    )


def run(folder: Path, kind: type[Tiny] = Tiny, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """last.ckpt of the run."""
    training.fit(tiny(folder, kind, **settings), resume=resume)
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
