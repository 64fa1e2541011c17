"""What the number of samples does: accuracy by training samples; entropy and variances by inference samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from probsym_fast.groups import Draws, Graphs
from probsym_fast.models import Symmetrized
from probsym_fast.tasks import config as configuration
from probsym_fast.tasks import exp_classify
from probsym_fast.tasks.config import COUNT, Limit, at_least, between
from probsym_fast.tasks.exp_classify import ExpClassify, ExpClassifyConfig
from probsym_fast.tasks.graphs import PUBLISHED
from probsym_fast.tasks.plots import history, plot_grid
from probsym_fast.tasks.task import Computation, seeded

NUMBERS = Limit("numbers of samples >= 1", lambda some: all(isinstance(s, int) and s >= 1 for s in some))
LIMITS = {
    "train": NUMBERS,
    "test": Limit(f"at least one of {NUMBERS.words}", lambda some: len(some) > 0 and NUMBERS.holds(some)),
    "repeats": at_least(2),
    "graphs": COUNT,
    "seed": between(0, 2**32 - 1),
    **{f"classify.{key}": limit for key, limit in exp_classify.LIMITS.items()},
}


@dataclass
class SampleSizeConfig:
    """The sample-size analysis of Kim et al. 2023 on EXP-classify.

    Args:
        task: "sample_size".
        name: of the run; its full name is <task>/<name>, or the name alone where it has a slash, as in `probsym info`.
        train: numbers of training samples; a model is trained for each (continued where a run is there already).
        test: numbers of inference samples.
        repeats: outputs that a variance is taken over.
        graphs: test graphs used for variances and entropies.
        seed: of weights and noise.
        folder: of the run; null: runs/<full name>/seed<seed>.
        classify: the experiment that is trained.
    """

    task: Literal["sample_size"] = "sample_size"
    name: str = "custom"
    train: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    test: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50, 100, 200])
    repeats: int = 20
    graphs: int = 20
    seed: int = 1
    folder: str | None = None
    classify: ExpClassifyConfig = field(default_factory=ExpClassifyConfig)


class SampleSize(Computation):
    """Figures and plots by the number of samples, of random and of trained models."""

    def __init__(self, config: SampleSizeConfig):
        configuration.check(config, LIMITS)
        self.config = config

    def run(self, folder: Path) -> dict[str, Any]:
        config = self.config
        random = {name: self.inference(self.random_model(name)) for name in ("ps", "ga")}
        trained, norms = {}, {}
        for samples in config.train:
            run = self.train(samples, folder / f"train{samples}")
            model = run["model"]
            trained[samples] = {
                "test_accuracy": run["test_accuracy"],
                "test_accuracy_std": run["test_accuracy_std"],
                **self.inference(model),
            }
            norms[samples] = history(folder / f"train{samples}").get("train/gradient_norm", {})
        results = {
            "data": PUBLISHED[config.classify.dataset],
            "inference_samples": config.test,
            "random": random,
            "trained": {str(samples): row for samples, row in trained.items()},
            "gradient_norm": {str(s): fmean(list(n.values())[-10:]) for s, n in norms.items() if n},  # last epochs
        }
        self.plot(folder, random, trained, norms)
        return results

    def random_model(self, method: str) -> Symmetrized:
        torch.manual_seed(self.config.seed)
        return ExpClassify(replace(self.config.classify, method=method)).model().eval()

    def train(self, samples: int, folder: Path) -> dict[str, Any]:
        """Trains, or takes up, the run with this number of training samples."""
        from probsym_fast.tasks import training

        classify = self.config.classify
        config = replace(
            classify,
            name=f"train{samples}",
            seed=self.config.seed,
            folder=str(folder),
            samples=replace(classify.samples, train=samples),
        )
        task = ExpClassify(config)
        if (folder / "results.json").is_file():
            results = training.test(task)
        else:
            results = training.fit(task, resume=(folder / "config.yaml").is_file())
        return results | {"model": training.best_model(task)}

    @torch.no_grad()
    def inference(self, model: Symmetrized) -> dict[str, list[float]]:
        """By inference samples: variance of the predicted probability and of the loss over repeats, and the entropy of the
        mean permutation (nats a node)."""
        config = self.config
        task = ExpClassify(config.classify)
        data = task.dataset("test")
        graphs, target = data[torch.arange(min(config.graphs, len(data)))]
        largest = max(config.test)
        outputs, losses, entropies = [], [], []
        for samples in config.test:
            some: list[Tensor] = [
                model(graphs, samples, seeded(config.seed, f"repeat {samples}", k))[0] for k in range(config.repeats)
            ]
            y = torch.stack(some)  # (repeats, graphs, 1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(y, target.expand_as(y), reduction="none")
            outputs.append(float(y.sigmoid().var(0).mean()))
            losses.append(float(loss.var(0).mean()))
        permutations, _ = model.distribution(graphs, largest, Draws(seeded(config.seed, "entropy", 0)))
        for samples in config.test:
            entropies.append(mean_permutation_entropy(permutations.rank[:, :samples], graphs))
        return {"output_variance": outputs, "loss_variance": losses, "entropy": entropies}

    def plot(self, folder: Path, random: dict, trained: dict, norms: dict) -> None:
        S = self.config.test
        variance = {f"{name}, random": (S, row["output_variance"]) for name, row in random.items()}
        variance |= {f"trained with {s}": (S, row["output_variance"]) for s, row in trained.items()}
        panels = [("output variance", "inference samples", variance, "log", "log")]
        loss = {f"{name}, random": (S, row["loss_variance"]) for name, row in random.items()}
        loss |= {f"trained with {s}": (S, row["loss_variance"]) for s, row in trained.items()}
        panels.append(("loss variance", "inference samples", loss, "log", "log"))
        entropy = {f"{name}, random": (S, row["entropy"]) for name, row in random.items()}
        entropy |= {f"trained with {s}": (S, row["entropy"]) for s, row in trained.items()}
        panels.append(("entropy of the mean permutation", "samples", entropy, "log", "linear"))
        if trained:
            accuracy = {"10 test samples": (list(trained), [row["test_accuracy"] for row in trained.values()])}
            panels.append(("test accuracy", "training samples", accuracy, "log", "linear"))
            series = {f"trained with {s}": (list(n), list(n.values())) for s, n in norms.items() if n}
            if series:
                panels.append(("gradient norm", "epoch", series, "linear", "log"))
        plot_grid(folder / "plots" / "samples.png", panels)

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        rows = []
        for name, row in results["random"].items():
            pairs = zip(results["inference_samples"], row["output_variance"], strict=True)
            rows.append((f"output variance, random {name}", "  ".join(f"S={s}: {v:.3e}" for s, v in pairs)))
        ratio = [a / b for a, b in zip(*(results["random"][m]["output_variance"] for m in ("ps", "ga")), strict=True)]
        rows.append(("ratio PS / GA", "  ".join(f"{r:.2f}" for r in ratio)))
        for samples, row in results["trained"].items():
            rows.append((f"trained with S = {samples}", f"test accuracy {row['test_accuracy']:.1%}"))
        return rows


def mean_permutation_entropy(rank: Tensor, graphs: Graphs) -> float:
    """Entropy of the rows of the mean permutation matrix, mean over nodes; rank (B, S, N)."""
    N = rank.shape[-1]
    mean = torch.nn.functional.one_hot(rank, N).double().mean(1)  # (B, N nodes, N slots)
    rows = torch.special.entr(mean).sum(-1)[graphs.graph, graphs.local]
    return float(rows.mean())
