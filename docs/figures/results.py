"""Figures of docs/results.md, from what benchmarks/experiments.py gathered."""

import json
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter
from style import COLORS, GREY, save

from probsym_fast.tasks.by_samples import by_samples

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "experiments"


def runs_of(name: str) -> dict:
    """name -> seed -> figures and curves."""
    return json.loads((RECORDS / f"{name}.json").read_text())["runs"]


def nbody(record: str, names: tuple[str, ...], published: dict[str, float]) -> None:
    """Validation error by epoch, a colour for each method; dashed: figures of the paper, named at the right."""
    runs = runs_of(record)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, color in zip(names, COLORS, strict=False):
        for k, run in enumerate(runs[name].values()):
            curve = run["curves"]["valid/mse"]
            axes.plot(curve["epochs"], curve["values"], color=color, lw=1.2, label=name if k == 0 else None)
    for name, value in published.items():
        axes.axhline(value, color=GREY, lw=0.9, ls="--")
        axes.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), xytext=(4, 0), va="center", color=GREY,
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="epoch", ylabel="validation error", ylim=(0.0035, 0.2))
    axes.set_yticks([0.004, 0.007, 0.01, 0.02, 0.05, 0.1, 0.2])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, record)


def exp_classify(name: str, panels: dict[str, dict[str, dict | None]], height: float) -> None:
    """Validation accuracy by epoch: a panel for each title, a line for each label's run; dashed: chance."""
    figure, places = plt.subplots(1, len(panels), figsize=(11, height), sharey=True, layout="constrained")
    for axes, (title, runs) in zip(places, panels.items(), strict=True):
        for (label, run), color in zip(runs.items(), COLORS, strict=False):
            if run is not None:  # the others keep their colours
                curve = run["curves"]["valid/accuracy"]
                axes.plot(curve["epochs"], curve["values"], color=color, lw=1.2, label=label)
        axes.axhline(0.5, color=GREY, lw=0.9, ls="--")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    places[0].set(ylabel="validation accuracy")
    save(figure, name)


def exp_classify_gin() -> None:
    """A panel for each method, a line for each seed."""
    runs = runs_of("exp-classify-gin")
    panels = {x: {f"seed {k}": runs[x].get(f"seed{k}") for k in (1, 2, 3)} for x in ("PS", "FA", "GA", "canonical")}
    exp_classify("exp-classify-gin", panels, 2.8)


def exp_classify_mlp() -> None:
    """PS with the published settings, and methods in a tenth of the epochs."""
    full, short = runs_of("exp-classify-mlp-ps"), runs_of("exp-classify-short")
    methods = ("FA", "PS fixed noise", "GA", "canonical")
    panels = {
        "PS, published settings": {"10 samples": full["PS"]["seed1"]},
        "200 epochs, 5 samples (canonical: 1)": {name: short[name]["seed1"] for name in methods},
    }
    exp_classify("exp-classify-mlp", panels, 3.4)


def equal_compute() -> None:
    """By samples in training: accuracy against forward passes so far, and after training against samples in the test."""
    runs = runs_of("equal-compute")
    names = [f"{method} S={S}" for method in ("PS", "GA") for S in (1, 2, 4, 8) if f"{method} S={S}" in runs]
    accuracy = by_samples([(name, run["samples"], run) for name in names for run in runs[name].values()])[
        "test_accuracy"
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for name, color in zip(names, COLORS, strict=False):
        method, S = name.split(" S=")
        style = {"color": color, "ls": "-" if method == "PS" else "--", "label": f"{method}, {S} in training"}
        curves = [run["curves"]["valid/accuracy"] for run in runs[name].values()]
        passes = [int(S) * epoch for epoch in curves[0]["epochs"]]
        left.plot(passes, [mean(x) for x in zip(*(curve["values"] for curve in curves), strict=True)], **style)
        points = dict(sorted(accuracy[name].items()))
        right.errorbar(list(points), [mean(x) for x in points.values()],
                       [stdev(x) if len(x) > 1 else 0.0 for x in points.values()], fmt="o", capsize=3, **style)  # fmt: skip
    left.set(xlabel="passes over the training set: samples × epochs", ylabel="validation accuracy, 8 samples")
    right.set(xlabel="samples in the test", ylabel="test accuracy", xscale="log")
    right.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"], minor=False)
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, "equal-compute")


def pattern() -> None:
    """PATTERN in small: a dot for each run of eight rows, a line at their mean."""
    runs = runs_of("pattern-small")
    figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
    methods = ("PS", "canonical", "GA", "FA")
    for start, color, shift in zip(("from images", "from scratch"), COLORS, (-0.16, 0.16), strict=False):
        for row, method in enumerate(methods):
            values = [run["test_accuracy"] for run in runs[f"{method}, {start}"].values()]
            label = None if row else start
            axes.plot(values, [row + shift] * len(values), "o", color=color, ms=5, alpha=0.6, label=label)
            axes.plot([mean(values)] * 2, [row + shift - 0.13, row + shift + 0.13], color=color, lw=2)
    axes.set(yticks=range(len(methods)), yticklabels=methods, xlabel="test accuracy")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "pattern-small")


if __name__ == "__main__":
    nbody("nbody-gnn", ("EGNN", "PS", "GA", "canonical", "none"), {"EGNN, paper": 0.0070})
    nbody("nbody-transformer", ("PS", "GA", "canonical", "none"), {"PS, paper": 0.0040, "canonical, paper": 0.0078})
    exp_classify_gin()
    exp_classify_mlp()
    equal_compute()
    pattern()
