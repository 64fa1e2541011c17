"""Measures of the whole validation set: of all batches at once, from all processes, from targets of any structure."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from probsym_fast.training import run as training
from probsym_fast.training.logs import history
from tests.helpers.tiny import Tiny, run, tiny

SCRIPT = """
import sys
from pathlib import Path
from probsym_fast.training import run as training
from tests.training.test_whole_set import Whole
from tests.helpers.tiny import tiny

training.fit(tiny(Path(sys.argv[1]), Whole, devices=int(sys.argv[2]), epochs=1, batch=6))
"""


class Whole(Tiny):
    """Measures that are no mean over batches."""

    whole_set_measures = True

    def measures(self, prediction, target):
        assert not prediction.requires_grad and prediction.dtype == torch.float32
        return {"median": (prediction - target).median(), "largest": prediction.max(), "count": len(target)}


class Labels(NamedTuple):
    y: torch.Tensor
    numbers: list[torch.Tensor]


class Structured(Whole):
    """Targets that are no tensor."""

    def inputs(self, batch: Any) -> tuple[Any, Any]:
        x, y = batch
        return x, Labels(y, [torch.arange(len(y))])

    def loss(self, prediction, target):
        return super().loss(prediction, target.y if isinstance(target, Labels) else target)

    def join(self, predictions, targets):
        assert all(isinstance(target, Labels) for target in targets)
        numbers = [n for target in targets for n in target.numbers]
        return torch.cat(predictions), Labels(torch.cat([target.y for target in targets]), numbers)

    def measures(self, prediction, target):
        return super().measures(prediction, target.y) | {"batches": len(target.numbers)}


class Parts(Whole):
    """Predictions and targets that are dicts, joined without a method of its own."""

    def model(self, fresh=True):
        model = super().model(fresh)
        model.readout.register_forward_hook(lambda *x: {"y": x[-1], "parts": (-x[-1], x[-1].double())})
        return model

    def inputs(self, batch: Any) -> tuple[Any, Any]:
        x, y = batch
        return x, {"y": y}

    def loss(self, prediction, target):
        return super().loss(prediction["y"], target["y"] if isinstance(target, dict) else target)

    def total(self, loss, penalties):
        assert penalties == {}
        return 0 * loss  # nothing is trained

    def measures(self, prediction, target):
        least, wide = prediction["parts"]
        assert not wide.requires_grad and wide.dtype == torch.float64 and len(wide) == len(target["y"]) == 20
        return super().measures(prediction["y"], target["y"]) | {"least": least.min()}


@torch.no_grad()
def expected(folder: Path) -> tuple[float, dict[str, float]]:
    """(the batches' losses, each by its size; the measures), of the weights that were kept."""
    task = tiny(folder, Whole, batch=6)
    model = training.best_model(task)
    x, y = task.loader("valid").dataset[torch.arange(20)]
    prediction = model(x, 1)[0]
    return task.loss(prediction, y).item(), {name: float(v) for name, v in task.measures(prediction, y).items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_measures_of_the_whole_set(tmp_path, precision):
    run(tmp_path, Whole, epochs=1, batch=6, precision=precision)  # validation: 6 + 6 + 6 + 2
    loss, measures = expected(tmp_path)
    found = history(tmp_path)
    assert found["valid/mse"][0] == pytest.approx(loss, rel=1e-5)
    for name, value in measures.items():
        assert found[f"valid/{name}"][0] == pytest.approx(value, rel=1e-5), name
        assert f"train/{name}" not in found


def test_nothing_is_kept_from_one_validation_to_the_next(tmp_path):
    run(tmp_path, Whole, epochs=3, batch=6)
    assert history(tmp_path)["valid/count"] == {0: 20, 1: 20, 2: 20}


def test_measures_of_batches_are_averaged_otherwise(tmp_path):
    class Averaged(Whole):
        whole_set_measures = False

        def measures(self, prediction, target):
            return {"count": torch.tensor(float(len(target)))}

    run(tmp_path, Averaged, epochs=1, batch=6)
    found = history(tmp_path)
    assert found["valid/count"][0] == pytest.approx((3 * 6 * 6 + 2 * 2) / 20)
    assert found["train/count"][0] == 6


def test_targets_of_any_structure(tmp_path):
    run(tmp_path, Structured, epochs=1, batch=6)
    loss, measures = expected(tmp_path)
    found = history(tmp_path)
    for name, value in measures.items():
        assert found[f"valid/{name}"][0] == pytest.approx(value, rel=1e-5), name
    assert found["valid/batches"][0] == 4
    task = tiny(tmp_path, Structured, batch=6)
    model = training.best_model(task)
    with torch.no_grad():  # batches count alike where the target has no length
        losses = [task.loss(model(x, 1)[0], y).item() for x, y in task.loader("valid")]
    assert found["valid/mse"][0] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert found["valid/mse"][0] != pytest.approx(loss, rel=1e-4)


def test_predictions_of_any_structure(tmp_path):
    run(tmp_path, Parts, epochs=1, batch=6, clip=1.0)
    _, measures = expected(tmp_path)
    found = history(tmp_path)
    for name, value in measures.items():
        assert found[f"valid/{name}"][0] == pytest.approx(value, rel=1e-5), name
    assert found["valid/least"][0] == -found["valid/largest"][0]
    assert found["train/gradient_norm"][0] == 0


@pytest.mark.slow
def test_measures_of_the_whole_set_over_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), "2"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    _, measures = expected(tmp_path / "run")
    found = history(tmp_path / "run")
    for name, value in measures.items():
        assert found[f"valid/{name}"][0] == pytest.approx(value, rel=1e-5), name
