"""Figures of a comparison's runs against the number of samples in the test: mean and deviation over the seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from probsym_fast._plots import save

Figures = dict[str, dict[str, dict[int, list[float]]]]  # figure -> configuration -> S -> a value per run


def by_samples(runs: list[tuple[str, int, dict[str, Any]]]) -> Figures:
    """From runs (configuration, S of its test, results): the figures that some run has for other S, as <figure>_S<number>."""
    names = {base for _, _, results in runs for key in results for base, _ in [_parts(key)] if base in results}
    found: Figures = {name: {} for name in sorted(names)}
    for label, own, results in runs:
        for key, value in results.items():
            base, count = _parts(key)
            name, S = (key, own) if key in found else (base, count)
            if name in found:
                found[name].setdefault(label, {}).setdefault(S, []).append(value)
    return found


def _parts(key: str) -> tuple[str, int]:
    """ "test_ece_S4" -> ("test_ece", 4); ("", 0) for another key."""
    base, _, count = key.rpartition("_S")
    return (base, int(count)) if count.isdecimal() else ("", 0)


def table(figures: Figures) -> str:
    """Markdown: a row per configuration and S, a column per figure."""
    labels = _labels(figures)
    heads = ["configuration", "S", *(name.replace("_", " ") for name in figures), "runs"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for label in labels:
        for S in sorted({S for of in figures.values() for S in of.get(label, {})}):
            each = [of.get(label, {}).get(S, []) for of in figures.values()]
            rows.append(
                "| " + " | ".join([label, str(S), *map(mean_and_deviation, each), str(max(map(len, each)))]) + " |"
            )
    return "\n".join(rows) + "\n"


def _labels(figures: Figures) -> list[str]:
    """The configurations in some figure."""
    return list(dict.fromkeys(label for of in figures.values() for label in of))


def mean_and_deviation(values: list[float]) -> str:
    """To two digits of the deviation; of one run only the value, of none nothing."""
    if not values:
        return ""
    mean, deviation = spread(values)
    digits = digits_of(mean, deviation)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and (n - 1) deviation, 0 for one value; nan where a value is not finite."""
    with np.errstate(invalid="ignore"):
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def digits_of(mean: float, deviation: float) -> int:
    """Decimals that show two digits of the deviation, or four of the mean where it has none."""
    shown, digits = (deviation, 2) if deviation > 0 else (abs(mean), 4)
    return max(0, digits - 1 - math.floor(math.log10(shown))) if 0 < shown < math.inf else 4


def plot(path: Path, figures: Figures) -> None:
    """A panel per figure, a line per configuration, with bars of one deviation over the seeds."""
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    drawn, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), squeeze=False)
    for axis in axes.flat[len(figures) :]:
        axis.remove()
    labels = _labels(figures)
    for axis, (name, of) in zip(axes.flat, figures.items(), strict=False):
        for k, label in enumerate(labels):
            points = dict(sorted(of.get(label, {}).items()))  # without any the line is in the legend only
            means, deviations = zip(*map(spread, points.values()), strict=True) if points else ((), ())
            color = f"C{k}" if len(labels) <= 10 else plt.get_cmap("tab20")(k)  # a colour each, up to 20
            axis.errorbar(list(points), means, deviations, fmt="o-", color=color, capsize=3, label=label)
        axis.set(xlabel="samples S", ylabel=name.replace("_", " "), xscale="log")
        shown = sorted({S for points in of.values() for S in points})
        axis.set_xticks(shown, [str(S) for S in shown], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    drawn.tight_layout()
    names = axes.flat[0].get_legend_handles_labels()
    drawn.legend(
        *names, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )  # beside the panels: it hides no line
    save(drawn, path)
