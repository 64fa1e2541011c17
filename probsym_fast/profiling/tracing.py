"""Traces of a training step, with named ranges for the model's parts and the ops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from probsym_fast._checks import check_count
from probsym_fast.models import Symmetrized
from probsym_fast.ops import OPS, using_backend
from probsym_fast.profiling.arguments import check_backends, check_lists
from probsym_fast.profiling.cases import chunks_like, kept, prepared
from probsym_fast.profiling.results import OWN
from probsym_fast.profiling.steps import training_steps


def trace(
    what: Any,
    batch: Any = None,
    *,
    path: str | Path,
    weights: str | Path | None = None,
    samples: int = 4,
    chunk: int | str | None = OWN,
    backend: str = "auto",
    draws: str | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Writes a trace of one training step for Perfetto (ui.perfetto.dev), with every op and the model's parts by name.

    Arguments as in `profile`, but one value in place of each list; chunk OWN and draws None mean the model's own. The model
    is restored afterwards (`kept`). Raises as `profile`, and OSError if the path cannot be written.
    """
    samples = check_count("profile", "samples", samples)
    check_lists({"backends": [backend], "draws": None if draws is None else [draws]})
    case = prepared(what, batch, device, weights)
    model, on_gpu = case.model, case.batch.device.type == "cuda"
    check_backends([backend], case.batch.device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with kept(model), using_backend(backend):
        model.chunks = chunks_like(model, model.chunks.size if chunk == OWN else chunk)
        model.draws = draws or model.draws
        step = training_steps(model, case.batch, samples, case.loss, **case.settings).step
        step()
        with with_named_ranges(model), torch_profile(activities=activities) as record:
            step()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}.json")
    try:
        record.export_chrome_trace(str(whole))
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


@contextmanager
def with_named_ranges(model: Symmetrized) -> Iterator[None]:
    """Inside it, traces name the model's parts and the ops that run as plain torch (kernels already have names)."""
    with ExitStack() as stack:
        for name in ("distribution", "embed", "backbone", "readout"):
            part = getattr(model, name)
            open_ranges: list[record_function] = []
            for hook in hooks(f"Symmetrized.{name}", open_ranges):
                handle = getattr(part, hook.__name__)(hook, **({} if "pre" in hook.__name__ else {"always_call": True}))
                stack.callback(handle.remove)
        for name, op in OPS.items():
            stack.callback(setattr, op, "reference", op.reference)
            op.reference = under_name(f"probsym_fast::{name} (reference)", op.reference)
        yield


def hooks(name: str, open_ranges: list[record_function]) -> tuple[Callable, Callable]:
    """Forward hooks that open and close a range of the trace, named after the methods that register them."""

    def register_forward_pre_hook(module: nn.Module, _: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def register_forward_hook(module: nn.Module, *_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return register_forward_pre_hook, register_forward_hook


def under_name(name: str, function: Callable) -> Callable:
    def run(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return run
