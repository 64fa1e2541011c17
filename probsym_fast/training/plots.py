"""The plot of a run."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from probsym_fast._plots import save
from probsym_fast.training.logs import history
from probsym_fast.training.settings import Monitor


def plot_losses(folder: Path, measure: str, monitor: Monitor) -> None:
    """Draws losses.png by epoch: the loss, the monitored measure if it is another, and the rest; marks the best epoch."""
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
    """The first epoch with the best value; NaN counts as the worst."""
    worst = math.inf if monitor.direction == "min" else -math.inf
    known = {epoch: worst if math.isnan(value) else value for epoch, value in values.items()}
    return (min if monitor.direction == "min" else max)(known, key=known.__getitem__)
