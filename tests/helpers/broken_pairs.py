"""Runs of two processes that are killed, or run out of memory: `python -m tests.helpers.broken_pairs FOLDER SEED`.

Writes FOLDER/outcomes.json: for every session [wait status, what was told] of either process.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.core.hooks import ModelHooks

from probsym_fast import _files
from probsym_fast.models.chunks import Fit
from probsym_fast.tasks.nbody import Samples
from probsym_fast.training import logs
from probsym_fast.training import run as training
from tests.helpers import spread
from tests.helpers.killed import Death
from tests.helpers.pairs import pair
from tests.helpers.tiny import Tiny

S = 5
SETTINGS = {"epochs": 3, "dropout": 0.3, "noise": 0.5, "log_every": 1}


class InTraining(Death):
    """SIGKILL at Python's `calls`-th call or return within the training, where both processes work together."""

    here = False

    def __call__(self, frame, event, argument) -> None:
        if frame.f_code is ModelHooks.on_train_start.__code__:
            self.here = True
        elif frame.f_code is ModelHooks.on_train_end.__code__:
            self.here = False
        if self.here:
            super().__call__(frame, event, argument)


class Chunked(Tiny):
    """5 noisy copies. chunk: of each process. fails: process 1 lacks memory once, in the "forward" or the "backward" pass."""

    chunk: int | str | tuple[int, int] | None = None
    fails: str | None = None
    rank = 0

    def model(self, fresh: bool = True):
        model = super().model(fresh)
        if self.chunk is not None:
            model.chunks.size = "auto" if isinstance(self.chunk, tuple) else self.chunk
        if isinstance(self.chunk, tuple):  # as if measured
            model.chunks._fit = {grad: Fit(S, 10**6, self.chunk[self.rank]) for grad in (True, False)}
        if self.fails and self.rank == 1:
            model.backbone.register_forward_pre_hook(self.fail)
        return model

    def fail(self, module, inputs) -> None:
        in_backward = torch._C._current_graph_task_id() >= 0
        if self.fails and torch.is_grad_enabled() and in_backward == (self.fails == "backward"):
            self.fails = None
            raise torch.OutOfMemoryError("in process 1")


def fitted(folder: Path, rank: int, name: str, chunk=None, fails=None, samples: int = S, **settings) -> None:
    """A run of these processes, or its resumption."""
    task = Chunked(spread.task(folder, name, 2, **{**SETTINGS, **settings}).config)
    task.config = replace(task.config, samples=Samples(samples, samples, samples, 1))
    task.chunk, task.fails, task.rank = chunk, fails, rank
    training.fit(task, resume=(folder / "config.yaml").exists())


def session(folder: Path, name: str, deaths: dict[int, Death], *, together: bool = False):
    """The processes' outcomes; either is killed as its death says."""

    def work(rank: int) -> None:
        if (death := deaths.get(rank)) is not None:
            _files.open = logs.open = death.open
            sys.setprofile(death)
        fitted(folder, rank, name)
        sys.setprofile(None)
        if death is not None:
            print("calls", death.seen)

    return pair(work, folder.parent / "told", together=together)


def calls(outcome: tuple[int, str]) -> int:
    return int(outcome[1].split()[-1])


def kills(folder: Path, name: str, moments: Callable[[int], list]) -> dict[str, list]:
    """A run killed at moments(calls within its training) beside one that was not."""
    found = {"whole": session(folder / f"{name}_whole", name, {0: InTraining(), 1: InTraining()})}
    for k, (deaths, together) in enumerate(moments(min(calls(one) for one in found["whole"]))):
        found[f"kill {k}"] = session(folder / name, name, deaths, together=together)
    return {**found, "last": session(folder / name, name, {})}


def errors(folder: Path) -> dict[str, list]:
    """Processes that run out of memory, or whose chunks differ."""

    def of(run: str, name: str, **settings):
        settings = {"dropout": 0, **settings}
        return pair(lambda rank: fitted(folder / run, rank, name, **settings), folder / "told")

    found = {
        "backward": of("backward", "ddp", chunk=(2, 2), fails="backward"),
        "backward resumed": of("backward", "ddp", chunk=1),
        "refused": of("refused", "fsdp", chunk="auto"),
    }
    for name in ("ddp", "samples"):
        found[f"{name} all at once"] = of(f"{name}_all", name)
        found[f"{name} uneven"] = of(f"{name}_uneven", name, chunk=(3, 2), fails="forward")
    return found


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    any_of = random.Random(seed)

    def moment(most: int) -> InTraining:
        return InTraining(any_of.randint(1, most))

    found = {
        "ddp": kills(
            folder,
            "ddp",
            lambda most: [  # of three epochs; every session has one left to it
                ({0: moment(most // 4)}, True),
                ({1: moment(most // 4)}, False),
                ({0: Death(name="last.ckpt")}, False),
                ({0: moment(most // 2)}, False),
                ({0: Death(name="last.ckpt")}, True),
            ],
        ),
        "samples": kills(folder, "samples", lambda most: [({1: moment(most // 2)}, False)]),
        "fsdp": kills(folder, "fsdp", lambda most: [({0: moment(most // 2)}, False)]),
        "errors": errors(folder),
    }
    (folder / "outcomes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
