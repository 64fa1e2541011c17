"""Report of rotated digits: calibration, what p(g|x) prefers, and the time of a step."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from probsym_fast._plots import save
from probsym_fast.draws import Draws, seeded
from probsym_fast.groups import move_images, plane_of
from probsym_fast.models import Symmetrized
from probsym_fast.profiling.steps import training_steps
from probsym_fast.tasks.plots import plot_grid

if TYPE_CHECKING:
    from probsym_fast.tasks.rotated_mnist import RotatedMNIST

BINS, FEW = 10, 0.005  # of the diagram: bins, and the smallest share of the images that gets a point
SHOWN, TIMED = 8, 7  # images, steps
NAMES = {"accuracy": "accuracy", "cross_entropy": "cross-entropy", "ece": "calibration error"}


def report(task: RotatedMNIST, model: Symmetrized, folder: Path, tested: dict[str, Any]) -> dict[str, Any]:
    """Figures besides those of the test poses, which are `tested`; writes plots/*.png.

    upright_*: of the upright test images. entropy: of p(g|x), in nats. step_ms: median time of a training step on the machine
    as it was.
    """
    S = task.config.samples.test
    logits = {split: task.logits(model, split, S) for split in ("test", "upright")}
    _plot_reliability(folder / "plots" / "reliability.png", task, logits)
    upright = {S: task.figures_of(*logits["upright"])}
    upright |= {count: task.evaluate(model, "upright", count, 0) for count in task.also_test if count != S}
    figures: dict[str, Any] = {}
    for count, found in sorted(upright.items()):
        figures |= {f"upright_{name}{_ending(count, S)}": value for name, value in found.items()}
    if len(upright) > 1:
        _plot_samples(folder / "plots" / "samples.png", task, tested | figures, sorted(upright))
    if hasattr(model.distribution, "candidates"):
        figures["entropy"] = _plot_elements(folder / "plots" / "elements.png", task, model)
    figures["step_ms"] = 1000 * step_time(task, model)
    return figures


def _ending(count: int, S: int) -> str:
    return "" if count == S else f"_S{count}"


def _plot_samples(path: Path, task: RotatedMNIST, figures: dict[str, Any], counts: list[int]) -> None:
    panels = []
    for name, label in NAMES.items():
        series = {}
        for split in ("test", "upright"):
            values = [figures[f"{split}_{name}{_ending(count, task.config.samples.test)}"] for count in counts]
            series[_title(task, split)] = (counts, values)
        panels.append((label, "samples S", series, "linear", "linear"))
    plot_grid(path, panels)


def step_time(task: RotatedMNIST, model: Symmetrized) -> float:
    """Seconds of a training step: forward, loss, backward, clipping and the optimiser; the model is left as it was."""
    state, device = {key: x.clone() for key, x in model.state_dict().items()}, next(model.parameters()).device
    batch, target = (x.to(device) for x in next(iter(task.loader("train"))))
    model.train()
    with torch.enable_grad():
        step = training_steps(
            model,
            batch,
            task.config.samples.train,
            lambda prediction, penalties: task.total(task.loss(prediction, target), penalties),
            clip=task.config.training.clip,
        ).step
        times = []
        for _ in range(2 + TIMED):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    model.load_state_dict(state)
    model.eval()
    model.zero_grad(set_to_none=True)
    return median(times[2:])


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """(bins,) each: mean confidence, accuracy (both NaN where there is none), and share of the images, by confidence."""
    sure, chosen = logits.double().softmax(1).max(1)
    right = (chosen == labels).double()
    place = (sure * bins).long().clamp(max=bins - 1)
    zeros = sure.new_zeros(bins)
    count = zeros.index_add(0, place, torch.ones_like(sure))
    return zeros.index_add(0, place, sure) / count, zeros.index_add(0, place, right) / count, count / len(labels)


def _title(task: RotatedMNIST, split: str) -> str:
    return "upright" if split == "upright" else f"moved by {task.config.test_poses}"


def _plot_reliability(path: Path, task: RotatedMNIST, logits: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Accuracy against confidence, for both test sets; below, how many images are how sure."""
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(4.6, 5.4), sharex=True, gridspec_kw={"height_ratios": [3, 1], "hspace": 0.08}
    )
    top.plot([0, 1], [0, 1], "k--", alpha=0.4, label="calibrated")
    for k, (split, (predicted, labels)) in enumerate(logits.items()):
        sure, right, share = reliability(predicted, labels)
        some = share >= FEW  # the accuracy of a few images is noise
        top.plot(
            sure[some].tolist(), right[some].tolist(), "o-", color=f"C{k}", markersize=4, label=_title(task, split)
        )
        at = (torch.arange(BINS) + 0.3 + 0.4 * k) / BINS
        below.bar(at.tolist(), share.tolist(), width=0.4 / BINS, color=f"C{k}")
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    below.set(xlabel="confidence", ylabel="share")
    top.legend(fontsize=8)
    for axis in (top, below):
        axis.grid(alpha=0.3)
    save(figure, path)


def _plot_elements(path: Path, task: RotatedMNIST, model: Any) -> float:
    """Test images, and under them g^-1 x of the three largest p(g|x). Returns the mean entropy of p, in nats."""
    device, data = next(model.parameters()).device, task.dataset("test")
    batch, _ = data[torch.arange(min(200, len(data)))]
    batch = batch.to(device)
    draws = Draws(seeded(task.config.seed, "elements", 0), device=device)
    model.distribution.best, before = True, model.distribution.best
    g, weights, penalties = model.distribution.elements_and_weights(batch, 3, draws)
    model.distribution.best = before
    count = min(SHOWN, len(data))
    some = batch.pixels[:count]
    plane = plane_of(task.group, g)[:count]
    moved = move_images(some, plane, inverse=True).cpu()  # (count, 3, 1, H, W)
    figure, axes = plt.subplots(4, count, figsize=(1.15 * count, 5.2), squeeze=False)
    for k in range(count):
        axes[0, k].imshow(some[k, 0].cpu(), cmap="gray_r", vmin=0, vmax=1)
        for rank in range(3):
            axes[1 + rank, k].imshow(moved[k, rank, 0], cmap="gray_r", vmin=0, vmax=1)
            axes[1 + rank, k].set_title(f"p = {float(weights[k, rank]):.2f}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, name in zip(axes[:, 0], ("image", "1st", "2nd", "3rd"), strict=True):
        row.set_ylabel(name, fontsize=9)
    figure.tight_layout()
    save(figure, path)
    return float(penalties["entropy"])
