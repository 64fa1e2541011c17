"""Plots of profiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from probsym_fast._plots import PRINTED, save

Row = dict[str, Any]


def plot_profile(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Plots latency, throughput, peak memory, tax and variance against S, a line per mode, backend, chunk and draws.

    rows: dictionaries of `results.Row`.
    """
    panels = [
        ("latency", 1e3, "step (ms)"),
        ("throughput", 1.0, "graphs / s"),
        ("peak", 1e-6, "peak memory (MB)"),
        ("tax", 1.0, "step / bare backbone"),
        ("variance", 1.0, "variance of the prediction"),
    ]
    panels = [panel for panel in panels if any(row[panel[0]] for row in rows)]  # log scale: skips a variance of 0
    parts = {key: {row[key] for row in rows} for key in ("mode", "backend", "chunk", "draws")}
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = [row["mode"]] if len(parts["mode"]) > 1 else []
        words += [row["backend"]] if len(parts["backend"]) > 1 else []
        words += [f"chunk {row['chunk'] or 'all'}"] if len(parts["chunk"]) > 1 else []
        words += [row["draws"]] if len(parts["draws"]) > 1 else []
        lines.setdefault(", ".join(words) or row["mode"], []).append(row)
    samples = sorted({row["samples"] for row in rows})
    with plt.rc_context(PRINTED):
        columns = min(3, len(panels) + 1)
        count = -(-(len(panels) + 1) // columns)  # one more panel for the legend
        figure, axes = plt.subplots(count, columns, figsize=(2.6 * columns, 2.2 * count), squeeze=False)
        for axis, (key, scale, label) in zip(axes.flat, panels, strict=False):
            for k, (line, some) in enumerate(lines.items()):
                some = [row for row in some if row[key] is not None]
                at, values = [row["samples"] for row in some], [row[key] * scale for row in some]
                axis.plot(at, values, marker="osD^v<>"[k % 7], markersize=3.5, linewidth=1.2, color=f"C{k}", label=line)
                if key == "latency":
                    low, high = ([row[end] * scale for row in some] for end in ("low", "high"))
                    axis.fill_between(at, low, high, color=f"C{k}", alpha=0.2, linewidth=0)
            if key == "tax":
                axis.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
                axis.set_ylim(bottom=0)
            if key == "variance":
                first = next(row for row in rows if row[key])
                plot_slope(axis, first, samples)
            axis.set_xscale("log", base=2)
            if key != "tax":
                axis.set_yscale("log")
            if key != "tax":  # ticks even within a decade
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:.0e}" if key == "variance" else "{x:g}")
            axis.set(xlabel="samples S", ylabel=label, xticks=samples, xticklabels=list(map(str, samples)))
            axis.minorticks_off()
            axis.grid(alpha=0.25, linewidth=0.5)
        *_, legend = axes.flat
        for axis in list(axes.flat)[len(panels) :]:
            axis.axis("off")
        found = dict(zip(*reversed(axes.flat[len(panels) - 1].get_legend_handles_labels()), strict=True))
        legend.legend(found.values(), found.keys(), loc="center", frameon=False, title=name)
        figure.tight_layout()
        save(figure, path)


def plot_slope(axis: plt.Axes, first: Row, samples: list[int]) -> None:
    """Plots the 1 / S slope of independent samples, starting at row `first`."""
    slope = [first["variance"] * first["samples"] / s for s in samples]
    axis.plot(samples, slope, color="0.2", linewidth=0.8, linestyle="--", label="1 / S", zorder=3)


def plot_variances(path: Path, profiles: list[tuple[str, str, list[Row]]]) -> None:
    """Plots variance against S for several profiles (name, weights, rows), with bars of one standard error.

    A column per name, a panel below for each of its profiles, a line per kind of draws. rows: dictionaries of
    `results.Row`, of one mode, backend and chunk. A row without error has no bar.
    """
    names = list(dict.fromkeys(name for name, _, _ in profiles))
    stacks = [[(weights, rows) for other, weights, rows in profiles if other == name] for name in names]
    count = max(map(len, stacks))
    ticks = sorted({row["samples"] for _, _, rows in profiles for row in rows if row["variance"]})
    with plt.rc_context(PRINTED):
        size = (2.3 * len(names), 2.2 * count + 0.35)
        figure, axes = plt.subplots(count, len(names), figsize=size, squeeze=False, sharex=True)
        for (i, k), axis in np.ndenumerate(axes):
            if i >= len(stacks[k]):
                axis.axis("off")
                continue
            weights, rows = stacks[k][i]
            some = [row for row in rows if row["variance"]]
            samples = sorted({row["samples"] for row in some})
            for number, kind in enumerate(dict.fromkeys(row["draws"] for row in some)):
                line = sorted((row for row in some if row["draws"] == kind), key=lambda row: row["samples"])
                at, values = zip(*((row["samples"], row["variance"]) for row in line), strict=True)
                errors = [math.nan if row["error"] is None else row["error"] for row in line]
                style = {"marker": "osD"[number % 3], "markersize": 3.5, "linewidth": 1.2, "capsize": 2}
                axis.errorbar(at, values, errors, color=f"C{number}", label=kind, **style)
            if some:
                plot_slope(axis, some[0], samples)
                axis.set(xscale="log", yscale="log")
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks, list(map(str, ticks)))
                variances = [row["variance"] for row in some]
                if max(variances) < 100 * min(variances):  # a tick per decade would give one or none
                    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_title(f"{names[k]}\n{weights}" if i == 0 else weights, fontsize=9)
            axis.set(xlabel="samples S" if i == len(stacks[k]) - 1 else "", ylabel="" if k else "variance")
            axis.tick_params(labelbottom=i == len(stacks[k]) - 1)
            axis.minorticks_off()
            axis.grid(alpha=0.25, linewidth=0.5)
        found = {
            label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        found = dict(sorted(found.items(), key=lambda one: one[0] == "1 / S"))
        figure.tight_layout(rect=(0, 0.25 / size[1], 1, 1))
        figure.legend(found.values(), found.keys(), loc="lower center", ncols=max(1, len(found)), frameon=False)
        save(figure, path)
