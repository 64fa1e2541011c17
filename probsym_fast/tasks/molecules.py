"""Molecules: energies and forces by GFN2-xTB, from molecular dynamics or the displaced molecules of G2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from probsym_fast.data import Conformations, dynamics, g2
from probsym_fast.models import Symmetrized
from probsym_fast.tasks.energies import Energies, EnergiesConfig, EnergyForces
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT


@dataclass
class MoleculesConfig(EnergiesConfig):
    """Energies (eV) and forces (eV/Å) by GFN2-xTB (`probsym data get md_ethanol`); other keys as in `EnergiesConfig`.

    Args:
        dataset: "ethanol", "aspirin" or "alanine_dipeptide": molecular dynamics at 500 K; "g2": 162 molecules, displaced.
        count: training conformations (g2: of each molecule); null: 1,000 (g2: 8).
        data: folder of the data files; null: the cache.
    """

    task: str = "molecules"
    dataset: Literal["ethanol", "aspirin", "alanine_dipeptide", "g2"] = "ethanol"
    count: int | None = None


class Molecules(Energies):
    """Reports errors in meV and meV/Å, the equivariance error by samples, and how smooth the energy is along a path."""

    Config = MoleculesConfig

    def __init__(self, config: MoleculesConfig):
        super().__init__(config)
        configuration.check(config, {"count": COUNT})
        if not self.with_forces:
            got = f"forces {config.forces!r}, force_weight {config.force_weight}"
            raise ValueError(f"config: force_weight must be > 0 and forces not null for molecules, got {got}")

    @property
    def about(self) -> str:
        return f"{self.config.dataset}, GFN2-xTB, {super().about}"

    @cached_property
    def conformations(self) -> Mapping[str, Conformations]:  # type: ignore[override]
        config = self.config
        counts = {"train": config.count, "valid": None, "test": None}
        if config.dataset == "g2":
            return {split: g2(split, count, root=config.data) for split, count in counts.items()}
        return {split: dynamics(config.dataset, split, count, root=config.data) for split, count in counts.items()}

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {name: 1000 * value for name, value in super().measures(prediction, target).items()}  # in meV

    def unit(self, figure: str) -> str:
        return {"test_energy_mae": "meV", "test_force_mae": "meV/Å"}.get(figure, "")

    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        from probsym_fast.tasks.molecules_report import report

        assert isinstance(model, EnergyForces)
        return super().report(model, folder) | report(self, model, folder)

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        from probsym_fast.tasks.molecules_report import describe

        return super().describe(results) + describe(results)
