"""Training of n-body: resume bit for bit, run folders, checkpoints, reports."""

import json
from pathlib import Path

import pytest
import torch

from probsym_fast import tasks
from probsym_fast.tasks import configuration, training
from probsym_fast.tasks.plots import history

SMALL = {
    "count": 60,
    "samples.train": 2,
    "samples.valid": 1,
    "samples.test": 1,
    "samples.trials": 1,
    "training.batch": 20,
    "training.accelerator": "cpu",
    "training.progress": "false",
}


def overrides(folder: Path, **more: object) -> list[str]:
    settings = {**SMALL, "folder": folder, **{name.replace("__", "."): value for name, value in more.items()}}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """Validation and test on 40 clouds: what is tested here does not depend on how many."""
    from probsym_fast.data import NBody
    from probsym_fast.tasks.nbody import NBodyTask

    def dataset(self, split):
        return NBody(split, self.config.data, self.config.count if split == "train" else 40)

    monkeypatch.setattr(NBodyTask, "dataset", dataset)
    monkeypatch.setattr("probsym_fast.tasks.nbody_report.SAMPLE_COUNTS", (1, 2))


def fit(folder: Path, config: str = "nbody/gnn_O3_ps", *, resume: bool = False, **more: object):
    return training.fit(tasks.load(config, overrides(folder, **more)), resume=resume)


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


class Stop(Exception):
    pass


def test_resumed_run_gives_the_same_numbers_bit_for_bit(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    results = fit(whole, training__epochs=4)

    step = training.TrainingModule.training_step

    def stop_in_epoch_three(self, batch, index):
        if self.current_epoch == 2 and index == 1:
            raise Stop
        return step(self, batch, index)

    monkeypatch.setattr(training.TrainingModule, "training_step", stop_in_epoch_three)
    with pytest.raises(Stop):
        fit(broken, training__epochs=4)
    monkeypatch.setattr(training.TrainingModule, "training_step", step)
    torch.manual_seed(999)  # whatever happened in between
    resumed = fit(broken, training__epochs=4, resume=True)

    expected, found = weights(whole), weights(broken)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert resumed == results
    assert history(broken) == history(whole)


def test_two_runs_with_one_seed_agree_and_another_seed_differs(tmp_path):
    a, b, c = (fit(tmp_path / n, training__epochs=1, seed=s)["test_mse"] for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b
    assert a != c


def test_run_folder_holds_everything(tmp_path):
    results = fit(tmp_path / "run", training__epochs=1)
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for name in ("config.yaml", "results.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert name in names
    for plot in ("losses", "trajectories", "equivariance"):
        assert (tmp_path / "run" / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert any("tfevents" in name for name in names)
    again = tasks.load(str(tmp_path / "run" / "config.yaml"))
    assert training.test(again) == results


def test_existing_run_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"fit: the run folder .* exists already; continue it with --resume"):
        fit(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damage", ["truncated", "not a checkpoint", "empty", "missing"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    folder = tmp_path / "run"
    fit(folder, training__epochs=1)
    before = json.loads((folder / "results.json").read_text())
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b""}.get(damage, b"something else" * 99))
    error = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(error, match=r"checkpoint: .*last.ckpt must"):
        fit(folder, training__epochs=2, resume=True)
    with pytest.raises(error, match=r"checkpoint: .*best.ckpt must"):
        training.test(tasks.load(str(folder / "config.yaml")))
    assert json.loads((folder / "results.json").read_text()) == before


def test_checkpoint_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "run"
    fit(folder, training__epochs=1)
    other = tasks.load("nbody/gnn_O3_ps", overrides(folder, backbone__width=12))
    with pytest.raises(ValueError, match=r"test: .*best.ckpt does not fit the configured model"):
        training.test(other)
    with pytest.raises(ValueError, match=r"resume: backbone was .*60|resume: backbone was"):
        training.fit(other, resume=True)


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last.ckpt must exist, found nothing there"):
        fit(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", [n for n in configuration.available() if n != "nbody/demo"])
def test_every_configuration_builds_and_takes_a_step(name):
    """Every parameter gets a gradient, and the published settings are the ones that are built."""
    task = tasks.load(name)
    config = task.config
    canonical = config.method == "canonical"
    assert (config.samples.train, config.samples.valid) == ((1, 1) if canonical else (20, 20))
    assert config.training.epochs == 10_000
    assert (config.count, config.distribution.tau) == (3000, 0.1)
    torch.manual_seed(0)
    model = task.model()
    batch = task.dataset("test")[torch.arange(8)]
    inputs, target = task.inputs(batch)
    prediction, penalties = model(inputs, 1 if canonical else 2)
    assert prediction.shape == target.shape
    assert ("entropy" in penalties) == ("S5" in config.symmetry and config.method != "ga")
    (task.loss(prediction, target) + sum(penalties.values(), torch.zeros(()))).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_early_stopping(tmp_path):
    fit(tmp_path / "run", training__epochs=50, training__patience=1, training__lr=0.0)
    assert max(history(tmp_path / "run")["valid/mse"]) < 5


def test_entropy_weight_zero_trains(tmp_path):
    results = fit(tmp_path / "run", "nbody/transformer_S5xO3_ps", training__epochs=1, training__entropy=0, count=20,
                  backbone__layers=1, backbone__width=8)  # fmt: skip
    assert results["test_mse"] < 10
