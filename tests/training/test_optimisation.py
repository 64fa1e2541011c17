"""Optimisers, learning rates, steps, accumulation and precision of the training."""

import re
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from probsym_fast.draws import seeded
from probsym_fast.training import optimisation
from probsym_fast.training import run as training
from probsym_fast.training.logs import history, read_rows
from probsym_fast.training.settings import Training
from probsym_fast.training.trainer import check_devices
from tests.helpers.tiny import Tiny, run, tiny


class Stop(Exception):
    pass


@pytest.fixture
def steps(monkeypatch):
    """What each batch of a run is trained with: learning rates by group, and the seed of the noise and of dropout."""
    seen = []
    step = training.TrainingModule.training_step

    def noted(self, batch, index):
        loss = step(self, batch, index)
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        seen.append({"rates": rates, "batch": batch[0], "dropout": torch.initial_seed(), "loss": loss.item()})
        return loss

    monkeypatch.setattr(training.TrainingModule, "training_step", noted)
    return seen


@pytest.mark.parametrize(
    ("step", "warmup", "decay", "total", "expected"),
    [
        (0, 0, "none", 10, 1.0),
        (9, 0, "none", 10, 1.0),
        (0, 4, "none", 10, 0.0),
        (1, 4, "none", 10, 0.25),
        (4, 4, "none", 10, 1.0),
        (10**9, 4, "none", 10, 1.0),
        (3, 40, "none", 10, 0.075),  # a run shorter than its warm-up
        (0, 0, "linear", 4, 1.0),
        (3, 0, "linear", 4, 0.25),  # the last step
        (4, 0, "linear", 4, 0.0),
        (0, 5, "linear", 25, 0.0),
        (4, 5, "linear", 25, 0.8),
        (5, 5, "linear", 25, 1.0),
        (15, 5, "linear", 25, 0.5),
        (24, 5, "linear", 25, 0.05),
        (25, 5, "linear", 25, 0.0),
        (26, 5, "linear", 25, 0.0),
        (0, 4, "linear", 5, 0.0),
        (4, 4, "linear", 5, 1.0),
    ],
)
def test_factor(step, warmup, decay, total, expected):
    assert optimisation.factor(step, warmup, decay, total) == pytest.approx(expected, abs=1e-15)


def test_factor_needs_steps_to_decay_in():
    with pytest.raises(ValueError, match=r"^factor: total must be more than the 5 warm-up steps, got 5$"):
        optimisation.factor(0, 5, "linear", 5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 5}, (0, 35)),
        ({"epochs": 5, "warmup": 2}, (14, 35)),
        ({"epochs": 5, "accumulate": 2}, (0, 20)),  # the last step of an epoch has one batch
        ({"epochs": 5, "accumulate": 2, "warmup": 3}, (12, 20)),
        ({"epochs": 5, "warmup_steps": 3}, (3, 35)),
        ({"epochs": 5, "steps": 9, "warmup_steps": 3, "accumulate": 7}, (3, 5)),
        ({"epochs": 500, "steps": 9, "warmup": 1}, (7, 9)),
    ],
)
def test_horizon(settings, expected):
    assert optimisation.horizon(training.Training(**settings), 7) == expected


def test_parameter_groups(tmp_path):
    task = tiny(tmp_path, noise=1.0, optimizer="adamw", lr=0.1, lr_pretrained=0.01, weight_decay=0.3, warmup_steps=4)
    module = training.TrainingModule(task)
    found = module.configure_optimizers()
    optimizer, rates = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert type(optimizer) is torch.optim.AdamW
    rest, backbone = optimizer.param_groups
    assert {id(p) for p in backbone["params"]} == {id(p) for p in module.model.backbone.parameters()}
    together = [id(p) for p in rest["params"] + backbone["params"]]
    assert len(together) == len(set(together)) and set(together) == {id(p) for p in module.model.parameters()}
    for group in (rest, backbone):
        assert group["weight_decay"] == 0.3 and group["fused"]
    optimizer.step()
    rates.step()
    assert (rest["lr"], backbone["lr"]) == (pytest.approx(0.025), pytest.approx(0.0025))
    plain = training.TrainingModule(tiny(tmp_path)).configure_optimizers()
    assert type(plain) is torch.optim.Adam and len(plain.param_groups) == 1


