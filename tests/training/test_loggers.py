"""Loggers and callbacks of one's own, by path and as objects."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger

from probsym_fast import cli, tasks
from probsym_fast.tasks import configuration
from probsym_fast.training import run as training
from probsym_fast.training.logs import history
from tests.helpers.tiny import run, tiny

MADE = []  # loggers and callbacks of the test
HERE = __name__


@pytest.fixture(autouse=True)
def none_made():
    MADE.clear()


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self, save_dir: str = "", tag: str = "rows"):
        super().__init__()
        self.folder, self.name_, self.rows, self.keys, self.ended = save_dir, tag, [], {}, None
        MADE.append(self)

    name = property(lambda self: self.name_)
    version = 0

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, params, *_, **__):
        self.keys = params

    def finalize(self, status):
        self.ended = status


class Epochs(Callback):
    """Counts epochs, also over a resumed run."""

    def __init__(self, first: int = 0):
        self.count = first
        MADE.append(self)

    def on_train_epoch_end(self, trainer, module):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Refusing(Callback):
    def __init__(self):
        raise RuntimeError("no licence")


ROWS = {"class_path": f"{HERE}.Rows", "init_args": {"tag": "mine"}}


def assert_whole(logger: Rows, folder: Path) -> None:
    """Every epoch's means, the configuration, and the end."""
    found = {
        name: {row["epoch"]: row[name] for row in logger.rows if name in row} for name in ("train/mse", "valid/mse")
    }
    assert found == {name: values for name, values in history(folder).items() if name in found}
    assert [row["step"] for row in logger.rows] == [2, 5]
    assert logger.keys["training"]["epochs"] == 2 and logger.ended == "success"


def test_a_logger_by_its_path(tmp_path):
    run(tmp_path, logger=["csv", ROWS, f"{HERE}.Rows"])
    (mine, plain) = MADE
    assert (mine.name, plain.name, mine.folder) == ("mine", "rows", str(tmp_path))
    for logger in MADE:
        assert_whole(logger, tmp_path)
    assert (tmp_path / "logs" / "metrics.csv").is_file() and not (tmp_path / "tensorboard").exists()


def test_objects_come_beside_those_of_the_configuration(tmp_path):
    callbacks = [f"{HERE}.Epochs", {"class_path": f"{HERE}.Epochs", "init_args": {"first": 5}}]
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # of Lightning
        training.fit(tiny(tmp_path / "two", callbacks=callbacks))
    assert not (tmp_path / "two").exists()
    logger, counted = Rows(tag="object"), []

    class Noted(Callback):
        def on_train_epoch_end(self, trainer, module):
            counted.append(trainer.current_epoch)

    training.fit(tiny(tmp_path / "run", callbacks=callbacks[1:]), loggers=[logger], callbacks=[Noted()])
    assert_whole(logger, tmp_path / "run")
    assert counted == [0, 1] and MADE[-1].count == 7
    assert list((tmp_path / "run" / "tensorboard").glob("*tfevents*"))


def test_they_change_no_number_and_may_change_where_a_run_is_resumed(tmp_path):
    plain = run(tmp_path / "plain")
    run(tmp_path / "run", epochs=1, logger=[], callbacks=[f"{HERE}.Epochs"])
    assert not (tmp_path / "run" / "logs").exists() and not (tmp_path / "run" / "tensorboard").exists()
    state = run(tmp_path / "run", resume=True, logger=["csv", ROWS], callbacks=[f"{HERE}.Epochs"])
    assert MADE[-1].count == 2 and [row["step"] for row in MADE[-2].rows] == [5]
    for name, weight in plain["state_dict"].items():
        assert torch.equal(state["state_dict"][name], weight)


def test_a_progress_bar_takes_the_place_of_ours(tmp_path, capsys):
    class Bar(ProgressBar):
        def on_train_epoch_end(self, trainer, module):
            print("mine")

    training.fit(tiny(tmp_path, progress=True), callbacks=[Bar()])
    out, err = capsys.readouterr()
    assert out.count("mine") == 2 and "epoch 1/2" not in err


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("logger", "wandb", "a list of csv, tensorboard, dotted paths of classes, or mappings of class_path and init_args,"
         " got ['wandb']"),
        ("callbacks", "csv", "a list of dotted paths of classes, or mappings of class_path and init_args, got ['csv']"),
        ("callbacks", "a..b", "a list of dotted paths"),
        ("logger", {"class_path": "a.B", "arguments": {}}, "a list of csv, tensorboard, dotted paths"),
        ("logger", {"init_args": {}}, "a list of csv, tensorboard, dotted paths"),
        ("callbacks", {"class_path": "a.B", "init_args": [1]}, "a list of dotted paths"),
    ],
)  # fmt: skip
def test_names_that_can_be_no_class_are_refused_where_they_are_read(key, entry, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'config: training.{key} must be {message}')}"):
        tasks.load("nbody/demo", [f"--training.{key}={[entry]}"])


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("logger", "nowhere.Logger", "must name classes that can be imported, got nowhere.Logger: No module named"),
        ("callbacks", f"{HERE}.None_", f"must name classes that can be imported, got {HERE}.None_: module"),
        ("logger", f"{HERE}.Epochs", f"must name subclasses of lightning.pytorch.loggers.logger.Logger, got {HERE}.Ep"),
        ("callbacks", f"{HERE}.run", "must name subclasses of lightning.pytorch.callbacks.callback.Callback, got"),
        ("logger", {"class_path": f"{HERE}.Rows", "init_args": {"name": 1}},
         f"must hold classes that can be made, got {HERE}.Rows with {{'name': 1}}: TypeError: "),
        ("callbacks", f"{HERE}.Refusing", "must hold classes that can be made, got "
         f"{HERE}.Refusing with {{}}: RuntimeError: no licence"),
    ],
)  # fmt: skip
def test_classes_that_cannot_be_made_are_refused_before_anything_is_written(tmp_path, key, entry, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'config: training.{key} {message}')}"):
        run(tmp_path / "run", **{key: [entry]})
    assert not (tmp_path / "run").exists()


def test_objects_of_other_kinds_are_refused(tmp_path):
    for name, given in (("loggers", ["csv"]), ("callbacks", Epochs()), ("loggers", [Epochs()])):
        with pytest.raises(TypeError, match=rf"^fit: {name} must be a list of lightning\.pytorch\..*, got "):
            training.fit(tiny(tmp_path / "run"), **{name: given})
    assert not (tmp_path / "run").exists()


def test_the_command_line_adds_to_a_list_or_replaces_it(tmp_path, capsys):
    def logger(*flags):
        return tasks.load(str(path), list(flags)).config.training.logger

    path = tmp_path / "own.yaml"
    path.write_text(f"extends: nbody/demo\ntraining: {{logger: [csv, {{class_path: {HERE}.Rows}}]}}\n")
    mine = {"class_path": f"{HERE}.Rows"}
    assert logger() == ["csv", mine]
    assert logger("--training.logger", "[tensorboard]") == ["tensorboard"]
    assert logger("--training.logger+", "a.B", f"--training.logger+={ROWS}") == ["csv", mine, "a.B", ROWS]
    (tmp_path / "again.yaml").write_text(configuration.dump(tasks.load(str(path)).config))
    assert tasks.load(str(tmp_path / "again.yaml")).config == tasks.load(str(path)).config
    assert cli.main(["fit", "-c", str(path), "--training.logger+=nope.B", f"--folder={tmp_path / 'run'}"]) == 1
    assert "probsym: error: config: training.logger must name classes that can be imported" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
