"""A tiny run killed at seeded moments: `python -m tests.helpers.killed FOLDER SEED KILLS`.

A process forked for every session, as starting Python costs most. Beside the run (FOLDER/run) an uninterrupted one
(FOLDER/whole). Prints a line a kill: what was being written ("-": nothing), the temporary files left behind.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch

from probsym_fast import _files
from probsym_fast.training import logs
from tests.helpers.tiny import run

SETTINGS = {"epochs": 30, "dropout": 0.3, "noise": 0.5, "log_every": 1, "batch": 8}


class Death:
    """SIGKILL at Python's `calls`-th call or return, or halfway through the `nth` writing of a file of this name."""

    def __init__(self, calls: int = 0, name: str = "", nth: int = 1):
        self.calls, self.name, self.nth, self.seen = calls, name, nth, 0

    def __call__(self, frame, event, argument) -> None:
        self.seen += 1
        if self.seen == self.calls:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path, mode, *rest):
        return Halved(open(path, mode, *rest), self)

    def halfway(self, name: str) -> None:
        if self.name and self.name in name:
            self.nth -= 1
            if self.nth == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Halved:
    """A file that writes in two halves."""

    def __init__(self, file, death: Death):
        self.file, self.death = file, death

    def write(self, data) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.death.halfway(Path(self.file.name).name)
        self.file.write(data[half:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def session(folder: Path, death: Death, **settings) -> int | None:
    """A run, or its resumption, in a process of its own: the calls it took, None where it was killed."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        _files.open = logs.open = death.open
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        sys.setprofile(death)
        run(folder, resume=(folder / "config.yaml").exists(), **{**SETTINGS, **settings})
        sys.setprofile(None)
        os.write(write, str(death.seen).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        calls = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0 and calls, status
    return int(calls)


def main(folder: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    random_ = random.Random(seed)
    whole, start = session(folder / "whole", Death()), session(folder / "start", Death(), epochs=1)
    epoch = (whole - start) // 29
    moments = [Death(name="config.yaml"), Death(name="last.ckpt"), Death(name="config.yaml"), Death(name="best.ckpt")]
    for k in range(kills - 5):
        name, nth = random_.choice(["last.ckpt", "best.ckpt", "metrics.csv"]), random_.randint(1, 2)
        some_call = random_.randint(1, 4 * epoch)  # setting up takes as many as two epochs
        moments.append(Death(name=name, nth=nth) if k % 3 == 0 else Death(some_call))
    for death in [*moments, Death(name="results.json")]:
        assert session(folder / "run", death) is None
        left = [path.name.split(".")[1] for path in (folder / "run").rglob(".*.tmp")]
        print(death.name or "-", *left, flush=True)
    session(folder / "run", Death())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