def test_weight_decay_of_adamw_is_decoupled(tmp_path):
    optimizer = training.TrainingModule(
        tiny(tmp_path, optimizer="adamw", lr=0.1, weight_decay=0.5)
    ).configure_optimizers()
    parameter = optimizer.param_groups[0]["params"][1]
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameter, before * (1 - 0.1 * 0.5))


def test_learning_rates_of_a_run(tmp_path, steps):
    state = run(tmp_path, epochs=100, steps=7, lr=0.1, lr_pretrained=0.01, warmup_steps=2, decay="linear")
    expected = [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2]
    assert [s["rates"] for s in steps] == [pytest.approx([0.1 * f, 0.01 * f], abs=1e-12) for f in expected]
    assert all(group["lr"] == 0 for group in state["optimizer_states"][0]["param_groups"])


@pytest.mark.parametrize("validate_every", [1, 2, 50])
def test_a_run_ends_with_its_last_step_validated_and_kept(tmp_path, steps, capsys, validate_every):
    state = run(tmp_path, epochs=100, steps=7, validate_every=validate_every, patience=50, progress=True)
    assert len(steps) == state["global_step"] == 7
    valid = history(tmp_path)["valid/mse"]
    assert sorted(valid) == {1: [0, 1, 2], 2: [1, 2], 50: [2]}[validate_every]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == min(valid, key=valid.get)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert len(lines) == len(valid)
    assert re.fullmatch(r"step 7/7  train/mse [\d.]+  valid/mse [\d.]+", lines[-1])
    training.fit(tiny(tmp_path, epochs=100, steps=7, validate_every=validate_every, patience=50), resume=True)
    assert len(steps) == 7  # nothing is left to do


def test_epochs_limit_the_steps(tmp_path, steps):
    assert run(tmp_path, epochs=2, steps=100)["global_step"] == len(steps) == 6
    assert sorted(history(tmp_path)["valid/mse"]) == [0, 1]


def test_patience_ends_before_the_steps(tmp_path):
    assert run(tmp_path, epochs=100, steps=90, patience=2, lr=1e-30)["global_step"] == 9


