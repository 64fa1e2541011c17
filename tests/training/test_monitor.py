"""What picks the best checkpoint and stops a training: a measure and its direction, apart from the loss."""

import csv
import json

import pytest
import torch

from probsym_fast.tasks import configuration
from probsym_fast.training import run as training
from probsym_fast.training.logs import history
from probsym_fast.training.plots import best_epoch
from probsym_fast.training.settings import Monitor
from tests.helpers.tiny import Tiny, run, tiny

SCORES = [0.2, 0.6, 0.6, 0.4, 0.5, 0.1]


class Scored(Tiny):
    """A measure that goes its own way, by the epoch: of the whole set, higher is better."""

    monitor = Monitor("score", "max")
    whole_set_measures = True

    def __init__(self, config):
        super().__init__(config)
        self.scores = iter(SCORES)

    def measures(self, prediction, target):
        return {"score": torch.tensor(next(self.scores, 0.0))}


class Batched(Scored):
    """The same as a mean over one batch of 20; 24 in training."""

    whole_set_measures = False

    def measures(self, prediction, target):
        return {} if len(prediction) == 24 else super().measures(prediction, target)  # in training


@pytest.mark.parametrize("kind", [Scored, Batched])
def test_the_highest_value_is_kept_and_patience_counts_from_it(tmp_path, kind, capsys):
    run(tmp_path, kind, epochs=6, batch=24, patience=3, progress=True)
    assert history(tmp_path)["valid/score"] == {k: pytest.approx(score) for k, score in enumerate(SCORES[:5])}
    best = training.load_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["epoch"] == 1, "the first of equals"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best_checkpoint"] == {"epoch": 2, "monitor": "valid/score", "value": pytest.approx(0.6)}
    assert tiny(tmp_path, kind).table(results)[-1] == ("best checkpoint", "epoch 2, valid/score 0.60000")
    assert "valid/score 0.60000" in capsys.readouterr().err


def test_without_a_monitor_the_lowest_loss_is_kept(tmp_path):
    run(tmp_path, epochs=4, lr=0.5, batch=20)
    loss = history(tmp_path)["valid/mse"]
    best = json.loads((tmp_path / "results.json").read_text())["best_checkpoint"]
    assert best == {
        "epoch": 1 + min(loss, key=loss.get),
        "monitor": "valid/mse",
        "value": pytest.approx(min(loss.values())),
    }
    assert Tiny.monitor.__get__(tiny(tmp_path)) == Monitor("mse", "min")


def test_patience_counts_validations(tmp_path):
    """Two without a better one are four epochs where every second is validated."""
    run(tmp_path, epochs=20, batch=20, patience=2, validate_every=2, lr=1e-30)
    assert sorted(history(tmp_path)["valid/mse"]) == [1, 3, 5]


def test_a_resumed_run_keeps_the_highest_value(tmp_path):
    whole = run(tmp_path / "whole", Scored, epochs=4, batch=20)
    run(tmp_path / "parts", Scored, epochs=2, batch=20)
    task = tiny(tmp_path / "parts", Scored, epochs=4, batch=20)
    task.scores = iter(SCORES[2:])
    training.fit(task, resume=True)
    parts = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert training.load_checkpoint(tmp_path / "parts" / "checkpoints" / "best.ckpt")["epoch"] == 1
    for state in (whole, parts):
        assert state["callbacks"]["checkpoint best"]["best_model_score"] == pytest.approx(0.6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Lightning names the callback that is gone
def test_a_run_that_was_monitored_by_its_loss_goes_on_by_the_new_measure(tmp_path):
    """A score of 0.2 is no worse than a loss that was larger: the first validation under the new monitor is the best yet."""

    class Before(Scored):
        monitor = Monitor("mse")

    run(tmp_path, Before, epochs=2, batch=20, patience=50)
    before = training.load_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["callbacks"]["checkpoint best"]
    assert before["best_model_score"] > 0.3
    task = tiny(tmp_path, Scored, epochs=4, batch=20, patience=50)
    task.scores = iter([0.3, 0.1])
    training.fit(task, resume=True)
    best = training.load_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["epoch"] == 2 and best["callbacks"]["checkpoint best"]["best_model_score"] == pytest.approx(0.3)


def test_a_recorded_configuration_without_the_new_keys_is_resumed_and_tested(tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / "config.yaml"
    values = configuration.read(path)
    del values["training"]["keep_every"]
    path.write_text(json.dumps(values))
    training.fit(tiny(tmp_path, epochs=2), resume=True)
    assert training.load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["epoch"] == 1


def test_a_best_checkpoint_that_does_not_say_how_it_was_picked(tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / "checkpoints" / "best.ckpt"
    state = training.load_checkpoint(path)
    torch.save({"state_dict": state["state_dict"]}, path)
    results = training.test(tiny(tmp_path))
    assert results["best_checkpoint"] is None and "best checkpoint" not in dict(tiny(tmp_path).table(results))


def test_weights_are_kept_every_few_epochs(tmp_path):
    def epochs():
        return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())

    run(tmp_path / "run", epochs=3, keep_every=2, validate_every=3)
    assert epochs() == ["best.ckpt", "epoch2.ckpt", "last.ckpt"]
    run(tmp_path / "run", resume=True, epochs=5, keep_every=2, validate_every=5)
    assert epochs() == ["best.ckpt", "epoch2.ckpt", "epoch4.ckpt", "last.ckpt"]
    kept = tmp_path / "run" / "checkpoints" / "epoch4.ckpt"
    state = run(tmp_path / "other", epochs=4)["state_dict"]
    weights = training.load_checkpoint(kept)
    assert "optimizer_states" not in weights
    assert all(torch.equal(value, state[name]) for name, value in weights["state_dict"].items())
    model = tiny(tmp_path / "run").trained(kept)
    assert torch.equal(model.backbone[0].weight, state["model.backbone.0.weight"])


def test_the_log_holds_the_monitor_and_the_plot_marks_its_best_epoch(tmp_path):
    run(tmp_path, Scored, epochs=3, batch=20)
    with open(tmp_path / "logs" / "metrics.csv") as file:
        assert [float(row["valid/score"]) for row in csv.DictReader(file)] == pytest.approx(SCORES[:3])
    assert (tmp_path / "plots" / "losses.png").stat().st_size > 1000
    nan = float("nan")
    assert best_epoch({0: 1.0, 3: 2.0, 4: 2.0, 5: nan}, Monitor("score", "max")) == 3
    assert best_epoch({0: nan, 3: 2.0, 4: 1.0, 5: 1.0}, Monitor("score")) == 4


def test_a_direction_is_min_or_max():
    with pytest.raises(ValueError, match="Monitor: direction must be min or max, got 'up'"):
        Monitor("score", "up")
