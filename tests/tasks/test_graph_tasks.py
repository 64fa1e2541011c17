"""The experiments on graphs, small: what they count, that they train, resume and refuse bad values, and their plots."""

import json
from dataclasses import replace

import pytest
import torch

from probsym_fast import cli, tasks
from probsym_fast.data import graph8c, wl_pairs, write_g6
from probsym_fast.groups import Draws
from probsym_fast.tasks import exp_classify, graphs, separation, training
from probsym_fast.tasks.config import available
from probsym_fast.tasks.sample_size import mean_permutation_entropy
from probsym_fast.tasks.separation import AllPairs, Partners


@pytest.fixture
def few(monkeypatch):
    """A dozen graphs in place of the data sets."""

    def load(name, path=None):
        data = graph8c()[:12] if name == "graph8c" else wl_pairs(count=6)
        for number, graph in enumerate(data):
            graph.key = torch.tensor([number])
        return data

    monkeypatch.setattr(separation, "load_graphs", load)
    monkeypatch.setattr(exp_classify, "load_graphs", load)
    monkeypatch.setattr(exp_classify, "SPLITS", {"valid": slice(0, 4), "test": slice(4, 8), "train": slice(8, 12)})
    monkeypatch.setattr(exp_classify, "WIDTHS", {"mlp": [32, 16, 1], "gin": [10, 1]})
    for name, (N, _, features) in separation.NETWORKS.items():
        monkeypatch.setitem(separation.NETWORKS, name, (N, [32, 16, 10], features))


@pytest.mark.parametrize("name", [n for n in available() if n.split("/")[0] in ("graph8c", "exp")])
def test_separation(name, few, tmp_path, capsys):
    assert cli.main(["test", "-c", name, "--folder", str(tmp_path), "--seeds", "2", "--stop", "false"]) == 0
    assert "pairs left" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["graphs"] == 12 and results["pairs"] == (66 if name.startswith("graph8c") else 6)
    assert len(results["pairs_left_after"]) == 2 and results["pairs_left_after"][1] <= results["pairs_left_after"][0]
    assert (tmp_path / "plots" / "pairs.png").stat().st_size > 1000


def test_separation_keeps_no_autograd_graph_of_any_batch(few, monkeypatch):
    """The public code keeps every batch's graph: 16 and 19 GB."""
    kept = []
    forward = separation.Symmetrized.forward

    def seen(self, *arguments):
        out = forward(self, *arguments)
        kept.append(out[0].requires_grad or any(p.requires_grad for p in out[1].values()))
        return out

    monkeypatch.setattr(separation.Symmetrized, "forward", seen)
    task = tasks.load("graph8c/mlp_ps", ["--batch", "4"])
    assert task.embeddings(task.batches(), 0).shape == (12, 10)
    assert kept == [False] * 3


def test_a_broken_network_separates_nothing(few, monkeypatch):
    task = tasks.load("exp/mlp_ga")
    model = task.model()
    torch.nn.init.constant_(model.backbone.layers[1].weight, torch.nan)
    monkeypatch.setattr(task, "model", lambda: model)
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinity at initialisation 3"):
        task.embeddings(task.batches(), 3)


def test_frames_are_computed_once_and_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    first, second = wl_pairs(count=3), wl_pairs(count=3)
    graphs.add_frames(first)
    (file,) = (tmp_path / "frames").iterdir()
    monkeypatch.setattr(graphs, "laplacian_keys", lambda *_: pytest.fail("computed again"))
    graphs.add_frames(second)
    assert all(torch.equal(a.frame, b.frame) for a, b in zip(first, second, strict=True))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="frames"):
        graphs.add_frames(second)


def test_a_short_data_file_is_refused(tmp_path):
    path = tmp_path / "few.g6"
    write_g6(path, [torch.ones(8, 8).triu(1).add(torch.ones(8, 8).tril(-1)).bool().numpy()] * 3)
    with pytest.raises(ValueError, match="data must hold the 11117 graphs of graph8c, got 3"):
        graphs.load_graphs("graph8c", str(path))


