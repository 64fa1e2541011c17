"""Throughput, latency, memory, tax and the prediction's variance against the number of samples."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from probsym_fast._memory import peak_memory
from probsym_fast._steps import Loss, Steps, inference_steps, move, training_steps
from probsym_fast._timing import interleave, machine
from probsym_fast.data._progress import announced
from probsym_fast.data._store import write_atomically
from probsym_fast.groups._draws import check_kind
from probsym_fast.models import Symmetrized
from probsym_fast.models.chunks import Chunks
from probsym_fast.ops import OPS, using_backend
from probsym_fast.ops._op import BACKENDS, check_count

SAMPLES = (1, 2, 4, 8, 16, 32, 64)
MODES = ("training", "inference")


@dataclass
class Row:
    """Of one number of samples S, in one mode, with one backend, chunk and kind of draws.

    latency: median seconds a step (low, high: quartiles). throughput: graphs a second; sampled graphs are S times as many.
    peak: bytes of a step beyond model and batch. tax: latency over that of the bare backbone, in turn with it. variance: of
    the prediction over noise, mean over its entries. None: not measured (out of memory, or without meaning).
    """

    mode: str
    backend: str
    chunk: int | str | None
    draws: str
    samples: int
    latency: float | None = None
    low: float | None = None
    high: float | None = None
    throughput: float | None = None
    peak: int | None = None
    tax: float | None = None
    variance: float | None = None


@dataclass
class Profile:
    """What `profile` measured."""

    name: str
    batch: int
    machine: dict[str, Any]
    rows: list[Row]

    def table(self) -> str:
        """A line a row, plain text."""
        head = ("mode", "backend", "chunk", "draws", "S", "ms", "graphs/s", "peak MB", "tax", "variance")
        lines = [head, *(cells(row) for row in self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | Path) -> None:
        """The figures as JSON."""
        write_atomically(Path(path), lambda file: file.write(self.json().encode()))

    def plot(self, path: str | Path) -> None:
        """Every quantity against S, as the ending says: .png, .pdf or .svg (needs matplotlib)."""
        from probsym_fast.tasks.plots import plot_profile

        plot_profile(Path(path), self.name, [asdict(row) for row in self.rows])


def profile(
    what: Any,
    batch: Any = None,
    *,
    samples: Sequence[int] = SAMPLES,
    modes: Sequence[str] = MODES,
    chunks: Sequence[int | str | None] | None = None,
    backends: Sequence[str] = ("auto",),
    draws: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    seconds: float = 1.0,
    repeats: int = 16,
) -> Profile:
    """Measures a model or task at every number of samples, in every mode, with every backend, chunk and kind of draws.

    what: a `Symmetrized` and a `batch` for it, or a task (`tasks.load(NAME)`), whose first training batch, loss, precision
    and clipping are taken. A training step of a model alone has the mean square of its prediction as loss. chunks: as in
    `models.chunks.Chunks`, where None is all samples at once and "auto" keeps within the model's limit; draws: kinds as in
    `groups.Draws`; without a list of them the model's. device: None: the batch's, of a task the GPU if there is one.
    seconds: given to each row, at least three rounds. repeats: predictions that the variance is taken over.

    A row that runs out of memory has no figures. The model keeps its weights and buffers. Raises TypeError for other
    kinds, ValueError for values out of range, a device that is not there and a backend that nothing has on it, RuntimeError
    where an op lacks the backend.
    """
    check_values(samples, modes, repeats)
    for kind in draws or ():
        check_kind("profile", kind)
    for size in chunks or ():
        Chunks(size)  # raises
    model, batch, loss, settings, name = prepared(what, batch, device)
    check_backends(backends, batch.device)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, training, rows = (model.chunks, model.draws), model.training, []
    cases = list(product(modes, backends, chunks or [model.chunks.size], draws or [model.draws], samples))
    try:
        with announced(f"profile {name}: {len(cases)} rows", len(cases)) as advance:
            for case in cases:
                row = Row(*case)
                model.load_state_dict(state)
                memory = before[0].memory if row.chunk == "auto" else None
                model.chunks, model.draws = Chunks(row.chunk, memory), row.draws
                with using_backend(row.backend):
                    measure(row, model, batch, loss, settings, seconds, repeats)
                rows.append(row)
                advance(1)
    finally:
        model.chunks, model.draws = before
        model.load_state_dict(state)
        model.train(training).zero_grad()
    return Profile(name, batch.size, machine(batch.device), rows)


def measure(
    row: Row, model: Symmetrized, batch: Any, loss: Loss, settings: dict[str, Any], seconds: float, repeats: int
) -> None:
    """Fills the row; leaves it empty where memory ends."""
    try:
        steps = steps_of(row.mode, model, batch, row.samples, loss, settings)
        steps.step()  # optimiser states are made, "auto" chunks found
        model.zero_grad()  # a step's gradients are its own, not the last one's
        row.peak = peak_memory(steps.step, batch.device)
        times = interleave({"step": steps.step, "bare": steps.bare}, batch.device, seconds, rounds=3)
        row.low, row.latency, row.high = statistics.quantiles(times["step"], n=4)
        row.throughput = batch.size / row.latency
        row.tax = row.latency / statistics.median(times["bare"])
        if row.mode == "inference":
            predictions = torch.stack([steps.step().float() for _ in range(repeats)])
            row.variance = predictions.var(0).mean().item()
    except torch.OutOfMemoryError:
        row.latency = row.low = row.high = row.throughput = row.peak = row.tax = row.variance = None


def trace(what: Any, batch: Any = None, *, path: str | Path, samples: int = 4, device: Any = None) -> None:
    """Writes one training step as a trace for Perfetto (ui.perfetto.dev): every op, and the model's parts, by name."""
    model, batch, loss, settings, _ = prepared(what, batch, device)
    step = training_steps(model, batch, samples, loss, **settings).step
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if batch.device.type == "cuda" else [])]
    with named(model), torch_profile(activities=activities) as record:
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
def named(model: Symmetrized) -> Iterator[None]:
    """Within it, a recorded trace names the model's parts and the ops that run as plain torch (kernels have names)."""
    with ExitStack() as stack:
        for name in ("distribution", "embed", "backbone", "readout"):
            part, open_ranges = getattr(model, name), []
            for hook in hooks(f"Symmetrized.{name}", open_ranges):
                handle = getattr(part, hook.__name__)(hook, **({} if "pre" in hook.__name__ else {"always_call": True}))
                stack.callback(handle.remove)
        for name, op in OPS.items():
            stack.callback(setattr, op, "reference", op.reference)
            op.reference = under_name(f"probsym_fast::{name} (reference)", op.reference)
        yield


