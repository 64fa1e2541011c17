"""The task on molecules, with springs in place of GFN2-xTB: every method trains, tests and reports; forces and tokens."""

import json

import pytest
import torch

from probsym_fast import cli, tasks
from probsym_fast.data import Conformations
from probsym_fast.tasks import molecules, molecules_report

SMALL = {
    "backbone.width": 8,
    "backbone.layers": 2,
    "backbone.heads": 2,
    "backbone.feedforward": 8,
    "distribution.width": 4,
    "training.epochs": 1,
    "training.batch": 4,
    "training.progress": "false",
    "training.accelerator": "cpu",
}
FEW = {"samples.train": 2, "samples.valid": 2, "samples.test": 2, "samples.trials": 2}


def springs(count, atoms, seed=0):
    """Molecules of 8 and 1 with springs of rest length 1 between all atoms; atoms: of each in turn."""
    generator, n = torch.Generator().manual_seed(seed), max(atoms)
    numbers = torch.zeros(count, n, dtype=torch.int64)
    positions, forces = torch.zeros(2, count, n, 3, dtype=torch.float64)
    energies = torch.zeros(count, dtype=torch.float64)
    for k in range(count):
        m = atoms[k % len(atoms)]
        numbers[k, :m] = torch.tensor([8, *[1] * (m - 1)])
        x = torch.randn(m, 3, dtype=torch.float64, generator=generator).requires_grad_()
        energy = 0.5 * (torch.pdist(x) - 1).square().sum() - 10.0 * m
        positions[k, :m], energies[k] = x.detach(), energy.detach()
        forces[k, :m] = -torch.autograd.grad(energy, x)[0]
    return Conformations(numbers, positions, energies, forces)


@pytest.fixture(autouse=True)
def no_xtb(monkeypatch):
    sizes = {"train": 8, "valid": 4, "test": 10}
    seeds = {"train": 0, "valid": 1, "test": 2}
    monkeypatch.setattr(
        molecules, "dynamics", lambda name, split, count, root: springs(count or sizes[split], [4], seeds[split])
    )
    monkeypatch.setattr(molecules, "g2", lambda split, count, root: springs(sizes[split], [2, 4, 3], seeds[split]))
    monkeypatch.setattr(molecules_report, "SAMPLES", (1, 4))
    monkeypatch.setattr(molecules_report, "POST_HOC", (1, 4))
    monkeypatch.setattr(molecules_report, "POINTS", 11)


def fit(name, folder, *more):
    flags = [f"--{key}={value}" for key, value in SMALL.items()]
    assert cli.main(["fit", "-c", name, "--folder", str(folder), *flags, *more]) == 0
    return json.loads((folder / "results.json").read_text())


NAMES = [
    f"molecules/{name}" for name in ("small_ps", "small_ga", "small_pca", "small_canonical", "small_none", "g2_ps")
]


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_trains_and_reports(name, tmp_path, capsys):
    one = name.endswith(("canonical", "none"))
    found = fit(name, tmp_path, *(() if one else [f"--{key}={value}" for key, value in FEW.items()]))
    assert 0 < found["test_energy_mae"] < 1e5 and 0 < found["test_force_mae"] < 1e5
    assert list(found["equivariance_error_force"]) == (["1"] if one else ["1", "4"])
    assert 0 <= found["path"]["slope_error"] < 10 and found["path"]["largest_jump"] >= 0
    assert ("post_hoc" in found) == name.endswith("none")
    out = capsys.readouterr().out
    assert "slope along paths" in out and ("symmetrized after training, S = 4" in out) == name.endswith("none")
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"path.png"} | (set() if one else {"equivariance.png"}) <= plots


def test_a_resumed_run_repeats_one_that_was_not_stopped(tmp_path):
    flags = [f"--{key}={value}" for key, value in FEW.items()]
    config = "molecules/small_ps"
    whole = fit(config, tmp_path / "whole", *flags, "--training.epochs=2", "--training.decay=none")
    fit(config, tmp_path / "parts", *flags, "--training.epochs=1", "--training.decay=none")
    flags += ["--training.epochs=2", "--training.decay=none", "--resume"]
    assert fit(config, tmp_path / "parts", *flags)["test_force_mae"] == whole["test_force_mae"]


def test_a_smooth_model_has_slopes_that_agree_and_one_that_jumps_has_not(tmp_path):
    task = tasks.load("molecules/small_none", [f"--{key}={value}" for key, value in SMALL.items()])
    torch.manual_seed(0)
    model, data = task.model().double().eval(), task.dataset("test")
    data.features = data.features.double()
    data.positions = data.positions[:1].double() + 0.05 * torch.randn(data.positions.shape, dtype=torch.float64)
    smooth = molecules_report.along_paths(task, model, tmp_path)
    assert smooth["slope_error"] < 0.1  # the head of `Transformer` has ReLU, whose slopes jump
    first = data.positions[:, 0, 0]

    class Jumps(torch.nn.Module):
        """By 100 where the first atom's coordinate passes its median."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, *inputs):
            return self.net(*inputs) + 100 * (inputs[0][..., :1, :1] > first.median())

    model.backbone = Jumps(model.backbone)
    jumping = molecules_report.along_paths(task, model, tmp_path)
    assert jumping["largest_jump"] > 10 * smooth["largest_jump"] and jumping["slope_error"] > 10 * smooth["slope_error"]
    assert (tmp_path / "plots" / "path.png").stat().st_size > 1000


def test_uniform_rotations_after_training_lower_the_equivariance_error(tmp_path):
    task = tasks.load("molecules/small_none", [f"--{key}={value}" for key, value in SMALL.items()])
    model = task.model().eval()
    batch, _ = task.dataset("test")[torch.arange(4)]
    turned = batch.replace(positions=batch.positions.roll(1, -1))
    net = molecules_report.symmetrized(task, model)
    with torch.no_grad():
        before = (model(batch)[0] - model(turned)[0])[:, 0].abs().mean()
        after = (net(batch, 256, seed=0)[0] - net(turned, 256, seed=1)[0])[:, 0].abs().mean()
    assert after < 0.5 * before