RESUMED = {
    "dropout": {"dropout": 0.5, "noise": 1.0},
    "groups and decay": {
        "steps": 10, "epochs": 9, "lr_pretrained": 1e-2, "optimizer": "adamw", "warmup_steps": 3, "decay": "linear",
    },
    "accumulated": {"accumulate": 2, "noise": 1.0, "dropout": 0.5, "steps": 7, "epochs": 9},
    "bfloat16": {"precision": "bf16-mixed", "epochs": 4, "noise": 1.0},
    "workers": {"workers": 1, "epochs": 4, "dropout": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_gives_the_same_numbers_bit_for_bit(tmp_path, monkeypatch, name):
    settings = {"epochs": 4, "batch": 6, "lr": 0.03, **RESUMED[name]}
    whole = run(tmp_path / "whole", **settings)
    step = training.TrainingModule.training_step

    def stop_in_epoch_three(self, batch, index):
        if self.current_epoch == 2 and index == 1:
            raise Stop
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingModule, "training_step", stop_in_epoch_three)
        with pytest.raises(Stop):
            run(tmp_path / "broken", **settings)
    torch.manual_seed(999)  # whatever happened in between
    resumed = run(tmp_path / "broken", resume=True, **settings)
    assert resumed["global_step"] == whole["global_step"]
    for kind in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(resumed[kind], whole[kind], rtol=0, atol=0)
    assert history(tmp_path / "broken") == history(tmp_path / "whole")


def test_workers_load_the_same_batches(tmp_path, steps):
    a = run(tmp_path / "a", dropout=0.5, noise=1.0)
    seen = [s["batch"].x for s in steps]
    steps.clear()
    b = run(tmp_path / "b", dropout=0.5, noise=1.0, workers=2)
    assert len(seen) == len(steps) and all(torch.equal(x, s["batch"].x) for x, s in zip(seen, steps, strict=True))
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    loader = tiny(tmp_path, workers=2).loader("train")
    assert loader.num_workers == 2 and loader.persistent_workers and tiny(tmp_path).loader("train").num_workers == 0


def test_accumulated_batches_are_one_step(tmp_path, steps):
    """Without noise two batches of 6 are a batch of 12."""
    whole = run(tmp_path / "whole", batch=12, lr=0.1)
    parts = run(tmp_path / "parts", batch=6, lr=0.1, accumulate=2)
    assert whole["global_step"] == parts["global_step"] == 4
    assert len(steps) == 4 + 8
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"])


def test_noise_differs_between_all_batches(tmp_path, steps, monkeypatch):
    seeds = []

    def noted(seed, purpose, step):
        seeds.append((purpose, step))
        return seeded(seed, purpose, step)

    monkeypatch.setattr("probsym_fast.training.module.seeded", noted)
    state = run(tmp_path, batch=5, accumulate=3, noise=1.0)  # an epoch: a step of three batches, and one of one
    assert state["global_step"] == 4
    drawn = [step for purpose, step in seeds if purpose == "train"]
    assert drawn == [0, 1, 2, 3, 6, 7, 8, 9]
    assert drawn == [step for purpose, step in seeds if purpose == "dropout"]
    assert len({s["dropout"] for s in steps}) == 8
    seeds.clear()
    run(tmp_path / "plain", noise=1.0)
    assert [step for purpose, step in seeds if purpose == "train"] == list(range(6))  # the steps' numbers


def test_validation_is_in_float32(tmp_path):
    dtypes = {True: set(), False: set()}

    class Noted(Tiny):
        def loss(self, prediction, target):
            dtypes[prediction.requires_grad].add((prediction.dtype, torch.is_autocast_enabled("cpu")))
            return super().loss(prediction, target)

    state = run(tmp_path, Noted, precision="bf16-mixed", epochs=1, validate_every=1)
    assert dtypes == {True: {(torch.bfloat16, True)}, False: {(torch.float32, False)}}
    task = tiny(tmp_path)
    model = training.TrainingModule(task)
    model.load_state_dict(state["state_dict"])
    loss = [task.loss(model.eval()(x, 1)[0], y).item() * len(y) for x, y in task.loader("valid")]
    assert history(tmp_path)["valid/mse"][0] == pytest.approx(sum(loss) / 20, rel=1e-6)


@pytest.fixture
def float16(monkeypatch):
    """Runs train in float16 on the CPU too: torch has a scaler there, which Lightning does not take but is given."""
    make = L.Trainer

    def trainer_of(precision, plugins, **rest):
        if precision != "16-mixed":
            return make(precision=precision, plugins=plugins, **rest)
        mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        return make(plugins=[*plugins, mixed], **rest)

    monkeypatch.setattr(L, "Trainer", trainer_of)
    monkeypatch.setattr(training, "check_devices", lambda settings: None)


def test_gradients_in_float16_are_unscaled_before_they_are_clipped(tmp_path, float16):
    norms = {}
    for precision in ("32-true", "16-mixed"):
        state = run(tmp_path / precision, precision=precision, clip=1e-3, epochs=1)
        norms[precision] = history(tmp_path / precision)["train/gradient_norm"][0]
    assert state["MixedPrecision"]["scale"] == 1024.0
    assert norms["16-mixed"] == pytest.approx(norms["32-true"], rel=0.02)


def test_a_step_in_float16_is_that_in_float32_but_for_rounding(tmp_path, float16):
    """Three steps of Adam, each of about the learning rate; without clipping the fused optimiser unscales."""
    settings = {"epochs": 1, "lr": 0.01}
    half, single = (run(tmp_path / p, precision=p, **settings)["state_dict"] for p in ("16-mixed", "32-true"))
    torch.testing.assert_close(half, single, rtol=0, atol=1e-3)


def test_compiled_backbone(tmp_path, monkeypatch):
    """The compiled forward is the one that is called, and the weights keep their names."""
    calls = []

    def compiled(function, **_):
        return lambda *arguments: calls.append(1) or function(*arguments)

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", compiled)
    state = run(tmp_path / "compiled", compile=True)
    assert len(calls) == 2 * (3 + 3)  # training and validation; the test takes a model of its own
    torch.testing.assert_close(state["state_dict"], plain["state_dict"], rtol=0, atol=0)


def test_steps_are_logged_beside_the_epochs_where_asked(tmp_path, steps):
    settings = {"epochs": 2, "lr": 0.1, "warmup_steps": 5}
    run(tmp_path / "plain", **settings)
    run(tmp_path / "logged", log_every=2, **settings)
    assert not any("step/mse" in row for row in rows(tmp_path / "plain"))
    logged = [row for row in rows(tmp_path / "logged") if row["step/mse"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5]  # every second step, from 0
    for row in logged:
        step = steps[6 + int(row["step"])]
        assert float(row["step/lr"]) == pytest.approx(step["rates"][0])
        assert float(row["step/mse"]) == pytest.approx(step["loss"])
    assert history(tmp_path / "logged") == history(tmp_path / "plain")


def rows(folder):
    return read_rows(folder / "logs" / "metrics.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 2, "warmup_steps": 3},
         "one of training.warmup (epochs) and training.warmup_steps must be 0, got 2 and 3"),
        ({"steps": 5, "warmup_steps": 5, "decay": "linear"},
         "training.warmup_steps must be shorter than the run (5 steps) when decay is linear, got 5 steps"),
        ({"epochs": 2, "warmup": 2, "decay": "linear"},
         "training.warmup must be shorter than the run (6 steps) when decay is linear, got 6 steps"),
        ({"precision": "16-mixed"}, "training.precision must be 32-true or bf16-mixed on the CPU, got '16-mixed'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'config: {message}')}$"):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "built", "fast"),
    [("32-true", True, False), ("bf16-mixed", True, True), ("bf16-mixed", True, False), ("bf16-mixed", False, True)],
)
def test_bfloat16_on_a_cpu_without_its_products_warns(monkeypatch, precision, built, fast):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_devices(Training(precision=precision, accelerator="cpu"))
    expected = ["set training.precision to 32-true."] if precision == "bf16-mixed" and not (built and fast) else []
    assert [str(one.message).split("; ")[1] for one in caught] == expected


