"""Tests with several samples and trials: figures as mean and standard deviation over the noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probsym_fast._progress import announced
from probsym_fast.draws import seed_generators, seeded
from probsym_fast.models import Symmetrized
from probsym_fast.training.task import Task


class Predicted(NamedTuple):
    """Predictions for a batch, on the CPU."""

    prediction: Tensor
    target: Any
    batch: Any


class InTrials(Task):
    """A task with `samples: Samples` whose test runs `samples.trials` times, each with new noise."""

    things = "graphs"  # what the data set holds
    also_test: tuple[int, ...] = ()  # more numbers of samples to test with; their figures end in _S<number>

    @property
    @abstractmethod
    def about(self) -> str:
        """The data, in the report."""

    @torch.no_grad()
    def predictions(self, model: Symmetrized, split: str, samples: int, trial: int) -> Iterator[Predicted]:
        """The model's predictions for every batch, in float32."""
        device, loader = next(model.parameters()).device, self.loader(split)
        text = f"{split}: {len(self.dataset(split))} {self.things}, {samples} samples, trial {trial + 1}"
        with announced(text, len(loader)) as advance:
            for k, loaded in enumerate(loader):
                batch, target = self.inputs(loaded)
                inputs = self.for_test(batch).to(device)
                seed_generators(seeded(self.config.seed, f"{split} patches {k}", trial).initial_seed())
                prediction, _ = model(inputs, samples, seeded(self.config.seed, f"{split} {k}", trial))
                yield Predicted(prediction.float().cpu(), target, batch)
                advance(1)

    def for_test(self, batch: Any) -> Any:
        """The batch as the test needs it."""
        return batch

    def evaluate(self, model: Symmetrized, split: str, samples: int, trial: int) -> dict[str, float]:
        """Measures of one pass over the split."""
        predictions, targets, _ = zip(*self.predictions(model, split, samples, trial), strict=True)
        joined = self.join(list(predictions), list(targets))
        return {name: float(x) for name, x in self.measures(*joined).items()}

    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        samples, trials = self.config.samples.test, self.config.samples.trials
        figures: dict[str, Any] = {"data": self.about, "samples": samples, "trials": trials}
        for count, ending in ((samples, ""), *((S, f"_S{S}") for S in self.also_test)):
            found = [self.evaluate(model, "test", count, k) for k in range(trials)]
            for name in found[0]:
                values = torch.tensor([each[name] for each in found], dtype=torch.float64)
                figures[f"test_{name}{ending}"] = values.mean().item()
                figures[f"test_{name}{ending}_std"] = values.std(correction=0).item()
        return figures

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [("data", results["data"]), ("samples, trials", f"{results['samples']}, {results['trials']}")]
        names = [key for key in results if key.startswith("test_") and f"{key}_std" in results]
        return rows + [
            (key.replace("_", " ", 1).replace("_S", ", S = "), f"{results[key]:.4f} +- {results[key + '_std']:.4f}")
            for key in names
        ]
