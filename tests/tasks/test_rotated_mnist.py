"""Rotated digits, on scikit-learn's small ones: every method trains, reports and starts from other weights."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from probsym_fast import cli, tasks
from probsym_fast.draws import seeded
from probsym_fast.tasks import rotated_mnist_data, rotated_mnist_report
from probsym_fast.tasks.comparison import Comparison, ComparisonConfig
from probsym_fast.tasks.rotated_mnist import RotatedMNIST, RotatedMNISTConfig
from probsym_fast.training.run import compute

SMALL = {
    "dataset": "digits",
    "backbone.patch": 4,
    "backbone.width": 8,
    "backbone.depth": 1,
    "backbone.heads": 2,
    "distribution.width": 2,
    "distribution.layers": 2,
    "distribution.angles": 4,
    "training.epochs": 1,
    "training.batch": 300,
    "training.validate_every": 1,
    "training.warmup": 0,
    "training.progress": "false",
    "training.accelerator": "cpu",
}
FLAGS = [f"--{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rotated_mnist_report, "TIMED", 1)


def fit(method, folder, *more):
    assert cli.main(["fit", "-c", f"rotated_mnist/{method}", "--folder", str(folder), *FLAGS, *more]) == 0
    return json.loads((folder / "results.json").read_text())


def test_every_method_trains_and_reports_and_starts_from_the_upright_network(tmp_path):
    plain = fit("upright", tmp_path / "upright")
    assert {"reliability.png", "losses.png"} == {path.name for path in (tmp_path / "upright" / "plots").iterdir()}
    assert 0 <= plain["upright_ece"] <= 1 and 0 < plain["upright_accuracy"] < 1 and plain["step_ms"] > 0
    start = f"--backbone.weights={tmp_path / 'upright'}"
    for method in ("augment", "ga", "orbit", "canonical", "ps", "best"):
        found = fit(method, tmp_path / method, start, f"--also_test={[] if method == 'augment' else [1]}")
        plots = {path.name for path in (tmp_path / method / "plots").iterdir()}
        assert ("elements.png" in plots) == (method in ("canonical", "ps")) == ("entropy" in found)
        assert ("samples.png" in plots) == (method in ("ga", "orbit", "ps", "best"))
        assert 0 < found["test_cross_entropy"] < 10


def test_weights_start_backbone_tokens_and_classifier(tmp_path):
    fit("upright", tmp_path / "upright")
    task = tasks.load("rotated_mnist/upright", [*FLAGS, f"--folder={tmp_path / 'upright'}"])
    trained = task.trained(tmp_path / "upright" / "checkpoints" / "best.ckpt").eval()
    start = [*FLAGS, f"--backbone.weights={tmp_path / 'upright'}"]
    model = tasks.load("rotated_mnist/none", start).model().eval()
    batch, _ = task.dataset("test")[torch.arange(5)]
    assert torch.equal(model(batch)[0], trained(batch)[0])
    other = tasks.load("rotated_mnist/none", [*start, "--backbone.depth=2"])
    with pytest.raises(
        ValueError, match=r"^config: backbone.weights must match the configured network, got .*best.ckpt"
    ):
        other.model()
    assert other.model(fresh=False) is not None


@pytest.mark.parametrize(
    ("flags", "key", "most", "got"),
    [
        (["--symmetry=C4", "--samples.valid=8"], "samples.valid", 4, 8),
        (["--samples.test=5"], "samples.test", 4, 5),
        (["--symmetry=O2", "--samples.train=9"], "samples.train", 8, 9),
        (["--also_test=[1,16]"], "also_test", 4, 16),
        (["--symmetry=D4", "--method=canonical", "--also_test=[9]"], "also_test", 8, 9),
    ],
)
def test_more_samples_than_elements_are_refused_before_the_training(flags, key, most, got):
    with pytest.raises(ValueError, match=rf"^config: {key} must be at most .*, {most}, for method .*, got {got}$"):
        tasks.load("rotated_mnist/ps", [*FLAGS, *flags])


@pytest.mark.parametrize(
    ("method", "symmetry", "counts"),
    [
        ("ps", "SO2", (1, 4)),
        ("ps", "D4", (1, 4, 8)),
        ("ps", "C4", (1, 4)),
        ("ga", "C4", (1, 2, 4, 16)),
        ("none", "D4", ()),
    ],
)
def test_tests_with_other_numbers_of_samples_go_as_far_as_there_are_elements(method, symmetry, counts):
    flags = [f"--symmetry={symmetry}", "--train_poses=upright"]
    assert tasks.load(f"rotated_mnist/{method}", [*FLAGS, *flags]).also_test == counts


def test_methods_share_first_weights_and_orbits_are_invariant():
    models = []
    for method in ("none", "ps", "orbit"):
        torch.manual_seed(0)
        models.append(
            tasks.load(f"rotated_mnist/{method}", [*FLAGS, "--symmetry=C4", "--test_poses=C4"]).model().eval()
        )
    first, *others = (model.backbone.state_dict() | model.embed.state_dict() for model in models)
    assert all(torch.equal(first[key], some[key]) for some in others for key in first)
    images, _ = tasks.load("rotated_mnist/ps", FLAGS).dataset("upright")[torch.arange(4)]
    turned = images.replace(pixels=images.pixels.rot90(1, (-2, -1)))
    bare, ps, orbit = models
    for model in (ps, orbit):  # with all four elements
        torch.testing.assert_close(model(turned, 4)[0], model(images, 4)[0], rtol=1e-4, atol=1e-5)
    assert (bare(turned)[0] - bare(images)[0]).abs().max() > 1e-3


def test_poses():
    pixels = torch.rand(400, 1, 8, 8)
    quarter = torch.stack([pixels.rot90(k, (-2, -1)) for k in range(4)])
    flipped = torch.stack([pixels.flip(-2).rot90(k, (-2, -1)) for k in range(4)])
    for poses, known in (("C4", quarter), ("D4", torch.cat([quarter, flipped]))):
        moved = rotated_mnist_data.posed(pixels, poses, seeded(0, "test", 0))
        found = (known == moved).flatten(2).all(2)  # (elements, images)
        assert (found.sum(0) == 1).all() and (found.sum(1) > 0.6 * 400 / len(known)).all()
    assert rotated_mnist_data.posed(pixels, "upright", seeded(0, "test", 0)) is pixels
    disc = torch.zeros(8, 8)
    disc[2:6, 2:6] = 1
    moved = rotated_mnist_data.posed(disc.expand(9, 1, 8, 8), "SO2", seeded(0, "test", 0))
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.full((9,), 16.0), rtol=0.02, atol=0)
    assert len(moved.flatten(1).unique(dim=0)) == 9


def test_the_test_set_is_fixed_and_augmented_images_differ_between_epochs():
    one, two = (tasks.load("rotated_mnist/augment", [*FLAGS, f"--seed={seed}"]) for seed in (1, 2))
    every = torch.arange(10)
    for split in ("test", "upright", "valid"):
        assert torch.equal(one.dataset(split)[every][0].pixels, two.dataset(split)[every][0].pixels)
    train = one.dataset("train")
    (a, y), (b, z) = train[every], train[every.flip(0)]
    assert torch.equal(y, z.flip(0)) and not torch.equal(a.pixels, b.pixels.flip(0))
    assert torch.equal(train[every][0].pixels, a.pixels)


def test_calibration_of_a_known_case():
    p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.05, 0.95]])
    sure, right, share = rotated_mnist_report.reliability(p.log(), torch.tensor([0, 1, 1]))
    assert right[7] == 0.5 and right[9] == 1 and right[:7].isnan().all()
    torch.testing.assert_close(sure[[7, 9]].float(), torch.tensor([0.75, 0.95]))
    assert torch.allclose(share[[7, 9]] * 3, torch.tensor([2.0, 1.0], dtype=torch.float64))
    task = RotatedMNIST(RotatedMNISTConfig())
    logits = torch.full((8, 10), -20.0)
    logits[:, 0] = 20.0
    found = task.figures_of(logits, torch.tensor([0] * 6 + [1] * 2))  # sure, and right three times of four
    assert found["accuracy"] == 0.75 and abs(found["ece"] - 0.25) < 1e-6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone.patch=3"], "backbone.patch must divide 8, got 3"),
        (["--backbone.heads=3"], "backbone.heads must divide backbone.width = 8, got 3"),
        (["--method=orbit", "--symmetry=SO2"], "symmetry must be one of C4, C8, D4 for method orbit, got 'SO2'"),
        (["--method=none", "--samples.test=2"], "method none takes 1 sample"),
        (["--distribution.angles=2"], "distribution.angles must be at least 3, got 2"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(ValueError, match=f"^config: {message}"):
        tasks.load("rotated_mnist/ps", [*FLAGS, *flags])


def test_calibration_against_samples_over_the_seeds(tmp_path):
    """Of a comparison: every seed's figures for every number of samples, with mean and deviation."""
    runs = {"ga": {"config": "rotated_mnist/ga", "also_test": [1, 2]}, "none": {"config": "rotated_mnist/none"}}
    common = {**SMALL, "training.progress": False}
    made = Comparison(ComparisonConfig(runs=runs, common=common, seeds=[1, 2], folder=str(tmp_path)), tasks.load)
    compute(made)
    assert (tmp_path / "plots" / "samples.png").is_file()
    found = made.by_samples(tmp_path)
    assert sorted(found) == [f"{a}_{b}" for a in ("test", "upright") for b in ("accuracy", "cross_entropy", "ece")]
    of = found["test_ece"]
    assert {name: sorted(points) for name, points in of.items()} == {"ga": [1, 2, 8], "none": [1]}
    each = [json.loads((tmp_path / "ga" / f"seed{seed}" / "results.json").read_text()) for seed in (1, 2)]
    assert of["ga"] == {S: [x[f"test_ece{end}"] for x in each] for S, end in ((1, "_S1"), (2, "_S2"), (8, ""))}
    rows = [row.split(" | ") for row in (tmp_path / "samples.md").read_text().splitlines()]
    cell = rows[2][rows[0].index("test ece")]
    digits = 0.06 * stdev(of["ga"][1])  # two of the deviation are shown
    shown = [float(x) for x in cell.split(" ± ")]
    assert shown == pytest.approx([mean(of["ga"][1]), stdev(of["ga"][1])], rel=0, abs=digits) and len(rows) == 6


def test_a_comparison_of_one_number_of_samples_has_no_table_of_them(tmp_path):
    runs, common = {"none": {"config": "rotated_mnist/none"}}, {**SMALL, "training.progress": False}
    compute(Comparison(ComparisonConfig(runs=runs, common=common, seeds=[1], folder=str(tmp_path)), tasks.load))
    assert not (tmp_path / "samples.md").exists() and not (tmp_path / "plots" / "samples.png").exists()


def test_the_methods_configuration_tests_several_numbers_of_samples():
    made = tasks.load("rotated_mnist/small_methods", [])
    runs = [run for run in made.runs(Path("x")) if run[0] != "first"]
    counts = {where.parent.name: made._task(keys, seed, where).also_test for _, keys, seed, where in runs}
    assert counts["ps"] and counts["orbit tuned"] and not counts["none"]
