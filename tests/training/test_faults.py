"""Runs that are killed, that cannot write, whose loss is no number, whose loader dies."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.data import get_worker_info

from probsym_fast import _files
from probsym_fast.training import faults
from probsym_fast.training import run as training
from probsym_fast.training.checkpoints import Checkpoints
from probsym_fast.training.logs import CsvLogger, history, read_rows
from tests.helpers.killed import Halved
from tests.helpers.tiny import Tiny, Vectors, run, tiny


class SignalInEpoch(Callback):
    """SIGTERM in the second step of an epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, module, batch, index):
        if (trainer.current_epoch, index) == (self.epoch, 1):
            os.kill(os.getpid(), signal.SIGTERM)


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights, moments of the optimiser, logs and figures, bit for bit."""
    for name in ("last", "best"):
        a, b = checkpoint(found, name), checkpoint(expected, name)
        assert a["state_dict"].keys() == b["state_dict"].keys()
        assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in b["state_dict"])
        torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
        assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
    for name in ("logs/metrics.csv", "results.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    assert not list(found.rglob(".*.tmp"))


def test_a_run_goes_on_from_an_epoch_without_validation_where_the_last_checkpoint_is_old(tmp_path, monkeypatch):
    settings = {"epochs": 6, "validate_every": 4, "dropout": 0.3, "noise": 0.5}
    with pytest.raises(training.Stopped):
        training.fit(tiny(tmp_path / "young", **settings), callbacks=[SignalInEpoch(2)])
    assert not (tmp_path / "young" / "checkpoints").exists(), "it is young"
    monkeypatch.setattr(Checkpoints, "SECONDS", 0.0)
    run(tmp_path / "whole", **settings)
    with pytest.raises(training.Stopped):
        training.fit(tiny(tmp_path / "run", **settings), callbacks=[SignalInEpoch(2)])
    assert checkpoint(tmp_path / "run")["epoch"] == 1 and not (tmp_path / "run/checkpoints/best.ckpt").exists()
    with pytest.raises(training.Stopped):
        training.fit(tiny(tmp_path / "run", **settings), resume=True, callbacks=[SignalInEpoch(5)])
    assert checkpoint(tmp_path / "run")["epoch"] == 4 and checkpoint(tmp_path / "run", "best")["epoch"] == 3
    run(tmp_path / "run", resume=True, **settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_the_run_that_was_not(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed", str(tmp_path), "1", "20"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    met = [line.split() for line in done.stdout.splitlines()]
    assert len(met) == 20
    for name in ("config.yaml", "last.ckpt", "best.ckpt", "metrics.csv", "results.json"):
        assert name in {wanted for wanted, *_ in met}
        assert name.split(".")[0] in {left for _, *lefts in met for left in lefts}, f"never killed within {name}"
    assert [wanted for wanted, *_ in met].count("-") >= 8  # anywhere
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rows = read_rows(tmp_path / "run" / "logs" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["step/mse"]] == list(range(90))
    assert [int(row["epoch"]) for row in rows if row["valid/mse"]] == list(range(30))
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: the later value of a step that two sessions wrote."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "tensorboard").glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0] if value.tensor.float_val else value.simple_value
                found.setdefault(value.tag, {})[event.step] = number
    return found


class Broken:
    """Every writing fails: halfway (a disk that is full), or when the file is opened."""

    def __init__(self, number: int, name: str):
        self.number, self.name, self.armed = number, name, False

    def open(self, path, mode, *rest):
        armed = self.armed and self.name in Path(path).name
        if armed and self.number != errno.ENOSPC:
            raise OSError(self.number, os.strerror(self.number), str(path))
        return Halved(open(path, mode, *rest), self if armed else Unbroken())

    def halfway(self, name: str) -> None:
        raise OSError(self.number, os.strerror(self.number))


class Unbroken:
    def halfway(self, name: str) -> None:
        pass


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_is_full_or_closed_is_told_and_the_last_checkpoint_is_whole(tmp_path, monkeypatch, name, number):
    broken = Broken(number, name)
    monkeypatch.setattr(_files, "open", broken.open, raising=False)

    class Filling(Tiny):
        def inputs(self, batch):
            broken.armed = broken.armed or batches(self) > 7  # in the second epoch
            return batch

    run(tmp_path / "whole")
    folder = tmp_path / "run"
    written = rf"{folder}/checkpoints/" + (name if number == errno.ENOSPC else rf"\.{name}\.\w+\.tmp")
    message = rf"fit: {written} must be writable, got \[Errno {number}\] .*; {folder}/checkpoints/last.ckpt is intact"
    with pytest.raises(training.Fault, match=rf"^{message} \(epoch 1\): continue with --resume$"):
        run(folder, Filling)
    assert checkpoint(folder)["epoch"] == 0
    assert not list(folder.rglob("*.tmp"))
    broken.armed = False
    run(folder, resume=True)
    assert_same_run(folder, tmp_path / "whole")


def batches(task: Tiny) -> int:
    """How often it was asked."""
    task.seen = getattr(task, "seen", 0) + 1
    return task.seen


def test_files_that_may_not_grow_are_told(tmp_path):
    """The system itself refuses the writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limited(Tiny):
        def inputs(self, batch):
            if batches(self) > 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            return batch

    run(tmp_path / "whole")
    folder = tmp_path / "run"
    try:
        with pytest.raises(training.Fault, match=rf"fit: {folder}/\S+ must be writable, got .*File too large"):
            run(folder, Limited)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint(folder)["epoch"] == 0
    run(folder, resume=True)
    assert_same_run(folder, tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_told_before_the_training(tmp_path, monkeypatch):
    broken = Broken(errno.EROFS, "config.yaml")
    broken.armed = True
    monkeypatch.setattr(_files, "open", broken.open, raising=False)
    folder = tmp_path / "run"
    with pytest.raises(
        training.Fault, match=rf"^fit: {folder}/\S+ must be writable, .*; there is no checkpoint in {folder} yet"
    ):
        run(folder)
    broken.armed = False
    run(folder)  # nothing stands in its way
    assert history(folder)["valid/mse"].keys() == {0, 1}


DISKS = "every disk in use (run folder, temporary files, shared memory) must be writable and have space"
PROCESSES = "another training process died (its own output may say why)"
TOLD = {
    "full elsewhere": (OSError(errno.ENOSPC, "full", "/dev/shm/x"), "/dev/shm/x must be writable"),
    "full elsewhere, bytes": (OSError(errno.EDQUOT, "full", b"/dev/shm/x"), "/dev/shm/x must be writable"),
    "closed elsewhere": (OSError(errno.EROFS, "closed", "/mnt/x"), "/mnt/x must be writable"),
    "full": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DISKS),
    "closed": (OSError(errno.EROFS, os.strerror(errno.EROFS)), DISKS),
    "full, a descriptor": (OSError(errno.ENOSPC, "full", 3), DISKS),
    "full, torch": (RuntimeError("shared memory for file </torch_7>: No space left on device (28)"), DISKS),
    "full, in a worker": (OSError("Caught OSError in ...: [Errno 28] No space left on device"), DISKS),
    "gloo": (RuntimeError("[/torch/gloo/gloo/transport/tcp/pair.cc:5] Connection closed by peer"), PROCESSES),
    "processes": (torch.distributed.DistNetworkError("gone"), PROCESSES),
}


