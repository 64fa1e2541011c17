"""Digits: they train, give their weights to graphs, and to the runs of a comparison."""

import importlib
import json
import shutil

import pytest
import torch

from probsym_fast import cli, tasks
from probsym_fast.tasks import comparison, configuration
from probsym_fast.training import run as training
from tests.helpers.tiny_vision import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path / "cache"))


# --- digits, and what starts from their weights ---


DIGITS = [
    "--backbone.arguments={depth: 2, embed_dim: 32, num_heads: 2}",
    "--training.epochs=2",
    "--training.progress=false",
    "--training.warmup=0",
    "--training.validate_every=1",
]


def test_digits_train_and_give_their_weights_to_graphs(tmp_path):
    first = tmp_path / "first"
    assert cli.main(["fit", "-c", "digits/vit_tiny", *DIGITS, f"--folder={first}"]) == 0
    assert 0 <= json.loads((first / "results.json").read_text())["test_accuracy"] <= 1
    trained = training.load_checkpoint(first / "checkpoints" / "best.ckpt")["state_dict"]
    name, changes = tiny("pattern", "ps", tmp_path / "run")
    model = tasks.load(name, [*changes, f"--backbone.weights={first}"]).model()
    block = "blocks.1.mlp.fc1.weight"
    assert torch.equal(model.backbone.state_dict()[block], trained[f"model.backbone.{block}"])


def test_a_finished_run_needs_its_starting_weights_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "-c", "digits/vit_tiny", *DIGITS, "--folder=first", "--training.epochs=1"]) == 0
    start = ["--backbone.weights=first", "--folder=second", "--training.epochs=1", "--training.decay=none"]
    assert cli.main(["fit", "-c", "digits/vit_tiny", *DIGITS, *start]) == 0
    config = tmp_path / "second" / "config.yaml"
    assert configuration.read(config)["backbone"]["weights"] == str(tmp_path / "first")
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("probsym_fast.models.backbones.timm.load_weights", lambda *_: pytest.fail("read again"))
    assert cli.main(["test", "-c", str(config)]) == 0
    assert json.loads((tmp_path / "second" / "results.json").read_text()) == results
    more = ["--training.epochs=2", "--backbone.weights=null", "--training.progress=false"]
    assert cli.main(["fit", "-c", str(config), "--resume", *more]) == 0
    assert configuration.read(config)["training"]["epochs"] == 2
    monkeypatch.undo()
    assert tasks.load("digits/vit_tiny", [*DIGITS, "--training.workers=2"]).loader("valid").num_workers == 2


def test_pretrained_weights_are_not_fetched_for_a_checkpoint(tmp_path, monkeypatch):
    name, changes = tiny("pattern", "ps", tmp_path)
    task = tasks.load(name, [*changes, "--backbone.pretrained=true", "--backbone.weights=null"])
    asked = []
    vision = importlib.import_module("probsym_fast.tasks.vision")  # `tasks.vision` is the function
    build = vision.timm_backbone
    monkeypatch.setattr(
        vision, "timm_backbone", lambda *a, pretrained, **k: asked.append(pretrained) or build(*a, False, **k)
    )
    fresh, not_fresh = task.model(), task.model(fresh=False)
    assert asked == [True, False]
    assert fresh.state_dict().keys() == not_fresh.state_dict().keys()


def test_digits_are_real_images_moved_in_training_alone():
    task = tasks.load("digits/vit_tiny")
    splits = {split: task.dataset(split) for split in ("train", "valid", "test")}
    assert sum(map(len, splits.values())) == 1797
    pictures = torch.cat([s.pixels.flatten(1) for s in splits.values()])
    assert pictures.unique(dim=0).shape[0] > 1700, "no image in two splits"
    index = torch.arange(20)
    assert torch.equal(splits["test"][index][0].pixels, splits["test"][index][0].pixels)
    first, again = (splits["train"][index][0].pixels for _ in range(2))
    second = splits["train"][index.flip(0)][0].pixels.flip(0)
    assert torch.equal(first, again) and not torch.equal(first, second) and first.shape == (20, 1, 8, 8)
    assert first.min() >= -1 - 1e-6 and first.max() <= 1 + 1e-6
    near = (first - splits["train"].pixels[:20]).square().mean()
    assert near < (first - splits["train"].pixels[20:40]).square().mean(), "still the same digits"


def test_a_grid_that_does_not_divide_the_images():
    with pytest.raises(ValueError, match=r"backbone.grid must divide 8, got 3"):
        tasks.load("digits/vit_tiny", ["--backbone.grid=3"])


# --- comparisons ---


@pytest.fixture
def pair(tmp_path):
    """A comparison of PS from digits' weights and GA, two seeds."""
    _, changes = tiny("pattern", "ga", "unused")
    keys = dict(change.removeprefix("--").split("=", 1) for change in changes if "folder" not in change)
    values = {key: json.loads(value) if value in ("null", "false") else value for key, value in keys.items()}
    runs = {
        "A": {"config": "pattern/pretrained_ps", "backbone.weights": "@first"},
        "B": {"config": "pattern/pretrained_ga"},
    }
    first = {"config": "digits/vit_tiny"} | dict(key.removeprefix("--").split("=", 1) for key in DIGITS)
    folder = str(tmp_path / "runs")
    return comparison.ComparisonConfig(first=first, runs=runs, common=values, seeds=[1, 2], folder=folder)


def test_a_comparison_trains_every_run_once(pair, tmp_path, monkeypatch, capsys):
    experiment = comparison.Comparison(pair, tasks.load)
    results = training.compute(experiment)
    assert set(results["mean"]) == {"A", "B"} and all(len(x) == 2 for x in results["values"].values())
    mean = torch.tensor(results["values"]["A"], dtype=torch.float64)
    assert results["mean"]["A"] == pytest.approx(mean.mean().item()) and results["std"]["A"] == pytest.approx(
        mean.std().item()
    )
    assert (tmp_path / "runs" / "plots" / "comparison.png").stat().st_size > 1000
    recorded = configuration.read(tmp_path / "runs" / "A" / "seed2" / "config.yaml")
    assert recorded["backbone"]["weights"] == str(tmp_path / "runs" / "first") and recorded["seed"] == 2
    assert any("A" in row[0] for row in experiment.describe(results))
    monkeypatch.setattr(comparison, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert training.compute(experiment) == results


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"runs": {}}, "runs must be at least one run"),
        ({"runs": {"A": {"backbone.grid": 3}}}, "runs must be at least one run, each with a config"),
        ({"first": {"grid": 3}}, "first must be a run with a config"),
        ({"runs": {"A": None}}, "runs must be at least one run, each with a config, .* got {'A': None}"),
        ({"runs": {"A": {"config": None}}}, "runs must be at least one run, each with a config"),
        ({"measure": "test_acuracy"}, "measure must be one of test_accuracy for A, seed 1, got 'test_acuracy'"),
        ({"first": {"config": "digits/vit_tiny", "grid": 3}}, "unknown key 'grid'"),
        ({"seeds": [1, 1]}, "seeds must be at least one seed, none twice"),
        ({"runs": {"A": {"config": "pattern/pretrained_ps", "grid": 3}}}, "unknown key 'grid'"),
        ({"runs": {"A": {"config": "graph8c/mlp_ps"}}, "common": {}}, "runs must be experiments that train a model"),
    ],
)
def test_bad_comparisons(pair, change, text):
    for key, value in change.items():
        setattr(pair, key, value)
    with pytest.raises(ValueError, match=text):
        comparison.Comparison(pair, tasks.load)
