"""Report of trained molecules: equivariance errors by samples, smoothness along paths, symmetrization after training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.batches import PointClouds
from probsym_fast.distributions import Uniform
from probsym_fast.draws import seeded
from probsym_fast.groups import SpecialOrthogonal
from probsym_fast.models import Symmetrized
from probsym_fast.profiling import equivariance_error
from probsym_fast.tasks.energies import Energies, EnergyForces
from probsym_fast.tasks.plots import plot_against_samples, plot_grid

SAMPLES = (1, 4, 16, 64)
POST_HOC = (1, 4, 16)
CLOUDS, PATHS, POINTS = 50, 8, 41
MILLI = 1000.0  # eV -> meV
ROTATIONS = SpecialOrthogonal(3)


def report(task: Energies, model: EnergyForces, folder: Path) -> dict[str, Any]:
    """Figures besides the test errors; writes plots/*.png. Energies in meV.

    equivariance_error_energy, _force: by samples, root mean square of E(R x) - E(x) (meV) and of F(R x) - R F(x) over that of
    F(x), for random rotations R; both sides draw their own noise. path: see `along_paths`. post_hoc: for a model without
    symmetrization, test and equivariance errors of the same weights under uniform rotations, by samples. Its paths are as
    smooth, since uniform elements do not depend on positions.
    """
    one_sample = task.config.method in ("canonical", "none")
    counts = (1,) if one_sample else SAMPLES
    found: dict[str, Any] = errors_by_samples(task, model, counts)
    if len(counts) > 1:
        by_samples = {int(S): value for S, value in found["equivariance_error_energy"].items()}
        plot_against_samples(folder / "plots" / "equivariance.png", by_samples, "equivariance error of the energy, meV")
    found["path"] = along_paths(task, model, folder)
    if task.config.method == "none":
        turned = symmetrized(task, model)
        errors = errors_by_samples(task, turned, POST_HOC)
        found["post_hoc"] = {
            str(S): task.evaluate(turned, "test", S, 0) | {name: by[str(S)] for name, by in errors.items()}
            for S in POST_HOC
        }
    return found


def errors_by_samples(task: Energies, model: EnergyForces, counts: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """The two equivariance errors of `report` on some of the test set."""
    device = next(model.parameters()).device
    some, _ = task.dataset("test")[torch.arange(min(CLOUDS, len(task.dataset("test"))))]
    found: dict[str, dict[str, float]] = {"equivariance_error_energy": {}, "equivariance_error_force": {}}
    for S in counts:
        for name, output, scale in (("energy", "c", 1 / MILLI), ("force", "nv", None)):
            predict = partial(_part, model, name, S, torch.Generator(device).manual_seed(task.config.seed))
            error = equivariance_error(predict, some.to(device), group=ROTATIONS, output=output, scale=scale)
            found[f"equivariance_error_{name}"][str(S)] = error
    return found


def symmetrized(task: Energies, model: EnergyForces) -> EnergyForces:
    """The same weights under uniform rotations."""
    parts: tuple[nn.Module, ...] = model.backbone, model.embed, model.readout
    return EnergyForces(*parts, Uniform(task.group()), scale=float(model.scale), forces=model.forces).eval()


@torch.no_grad()
def along_paths(task: Energies, model: EnergyForces, folder: Path) -> dict[str, float]:
    """How well forces agree with finite differences of the energy on straight paths, all points with the same noise.

    Paths lead from test conformations to the next ones, or, where that is another molecule, stretch it by a tenth.
    slope_error: root mean square of the central difference of E less -F . x', relative to that of -F . x'. largest_jump: of
    E between neighbouring points beyond the mean of the two slopes, meV. A model with jumps along the path has large ones.
    """
    data, device = task.dataset("test"), next(model.parameters()).device
    last = min(PATHS, len(data) - 1)
    start = torch.arange(last) * max(1, (len(data) - 1) // last)
    (batch, _), (other, _) = data[start], data[start + 1]
    assert batch.features is not None and other.features is not None  # `Conformers` gives them
    same = torch.eq(batch.features, other.features).flatten(1).all(1)
    step = torch.where(same[:, None, None], other.positions - batch.positions, 0.1 * batch.positions)
    energies, slopes = [], []
    for t in torch.linspace(0, 1, POINTS):
        clouds = batch.replace(positions=batch.positions + t * step).to(device)
        y, _ = model(clouds, task.config.samples.test, seeded(task.config.seed, "path", 0))
        y = y.cpu().double()
        energies.append(MILLI * y[:, 0])
        slopes.append(-MILLI * (y[:, 1:].view_as(step) * step).sum((1, 2)))
    E, slope = torch.stack(energies, 1), torch.stack(slopes, 1)  # (paths, points)
    h = 1 / (POINTS - 1)
    central = (E[:, 2:] - E[:, :-2]) / (2 * h)
    jumps = E.diff(dim=1) - h * (slope[:, 1:] + slope[:, :-1]) / 2
    _plot(folder / "plots" / "path.png", E, central, slope)
    size = slope[:, 1:-1].square().mean().sqrt()
    return {
        "slope_error": float((central - slope[:, 1:-1]).square().mean().sqrt() / size),
        "largest_jump": float(jumps.abs().max()),
    }


def _plot(path: Path, E: Tensor, central: Tensor, slope: Tensor) -> None:
    """Energy and slope along the first three paths."""
    at = torch.linspace(0, 1, POINTS)
    panels: list[tuple[str, str, dict[str, tuple], str, str]] = []
    for k in range(min(3, len(E))):
        panels.append((f"E, meV, path {k + 1}", "t", {"energy": (at, E[k] - E[k, 0])}, "linear", "linear"))
    for k in range(min(3, len(E))):
        series = {"difference of E": (at[1:-1], central[k]), "-F x'": (at, slope[k])}
        panels.append((f"slope, meV, path {k + 1}", "t", series, "linear", "linear"))
    plot_grid(path, panels)


def _part(model: Symmetrized, name: str, samples: int, generator: torch.Generator, batch: PointClouds) -> Tensor:
    """The energy (B, 1), or the forces (B, n, 3), with noise of its own at each call."""
    y = model(batch, samples, generator)[0]
    return y[:, :1] if name == "energy" else y[:, 1:].view_as(batch.positions)


def describe(results: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, unit in (("energy", " meV"), ("force", ", relative")):
        for S, error in results[f"equivariance_error_{name}"].items():
            rows.append((f"equivariance error of the {name}, S = {S}", f"{error:.4g}{unit}"))
    path = results["path"]
    rows.append(("slope along paths, error relative to -F x'", f"{path['slope_error']:.4f}"))
    rows.append(("largest jump of the energy", f"{path['largest_jump']:.3g} meV"))
    for S, found in results.get("post_hoc", {}).items():
        text = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in found.items())
        rows.append((f"symmetrized after training, S = {S}", text))
    return rows
