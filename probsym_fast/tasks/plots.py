"""Plots for the reports of experiments."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from probsym_fast._plots import save


def plot_trajectories(path: Path, start: Tensor, predicted: Tensor, true: Tensor, charges: Tensor) -> None:
    """Plots M clouds, seen along z: start to true end (line), predicted end (cross). Tensors are (M, n, 3)."""
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
    """Plots an error against the number of samples, with 1 / sqrt(S)."""
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
    """Plots every run's figure with mean and deviation, a column per configuration; and validation by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for k, (name, some) in enumerate(values.items()):
        color = f"C{k}" if len(values) <= 10 else plt.get_cmap("tab20")(k)  # a colour each, up to 20
        y = np.asarray(some)
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
    right.legend(fontsize=8, **({} if len(values) < 8 else {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}))
    if len(values) > 5:
        plt.setp(left.get_xticklabels(), rotation=60, ha="right", rotation_mode="anchor")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path)


def plot_grid(path: Path, panels: list[tuple[str, str, dict[str, tuple], str, str]]) -> None:
    """Plots panels (y, x, series, x scale, y scale), up to three in a row."""
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
    """Draws graphs in a row, nodes coloured by value; each is (name, positions (n, 2), edges, values (n,))."""
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
