"""Plots of runs and profiles."""

from __future__ import annotations

import csv
import math
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from probsym_fast.data._store import write_atomically
from probsym_fast.training.task import Monitor

Row = dict[str, Any]
PRINTED = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}


def save(figure: Figure, path: Path) -> None:
    """Writes the figure whole or not at all, as the path's ending says, and closes it."""
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=130, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def read_rows(path: Path) -> list[Row]:
    """A log's whole rows, values as text, "" where a row has none; [] without a file. ValueError where it is damaged."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # a row that was cut off has no end
    try:
        rows = list(csv.DictReader(StringIO(whole.decode(), newline="")))
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values() or not row.get("step", "").isdecimal():
                raise ValueError(f"a value a column and a step, got another row {number}")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"log: {path} must hold rows as they were written: {error}") from error
    return rows


def history(folder: Path) -> dict[str, dict[int, float]]:
    """Every quantity logged by epoch (not "step/...")."""
    series: dict[str, dict[int, float]] = {}
    for row in read_rows(folder / "logs" / "metrics.csv"):
        for name, value in row.items():
            if value and name not in ("epoch", "step") and not name.startswith("step/"):
                series.setdefault(name, {})[int(row["epoch"])] = float(value)
    return series


def plot_losses(folder: Path, measure: str, monitor: Monitor) -> None:
    """losses.png by epoch: the loss, what picks the best checkpoint where that is another measure, and the rest; the best
    epoch is marked."""
    series = history(folder)
    main = {name: values for name, values in series.items() if name.endswith(f"/{measure}")}
    if not main:
        return
    picked = {name: values for name, values in series.items() if name == monitor.key and name not in main}
    rest = {name: values for name, values in series.items() if name not in main | picked}
    panels = [(name, some) for name, some in ((measure, main), (monitor.name, picked), ("", rest)) if some]
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 4 * len(panels), 4), squeeze=False)
    for axis, (ylabel, some) in zip(axes[0], panels, strict=True):
        for name, values in sorted(some.items()):
            axis.plot(list(values), list(values.values()), label=name, marker="o" if len(values) == 1 else None)
        if monitor.key in some:
            best = best_epoch(some[monitor.key], monitor)
            axis.plot(best, some[monitor.key][best], "k*", label=f"best, epoch {best + 1}")
        axis.set(xlabel="epoch", ylabel=ylabel.replace("_", " "))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set(yscale="log")
    save(figure, folder / "plots" / "losses.png")


def best_epoch(values: dict[int, float], monitor: Monitor) -> int:
    """The first epoch with the best value; of values that are no numbers, the first epoch."""
    worst = math.inf if monitor.direction == "min" else -math.inf
    known = {epoch: worst if math.isnan(value) else value for epoch, value in values.items()}
    return (min if monitor.direction == "min" else max)(known, key=known.__getitem__)


def plot_trajectories(path: Path, start: Tensor, predicted: Tensor, true: Tensor, charges: Tensor) -> None:
    """Clouds side by side, seen along z: start to true end (line), predicted end (cross). Tensors are (M, n, 3); M panels."""
    figure, axes = plt.subplots(1, len(start), figsize=(3.6 * len(start), 3.8), squeeze=False)
    for axis, x, p, y, q in zip(axes[0], start, predicted, true, charges, strict=True):
        for i in range(len(x)):
            color = "tab:red" if q[i] > 0 else "tab:blue"
            axis.plot([x[i, 0], y[i, 0]], [x[i, 1], y[i, 1]], color=color, alpha=0.6)
            axis.plot(*x[i, :2], "o", color=color, markersize=4)
            axis.plot(*y[i, :2], "o", markerfacecolor="none", color=color, markersize=8)
            axis.plot(*p[i, :2], "x", color="black", markersize=7)
        axis.set(aspect="equal", xlabel="x", ylabel="y")
        axis.set_title(f"mean squared error {((p - y) ** 2).mean():.4f}", fontsize=9)
    figure.suptitle("dot: start, circle: true end, cross: predicted end; red: +, blue: -", fontsize=9)
    figure.tight_layout()
    save(figure, path)


def plot_against_samples(path: Path, errors: dict[int, float], name: str) -> None:
    """An error against the number of samples, beside 1 / sqrt(S)."""
    figure, axis = plt.subplots(figsize=(5, 4))
    samples, values = list(errors), list(errors.values())
    axis.loglog(samples, values, "o-", label=name)
    axis.loglog(samples, [values[0] * (samples[0] / s) ** 0.5 for s in samples], "k--", alpha=0.5, label="1/sqrt(S)")
    axis.set(xlabel="samples S", ylabel=name)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, path)


def plot_runs(
    path: Path, values: dict[str, list[float]], curves: dict[str, list[dict[int, float]]], measure: str, curve: str
) -> None:
    """Beside each other: every run's figure, its mean and deviation, a column a configuration; validation by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for k, (name, some) in enumerate(values.items()):
        color, y = f"C{k}", np.asarray(some)
        left.plot(np.full(len(y), k), y, "o", color=color, alpha=0.5)
        left.errorbar([k + 0.15], [y.mean()], [y.std(ddof=min(1, len(y) - 1))], fmt="s", color=color, capsize=4)
        for n, points in enumerate(curves[name]):
            epochs = [epoch + 1 for epoch in points]
            right.plot(epochs, list(points.values()), color=color, alpha=0.7, label=name if n == 0 else None)
    right.xaxis.get_major_locator().set_params(integer=True)
    left.set(
        xticks=range(len(values)),
        xticklabels=list(values),
        ylabel=measure.replace("_", " "),
        xlim=(-0.5, len(values) - 0.5),
    )
    right.set(xlabel="epoch", ylabel=curve.replace("_", " "))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path)


