"""Ready-made tasks on a few graphs and molecules of one's own, from files and lists."""

import json
import re

import pytest
import torch
from torch_geometric.data import Data, InMemoryDataset

from probsym_fast import cli, tasks
from probsym_fast.tasks import own_data
from probsym_fast.tasks.energies import EnergiesConfig
from probsym_fast.tasks.own_data import Splitting, read_splits
from probsym_fast.tasks.ready_made import GraphClassificationConfig, GraphRegressionConfig, NodeClassificationConfig
from probsym_fast.training.run import fit

SMALL = {
    "split.valid": 0.25,
    "split.test": 0.25,
    "backbone.width": 8,
    "backbone.layers": 2,
    "distribution.width": 4,
    "samples.train": 2,
    "samples.valid": 2,
    "samples.test": 2,
    "samples.trials": 2,
    "training.epochs": 1,
    "training.batch": 4,
    "training.progress": "false",
    "training.accelerator": "cpu",
}
ONE = {"samples.train": 1, "samples.valid": 1, "samples.test": 1}


def graphs(kind, count=12):
    """Rings and chains; the target says which, or a node's degree, or both as labels."""
    made = []
    for k in range(count):
        n, ring = 3 + k % 4, k % 2
        edges = [(i, i + 1) for i in range(n - 1)] + [(n - 1, 0)] * ring
        edge_index = torch.tensor([*edges, *((j, i) for i, j in edges)]).T
        degree = torch.bincount(edge_index[0], minlength=n)
        y = {
            "real": torch.tensor([100.0 + 10 * ring + n, float(n)]),
            "class": torch.tensor(ring),
            "labels": torch.tensor([[float(ring), float("nan") if k == 5 else float(n > 4)]]),
            "node": degree - 1,
        }[kind]
        attr = torch.ones(edge_index.shape[1], 2)
        made.append(Data(x=degree[:, None], edge_index=edge_index, edge_attr=attr, y=y))
    return made


def molecules(count=8, forces=True):
    """Waters and hydrogens at random, with the energy of springs of rest length 1 between all atoms."""
    made = []
    for k in range(count):
        z = torch.tensor([8, 1, 1] if k % 2 else [1, 1])
        pos = torch.randn(len(z), 3, dtype=torch.float64).requires_grad_()
        energy = 0.5 * (torch.pdist(pos) - 1).square().sum() - 3.0 * z.sum()
        (slope,) = torch.autograd.grad(energy, pos)
        fields = {"force": -slope} if forces else {}
        made.append(Data(pos=pos.detach(), z=z, energy=energy.detach(), **fields))
    return made


def run(name, folder, changes, data):
    """The report of `probsym fit` on a file."""
    torch.save(data, folder / "data.pt")
    (folder / "mine.yaml").write_text(f"task: {name}\ndata: {folder / 'data.pt'}\n")
    flags = [f"--{key}={value}" for key, value in (SMALL | changes).items()]
    assert cli.main(["fit", "-c", str(folder / "mine.yaml"), "--folder", str(folder / "run"), *flags]) == 0
    return json.loads((folder / "run" / "results.json").read_text())


CASES = [
    ("graph_regression", "real", {}, "mae"),
    ("graph_regression", "real", {"backbone.kind": "gin", "method": "ga", "error": "mse"}, "r2"),
    ("graph_classification", "class", {"backbone.kind": "transformer", "method": "fa", **ONE}, "accuracy"),
    ("graph_classification", "labels", {"method": "canonical", **ONE}, "average_precision"),
    ("node_classification", "node", {"method": "none", **ONE}, "accuracy"),
    ("node_classification", "node", {"backbone.kind": "transformer"}, "accuracy"),
    (
        "graph_regression",
        "real",
        {
            "backbone.kind": "vit",
            "backbone.grid": 2,
            "backbone.arguments": "{depth: 1, embed_dim: 16, num_heads: 2}",
        },
        "mae",
    ),
]


@pytest.mark.parametrize(("name", "kind", "changes", "figure"), CASES)
def test_trains_from_a_file(name, kind, changes, figure, tmp_path, capsys):
    found = run(name, tmp_path, changes, graphs(kind))
    assert 0 <= abs(found[f"test_{figure}"]) < 1e3 and f"test_{figure}_std" in found
    assert found["data"] == "6 + 3 + 3 graphs of up to 6 nodes"
    assert figure.replace("_", " ") in capsys.readouterr().out.replace("_", " ")


def test_energies_from_a_file(tmp_path):
    found = run("energies", tmp_path, {"distribution.width": 4, "backbone.heads": 2}, molecules())
    assert found["data"] == "4 + 2 + 2 molecules of up to 3 atoms"
    assert 0 < found["test_energy_mae"] < 10 and 0 < found["test_force_mae"] < 10


