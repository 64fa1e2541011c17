"""Trainings on a GPU: losses fall, a run that is stopped goes on, and its checkpoint serves on a CPU."""

from math import isfinite

import pytest
import torch

from probsym_fast import tasks
from probsym_fast.training import run as training
from probsym_fast.training.logs import history
from tests.helpers.tiny_vision import TINY

SMALL = {"training.accelerator": "gpu", "training.progress": "false", "training.epochs": 3}
SAMPLES = {"samples.train": 2, "samples.valid": 1, "samples.test": 1, "samples.trials": 1}
NBODY = SMALL | SAMPLES | {"count": 200, "training.batch": 50}
VIT = dict(setting.removeprefix("--").split("=", 1) for setting in TINY)  # in bfloat16 here, as published
VIT |= SMALL | SAMPLES | {"graphs.train": 32, "training.precision": "bf16-mixed", "training.lr": 1e-3}


class Stop(Exception):
    pass


CASES = {
    "nbody/gnn_O3_ps": NBODY,
    "nbody/transformer_S5xO3_ps": NBODY,
    "nbody/gnn_O3_canonical": NBODY | {"samples.train": 1},
    "exp_classify/mlp_ps": SMALL | SAMPLES | {"training.warmup": 1},
    "exp_classify/gin_ps": SMALL | SAMPLES,
    "pattern/pretrained_ps": VIT,
    "peptides_func/pretrained_ps": VIT | {"dataset": "random_peptides_func"},
    "pcqm_contact/pretrained_ps": VIT | {"dataset": "random_pcqm_contact"},
}


@pytest.mark.parametrize("name", CASES)
def test_fit(name, tmp_path, monkeypatch, gpu):
    pytest.importorskip("lightning")
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path / "cache"))

    settings = CASES[name] | {"folder": tmp_path / "run"}
    task = tasks.load(name, [f"--{key}={value}" for key, value in settings.items()])
    step = training.TrainingModule.training_step

    def stop_in_the_last_epoch(self, batch, index):
        if self.current_epoch == 2:
            raise Stop
        return step(self, batch, index)

    monkeypatch.setattr(training.TrainingModule, "training_step", stop_in_the_last_epoch)
    with pytest.raises(Stop):
        training.fit(task)
    assert torch.cuda.max_memory_allocated() > 0
    monkeypatch.setattr(training.TrainingModule, "training_step", step)
    results = training.fit(task, resume=True)
    assert all(isfinite(x) for x in results.values() if isinstance(x, float))
    losses = next(x for series, x in history(tmp_path / "run").items() if series.startswith("train/"))
    assert list(losses) == [0, 1, 2]
    assert losses[2] < losses[0] or not name.startswith("nbody"), "three epochs teach the others little"
    again = training.test(tasks.load(str(tmp_path / "run" / "config.yaml"), ["--training.accelerator=cpu"]))
    assert again.keys() == results.keys()