@pytest.mark.parametrize("name", TOLD)
def test_faults_blame_what_the_error_names_alone(tmp_path, name):
    error, wanted = TOLD[name]
    with pytest.raises(faults.Fault) as found, faults.faults_reported(tmp_path):
        raise error
    link = ":" if wanted == PROCESSES else ", got"
    assert str(found.value) == f"fit: {wanted}{link} {error}; there is no checkpoint in {tmp_path} yet"
    assert found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EPERM, "refused"),
        OSError(errno.EACCES, "refused", "/elsewhere/data"),
        OSError(errno.EACCES, "refused", 3),
        FileNotFoundError(errno.ENOENT, "missing", "/elsewhere/data"),
        RuntimeError("shapes do not fit"),
        OSError("a file of /data/gloo/"),
    ],
    ids=repr,
)
def test_errors_that_are_no_faults_pass(tmp_path, error):
    with pytest.raises(type(error)) as found, faults.faults_reported(tmp_path):
        raise error
    assert found.value is error


def test_a_full_device_is_told(tmp_path):
    """The system's own error, in the midst of a training and not of the run's folder."""

    class Filling(Tiny):
        def inputs(self, batch):
            if batches(self) > 7:
                with open("/dev/full", "wb") as file:
                    file.write(b"0")
            return batch

    message = re.escape(
        f"fit: {DISKS}, got [Errno 28] No space left on device; {tmp_path}/run/checkpoints/last.ckpt is"
    )
    with pytest.raises(training.Fault, match=f"^{message} intact"):
        run(tmp_path / "run", Filling)


