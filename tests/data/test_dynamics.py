"""Molecular dynamics and displaced molecules: energies, forces, seeds, files and what is refused."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch

from probsym_fast import cli
from probsym_fast.data import dynamics, g2
from probsym_fast.data.geometries import GEOMETRIES, geometry

module = importlib.import_module("probsym_fast.data.dynamics")


@pytest.fixture
def xtb(monkeypatch):
    """Short runs of real GFN2-xTB."""
    pytest.importorskip("ase", reason="makes no molecules without ase (the extra molecules)")
    pytest.importorskip("tblite", reason="makes no molecules without tblite (the extra molecules)")
    for name, value in {"WARMUP": 5, "STRIDE": 2, "RUN": 3}.items():
        monkeypatch.setattr(module, name, value)


def test_geometries_are_molecules():
    for name, atoms in {"ethanol": 9, "aspirin": 21, "alanine_dipeptide": 22}.items():
        symbols, positions = geometry(name)
        assert len(symbols) == len(positions) == atoms and set(symbols) <= set("HCNO")
        near = torch.cdist(torch.tensor(positions), torch.tensor(positions)) + 9 * torch.eye(atoms)
        assert 0.9 < near.min() and near.amin(1).max() < 1.6  # every atom has a bond
    assert list(GEOMETRIES) == ["ethanol", "aspirin", "alanine_dipeptide"]


def test_frames_and_their_forces(xtb, tmp_path):
    frames = dynamics("ethanol", "train", 4, root=tmp_path)
    assert frames.numbers.shape == (4, 9) and frames.num_nodes.tolist() == [9] * 4
    assert frames.positions.shape == frames.forces.shape == (4, 9, 3) and frames.energies.dtype == torch.float64
    assert frames.positions.mean(1).abs().max() < 1e-12 and frames.forces.sum(1).abs().max() < 1e-4
    from ase import Atoms
    from tblite.ase import TBLite

    atoms = Atoms(numbers=frames.numbers[1].numpy(), positions=frames.positions[1].numpy())
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    energies = []
    for h in (-1e-3, 1e-3):
        atoms.positions = frames.positions[1].numpy() + h * frames.forces[1].numpy()
        energies.append(atoms.get_potential_energy())
    slope = -(energies[1] - energies[0]) / 2e-3
    assert slope == pytest.approx(float(frames.forces[1].square().sum()), rel=1e-3)


def test_a_run_depends_on_seed_split_and_number_alone(xtb, tmp_path):
    five = dynamics("ethanol", "valid", 5, seed=3, root=tmp_path)
    for count in (1, 4):
        few = dynamics("ethanol", "valid", count, seed=3, root=tmp_path)
        torch.testing.assert_close(few.positions, five.positions[:count], rtol=0, atol=1e-6)
    others = [dynamics("ethanol", split, 1, seed=seed, root=tmp_path) for split, seed in (("test", 3), ("valid", 4))]
    assert all((other.positions - five.positions[:1]).abs().max() > 0.1 for other in others)


def test_a_stopped_simulation_continues(xtb, tmp_path, monkeypatch):
    whole = dynamics("ethanol", "train", 7, root=tmp_path / "whole")
    simulated, simulate = [], module.simulate

    def stopped(*arguments):
        simulated.append(len(simulated))
        if len(simulated) == 3:
            raise KeyboardInterrupt
        return simulate(*arguments)

    monkeypatch.setattr(module, "simulate", stopped)
    with pytest.raises(KeyboardInterrupt):
        dynamics("ethanol", "train", 7, root=tmp_path)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["ethanol-train-7-seed0.part.npz"]
    again = dynamics("ethanol", "train", 7, root=tmp_path)
    assert len(simulated) == 4  # the two finished runs are kept
    torch.testing.assert_close(again.positions, whole.positions, rtol=0, atol=1e-6)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["ethanol-train-7-seed0.npz"]
    file = tmp_path / "ethanol-train-7-seed0.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="run `probsym data get md_ethanol --force`"):
        dynamics("ethanol", "train", 7, root=tmp_path)


def test_g2_is_ragged(xtb, tmp_path):
    molecules = g2("valid", root=tmp_path)
    assert len(molecules) == 162 and molecules.numbers.shape[1] == 14
    assert molecules.num_nodes.min() == 1 and molecules.num_nodes.max() == 14
    assert len(molecules.numbers.unique()) == 15 and molecules.energies.isfinite().all()  # 14 elements and padding
    padding = molecules.numbers == 0
    assert not molecules.positions[padding].any() and not molecules.forces[padding].any()
    assert 0.1 < molecules.forces.square().mean().sqrt() < 10


def test_without_tblite_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    monkeypatch.setitem(sys.modules, "ase", None)
    assert cli.main(["data", "get", "md_ethanol"]) == 1
    wanted = r'(ase|tblite)[.\w]* is needed to make molecules: pip install "probsym_fast\[molecules\]"'
    assert re.search(wanted, capsys.readouterr().err)


def test_arguments_out_of_range(tmp_path):
    for arguments, message in (
        (("water",), "dynamics: molecule must be one of ethanol, aspirin, alanine_dipeptide, got 'water'"),
        (("ethanol", "all"), "dynamics: split must be one of train, valid, test, got 'all'"),
        (("ethanol", "train", 0), "dynamics: count must be at least 1, got 0"),
        (("ethanol", "train", 1, -1), "dynamics: seed must be in 0..2^32 - 1, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            dynamics(*arguments, root=tmp_path)


def test_rotations_are_proper():
    random = np.random.RandomState(0)
    for _ in range(5):
        R = module._rotation(random)
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(R) == pytest.approx(1)
