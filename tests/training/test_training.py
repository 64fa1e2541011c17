"""Training of n-body: resume bit for bit, run folders, checkpoints, reports."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from probsym_fast import tasks
from probsym_fast.tasks import configuration
from probsym_fast.training import run as training
from probsym_fast.training.loading import EpochSampler
from probsym_fast.training.logs import history

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
    with pytest.raises(FileExistsError, match=r"fit: run folder .* already exists; continue it with --resume"):
        fit(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damage", ["truncated", "not a checkpoint", "empty"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    folder = tmp_path / "run"
    fit(folder, training__epochs=1)
    before = json.loads((folder / "results.json").read_text())
    for name, use in (
        ("last", lambda: fit(folder, training__epochs=2, resume=True)),
        ("best", lambda: training.test(tasks.load(str(folder / "config.yaml")))),
    ):
        path = folder / "checkpoints" / f"{name}.ckpt"
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b""}.get(damage, b"something else" * 99))
        with pytest.raises(ValueError, match=rf"checkpoint: .*{name}.ckpt must"):
            use()
    assert json.loads((folder / "results.json").read_text()) == before


def test_a_missing_best_checkpoint_is_refused_and_a_missing_last_one_told(tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    results = fit(whole, training__epochs=2)
    fit(folder, training__epochs=1)
    (folder / "checkpoints" / "last.ckpt").unlink()  # as where a run is killed between its first two checkpoints
    assert fit(folder, training__epochs=2, resume=True) == results
    assert f"there is no last.ckpt in {folder}; continuing from best.ckpt" in capsys.readouterr().err
    assert history(folder) == history(whole)
    (folder / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*best.ckpt must exist"):
        training.test(tasks.load(str(folder / "config.yaml")))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "run"
    fit(folder, training__epochs=1)
    other = tasks.load("nbody/gnn_O3_ps", overrides(folder, backbone__width=12))
    with pytest.raises(ValueError, match=r"resume: backbone.width must be None as in .*config.yaml, got 12"):
        training.fit(other, resume=True)
    with pytest.raises(ValueError, match=r"test: backbone.width must be None as in .*config.yaml, got 12"):
        training.test(other)
    with pytest.raises(ValueError, match=r"test: method must be 'ps' as in .*config.yaml, got 'canonical'"):
        training.test(tasks.load("nbody/gnn_O3_ps", overrides(folder, method="canonical", samples__train=1)))
    training.test(tasks.load("nbody/gnn_O3_ps", overrides(folder, samples__test=3)))
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"checkpoint: .*best.ckpt must match the configured model"):
        training.test(other)


def without(name):
    return lambda state: state.pop(name)


def other_weights(state):
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] = state["state_dict"][name][..., :1]


def other_moments(state):
    state["optimizer_states"][0]["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("optimizer_states"), r"must hold .*, got none of optimizer_states"),
        (without("loops"), r"must hold .*, got none of loops"),
        (lambda state: state.update(state_dict=3), "must match the configured model, got"),
        (lambda state: state["state_dict"].popitem(), "must match the configured model, got .*Missing key"),
        (other_weights, "must match the configured model, got .*size mismatch"),
        (other_moments, "must match the configured model, got .*size of optimizer's group"),
        (
            lambda state: state.update(epoch=6),
            r"resume: training.epochs must be at least 7, the epochs already done, got 2",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    folder = tmp_path / "run"
    fit(folder, training__epochs=1)
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=rf"(?s){message}") as error:
        fit(folder, training__epochs=2, resume=True)
    assert "resume:" in str(error.value) or f"checkpoint: {path} must" in str(error.value)
    assert (folder / "config.yaml").read_text() == before


def test_a_resumed_run_may_change_how_long_and_where_but_not_what(tmp_path):
    folder = tmp_path / "run"
    fit(folder, training__epochs=1)
    for key, was, given in (("training.lr", 0.001, 0.5), ("training.batch", 20, 10), ("seed", 1, 2),
                            ("samples.train", 2, 3), ("training.precision", "32-true", "bf16-mixed")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"resume: {key} must be {was!r} as in .*config.yaml, got {given!r}$"):
            fit(folder, training__epochs=2, resume=True, **{key.replace(".", "__"): given})
    fit(folder, training__epochs=2, resume=True, samples__trials=2, training__deterministic="false")
    now = configuration.read(folder / "config.yaml")
    assert (now["training"]["epochs"], now["training"]["deterministic"], now["samples"]["trials"]) == (2, False, 2)


def best_of(state):
    """What a checkpoint holds of the callback that keeps the best one."""
    return next(state for state in state["callbacks"].values() if state.get("monitor") and "best_k_models" in state)


def test_best_score_and_new_patience_hold_where_a_moved_run_is_resumed(tmp_path):
    fit(tmp_path / "old", training__epochs=1, training__patience=1)
    folder = (tmp_path / "old").rename(tmp_path / "new")
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    best = best_of(state)
    best["best_model_score"] = best["current_score"] = torch.tensor(1e-3)
    best["best_k_models"] = {name: torch.tensor(1e-3) for name in best["best_k_models"]}
    torch.save(state, path)
    fit(folder, training__epochs=3, training__validate_every=3, training__patience=7, resume=True)
    state = torch.load(path, weights_only=True)
    assert best_of(state)["best_model_score"] == torch.tensor(1e-3)
    assert torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 0
    assert next(state for name, state in state["callbacks"].items() if name.startswith("Patience"))["patience"] == 7


def test_a_run_folder_may_be_used_from_anywhere_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = fit(Path("run"), training__epochs=1)
    shutil.copytree("run", "copy")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert training.test(tasks.load("../copy/config.yaml")) == results
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_validates_at_the_end_at_least(tmp_path):
    fit(tmp_path / "run", training__epochs=2, training__validate_every=5)
    assert list(history(tmp_path / "run")["valid/mse"]) == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"training__accelerator": "gpu"},
            "training.accelerator must be auto or cpu when torch sees no GPU, got 'gpu'",
        ),
        ({"training__devices": 3}, "training.batch must be a multiple of the 3 devices, got 20"),
        ({"data": "none.txt/there"}, "none.txt"),
    ],
)
def test_nothing_is_written_before_all_is_built(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("none.txt").touch()
    with pytest.raises((ValueError, OSError), match=message):
        fit(tmp_path / "run", training__epochs=1, **flags)
    assert not (tmp_path / "run").exists()


def test_the_test_split_is_opened_before_the_training(tmp_path, monkeypatch):
    from probsym_fast.tasks.nbody import NBodyTask

    dataset = NBodyTask.dataset

    def without_test(self, split):
        if split == "test":
            raise FileNotFoundError("no test split")
        return dataset(self, split)

    monkeypatch.setattr(NBodyTask, "dataset", without_test)
    with pytest.raises(FileNotFoundError, match="no test split"):
        fit(tmp_path / "run", training__epochs=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "batch", "processes"), [(10, 4, 1), (10, 4, 2), (9, 4, 2), (9, 4, 4), (12, 4, 3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_every_batch(count, batch, processes, drop_last):
    def sampler(k, step):
        sampler = EpochSampler(count, batch, shuffle=True, drop_last=drop_last, seed=3)
        sampler.set_epoch(2)
        sampler.share = k, step
        found = list(sampler)
        assert len(found) == len(sampler) and all(map(len, found))
        return found

    shares = [sampler(k, processes) for k in range(processes)]
    assert len({len(share) for share in shares}) == 1
    whole = sampler(0, 1)
    if len(whole[-1]) < processes:  # no part for everyone
        whole[-2:] = [torch.cat(whole[-2:])]
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(parts).sort().values, batch.sort().values)


def test_fewer_items_than_processes_are_refused():
    sampler = EpochSampler(3, 4)
    sampler.share = 0, 4
    with pytest.raises(ValueError, match=r"EpochSampler: count must be at least the 4 processes, got 3"):
        len(sampler)


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: .*config.yaml must exist, found nothing there"):
        fit(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "name", [x for x in configuration.available() if re.fullmatch(r"nbody/.*_(ps|ga|canonical)", x)]
)
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
    fit(tmp_path / "run", training__epochs=50, training__patience=1, training__lr=1e-30)
    assert max(history(tmp_path / "run")["valid/mse"]) < 5


def test_entropy_weight_zero_trains(tmp_path):
    results = fit(tmp_path / "run", "nbody/transformer_S5xO3_ps", training__epochs=1, training__entropy=0, count=20,
                  backbone__layers=1, backbone__width=8)  # fmt: skip
    assert results["test_mse"] < 10
