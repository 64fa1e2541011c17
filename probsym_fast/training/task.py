"""Base classes of tasks: an experiment's data, model, loss and report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probsym_fast.models import Symmetrized
from probsym_fast.models.predictions import mapped
from probsym_fast.profiling.cases import Case
from probsym_fast.profiling.steps import move
from probsym_fast.training.configuration import full_name
from probsym_fast.training.loading import EpochSampler, batches
from probsym_fast.training.settings import Monitor


class Experiment(ABC):
    """An experiment, built from its configuration: a dataclass with at least task, name, seed and folder."""

    config: Any

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        """The report's table, as rows (what, figure)."""
        return [(name, str(value)) for name, value in results.items() if name != "best_checkpoint"]

    def table(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        """The whole table: `describe`, plus the rows that all experiments of a kind share."""
        return self.describe(results)


class Computation(Experiment):
    """An experiment that trains no model of its own."""

    continues: bool = False  # whether it resumes a stopped run, and checks the folder's configuration, by itself

    @abstractmethod
    def run(self, folder: Path) -> dict[str, Any]:
        """Computes and returns the experiment's figures, and writes plots into the folder."""


class Task(Experiment):
    """An experiment that trains a model; its configuration also has a `training: Training`."""

    measure: str  # name of the loss in the logs
    whole_set_measures: bool = False  # `measures` takes the whole validation set, and no training batches

    figures: tuple[str, ...] = ()  # names of the report's measures; empty: only the report knows

    def unit(self, figure: str) -> str:
        """The unit of a measure in the results, for plots; "": none."""
        return ""

    @property
    def monitor(self) -> Monitor:
        """Picks the best checkpoint: the validation loss, unless the task chooses another measure."""
        return Monitor(self.measure)

    def table(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        rows = self.describe(results)
        if best := results.get("best_checkpoint"):
            rows.append(("best checkpoint", f"epoch {best['epoch']}, {best['monitor']} {best['value']:.5f}"))
        return rows

    @abstractmethod
    def model(self, fresh: bool = True) -> Symmetrized:
        """A new model, with random weights from torch's global generator or the pretrained ones in the configuration.

        fresh: False skips reading pretrained weights, because a checkpoint will overwrite them.
        """

    def trained(self, path: Path) -> Symmetrized:
        """The model with a checkpoint's weights. Raises FileNotFoundError if missing, ValueError if it does not match."""
        from probsym_fast.training.checkpoints import load_checkpoint, with_weights

        return with_weights(self.model(fresh=False), path, load_checkpoint(path))

    def case(self, device: torch.device, weights: Path | None = None) -> Case:
        """What profiles measure: a new or `trained` model on the first training batch, with the training loss."""
        config = self.config
        torch.manual_seed(config.seed)
        model = (self.model() if weights is None else self.trained(weights)).to(device)
        batch, target = self.inputs(move(next(iter(self.loader("train"))), device))

        def loss(prediction: Any, penalties: Any) -> Tensor:
            return self.total(self.loss(prediction, target), penalties)

        precision = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.training.precision)
        return Case(full_name(config), model, batch, loss, {"clip": config.training.clip, "autocast": precision})

    def dataset(self, split: str) -> Sized:
        """The graphs of "train", "valid" or "test", in memory: an index tensor gives a batch."""
        raise NotImplementedError(f"{type(self).__name__}: dataset must be defined, or loader without it")

    def loader(self, split: str) -> DataLoader:
        """Batches of a split; those of "train" have equal sizes and are reshuffled every epoch."""
        dataset, train, settings = self.dataset(split), split == "train", self.config.training
        size = min(settings.batch, len(dataset))
        sampler = EpochSampler(len(dataset), size, shuffle=train, drop_last=train, seed=self.config.seed)
        return batches(cast(Dataset, dataset), sampler, settings.workers)

    def inputs(self, batch: Any) -> tuple[Any, Any]:
        """The model's inputs and the target of a batch; by default a batch is this pair."""
        return batch

    @abstractmethod
    def loss(self, prediction: Any, target: Any) -> Tensor:
        """The training loss without penalties: a scalar mean over the batch."""

    @abstractmethod
    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        """Tests the model, writes plots into the folder, and returns the figures."""

    def total(self, loss: Tensor, penalties: Mapping[str, Tensor]) -> Tensor:
        """What is trained: the loss, and the distribution's penalties (scalars), each weighted by `training.entropy`."""
        return loss + self.config.training.entropy * sum(penalties.values()) if penalties else loss

    def measures(self, prediction: Any, target: Any) -> dict[str, Tensor]:
        """What is logged besides the loss: means over batches, or with `whole_set_measures` over the whole validation set."""
        return {}

    def join(self, predictions: list[Any], targets: list[Any]) -> tuple[Any, Any]:
        """Joins batches on the CPU to the whole validation set's prediction (float32 or better) and target, for `measures`.

        Tensors, also those in dicts and tuples, are joined on axis 0.
        """
        prediction, target = (mapped(lambda *x: torch.cat(x), *parts) for parts in (predictions, targets))
        return prediction, target

    def count(self, target: Any) -> int:
        """A batch's weight in means over the set: its number of targets, or 1 if they are not a tensor."""
        return len(target) if isinstance(target, Tensor) else 1
