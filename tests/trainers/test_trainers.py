"""Symmetrized models in other people's trainers, and on the Hugging Face Hub."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import probsym_fast as psf
from tests.helpers.graphs import random_graphs

SIZES = [3, 4, 5, 6, 3, 4, 5, 6]
DATA = [(random_graphs([n], dtype=torch.float32, seed=k), torch.tensor([n / 6.0])) for k, n in enumerate(SIZES)]


def collated(data: list[tuple[psf.Graphs, Tensor]]) -> tuple[psf.Graphs, Tensor]:
    """Several graphs in one batch."""
    graphs, targets = zip(*data, strict=True)
    starts = torch.tensor([0, *(len(one.x) for one in graphs)]).cumsum(0)
    edges = [one.edge_index + start for one, start in zip(graphs, starts, strict=False)]
    return psf.Graphs(torch.cat([one.x for one in graphs]), torch.cat(edges, 1), starts), torch.stack(targets)


def parts(width: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    learned = psf.distributions.Learned(psf.groups.Symmetric(6), psf.distributions.GIN(2, 8))
    embed = psf.models.FlatGraph(N=6, width=width, node_features=2)
    return psf.models.MLP([width, 1]), embed, psf.models.MeanReadout(), learned


def assert_learns(model: nn.Module, train) -> None:
    """The error on all graphs is lower after the training, with the same elements."""
    graphs, target = collated(DATA)

    def error() -> Tensor:
        with torch.no_grad():
            return mse_loss(model.eval()(graphs, 8, seed=0)[0], target)

    before = error()
    model.train()
    train()
    assert error() < before


def test_a_plain_loop():
    model = psf.Symmetrized(*parts(16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train():
        for _ in range(10):
            for graphs, target in DataLoader(DATA, batch_size=4, shuffle=True, collate_fn=collated):
                prediction, penalties = model(graphs, samples=4)
                optimizer.zero_grad()
                (mse_loss(prediction, target) + 0.01 * penalties["entropy"]).backward()
                optimizer.step()

    assert_learns(model, train)


def test_a_lightning_module(tmp_path):
    L = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = psf.Symmetrized(*parts(16))

        def training_step(self, batch, index):
            graphs, target = batch
            prediction, penalties = self.model(graphs, samples=4)
            return mse_loss(prediction, target) + 0.01 * penalties["entropy"]

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    module = Module()

    def train():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = L.Trainer(max_epochs=10, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(DATA, batch_size=4, collate_fn=collated))

    assert_learns(module.model, train)


def test_the_trainer_of_hugging_face(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class Regressor(nn.Module):
        """Its loss is what the trainer asks for."""

        def __init__(self):
            super().__init__()
            self.model = psf.Symmetrized(*parts(16))

        def forward(self, graphs, labels):
            prediction, penalties = self.model(graphs, samples=4)
            return {"loss": mse_loss(prediction, labels) + 0.01 * penalties["entropy"], "prediction": prediction}

    def named(data):
        graphs, target = collated(data)
        return {"graphs": graphs, "labels": target}

    regressor = Regressor()
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    settings = transformers.TrainingArguments(
        tmp_path,
        num_train_epochs=10,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        **quiet,
    )
    trainer = transformers.Trainer(regressor, settings, data_collator=named, train_dataset=DATA, eval_dataset=DATA)
    assert_learns(regressor.model, trainer.train)
    assert trainer.predict(DATA).predictions.shape == (8, 1)


def test_saved_and_loaded_as_on_the_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class GraphRegressor(psf.Symmetrized, hub.PyTorchModelHubMixin):
        """Its own arguments are numbers, which the mixin keeps in config.json."""

        def __init__(self, width: int = 8):
            super().__init__(*parts(width))

    model = GraphRegressor(width=12).eval()
    model.save_pretrained(tmp_path)
    loaded = GraphRegressor.from_pretrained(tmp_path).eval()
    graphs, _ = collated(DATA)
    with torch.no_grad():
        assert torch.equal(loaded(graphs, 4, seed=1)[0], model(graphs, 4, seed=1)[0])
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 12}