def plot_grid(path: Path, panels: list[tuple[str, str, dict[str, tuple], str, str]]) -> None:
    """Panels (y, x, series, x scale, y scale), up to three side by side."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (y, x, series, x_scale, y_scale) in zip(axes.flat, panels, strict=False):
        for name, (at, values) in series.items():
            axis.plot(at, values, label=name, marker="." if len(at) < 30 else None)
        axis.set(xlabel=x, ylabel=y, xscale=x_scale, yscale=y_scale)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    save(figure, path)


def plot_graphs(path: Path, pictures: list[tuple[str, Tensor, list[tuple[int, int]], Tensor]]) -> None:
    """Graphs side by side, nodes coloured by value: (name, positions (n, 2), edges, values (n,)) each."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(3.6 * len(pictures), 3.6), squeeze=False)
    for axis, (name, positions, edges, values) in zip(axes[0], pictures, strict=True):
        for u, v in edges:
            axis.plot(*positions[[u, v]].T.tolist(), color="0.7", zorder=1)
        nodes = axis.scatter(
            *positions.T.tolist(), c=values.tolist(), s=220, cmap="viridis", edgecolors="black", zorder=2
        )
        figure.colorbar(nodes, ax=axis, orientation="horizontal", shrink=0.8, format="%.3f").ax.tick_params(labelsize=6)
        axis.set(title=name, aspect="equal")
        axis.axis("off")
    save(figure, path)


def plot_profile(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Latency, throughput, peak memory, tax and variance against S, a line a mode, backend, chunk and kind of draws;
    rows as of `profile.Row`."""
    panels = (
        ("latency", 1e3, "step (ms)"),
        ("throughput", 1.0, "graphs / s"),
        ("peak", 1e-6, "peak memory (MB)"),
        ("tax", 1.0, "step / bare backbone"),
        ("variance", 1.0, "variance of the prediction"),
    )
    panels = [panel for panel in panels if any(row[panel[0]] for row in rows)]  # a variance of 0 has no logarithm
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
        count = -(-(len(panels) + 1) // columns)  # the legend stands in a panel of its own
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
            if key != "tax":  # less than a decade has ticks too
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
    """What the variance of a mean of independent samples is, from a row on."""
    slope = [first["variance"] * first["samples"] / s for s in samples]
    axis.plot(samples, slope, color="0.2", linewidth=0.8, linestyle="--", label="1 / S", zorder=3)


def plot_variances(path: Path, profiles: list[tuple[str, str, list[Row]]]) -> None:
    """Variance against S of several profiles (name, weights, rows), bars of a standard error: a column a name, a row for each
    profile of it, a line a kind of draws; rows as of `profile.Row`, of one mode, backend and chunk; no bar without error."""
    names = list(dict.fromkeys(name for name, _, _ in profiles))
    stacks = [[(weights, rows) for other, weights, rows in profiles if other == name] for name in names]
    count = max(map(len, stacks))
    ticks = sorted({row["samples"] for _, _, rows in profiles for row in rows if row["variance"]})
    with plt.rc_context(PRINTED):
        size = (2.3 * len(names), 2.2 * count + 0.35)
        figure, axes = plt.subplots(count, len(names), figsize=size, squeeze=False, sharex=True)
        for i, k in np.ndindex(axes.shape):
            axis = axes[i, k]
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
                values = [row["variance"] for row in some]
                if max(values) < 100 * min(values):  # a tick a decade would be one or none
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
