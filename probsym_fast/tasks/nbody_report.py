"""Report of a trained n-body model: test errors with baselines, and equivariance errors by number of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from probsym_fast.data import NBody
from probsym_fast.distributions import Identity
from probsym_fast.draws import seeded
from probsym_fast.groups import Draws, SpecialOrthogonal
from probsym_fast.models import Symmetrized
from probsym_fast.profiling import equivariance_error
from probsym_fast.tasks.plots import plot_against_samples, plot_trajectories
from probsym_fast.training.task import Task

SAMPLE_COUNTS = (1, 4, 16, 64)
ROTATIONS = SpecialOrthogonal(3)


def report(task: Task, model: Symmetrized, folder: Path) -> dict[str, Any]:
    """Test errors (mean squared, over all coordinates) and equivariance errors; writes plots/*.png.

    test: as configured, mean and standard deviation over trials. rotated: with every test cloud rotated at random.
    unsymmetrized: the same weights with g = identity. constant_velocity: x + v t.
    equivariance_error: root mean square of f(hx) - h f(x) over random rotations h, relative to the displacement.
    """
    config = task.config
    dataset = cast(NBody, task.dataset("test"))
    device = next(model.parameters()).device
    trials = [
        _error(task, model, config.samples.test, seeded(config.seed, "test", k)) for k in range(config.samples.trials)
    ]
    trial = torch.tensor(trials)
    turn = seeded(config.seed, "turn", 0)
    bare = Symmetrized(model.backbone, model.embed, model.readout, Identity(model.distribution.group))
    results = {
        "test_mse": trial.mean().item(),
        "test_mse_std": trial.std(correction=0).item(),
        "samples": config.samples.test,
        "trials": config.samples.trials,
        "rotated_mse": _error(task, model, config.samples.test, seeded(config.seed, "test", 0), turn),
        "unsymmetrized_mse": _error(task, bare, 1, None),
        "unsymmetrized_rotated_mse": _error(task, bare, 1, None, turn),
        "constant_velocity_mse": (dataset.constant_velocity() - dataset.target).square().mean().item(),
        "equivariance_error": _equivariance(task, model, device),
    }
    if len(results["equivariance_error"]) > 1:
        errors = {int(s): e for s, e in results["equivariance_error"].items()}
        plot_against_samples(folder / "plots" / "equivariance.png", errors, "relative equivariance error")
    shown = dataset[torch.arange(4)]
    inputs, target = task.inputs(tuple(x.to(device) for x in shown))
    prediction, _ = model(inputs, config.samples.test, seeded(config.seed, "test", 0))
    plot_trajectories(folder / "plots" / "trajectories.png", shown[0], prediction.cpu(), target.cpu(), shown[2])
    return results


def describe(results: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (f"model, S = {results['samples']}", f"{results['test_mse']:.4f} ± {results['test_mse_std']:.4f}"),
        ("model, rotated test data", f"{results['rotated_mse']:.4f}"),
        ("same network, no symmetrization", f"{results['unsymmetrized_mse']:.4f}"),
        ("same network, no symmetrization, rotated", f"{results['unsymmetrized_rotated_mse']:.4f}"),
        ("constant velocity", f"{results['constant_velocity_mse']:.4f}"),
    ]
    rows = [(f"test error: {name}", value) for name, value in rows]
    for samples, error in results["equivariance_error"].items():
        rows.append((f"equivariance error, S = {samples}", f"{error:.4f}"))
    return rows


def _error(task, model, samples: int, generator, turn=None) -> float:
    """Mean squared error over the test set; turn: generator of a random rotation per cloud."""
    device = next(model.parameters()).device
    total = count = 0
    for batch in task.loader("test"):
        inputs, target = task.inputs(tuple(x.to(device) for x in batch))
        if turn is not None:
            frames = ROTATIONS.uniform(inputs, 1, Draws(turn))
            target = inputs.carried(ROTATIONS, frames, target, "np")
            inputs = inputs.moved(ROTATIONS, frames)
        prediction, _ = model(inputs, samples, generator)
        total += (prediction - target).square().sum().item()
        count += target.numel()
    return total / count


def _equivariance(task, model, device, clouds: int = 200) -> dict[str, float]:
    """Equivariance errors by number of samples, relative to the displacement."""
    dataset = cast(NBody, task.dataset("test"))
    some = torch.arange(min(clouds, len(dataset)))
    inputs, target = task.inputs(tuple(x.to(device) for x in dataset[some]))
    displacement = (target - inputs.positions).square().mean().sqrt().item()
    counts = (1,) if task.config.method in ("canonical", "none") else SAMPLE_COUNTS
    settings = {"group": ROTATIONS, "seed": task.config.seed, "scale": displacement}
    return {str(samples): equivariance_error(model, inputs, samples, **settings) for samples in counts}
