"""Effect of the number of samples: accuracy by training samples, variance by inference samples, PS and GA by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from probsym_fast.models import Symmetrized
from probsym_fast.tasks import exp_classify
from probsym_fast.tasks.exp_classify import ExpClassify, ExpClassifyConfig
from probsym_fast.tasks.graphs import PUBLISHED
from probsym_fast.tasks.plots import plot_grid
from probsym_fast.tasks.sample_figures import Measurement
from probsym_fast.training import configuration
from probsym_fast.training import run as training
from probsym_fast.training.checkpoints import kept_weights
from probsym_fast.training.configuration import COUNT, Limit, at_least, between
from probsym_fast.training.settings import Run, may_change
from probsym_fast.training.task import Computation

NUMBERS = Limit("numbers of samples >= 1", lambda some: all(isinstance(s, int) and s >= 1 for s in some))
LIMITS = {
    "train": NUMBERS,
    "compared": COUNT,
    "every": COUNT,
    "test": Limit(f"at least one of {NUMBERS.words}", lambda some: len(some) > 0 and NUMBERS.holds(some)),
    "repeats": at_least(2),
    "graphs": COUNT,
    "permutations": COUNT,
    "gradients": COUNT,
    "seed": between(0, 2**32 - 1),
    **{f"classify.{key}": limit for key, limit in exp_classify.LIMITS.items()},
}
Row = dict[str, Any]


@dataclass
class SampleSizeConfig(Run):
    """The sample-size analysis of Kim et al. 2023 on EXP-classify; defaults: published settings (docs/differences.md).

    Args:
        task: "sample_size".
        train: numbers of training samples; trains PS with each (existing runs continue).
        compared: number of samples with which PS and GA are both trained and measured every few epochs; null: neither.
        every: epochs between these measurements; keeps the weights, 100 MB each for the MLP.
        test: numbers of inference samples.
        repeats: outputs per deviation.
        graphs: validation graphs for variances and entropies.
        permutations: samples for the mean permutation, whose entropy is measured.
        gradients: training graphs for the gradient norm.
        seed: seed of weights and noise.
        folder: run folder; null: runs/<full name>/seed<seed>. Existing trainings and figures are kept.
        classify: the experiment to train.
    """

    task: Literal["sample_size"] = "sample_size"
    train: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    compared: int | None = 10
    every: int = 100
    test: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50, 100, 200])
    repeats: int = 100
    graphs: int = 200
    permutations: int = 100
    gradients: int = 800
    classify: ExpClassifyConfig = field(default_factory=ExpClassifyConfig)


class SampleSize(Computation):
    """Figures and plots by number of samples, for random and trained models."""

    def __init__(self, config: SampleSizeConfig):
        configuration.check(config, LIMITS)
        self.config = config
        self.measurement = Measurement(
            tuple(config.test), config.repeats, config.graphs, config.permutations, config.gradients, config.seed
        )

    def run(self, folder: Path) -> dict[str, Any]:
        config = self.config
        results: dict[str, Any] = {"data": PUBLISHED[config.classify.dataset], "inference_samples": config.test}
        results["random"] = {method: self.random(method, folder) for method in ("ps", "ga")}
        runs = {("ps", samples): None for samples in config.train}
        if config.compared is not None:
            runs |= {(method, config.compared): None for method in ("ps", "ga")}
        results |= {"trained": {}, "trained_ga": {}, "compared": {}}
        for method, samples in runs:
            task = self.task(method, samples, folder)
            row = self.best(task, folder)
            if method == "ga":
                results["trained_ga"][str(samples)] = row
            elif samples in config.train:
                results["trained"][str(samples)] = row
            if samples == config.compared:
                results["compared"][method] = self.by_epoch(task, results["random"][method], folder)
        self.plot(folder, results)
        return results

    def task(self, method: str, samples: int, folder: Path) -> ExpClassify:
        """The training with `samples` samples, in its own folder."""
        classify, config = self.config.classify, self.config
        name = f"train{samples}" + ("" if method == "ps" else f"_{method}")
        keep = config.every if samples == config.compared else None
        return ExpClassify(
            replace(
                classify,
                name=name,
                method=method,
                seed=config.seed,
                folder=str(folder / name),
                samples=replace(classify.samples, train=samples),
                training=replace(classify.training, keep_every=keep),
            )
        )

    def random(self, method: str, folder: Path) -> Row:
        """Figures of an untrained model, the one that training starts from."""
        samples = self.config.compared or self.config.classify.samples.train
        task = self.task(method, samples, folder)
        torch.manual_seed(self.config.seed)
        return self.measured(f"random_{method}", task.model().eval(), task, folder)

    def best(self, task: ExpClassify, folder: Path) -> Row:
        """Figures of the best checkpoint; trains, resumes or only tests, as needed."""
        where = training.run_folder(task.config)
        accuracy: dict[str, Any] | None
        if (where / "results.json").is_file():
            training.check_recorded(where, task.config, may_change(task.config.training))
            accuracy = training.test(task)
        else:
            accuracy = training.fit(task, resume=(where / "config.yaml").is_file())
        assert accuracy is not None  # this is the first process
        row = self.measured(f"{task.config.name}_best", training.best_model(task), task, folder)
        return {key: accuracy[key] for key in ("test_accuracy", "test_accuracy_std")} | row

    def by_epoch(self, task: ExpClassify, random: Row, folder: Path) -> dict[str, list]:
        """Figures of the kept weights by epoch; epoch 0 is the random model."""
        checkpoints = training.run_folder(task.config) / "checkpoints"
        device = next(training.best_model(task).parameters()).device
        rows = {0: random}
        for epoch in range(self.config.every, task.config.training.epochs + 1, self.config.every):
            if (path := kept_weights(checkpoints, epoch)).is_file():  # none after an early stop
                model = task.trained(path).to(device).eval()
                rows[epoch] = self.measured(f"{task.config.name}_epoch{epoch}", model, task, folder)
        return {"epochs": list(rows), **{key: [row[key] for row in rows.values()] for key in random}}

    def measured(self, name: str, model: Symmetrized, task: ExpClassify, folder: Path) -> Row:
        return self.measurement.figures(folder / "figures" / f"{name}.json", model, task, task.config.samples.train)

    def plot(self, folder: Path, results: dict[str, Any]) -> None:
        S, trained, compared = self.config.test, results["trained"], results["compared"]
        rows = {f"{method}, random": row for method, row in results["random"].items()}
        rows |= {f"ps, trained with {s}": row for s, row in trained.items()}
        rows |= {f"ga, trained with {s}": row for s, row in results["trained_ga"].items()}
        panels = [
            (
                f"{what} variance",
                "inference samples",
                {name: (S, row[f"{what}_variance"]) for name, row in rows.items()},
                "log",
                "log",
            )
            for what in ("output", "loss")
        ]
        for key, label in (("test_accuracy", "test accuracy"), ("entropy", "entropy of the mean permutation")):
            if trained:
                line = {"ps": ([int(s) for s in trained], [row[key] for row in trained.values()])}
                panels.append((label, "training samples", line, "log", "linear"))
        plot_grid(folder / "plots" / "samples.png", panels)
        if compared:
            panels = [
                (
                    label,
                    "epoch",
                    {method: (row["epochs"], row[key]) for method, row in compared.items()},
                    "linear",
                    scale,
                )
                for key, label, scale in (
                    ("entropy", "entropy of the mean permutation", "linear"),
                    ("gradient_norm", "norm of the mean gradient", "log"),
                )
            ]
            plot_grid(folder / "plots" / "epochs.png", panels)

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [("data", results["data"])]
        for name, row in results["random"].items():
            pairs = zip(results["inference_samples"], row["output_variance"], strict=True)
            rows.append((f"output variance, random {name}", "  ".join(f"S={s}: {v:.3e}" for s, v in pairs)))
        ratio = [a / b for a, b in zip(*(results["random"][m]["output_variance"] for m in ("ps", "ga")), strict=True)]
        rows.append(("ratio PS / GA", "  ".join(f"{r:.2f}" for r in ratio)))
        for method, trained in (("PS", results["trained"]), ("GA", results["trained_ga"])):
            for samples, row in trained.items():
                text = f"test accuracy {row['test_accuracy']:.1%}, entropy {row['entropy']:.2f}"
                rows.append((f"{method} trained with S = {samples}", text))
        for method, row in results["compared"].items():
            last = f"after {row['epochs'][-1]} epochs: entropy {row['entropy'][-1]:.2f}"
            rows.append((f"{method.upper()} by epoch", f"{last}, gradient norm {row['gradient_norm'][-1]:.2e}"))
        return rows
