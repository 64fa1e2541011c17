"""The experiments on graphs, small: what they count, that they train, resume and refuse bad values, and their plots."""

import json
import math
from dataclasses import replace

import networkx
import pytest
import torch

from probsym_fast import cli, tasks
from probsym_fast.data import graph8c, wl_pairs, write_g6
from probsym_fast.draws import seeded
from probsym_fast.groups import Draws, Graphs
from probsym_fast.tasks import automorphism, exp_classify, graphs, sample_figures, separation
from probsym_fast.tasks.sample_figures import permutation_entropy
from probsym_fast.tasks.separation import AllPairs, Partners
from probsym_fast.training import run as training
from probsym_fast.training.configuration import available


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


def test_classification_is_validated_every_epoch_and_picked_by_its_loss():
    for name in (n for n in available() if n.startswith("exp_classify")):
        task = tasks.load(name)
        assert (task.config.training.validate_every, task.config.training.patience) == (1, None), name
        assert (task.monitor.key, task.monitor.direction) == ("valid/bce", "min")


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


SIZES = ["--train", "[1]", "--compared", "2", "--every", "2", "--test", "[1, 4]", "--repeats", "3", "--graphs", "3"]
SIZES += ["--permutations", "6", "--gradients", "3", "--seed", "7"]
SIZES += [x.replace("--training", "--classify.training") for x in SMALL]


def test_sample_size(few, tmp_path, capsys, monkeypatch):
    arguments = ["test", "-c", "sample_size/exp_mlp", "--folder", str(tmp_path), *SIZES]
    assert cli.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert tasks.load(str(tmp_path / "train1" / "config.yaml")).config.seed == 7
    assert tasks.load(str(tmp_path / "train2_ga" / "config.yaml")).config.method == "ga"
    assert set(results["trained"]) == {"1"} and set(results["trained_ga"]) == {"2"}
    for row in (*results["random"].values(), *results["trained"].values(), *results["trained_ga"].values()):
        assert all(len(row[name]) == 2 and row[name][0] > 0 for name in ("output_variance", "loss_variance"))
        assert row["entropy"] > 0 and row["gradient_norm"] > 0
    for method, row in results["compared"].items():
        assert row["epochs"] == [0, 2] and row["entropy"][0] == results["random"][method]["entropy"]
        assert row["gradient_norm"][0] != row["gradient_norm"][1], "of other weights"
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 1000 for name in ("samples", "epochs"))
    out = capsys.readouterr().out
    assert "ratio PS / GA" in out and "GA by epoch" in out
    # again: trainings and figures that are there are taken
    monkeypatch.setattr(sample_figures.Measurement, "_spread", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_figures_of_other_weights_or_settings_are_not_taken(few, tmp_path):
    task = tasks.load("exp_classify/mlp_ps")
    measurement = sample_figures.Measurement((1,), 2, 2, 3, 1, 0)
    torch.manual_seed(0)
    model, path = task.model().eval(), tmp_path / "figures" / "one.json"
    first = measurement.figures(path, model, task, 2)
    assert measurement.figures(path, model, task, 2) == first
    with torch.no_grad():
        model.backbone.layers[1].weight.mul_(2)
    other = measurement.figures(path, model, task, 2)
    assert other["output_variance"] != first["output_variance"] and other["entropy"] == first["entropy"]
    more = replace(measurement, test=(1, 3)).figures(path, model, task, 2)
    assert len(more["output_variance"]) == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"one.json must hold figures, got KeyError\('of'\); remove it"):
        measurement.figures(path, model, task, 2)


