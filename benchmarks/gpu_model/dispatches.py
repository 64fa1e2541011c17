"""Counts what the host does for a GPU in a training step of a small model: calls of torch's operators, and launches.

    python -m benchmarks.gpu_model.dispatches --write

The step runs on the CPU, on the paths that a GPU takes: checks read no values, backbones run by modules, vectors in the
slices of a GPU. Each op with Triton kernels is also handed to these, which record their launches. The time of a small
model on a GPU goes with these counts; nothing here is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.record import Call, arguments, kept_steps
from benchmarks.test_steps import SMALL_MODELS, case
from probsym_fast._files import write_atomically
from probsym_fast.distributions import vector_steps
from probsym_fast.ops import _patches
from probsym_fast.ops._op import NAMESPACE
from probsym_fast.ops.triton import KERNELS, _lazy

TABLE = Path(__file__).parents[1] / "results" / "gpu-dispatches.json"
COMMAND = "python -m benchmarks.gpu_model.dispatches --write"
MOST = 1.05  # growth that passes
BATCH = 8


class Counter(TorchDispatchMode):
    """calls: of operators that compute or ask torch for something. views: views and new memory. launches: of kernels,
    the library's one for each operator that makes a tensor. ours: those that are Triton's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("calls", "views", "launches", "ours"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        op = name.removesuffix("_backward")
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if view or "empty" in name or name == "_unsafe_view":
            self.counts["views"] += 1
            return out
        self.counts["calls"] += 1
        if func.namespace == NAMESPACE and op in KERNELS:
            steps: list[Launch | Call] = []
            with kept_steps(steps):
                _lazy(op, "forward" if name == op else "backward")(*arguments(func, args, kwargs))
            self.counts["launches"] += len(steps)
            self.counts["ours"] += sum(isinstance(x, Launch) for x in steps)
        elif any(isinstance(x, Tensor) for x in tree_leaves(out)) or func._schema.is_mutable:
            self.counts["launches"] += 1
        return out


@contextlib.contextmanager
def paths_of_a_gpu() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in [x for name, x in sys.modules.items() if name.startswith("probsym_fast")]:
            if hasattr(module, "looks_at_values"):
                stack.enter_context(mock.patch.object(module, "looks_at_values", return_value=False))
        stack.enter_context(mock.patch.object(vector_steps, "AT_ONCE", vector_steps.AT_ONCE_ELSEWHERE))
        # constants are kept from one step to the next, as without this counter
        stack.enter_context(mock.patch.object(_patches, "_get_current_dispatch_mode", return_value=None))
        yield


def counted(run: Callable[[], object]) -> dict[str, int]:
    """Of a call of `run`, after one that is not counted."""
    with paths_of_a_gpu():
        run()
        with Counter() as counter:
            run()
    return counter.counts


def of_model(name: str, change: Callable[[torch.nn.Module], object] = lambda model: None) -> dict[str, dict[str, int]]:
    """Of a whole step and of the bare backbone. change: what to do to the model before."""
    steps = case(SMALL_MODELS[name], "cpu", [f"--training.batch={BATCH}"], counted=True, change=change)
    return {"step": counted(steps.step), "bare backbone": counted(steps.bare)}


def grown(now: dict[str, dict[str, int]], before: dict[str, dict[str, int]]) -> list[str]:
    """What has grown by more than MOST, in words."""
    return [
        f"{part}: {now[part][kind]} {kind}, were {was}; {COMMAND}"
        for part, counts in before.items()
        for kind, was in counts.items()
        if now[part][kind] > MOST * was
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model.dispatches", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    found = {name: of_model(name) for name in SMALL_MODELS}
    text = json.dumps({"torch": torch.__version__.split("+")[0], "models": found}, indent=1) + "\n"
    if parser.parse_args().write:
        write_atomically(TABLE, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()