def test_a_task_learns_and_its_subclass_is_registered(tmp_path, monkeypatch):
    """Rings and chains are told apart, and the target's units are those of the data."""
    monkeypatch.setattr(tasks.TASKS, "_added", {})

    @tasks.register("sizes")
    class Sizes(tasks.GraphRegression):
        def measures(self, prediction, target):
            return super().measures(prediction, target) | {"worst": (prediction - target).abs().max()}

    config = GraphRegressionConfig(task="sizes", method="ga", folder=str(tmp_path / "run"))
    config.backbone.width = 16
    config.training.epochs, config.training.batch, config.training.lr = 80, 6, 0.01
    config.training.progress, config.training.accelerator = False, "cpu"
    config.training.validate_every = 80
    lists = {name: graphs("real") for name in ("train", "valid", "test")}
    task = Sizes(config, lists)
    mean, deviation = task.units
    every = torch.stack([graph.y for graph in lists["train"]])
    torch.testing.assert_close(mean, every.mean(0))
    torch.testing.assert_close(deviation, every.std(0, correction=0))
    found = fit(task)
    assert found["test_mae"] < 1.0 and found["test_r2"] > 0.8 and found["test_worst"] >= found["test_mae"]


def test_files_of_every_form_hold_the_same_graphs(tmp_path):
    some = graphs("real")
    torch.save(some, tmp_path / "list.pt")
    InMemoryDataset.save(some, str(tmp_path / "saved.pt"))
    torch.save(InMemoryDataset.collate(some), tmp_path / "old.pt")
    for name in ("list", "saved", "old"):
        found = own_data.read_graphs(tmp_path / f"{name}.pt")
        assert len(found) == len(some)
        for a, b in zip(found, some, strict=True):
            assert (
                torch.equal(a.x, b.x) and torch.equal(a.edge_index, b.edge_index) and torch.equal(a.y, b.y.view_as(a.y))
            )


def test_folders_and_splits(tmp_path):
    some = graphs("real")
    for name, part in {"train": some[:6], "val": some[6:9], "test": some[9:]}.items():
        torch.save(part, tmp_path / f"{name}.pt")
    found = read_splits(tmp_path, Splitting())
    assert [len(found[name]) for name in ("train", "valid", "test")] == [6, 3, 3]
    one = own_data.split(some, Splitting(0.2, 0.3, seed=1))
    assert [len(one[name]) for name in one] == [6, 2, 4]
    assert {id(graph) for part in one.values() for graph in part} == {id(graph) for graph in some}
    again, other = (own_data.split(some, Splitting(0.2, 0.3, seed=seed)) for seed in (1, 2))
    assert [id(x) for x in again["train"]] == [id(x) for x in one["train"]] != [id(x) for x in other["train"]]


def test_other_data_are_refused(tmp_path):
    class Odd:
        def __reduce__(self):
            return print, ("ran",)

    for content, words in (
        ({"a": 1}, "a list of Data, one or more, got dict"),
        (Odd(), "Data of PyTorch Geometric, got UnpicklingError"),
    ):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=f"^data: .*bad.pt must hold .*{re.escape(words)}"):
            own_data.read_graphs(tmp_path / "bad.pt")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold train.pt, valid.pt and test.pt, or one file, found \[\]$"):
        read_splits(empty, Splitting())
    refused = {
        "data: y must be (1,) integers >= 0, got": (tasks.GraphClassification, GraphClassificationConfig(), "node"),
        "data: y must be (3,) integers >= 0, got": (tasks.NodeClassification, NodeClassificationConfig(), "class"),
        "data: y of every graph must be a Tensor, got NoneType": (tasks.GraphRegression, GraphRegressionConfig(), None),
    }
    for message, (task, config, kind) in refused.items():
        some = graphs(kind or "real")
        for graph in some if kind is None else []:
            del graph.y
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            task(config, dict.fromkeys(("train", "valid", "test"), some)).model()
    with pytest.raises(ValueError, match=r"^config: data must be a folder or a file of graphs, got null$"):
        tasks.GraphRegression(GraphRegressionConfig()).model()
    config = NodeClassificationConfig()
    config.backbone.kind = "gin"
    with pytest.raises(
        ValueError, match=r"^config: backbone.kind must be mlp, transformer or vit for classes of nodes"
    ):
        tasks.NodeClassification(config)


def test_reference_energies_units_and_missing_forces():
    some = molecules()
    lists = dict.fromkeys(("train", "valid", "test"), some)
    task = tasks.Energies(EnergiesConfig(), lists)
    train = task.dataset("train")
    assert task.types.tolist() == [1, 8]
    counts = torch.tensor([[int((one.z == t).sum()) for t in (1, 8)] for one in some]).double()
    energies = torch.stack([one.energy for one in some])
    left = energies - counts @ task.references
    assert (counts.T @ left).abs().max() < 1e-8  # what least squares leaves
    torch.testing.assert_close(train.target[:, 0], left.float())
    assert train.num_nodes.tolist() == [len(one.z) for one in some]
    batch, target = train[torch.arange(3)]
    assert batch.features.shape == (3, 3, 2) and target.shape == (3, 10) and target[0].isnan().sum() == 3
    model = task.model().train()
    prediction, _ = model(batch, 2)
    assert prediction.shape == target.shape and task.loss(prediction, target).isfinite()
    assert not prediction[0, 7:].any()  # forces of padding
    del some[0].force
    with pytest.raises(ValueError, match=re.escape("data: force of every molecule must be (2, 3), here of 2 atoms")):
        tasks.Energies(EnergiesConfig(), lists).model()
    task = tasks.Energies(EnergiesConfig(forces=None), lists)
    assert task.model()(batch, 2)[0].shape == (3, 1) and task.figures == ("test_energy_mae",)