def hooks(name: str, open_ranges: list) -> tuple[Callable, Callable]:
    """Forward hooks of a module, called as the methods that register them, that open and close a range of the trace."""

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


def prepared(what: Any, batch: Any, device: Any) -> tuple[Symmetrized, Any, Loss, dict[str, Any], str]:
    """Model and batch on the device, loss, and what else a training step takes; a name."""
    if isinstance(what, Symmetrized):
        if batch is None:
            raise TypeError("profile: batch must be given with a model, got None")
        device = batch.device if device is None else checked_device(device)
        square = lambda y, penalties: y.float().square().mean() + sum(penalties.values())  # noqa: E731
        return what.to(device), move(batch, device), square, {}, "model"
    if not (hasattr(what, "loader") and hasattr(what, "inputs")):
        raise TypeError(f"profile: what must be a Symmetrized or a task that is trained, got {type(what).__name__}")
    config = what.config
    device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    model = what.model().to(device)
    batch, target = what.inputs(move(next(iter(what.loader("train"))), device))

    def loss(prediction: Any, penalties: Any) -> torch.Tensor:
        return what.loss(prediction, target) + config.training.entropy * sum(penalties.values())

    precision = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.training.precision)
    settings = {"clip": config.training.clip, "autocast": precision}
    return model, batch, loss, settings, f"{config.task}/{config.name}"


def steps_of(mode: str, model: Symmetrized, batch: Any, samples: int, loss: Loss, settings: dict[str, Any]) -> Steps:
    if mode == "inference":  # in float32, as the tasks test
        return inference_steps(model, batch, samples)
    return training_steps(model, batch, samples, loss, **settings)


def check_values(samples: Sequence[int], modes: Sequence[str], repeats: int) -> None:
    for count in samples:
        check_count("profile", "samples", count)
    check_count("profile", "repeats", repeats, least=2)
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"profile: modes must be of {MODES}, got {mode!r}")


def checked_device(device: torch.device | str) -> torch.device:
    """ValueError unless it is a CPU or a GPU that torch sees."""
    there = ("cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count())))
    wanted = "cuda:0" if str(device) == "cuda" else str(device)
    if wanted not in there:
        raise ValueError(f"profile: device must be one of {there}, got {str(device)!r}")
    return torch.device(device)


def check_backends(names: Sequence[str], device: torch.device) -> None:
    """ValueError for a name that is no backend of any op on this device, before anything is measured."""
    there = {name for (_, kind), found in BACKENDS.items() if kind == device.type for name in found}
    for name in names:
        if name not in (known := ("auto", *sorted(there))):
            raise ValueError(f"profile: backends must be of {known} on {device.type}, got {name!r}")


def cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    return (
        row.mode,
        row.backend,
        "all" if row.chunk is None else str(row.chunk),
        row.draws,
        str(row.samples),
        number(row.latency, ".3g", 1e3) if row.latency is not None else "out of memory",
        number(row.throughput, ".4g"),
        number(row.peak, ".4g", 1e-6),
        number(row.tax, ".2f"),
        number(row.variance, ".2e"),
    )