@pytest.mark.parametrize("method", ["ps", "ga"])
def test_figures_of_a_model_are_as_defined(few, tmp_path, method):
    task = tasks.load(f"exp_classify/mlp_{method}", ["--training.batch", "4"])
    torch.manual_seed(0)
    model = task.model().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = sample_figures.Measurement((1, 5), 4, 3, 6, 4, 9).figures(tmp_path / "x.json", model, task, 2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    graphs_, target = task.dataset("valid")[torch.arange(3)]
    for k, samples in enumerate((1, 5)):
        y = torch.stack([model(graphs_, samples, seeded(9, f"repeat {samples} 0", n))[0] for n in range(4)])[..., 0]
        p = y.double().sigmoid()
        deviation = ((p - p.mean(0)).square().sum(0) / 3).sqrt()
        assert found["output_variance"][k] == pytest.approx(deviation.mean().item() ** 2, rel=1e-3)
        assert found["output_variance"][k] <= p.var(0).mean().item()
        losses = -torch.where(target[:, 0] > 0, p.log(), (1 - p).log())
        assert found["loss_variance"][k] == pytest.approx(losses.std(0).mean().item() ** 2, rel=1e-3)
        assert found["loss"][k] == pytest.approx(losses.mean().item(), rel=1e-5)
    # gradients one by one, their mean, then its norm
    parameters, sums = [*model.embed.parameters(), *model.backbone.parameters()], 0
    for n in range(4):
        graph, target = task.dataset("train")[torch.tensor([n])]
        loss = task.loss(model.train()(graph, 2, seeded(9, "gradient", n))[0], target)
        sums = sums + torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert found["gradient_norm"] == pytest.approx((sums / 4).norm().item(), rel=1e-4)


def test_entropy_of_the_mean_permutation():
    """Rows and columns, a node; nodes of smaller graphs alone."""
    n = 64
    batch = Graphs(torch.zeros(n + 2, 1), torch.zeros(2, 0).long(), torch.tensor([0, n, n + 2]))
    same = torch.arange(n).expand(2, 3, n)
    assert permutation_entropy(same, batch).tolist() == [0, 0]
    turned = (torch.arange(n) + 1) % n
    swapped = torch.tensor([1, 0, *range(2, n)])
    mixed = torch.stack([torch.stack([same[0, 0], turned]), torch.stack([same[0, 0], swapped])])
    assert permutation_entropy(mixed, batch).tolist() == pytest.approx([2 * math.log(2)] * 2)
    # rows of one slot each, columns that are shared: 0 for the rows, for the column of both log 2 over 2 nodes
    one_slot = torch.zeros(1, 2, 2).long()
    one_slot[0, 1] = 1
    some = Graphs(torch.zeros(2, 1), torch.zeros(2, 0).long(), torch.tensor([0, 2]))
    assert permutation_entropy(one_slot, some).item() == pytest.approx(math.log(2) + 0.5 * 2 * math.log(2))


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


def test_the_published_graphs_and_their_orbits():
    """Seed 777, x = 0, 25 slots, 100 samples; orbits by their definition: all automorphisms."""
    config = tasks.load("automorphism/ps").config
    assert (config.seed, config.samples) == (777, 100)
    found = automorphism.graphs()
    assert [len(positions) for _, _, positions in found.values()] == [7, 7, 7, 7, 25]
    assert [len(edges) for edges, _, _ in found.values()] == [8, 6, 6, 7, 40]
    for name, (edges, orbits, positions) in found.items():
        graph = networkx.Graph(edges)
        assert sorted(graph) == list(range(len(positions))), name
        joined = networkx.Graph()
        joined.add_nodes_from(graph)
        for same in networkx.isomorphism.GraphMatcher(graph, graph).isomorphisms_iter():
            joined.add_edges_from(same.items())
        assert sorted(map(sorted, networkx.connected_components(joined))) == sorted(map(sorted, orbits)), name


def test_no_feature_tells_the_nodes_of_the_published_graphs_apart(tmp_path, monkeypatch):
    seen, forward = [], automorphism.Symmetrized.forward

    def look(self, batch, *rest):
        seen.append(batch.x)
        return forward(self, batch, *rest)

    monkeypatch.setattr(automorphism.Symmetrized, "forward", look)
    tasks.load("automorphism/ga", ["--trials", "2", "--samples", "1"]).run(tmp_path)
    assert len(seen) == 10 and all(x.shape[1] == 1 and not x.any() for x in seen)


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
        ("sample_size/random", ["--compared", "0"], "compared must be at least 1, got 0"),
        ("sample_size/random", ["--every", "0"], "every must be at least 1, got 0"),
        ("sample_size/random", ["--gradients", "0"], "gradients must be at least 1, got 0"),
        ("sample_size/random", ["--permutations", "0"], "permutations must be at least 1, got 0"),
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
