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


def nbody(record: str, names: tuple[str, ...], published: dict[str, float], runs: dict | None = None) -> None:
    """Validation error by epoch, a colour for each method; dashed: figures of the paper, named at the right."""
    runs = runs or runs_of(record)
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


def nbody_gnn() -> None:
    """The table's methods, and PS by the shorter recipe."""
    runs = runs_of("nbody-gnn") | {"PS, shorter recipe": runs_of("nbody-gnn-fast")["PS"]}
    names = ("EGNN", "PS", "GA", "canonical", "none", "PS, shorter recipe")
    nbody("nbody-gnn", names, {"EGNN, paper": 0.0070}, runs)


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
    """PS with the published settings, by samples in training in fewer epochs, and other methods."""
    full, short, samples = (runs_of(f"exp-classify-{name}") for name in ("mlp-ps", "short", "samples"))
    methods = ("FA", "PS fixed noise", "GA", "canonical")
    panels = {
        "PS, 2,000 epochs, bfloat16": {"S = 10": full["PS"]["seed1"]},
        "PS and others, 160 epochs": {f"S = {S}": samples[f"S={S}"]["seed1"] for S in (10, 5, 2, 1)}
        | {"S = 5, soft": samples["PS soft"]["seed1"]}
        | {name: samples[name]["seed1"] for name in ("GA", "canonical")},
        "other methods, 200 epochs": {name: short[name]["seed1"] for name in methods},
    }
    exp_classify("exp-classify-mlp", panels, 3.4)


def dots(axes, values: dict[float, list[float]], color: str, label: str | None = None) -> None:
    """A dot for each run and a line through the means of several, against a number on a logarithmic axis."""
    for x, runs in values.items():
        axes.plot([x] * len(runs), runs, "o", color=color, ms=5, alpha=0.6)
    several = {x: mean(runs) for x, runs in values.items() if len(runs) > 1}
    axes.plot(list(several), list(several.values()), color=color, lw=1.2, label=label)
    axes.set(xscale="log")
    axes.set_xticks(list(values), [f"{x:,}" for x in values])
    axes.minorticks_off()


def equal_compute() -> None:
    """Accuracy by samples in training: against passes so far, and after it against samples in the test; by entropy weight."""
    runs = runs_of("equal-compute")
    names = [f"{method} S={S}" for method in ("PS", "GA") for S in (1, 2, 4, 8) if f"{method} S={S}" in runs]
    accuracy = by_samples([(name, run["samples"], run) for name in names for run in runs[name].values()])[
        "test_accuracy"
    ]
    shape = {"figsize": (12.5, 3.8), "width_ratios": [4, 4, 2.5]}
    figure, (left, right, weights) = plt.subplots(1, 3, **shape, layout="constrained")
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
    by_weight = {0.03: "PS S=2 entropy 0.03", 0.1: "PS S=2", 0.3: "PS S=2 entropy 0.3"}
    dots(weights, {x: accuracies(runs[name]) for x, name in by_weight.items()}, COLORS[0])
    weights.set(xlabel="weight of the entropy", ylabel="test accuracy, PS, 2 in training", ylim=(0.7, 0.9))
    for axes in (left, right, weights):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, "equal-compute")


def pattern() -> None:
    """PATTERN in small, a dot for each run: eight rows with a line at their mean, and PS by the number of training graphs."""
    runs = runs_of("pattern-small")
    shape = {"figsize": (11, 3.2), "width_ratios": [1, 0.8]}
    figure, (rows, graphs) = plt.subplots(1, 2, **shape, layout="constrained")
    methods = ("PS", "canonical", "GA", "FA")
    few = runs_of("pattern-small-graphs")
    for start, color, shift in zip(("from images", "from scratch"), COLORS, (-0.16, 0.16), strict=False):
        for row, method in enumerate(methods):
            values = accuracies(runs[f"{method}, {start}"])
            label = None if row else start
            rows.plot(values, [row + shift] * len(values), "o", color=color, ms=5, alpha=0.6, label=label)
            rows.plot([mean(values)] * 2, [row + shift - 0.13, row + shift + 0.13], color=color, lw=2)
        by_graphs = {x: accuracies(few[f"{start}, {x} graphs"]) for x in (250, 1000)}
        by_graphs[2000] = json.loads((RECORDS / "pattern-small-transfer.json").read_text())["values"][start]
        dots(graphs, by_graphs | {4000: accuracies(runs[f"PS, {start}"])}, color, start)
    rows.set(yticks=range(len(methods)), yticklabels=methods, xlabel="test accuracy")
    rows.invert_yaxis()
    graphs.set(xlabel="training graphs, PS", ylabel="test accuracy")
    for axes in (rows, graphs):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, "pattern-small")


def accuracies(runs: dict) -> list[float]:
    """Test accuracies by seed."""
    return [run["test_accuracy"] for run in runs.values()]


if __name__ == "__main__":
    nbody_gnn()
    nbody("nbody-transformer", ("PS", "GA", "canonical", "none"), {"PS, paper": 0.0040, "canonical, paper": 0.0078})
    exp_classify_gin()
    exp_classify_mlp()
    equal_compute()
    pattern()