SCHEDULED = {"epochs": 3, "decay": "linear", "lr": 0.03}


@pytest.mark.parametrize(
    ("before", "change", "message"),
    [
        (SCHEDULED, {"epochs": 4}, "training.epochs must be 3 as in .*, got 4"),
        (SCHEDULED, {"decay": "none"}, "training.decay must be 'linear' as in .*, got 'none'"),
        ({"steps": 4}, {"steps": 5}, "training.steps must be 4 as in .*, got 5"),
        ({"steps": 4}, {"warmup_steps": 1}, "training.warmup_steps must be 0 as in .*, got 1"),
        ({}, {"optimizer": "adamw"}, "training.optimizer must be 'adam' as in .*, got 'adamw'"),
        ({}, {"lr_pretrained": 1e-5}, "training.lr_pretrained must be None as in .*, got 1e-05"),
        ({}, {"accumulate": 2}, "training.accumulate must be 1 as in .*, got 2"),
    ],
)
def test_a_resumed_run_keeps_its_schedule(tmp_path, before, change, message):
    run(tmp_path, **before)
    with pytest.raises(ValueError, match=f"^resume: {message}$"):
        run(tmp_path, resume=True, **{**before, **change})


def test_a_resumed_run_may_load_and_log_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run(tmp_path, epochs=1)
    assert run(tmp_path, resume=True, epochs=2, workers=1, log_every=1, compile=True)["global_step"] == 6


def test_a_run_recorded_without_later_keys_is_resumed(tmp_path):
    """Runs of before these settings: what their configuration does not say has the default."""
    run(tmp_path, epochs=1)
    path = tmp_path / "config.yaml"
    later = (
        "steps",
        "accumulate",
        "optimizer",
        "lr_pretrained",
        "warmup_steps",
        "decay",
        "compile",
        "workers",
        "log_every",
    )
    kept = [line for line in path.read_text().splitlines() if line.strip().split(":")[0] not in later]
    path.write_text("\n".join(kept) + "\n")
    assert "warmup_steps" not in path.read_text()
    assert run(tmp_path, resume=True, epochs=2)["global_step"] == 6
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(ValueError, match=r"resume: training.decay must be 'none' as in .*, got 'linear'"):
        run(tmp_path, resume=True, epochs=2, decay="linear")
