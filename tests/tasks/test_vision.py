"""Vision transformers on graphs, small: every set and method trains, tests, resumes and refuses."""

import json

import pytest
import torch
from torch.nn import functional as F

from probsym_fast import cli, tasks
from probsym_fast.groups import Graphs
from probsym_fast.tasks import configuration, measures, vision_data
from probsym_fast.tasks.vision import GraphClassification, GraphRegression, LinkPrediction, NodeClassification
from probsym_fast.tasks.vision_data import SETS, LabelledGraphs
from probsym_fast.training import run as training
from probsym_fast.training.logs import history
from tests.helpers.tiny_vision import tiny

NO_GRAPHS = [f"--graphs.{split}=null" for split in ("train", "valid", "test")]

FIGURES = {
    "pattern": {"accuracy"},
    "random_peptides_func": {"average_precision"},
    "random_peptides_struct": {"mae", "r2"},
    "random_pcqm_contact": {
        f"{name}{ending}"
        for name in ("hits@1", "hits@3", "hits@10", "mrr")
        for ending in ("", "_filtered", "_filtered_noself")
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["ps", "ga", "fa", "canonical"])
@pytest.mark.parametrize("dataset", FIGURES)
def test_every_set_and_method_trains_and_reports(dataset, method, tmp_path):
    name, changes = tiny(dataset, method, tmp_path / "run")
    assert cli.main(["fit", "-c", name, *changes]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"] == SETS[dataset].about
    found = {key[5:] for key in results if key.startswith("test_") and not key.endswith("_std")}
    assert found == FIGURES[dataset]
    for figure in found - {"r2", "mae"}:
        assert 0 <= results[f"test_{figure}"] <= 1
    assert set(tasks.load(name, changes).figures) == {f"test_{figure}" for figure in found}
    assert (tmp_path / "run" / "plots" / "losses.png").stat().st_size > 1000


def test_the_published_settings():
    """As in the table of the experiments."""
    table = {
        "pattern": (1, 10, 10, 1e-5, 0.01, 25_000, "zeros", False, [0, 0], "diagonal", 0.1),
        "peptides_func": (1, 10, 100, 1e-5, 0.1, 50_000, "reflect", True, [0.5, 0.5], "tokens", 0.1),
        "peptides_struct": (1, 10, 100, 1e-5, 0.1, 50_000, "circular", True, [0, 0.5], "tokens", 0.1),
        "pcqm_contact": (10, 10, 10, 5e-5, 0.01, 50_000, "zeros", False, [0, 0], "tokens", 0.0),
    }
    kinds = (NodeClassification, GraphClassification, GraphRegression, LinkPrediction)
    for (name, row), kind in zip(table.items(), kinds, strict=True):
        task = tasks.load(f"{name}/pretrained_ps")
        c, t = task.config, task.config.training
        samples = c.samples.train, c.samples.valid, c.samples.test
        padding = c.pad_mode, c.centered, c.backbone.patch_dropout, c.nodes, c.distribution.dropout
        assert (*samples, t.lr, t.weight_decay, t.steps, *padding) == row, name
        assert (t.optimizer, t.decay, t.warmup_steps, t.batch, t.precision) == (
            "adamw",
            "linear",
            5000,
            128,
            "bf16-mixed",
        )
        assert (
            c.backbone.name == "vit_base_patch16_224.augreg_in21k" and c.backbone.pretrained and c.backbone.grid == 14
        )
        assert (c.distribution.width, c.distribution.layers, c.distribution.tau, t.entropy) == (64, 3, 0.01, 0.1)
        assert type(task) is kind
        assert (t.patience, t.validate_every) == (100, 1), "epochs"
        assert not c.backbone.patch_dropout_always
        by = {"peptides_func": ("valid/average_precision", "max")}
        assert (task.monitor.key, task.monitor.direction) == by.get(name, (f"valid/{task.measure}", "min"))
    assert tasks.load("pattern/scratch_ga").config.samples.train == 10
    assert not tasks.load("pattern/scratch_ga").config.backbone.pretrained
    assert tasks.load("pattern/scratch_canonical").config.samples.test == 1


def test_the_published_numbers_of_test_seeds():
    table = {
        **{f"pattern/{start}_{method}": (6, [1]) for start in ("pretrained", "scratch") for method in ("ps", "ga")},
        **{
            f"pattern/{start}_{method}": (1, [])
            for start in ("pretrained", "scratch")
            for method in ("fa", "canonical")
        },
        **{f"peptides_{kind}/pretrained_ps": (3, []) for kind in ("func", "struct")},
        "pcqm_contact/pretrained_ps": (1, []),
    }
    for name, row in table.items():
        config = tasks.load(name).config
        assert (config.samples.trials, config.also_test) == row, name


def test_further_numbers_of_samples_are_tested(tmp_path):
    name, changes = tiny("pattern", "ps", tmp_path, "--samples.trials=2", "--samples.test=3", "--also_test=[1, 2]")
    task = tasks.load(name, changes)
    model = task.model().eval()
    figures = task.report(model, tmp_path)
    assert set(task.figures) == {"test_accuracy", "test_accuracy_S1", "test_accuracy_S2"}
    for samples, ending in ((3, ""), (1, "_S1"), (2, "_S2")):
        trials = [task.evaluate(model, "test", samples, k)["accuracy"] for k in range(2)]
        assert figures[f"test_accuracy{ending}"] == pytest.approx(sum(trials) / 2)
        assert figures[f"test_accuracy{ending}_std"] == pytest.approx(abs(trials[0] - trials[1]) / 2)
    assert ("test accuracy, S = 1") in dict(task.describe(figures))


def test_peptides_func_keeps_the_checkpoint_with_the_highest_average_precision(tmp_path, monkeypatch, capsys):
    """In the order 0.2, 0.6, 0.4, 0.6, 0.1, while the loss falls, and stops after two validations without a higher one."""
    precisions = iter([0.2, 0.6, 0.4, 0.6, 0.1])
    name, changes = tiny("random_peptides_func", "ga", tmp_path / "run", "--training.lr=1e-3", "--training.patience=3")
    plain = GraphClassification.measures

    def measures(self, prediction, target):
        value = next(precisions, None)
        return plain(self, prediction, target) if value is None else {"average_precision": torch.tensor(value)}

    monkeypatch.setattr(GraphClassification, "measures", measures)
    flags = ["--training.epochs=9", "--training.progress=true"]
    assert (
        cli.main(["fit", "-c", name, *(c for c in changes if "epochs" not in c and "progress" not in c), *flags]) == 0
    )
    out, err = capsys.readouterr()
    logged = history(tmp_path / "run")["valid/average_precision"]
    assert list(logged) == [0, 1, 2, 3, 4], "stopped after 3 validations without a higher one"
    assert training.load_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["epoch"] == 1
    best = json.loads((tmp_path / "run" / "results.json").read_text())["best_checkpoint"]
    assert best == {"epoch": 2, "monitor": "valid/average_precision", "value": pytest.approx(0.6)}
    assert "best checkpoint" in out and "epoch 2, valid/average_precision 0.60000" in out
    assert "valid/average_precision 0.60000" in err, "progress"


def test_patches_are_dropped_in_evaluation_where_asked_for(tmp_path):
    """As the public code does: random, yet the same in every run with the same seed."""
    found = {}
    for always in ("true", "false"):
        more = ("--backbone.patch_dropout=[0.5, 0.5]", f"--backbone.patch_dropout_always={always}")
        name, changes = tiny("random_peptides_struct", "canonical", tmp_path / always, *more)
        task = tasks.load(name, changes)
        torch.manual_seed(0)
        model = task.model().eval()
        counts = []
        model.backbone.blocks[0].register_forward_pre_hook(lambda _, x, counts=counts: counts.append(x[0].shape[-2]))
        found[always] = [task.evaluate(model, "test", 1, trial)["mae"] for trial in (0, 1, 0)]
        assert set(counts) == ({1 + 8} if always == "true" else {1 + 16})
        training.fit(task)  # validation, too
        training.fit(tasks.load(name, [*changes, f"--folder={tmp_path / always}2"]))
        first, second = (history(tmp_path / folder)["valid/l1"] for folder in (always, f"{always}2"))
        assert first == second
    assert found["true"][0] == found["true"][2] != found["true"][1]
    assert found["true"][0] != found["false"][0]


def test_channels_and_sizes_of_the_sets():
    table = {"pattern": (188, 3, 1, 2), "peptides_func": (444, 50, 8, 10), "pcqm_contact": (53, 68, 7, 1)}
    assert {name: SETS[name][:4] for name in table} == table
    assert SETS["peptides_struct"].outputs == 11


def test_a_seed_gives_every_method_the_same_backbone(tmp_path):
    weights = []
    for method in ("ps", "ga"):
        name, changes = tiny("pattern", method, tmp_path)
        torch.manual_seed(3)
        model = tasks.load(name, changes).model()
        weights.append(torch.cat([p.flatten() for p in (*model.backbone.parameters(), *model.embed.parameters())]))
    assert torch.equal(*weights)


def test_no_parameter_is_without_gradient(tmp_path):
    for dataset in FIGURES:
        name, changes = tiny(dataset, "ps", tmp_path)
        task = tasks.load(name, changes)
        model = task.model().train()
        graphs, target = task.dataset("train")[torch.arange(8)]
        prediction, penalties = model(graphs, 2)
        (task.loss(prediction, target) + penalties["entropy"]).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{dataset} {key}"


def test_losses():
    logits, labels = torch.randn(6, 2), torch.tensor([0, 0, 0, 1, 0, 0])
    (node, func, struct, contact) = (
        tasks.load(f"{name}/pretrained_ps") for name in ("pattern", "peptides_func", "peptides_struct", "pcqm_contact")
    )
    weight = torch.tensor([1 / 6, 5 / 6])
    torch.testing.assert_close(node.loss(logits, labels), F.cross_entropy(logits, labels, weight))
    target = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
    given = [F.softplus(logits[0, 0]), F.softplus(-logits[0, 1]), F.softplus(-logits[1, 1])]
    torch.testing.assert_close(func.loss(logits[:2], target), torch.stack(given).mean())
    torch.testing.assert_close(struct.loss(logits, logits + 2), torch.tensor(2.0))
    torch.testing.assert_close(contact.loss(torch.zeros(3, 1), torch.ones(3, 1)), torch.tensor(2.0).log())
    for task, labels in ((func, torch.full((6, 2), torch.nan)), (contact, torch.zeros(0, 1))):
        scores = torch.randn(labels.shape, requires_grad=True)
        loss = task.loss(scores, labels)
        loss.backward()
        assert loss.item() == 0 and torch.equal(scores.grad, torch.zeros_like(scores)), "no label at all"


@pytest.mark.parametrize(("dataset", "labels"), [("peptides_func", "y"), ("pcqm_contact", "edge_label")])
def test_labels_that_are_no_classes_are_refused(dataset, labels, tmp_path, monkeypatch, capsys):
    name, changes = tiny(f"random_{dataset}", "ga", tmp_path / "run")
    load = SETS[f"random_{dataset}"].load

    def wrong(*arguments):
        source = load(*arguments)
        values = getattr(source, labels).clone().float()
        values.view(-1)[:2] = torch.tensor([torch.nan, 3.0])
        setattr(source, labels, values)
        return source

    monkeypatch.setitem(SETS, f"random_{dataset}", SETS[f"random_{dataset}"]._replace(load=wrong))
    assert cli.main(["fit", "-c", name, *changes]) == 1
    assert f"random_{dataset}: labels must be 0, 1 or NaN (missing), got 3.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_graphs_keep_their_own_noise_in_any_batch(tmp_path):
    name, changes = tiny("pattern", "ps", tmp_path, "--distribution.fixed=true")
    task = tasks.load(name, changes)
    data, noise = task.dataset("train"), task.model().distribution.noise
    for some in ([0, 1, 2, 3], [5, 2], [2]):
        graphs, _ = data[torch.tensor(some)]
        assert graphs.key.tolist() == some
        z = noise((len(graphs.x), 1, 4), graphs)[graphs.graph == some.index(2)]
        alone, _ = data[torch.tensor([2])]
        assert torch.equal(z, noise((len(alone.x), 1, 4), alone))


def test_the_reports_figures_are_those_of_the_whole_split(tmp_path):
    """A batch size that does not divide the split changes nothing, and contacts are ranked among all nodes."""
    name, changes = tiny("random_pcqm_contact", "canonical", tmp_path)
    task = tasks.load(name, changes)
    model = task.model().eval()
    graphs, target = task.dataset("test")[torch.arange(5)]
    with torch.no_grad():
        scores, _ = model(graphs.replace(pairs=measures.all_pairs(graphs.ptr)), 1)
    whole = measures.contact_measures(scores[:, 0], graphs.ptr, graphs.pairs, target[:, 0])
    found = task.evaluate(model, "test", 1, 0)
    for key, values in whole.items():
        assert found[key] == pytest.approx(values.mean().item(), abs=1e-6), key


def test_batches_are_the_graphs_asked_for(monkeypatch):
    source = SETS["random_peptides_func"].load("train", 6, None, 1)
    labelled = LabelledGraphs(source, by_frame=True)
    graphs, target = labelled[torch.tensor([4, 1])]
    assert isinstance(graphs, Graphs) and graphs.size == 2 and target.shape == (2, 10)
    for k, number in enumerate((4, 1)):
        alone, y = labelled[torch.tensor([number])]
        mine = graphs.graph == k
        assert torch.equal(graphs.x[mine], alone.x) and torch.equal(target[k : k + 1], y)
        assert torch.equal(graphs.frame[mine], alone.frame) and len(alone.frame) == len(alone.x)
    pairs = SETS["random_pcqm_contact"].load("train", 3, None, 1)
    graphs, target = LabelledGraphs(pairs)[torch.arange(3)]
    assert target.shape == (graphs.pairs.shape[1], 1) and target.unique().tolist() == [0, 1]
    splits = [SETS["random_pcqm_contact"].load(split, 3, None, 1) for split in ("train", "valid", "test")]
    assert len({len(s.x) for s in splits}) > 1, "other molecules in other splits"
    assert vision_data.RANDOM["train"] == len(SETS["random_pcqm_contact"].load("train", None, None, 1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--dataset=protein"], "dataset"),
        (["--method=canonical", "--samples.test=2"], "config: method canonical takes 1 sample"),
        (["--pad_mode=reflect"], "config: nodes on the diagonal take pad_mode zeros, not centered, got reflect"),
        (["--backbone.patch_dropout=[0.5, 0.2]"], r"backbone.patch_dropout must be \[low, high\] .* got \[0.5, 0.2\]"),
        (["--backbone.grid=0"], "backbone.grid must be at least 1, got 0"),
        (["--also_test=[1, 0]"], r"also_test must be numbers of samples >= 1, none twice, got \[1, 0\]"),
        (["--also_test=[1, 1]"], r"also_test must be numbers of samples >= 1, none twice, got \[1, 1\]"),
        (
            ["--method=canonical", "--also_test=[2]"],
            r"method canonical takes 1 sample, got .* and also_test \[2\]",
        ),
        (["--graphs.train=0"], "graphs.train must be at least 1, got 0"),
        (["--dataset=published_pattern", "--graphs.train=5"], "graphs must be null for published_pattern"),
        (
            ["--backbone.arguments={depth: 2, weights: x}"],
            r"backbone.arguments must be timm's, without name, .*'weights'",
        ),
        (["--dataset=random_pcqm_contact", "--data=x"], "data must be null for random_pcqm_contact, .* got 'x'"),
    ],
)
def test_bad_configurations(changes, text):
    with pytest.raises(ValueError, match=text):
        tasks.load("pattern/pretrained_ps", changes)


def test_missing_data_and_unknown_backbones_leave_nothing_behind(tmp_path, capsys):
    run = tmp_path / "run"
    name, changes = tiny("pattern", "ps", run)
    assert cli.main(["fit", "-c", name, *changes, "--dataset=published_pattern", *NO_GRAPHS]) == 1
    assert cli.main(["fit", "-c", name, *changes, "--backbone.name=vit_tinny_patch16_224"]) == 1
    assert "did you mean vit_tiny_patch16_224" in capsys.readouterr().err
    assert not run.exists()


# --- extends ---


def test_a_configuration_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text("a: 1\nb: {c: 2, d: 3}\n")
    (tmp_path / "more.yaml").write_text(f"extends: {tmp_path / 'base.yaml'}\nb: {{d: 4}}\ne: 5\n")
    assert configuration.read(tmp_path / "more.yaml") == {"a": 1, "b": {"c": 2, "d": 4}, "e": 5}
    (tmp_path / "lost.yaml").write_text("extends: pattern/pretraned_ps\n")
    with pytest.raises(ValueError, match=r"did you mean .*pattern/pretrained_ps"):
        configuration.read(tmp_path / "lost.yaml")
