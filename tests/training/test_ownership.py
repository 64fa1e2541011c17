"""One process a run folder: second starts, killed owners, races."""

import os
import signal
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from probsym_fast import cli
from probsym_fast.training import run as training
from probsym_fast.training.ownership import LOCK, InUse, owned
from tests.helpers.tiny import Tiny, run, tiny


def forked(work) -> int:
    """A process that does the work; its status is 0 where that raises nothing."""
    if not (pid := os.fork()):
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


@contextmanager
def another(work):
    """A process of its own in the midst of `work(ready)`, which calls ready() and never ends; its id."""
    read, write = os.pipe()

    def ready():
        os.write(write, b"1")
        time.sleep(100)

    pid = forked(lambda: work(ready))
    os.close(write)
    try:
        assert os.read(read, 1) == b"1"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", ["fit", "resume"])
def test_a_second_start_is_refused_and_changes_nothing(tmp_path, first):
    folder = tmp_path / "run"
    if first == "resume":
        run(folder, epochs=1)

    def train(ready):
        class Waiting(Tiny):  # as while a data set is loaded
            def model(self, fresh=True):
                ready()

        training.fit(tiny(folder, Waiting), resume=first == "resume")

    with another(train) as pid:
        before = content(folder)
        for second in (run, lambda folder: run(folder, resume=True), lambda folder: training.test(tiny(folder))):
            with pytest.raises(
                InUse, match=rf"^run folder: {folder} must be used by one .* while process {pid} is running"
            ):
                second(folder)
        assert content(folder) == before
    assert (folder / LOCK).is_file()  # left over, and locks nothing
    run(folder, resume=first == "resume")
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "-c", "nbody/gnn_O3_ps", "--folder"],
        ["test", "-c", "automorphism/ps", "--folder"],
        ["profile", "-c", "exp_classify/gin_ps", "--output"],
    ],
    ids=lambda arguments: arguments[2],
)
def test_commands_are_refused_with_one_line(tmp_path, capsys, arguments):
    def own(ready):
        with owned(tmp_path):
            ready()

    with another(own) as pid:
        assert cli.main([*arguments, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"probsym: error: run folder: {tmp_path} must be used") and f"process {pid}" in error
    assert error.count("\n") == 1


def test_folders_that_stay_empty_are_removed(tmp_path):
    with owned(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).is_file()
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    with owned(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()  # not made here


def test_further_processes_of_a_training_do_not_lock(tmp_path, monkeypatch):
    with owned(tmp_path):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with owned(tmp_path):
            assert (tmp_path / LOCK).is_file()
        assert (tmp_path / LOCK).is_file()
        monkeypatch.setattr(rank_zero_only, "rank", 0)


def test_a_fork_does_not_end_the_ownership(tmp_path):
    ids = []
    try:
        with owned(tmp_path):
            ids.append(os.fork())
            if not ids[0]:
                raise SystemExit  # out of the same `with`
            os.waitpid(ids[0], 0)
            with pytest.raises(InUse), owned(tmp_path):
                pass
    finally:
        if ids == [0]:
            os._exit(0)


def test_of_many_processes_one_owns_the_folder(tmp_path, monkeypatch):
    """Owners come and go, and remove the folder with the lock file each time."""
    folder, inside = tmp_path / "a" / "run", tmp_path / "inside"
    unlink = Path.unlink

    def slow(path, *arguments, **settings):
        time.sleep(0.01)  # long enough for another one to come
        unlink(path, *arguments, **settings)

    monkeypatch.setattr(Path, "unlink", slow)

    def work():
        done, until = 0, time.time() + 120
        while done < 10:
            assert time.time() < until
            try:
                with owned(folder):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where it is there
                    time.sleep(0.01)
                    os.unlink(inside)
                    done += 1
            except InUse:
                pass

    ids = [forked(work) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in ids] == [0] * 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def acquire(self, timeout):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert cli.main(["fit", "-c", "nbody/gnn_O3_ps", "--folder", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == f"probsym: error: {tmp_path}/run/{LOCK}: No locks available\n"
    assert not list(tmp_path.iterdir())