def test_pairs_are_counted_as_by_hand():
    torch.manual_seed(0)
    first, second = torch.randint(0, 3, (40, 2)) * 1.0, torch.randint(0, 3, (40, 2)) * 1.0
    near = lambda x: (x[:, None] - x).abs().sum(-1) <= 1  # noqa: E731
    upper = torch.ones(40, 40, dtype=torch.bool).triu(1)
    for few in (0, 10**6):  # as a matrix all along, and as a list from the first time on
        pairs, before = AllPairs(40, 1.0), separation.FEW
        separation.FEW = few
        try:
            assert pairs.update(first) == int((near(first) & upper).sum())
            assert pairs.update(second) == int((near(first) & near(second) & upper).sum())
        finally:
            separation.FEW = before
    partners = Partners(40, 1.0)
    assert partners.update(first) == int(near(first)[range(0, 40, 2), range(1, 40, 2)].sum())


def test_one_seed_gives_all_methods_the_same_backbone(few):
    models = []
    for method in ("ps", "ga", "fa"):
        torch.manual_seed(3)
        models.append(tasks.load(f"exp_classify/mlp_{method}").model())
    for other in models[1:]:
        for (name, x), y in zip(models[0].backbone.named_parameters(), other.backbone.parameters(), strict=True):
            assert torch.equal(x, y), name
        assert torch.equal(models[0].embed.edges(), other.embed.edges())


SMALL = ["--training.epochs", "2", "--training.validate_every", "1", "--training.batch", "4", "--training.warmup", "1"]