def test_rows_that_reach_no_disk_name_their_file(tmp_path):
    rows = CsvLogger(tmp_path)
    rows.log_metrics({"loss": 1.0}, 0)
    rows.save()
    rows._file.close()
    rows._file = open("/dev/full", "ab", buffering=0)
    rows.log_metrics({"loss": 2.0}, 1)
    with pytest.raises(faults.Fault) as found, faults.faults_reported(tmp_path):
        rows.save()
    assert str(found.value).startswith(
        f"fit: {tmp_path}/logs/metrics.csv must be writable, got [Errno 28] No space left"
    )
    rows._file.close()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, value, at_once):
    if not at_once:  # as on a GPU
        monkeypatch.setattr(faults.StopOnNonFinite, "_at_once", staticmethod(lambda trainer, loss: False))
    folder = tmp_path / "run"

    class Diverging(Tiny):
        def loss(self, prediction, target):
            loss = super().loss(prediction, target)
            return loss * float(value) if prediction.requires_grad and batches(self) == 5 else loss

    run(tmp_path / "whole")
    got = value if at_once else "nan or inf"
    message = rf"fit: loss must be finite, got {got} in step 5, epoch 2; .*; {folder}/checkpoints/last.ckpt is intact"
    with pytest.raises(training.Fault, match=rf"^{message} \(epoch 1\): continue with --resume$"):
        run(folder, Diverging)
    run(folder, resume=True)
    assert_same_run(folder, tmp_path / "whole")


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    folder = tmp_path / "run"

    class Diverging(Tiny):
        def loss(self, prediction, target):
            loss = super().loss(prediction, target)
            if prediction.requires_grad and batches(self) == 6:  # the epoch's last: value 0, gradient nan
                loss = loss + (0 * prediction).sum().sqrt()
            return loss

    with pytest.raises(
        training.Fault, match=r"fit: weights must be finite, got nan or inf in step 6, epoch 2; .* \(epoch 1\)"
    ):
        run(folder, Diverging)
    assert checkpoint(folder)["epoch"] == 0


def test_a_dead_worker_is_told(tmp_path):
    folder = tmp_path / "run"

    class Fragile(Vectors):
        def __getitem__(self, index):
            if get_worker_info() is not None and batches(self) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    class Dying(Tiny):
        def loader(self, split):
            loader = super().loader(split)
            if split == "train":
                loader.dataset.__class__ = Fragile
            return loader

    run(tmp_path / "whole", workers=1)
    with pytest.raises(training.Fault, match=r"fit: a data-loader worker died .*last.ckpt is intact \(epoch 1\)"):
        run(folder, Dying, workers=1)
    run(folder, resume=True, workers=1)
    assert_same_run(folder, tmp_path / "whole")


def test_a_run_whose_patience_ran_out_does_not_go_on(tmp_path):
    settings = {"epochs": 20, "patience": 2, "lr": 1e-30}
    run(tmp_path, **settings)
    rows = (tmp_path / "logs" / "metrics.csv").read_bytes()
    assert history(tmp_path)["valid/mse"].keys() == {0, 1, 2}
    (tmp_path / "results.json").unlink()  # as where it was killed before the test
    run(tmp_path, resume=True, **settings)
    assert (tmp_path / "logs" / "metrics.csv").read_bytes() == rows
    assert (tmp_path / "results.json").is_file()


def test_other_errors_stay_what_they_are(tmp_path):
    class Refused(Tiny):
        def inputs(self, batch):
            raise PermissionError(errno.EACCES, "refused", "/elsewhere/data")

    with pytest.raises(PermissionError, match=re.escape("/elsewhere/data")):
        run(tmp_path / "run", Refused)
    with pytest.raises(ValueError, match=r"training.batch must be"):
        training.fit(tiny(tmp_path / "other", devices=3))


def test_a_resumed_run_reads_its_checkpoint_once_and_runs_no_code(tmp_path, monkeypatch):
    """Lightning is given what was read; it would read the file again, with its code where torch's default is so."""
    folder, read = tmp_path / "run", []
    run(folder, epochs=1)
    load = torch.load

    def noted(path, *arguments, **settings):
        read.append((Path(path).name, settings.get("weights_only")))
        return load(path, *arguments, **settings)

    monkeypatch.setattr(torch, "load", noted)
    training.fit(tiny(folder), resume=True)
    assert read == [("last.ckpt", True), ("best.ckpt", True)]  # the second for the test


@pytest.mark.parametrize("name", ["loops", "callbacks", "optimizer_states", "lr_schedulers", "epoch", "global_step"])
def test_checkpoints_of_wrong_types_are_refused_before_anything_is_written(tmp_path, name):
    folder = tmp_path / "run"
    path = folder / "checkpoints" / "last.ckpt"
    state = run(folder, epochs=1)
    for value in ("text", -1):
        torch.save({**state, name: value}, path)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        with pytest.raises(ValueError, match=rf"^checkpoint: {path} must hold {name} of type \w+, got \S+$"):
            run(folder, resume=True)
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_torchs_advice_is_not_passed_on(tmp_path, capfd):
    folder = tmp_path / "run"
    state = run(folder, epochs=1)
    torch.save({**state, "other": Path("x")}, folder / "checkpoints" / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"last.ckpt must be an intact checkpoint, got UnpicklingError: the global path"
    ) as error:
        run(folder, resume=True)
    assert "weights_only" not in str(error.value) + capfd.readouterr().err and error.value.__suppress_context__
