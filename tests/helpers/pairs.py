"""Two processes that train one run, forked as starting Python costs most."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

LIMIT = 90  # seconds of work; a process that waits longer for another is one that waits for ever


def pair(work: Callable[[int], None], folder: Path, *, together: bool = False) -> list[tuple[int, str]]:
    """work(rank) in either process, as torchrun starts them: (wait status, what it told) of each.

    together: what kills one kills the other.

    Raises TimeoutError where one does not end, and leaves none behind.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    told = [folder / f"told{rank}.txt" for rank in range(2)]
    alive = {_forked(work, rank, port, told[rank]): rank for rank in range(2)}
    statuses = [0, 0]
    for _ in range(100 * LIMIT):  # not by the clock: this process may be stopped with the others
        if not alive:
            break
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[alive.pop(pid)] = status
            for other in alive if together and os.WIFSIGNALED(status) else ():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    for pid in alive:
        os.kill(pid, signal.SIGUSR1)  # it tells where it waits
    time.sleep(1 if alive else 0)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if alive:
        raise TimeoutError(f"processes {list(alive.values())} did not end: {[path.read_text() for path in told]}")
    return [(status, path.read_text()) for status, path in zip(statuses, told, strict=True)]


def _forked(work: Callable[[int], None], rank: int, port: int, told: Path) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(told, "w") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
        faulthandler.register(signal.SIGUSR1, file=2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "pair"}
        os.environ.update({name: str(value) for name, value in {**place, **meet}.items()})
        torch.set_num_threads(1)
        work(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