@pytest.mark.parametrize("name", [n for n in available() if n.startswith("exp_classify")])
def test_classification_trains_and_reports(name, few, tmp_path, capsys):
    assert cli.main(["fit", "-c", name, "--folder", str(tmp_path), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "our own pairs (not EXP)" in out and "test accuracy" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["test_accuracy"] <= 1
    assert (tmp_path / "plots" / "losses.png").stat().st_size > 1000


def test_warm_up_and_clipping(few, tmp_path):
    task = tasks.load("exp_classify/gin_ps", ["--folder", str(tmp_path), *SMALL, "--training.clip", "0.05"])
    module = training.TrainingModule(task)
    found = module.configure_optimizers()
    optimizer, rise = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert optimizer.param_groups[0]["lr"] == 0
    optimizer.step()
    rise.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    rise.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    for parameter in module.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.log = module._mean = lambda *_, **__: None
    module.configure_gradient_clipping(optimizer)
    norm = torch.stack([p.grad.norm() for p in module.model.parameters()]).norm()
    assert norm == pytest.approx(0.05, rel=1e-3)


def test_a_resumed_classification_ends_with_the_same_weights(few, tmp_path):
    def run(folder, epochs, resume=False):
        rest = [x if x != "2" else str(epochs) for x in SMALL]
        task = tasks.load("exp_classify/gin_ps", ["--folder", str(tmp_path / folder), *rest])
        training.fit(task, resume=resume)
        return torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_fixed_noise_is_the_same_every_time(few):
    task = tasks.load("exp_classify/mlp_ps_fixed_noise")
    model = task.model().eval()
    batch, _ = task.dataset("train")[torch.arange(4)]
    state = torch.get_rng_state()
    first, second = (model.distribution(batch, 3, Draws(seed=k))[0] for k in (1, 2))
    assert torch.equal(first.order, second.order)
    turned, _ = task.dataset("train")[torch.tensor([2, 0])]
    assert torch.equal(model.distribution(turned, 3, Draws(seed=5))[0].order, first.order[[2, 0]])
    assert torch.equal(state, torch.get_rng_state())


def test_sample_size(few, tmp_path, capsys):
    arguments = ["--train", "[1, 2]", "--test", "[1, 4]", "--repeats", "3", "--graphs", "4", "--seed", "7"]
    arguments += [x.replace("--training", "--classify.training") for x in SMALL]
    for _ in range(2):  # the second time takes up the runs that are there
        assert cli.main(["test", "-c", "sample_size/exp_mlp", "--folder", str(tmp_path), *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert tasks.load(str(tmp_path / "train2" / "config.yaml")).config.seed == 7
    assert set(results["trained"]) == {"1", "2"} and results["gradient_norm"]["1"] > 0
    for row in (*results["random"].values(), *results["trained"].values()):
        assert all(len(row[name]) == 2 and row[name][0] > 0 for name in ("output_variance", "loss_variance"))
        assert row["entropy"][0] == 0 < row["entropy"][1]  # one permutation has none
    assert (tmp_path / "plots" / "samples.png").stat().st_size > 1000
    assert "ratio PS / GA" in capsys.readouterr().out


def test_entropy_of_the_mean_permutation():
    batch = graphs.collate(wl_pairs(count=1))
    rank = torch.arange(64).expand(2, 3, 64)
    assert mean_permutation_entropy(rank, batch) == 0
    mixed = torch.stack([torch.arange(64), (torch.arange(64) + 1) % 64]).expand(2, 2, 64)
    assert mean_permutation_entropy(mixed, batch) == pytest.approx(torch.tensor(2.0).log().item())


@pytest.mark.parametrize("method", ["ps", "ga", "fa", "canonical"])
def test_automorphism(method, tmp_path):
    assert cli.main(["test", "-c", f"automorphism/{method}", "--folder", str(tmp_path), "--trials", "3"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["graphs"]
    assert set(rows) == {"no symmetry", "star", "two stars", "7-cycle", "5 x 5 grid"}
    assert rows["no symmetry"]["within_orbits"] == 0
    if method != "canonical":  # equal within the sampling error of 100 samples
        assert all(row["within_orbits"] < 8 * row["sampling_error"] + 1e-7 for row in rows.values())
    else:
        assert all(row["within_orbits"] > 1e-3 for name, row in rows.items() if name != "no symmetry")
    assert (tmp_path / "plots" / "automorphism.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("graph8c/mlp_ps", ["--samples", "0"], "config: samples must be at least 1, got 0"),
        ("graph8c/mlp_canonical", ["--samples", "2"], "samples must be 1 for method canonical, got 2"),
        ("graph8c/mlp_ps", ["--distribution.tau", "0"], "distribution.tau must be finite and > 0, got 0"),
        ("exp/mlp_ps", ["--data", "nowhere.pkl"], "nowhere.pkl must be the published file GRAPHSAT.pkl, found nothing"),
        ("exp_classify/mlp_ps", ["--data", "x.pkl"], "data must be null for the generated wl_pairs, got 'x.pkl'"),
        ("exp_classify/gin_ps", ["--soft", "true"], "soft takes backbone mlp and method ps, got gin and ps"),
        ("exp_classify/gin_ps", ["--training.clip", "0"], "training.clip must be finite and > 0, got 0"),
        ("exp_classify/gin_ps", ["--distribution.layers", "0"], "distribution.layers must be at least 1, got 0"),
        ("sample_size/random", ["--test", "[]"], "test must be at least one of numbers of samples >= 1, got []"),
        ("sample_size/random", ["--train", "[2, 0]"], "train must be numbers of samples >= 1, got [2, 0]"),
        ("sample_size/random", ["--repeats", "1"], "repeats must be at least 2, got 1"),
        ("sample_size/random", ["--classify.training.lr", "0"], "classify.training.lr must be finite and > 0, got 0"),
        ("automorphism/ps", ["--trials", "1"], "trials must be at least 2, got 1"),
        ("automorphism/ps", ["--distribution.tau", "0"], "distribution.tau must be finite and > 0, got 0"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(name, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "-c", name, "--folder", "run", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_configuration_does_not_overwrite_a_folder(few, tmp_path, capsys):
    arguments = ["test", "-c", "graph8c/mlp_ga", "--folder", str(tmp_path), "--seeds", "1"]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0  # the same again
    assert cli.main([*arguments, "--threshold", "0.5"]) == 1
    assert "holds another configuration" in capsys.readouterr().err


def test_every_configuration_loads():
    for name in available():
        task = tasks.load(name)
        assert replace(task.config) == task.config
