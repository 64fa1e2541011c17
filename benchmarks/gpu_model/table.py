"""The table: every case on every architecture, as data and as a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_model import cuda
from benchmarks.gpu_model.cases import Case, all_cases
from benchmarks.gpu_model.devices import DEVICES, GUIDE
from benchmarks.gpu_model.latency import WAIT
from benchmarks.gpu_model.launches import Launch, all_compiled
from benchmarks.gpu_model.measured import Results
from benchmarks.gpu_model.model import OVERHEAD, Compiled, examined, library, predict
from benchmarks.gpu_model.record import Part, recorded

RESULTS = Path(__file__).parents[1] / "results"
Calls = list[tuple[Case, list[Part]]]


@dataclass
class Row:
    """A case on one device. Times in seconds, None where a loop's turns are unknown. limit: of the part `of`, on a device
    that was measured by its measured rates. The share then is of the measured time, too."""

    architecture: int
    device: str
    op: str
    case: str
    of: str
    bytes: int
    operations: int
    limit: float
    launches: int
    library: int  # calls of the library
    forward: float | None
    both: float | None  # forward and backward
    share: float | None
    measured: float | None = None
    host: float | None = None  # measured, of one call
    kernels: list[dict[str, Any]] = field(default_factory=list)  # those of `Predicted`, with direction and count

    @property
    def predicted(self) -> float | None:
        return self.forward if self.of == "forward" else self.both


def calls() -> Calls:
    """Every case with what it launches."""
    matmul = torch.backends.cuda.matmul
    before, found = matmul.fp32_precision, []
    try:
        for case in all_cases():
            matmul.fp32_precision = "tf32" if case.kind == "tf32" else "ieee"
            parts = [part for part in recorded(case.run) if part.op in (case.op, case.also)]
            if parts:
                found.append((case, parts))
            else:  # its modules did not take the op
                print(f"{case.needs.case}: {case.op} was not called", flush=True)
    finally:
        matmul.fp32_precision = before
    return found


def compile_all(launches: Iterable[Launch], architecture: int) -> dict[tuple[str, str], Compiled]:
    """Every launch, compiled and read once."""
    different = {launch.key: launch for launch in launches}
    made = all_compiled(different.values(), architecture)
    with ThreadPoolExecutor(cpu_count()) as pool:
        return dict(zip(different, pool.map(examined, different.values(), made), strict=True))


def launches(some: Calls) -> Iterator[Launch]:
    return (step for _, parts in some for part in parts for step in part.steps if isinstance(step, Launch))


def rows(
    some: Calls, architecture: int, compiled: dict[tuple[str, str], Compiled], found: Results | None = None
) -> list[Row]:
    """found: measured on a GPU of this architecture, for which the times are predicted; None: the one of DEVICES."""
    return [_row(case, parts, architecture, compiled, found) for case, parts in some]


def _row(case: Case, parts: list[Part], architecture: int, compiled: dict, found: Results | None) -> Row:
    device, needs = found.device if found else DEVICES[architecture], case.needs
    kernels: dict[tuple, dict[str, Any]] = {}
    totals: dict[str, float | None] = {"forward": 0.0, "backward": 0.0}
    calls_of_library = 0
    for part in parts:
        for step in part.steps:
            if isinstance(step, Launch):
                key = part.direction, *step.key, step.grid
                if key not in kernels:
                    one = predict(step, compiled[step.key], device, case.facts)
                    kernels[key] = {"direction": part.direction, "count": 0, **asdict(one)}
                kernels[key]["count"] += 1
                seconds = kernels[key]["seconds"]
            else:
                seconds, calls_of_library = library(step, device), calls_of_library + 1
            before = totals[part.direction]
            totals[part.direction] = None if before is None or seconds is None else before + seconds
    forward, backward = totals["forward"], totals["backward"]
    both = None if forward is None or backward is None else forward + backward
    limit = max(needs.bytes / device.bandwidth, needs.operations / device.rate(case.kind))
    predicted = forward if needs.of == "forward" else both
    count = sum(x["count"] for x in kernels.values())
    row = Row(
        architecture, device.name, case.op, needs.case, needs.of, needs.bytes, needs.operations, limit, count,
        calls_of_library, forward, both, limit / predicted if predicted and limit else None,
        kernels=list(kernels.values()),
    )  # fmt: skip
    if found is not None:
        _measure(row, found, case.kind)
    return row


def _measure(row: Row, found: Results, kind: str) -> None:
    """Adds what was measured."""
    times = found.kernels(row.case)
    for x in row.kernels:
        x["measured"] = times.get(x["kernel"])
    if not any(x["measured"] for x in row.kernels):  # other kernels ran, as those of csrc/cuda for the soft permutation
        return
    here = found.rows.get(row.case + (", forward" if row.of == "forward" else "")) or found.rows.get(row.case)
    if here is not None:
        row.limit = found.limit(row.bytes, row.operations, kind)
        row.measured, row.host, row.share = here["median"], here["host"], row.limit / here["median"]


def of_cuda(found: Results | None = None) -> Iterator[Row]:
    """The kernels of csrc/cuda."""
    device = found.device if found else DEVICES[cuda.ARCHITECTURE]
    for needs, kernels in cuda.predicted(cuda.compiled(), device):
        limit = max(needs.bytes / device.bandwidth, needs.operations / device.float32)
        seconds = [x.seconds for x in kernels]
        both = None if None in seconds else sum(seconds) + OVERHEAD  # with the sum of the entropies
        row = Row(
            cuda.ARCHITECTURE, device.name, "soft_permutation (CUDA C++)", needs.case, needs.of, needs.bytes,
            needs.operations, limit, len(kernels) + 1, 0, None, both, both and limit / both,
            kernels=[{"direction": "", "count": 1, **asdict(x)} for x in kernels],
        )  # fmt: skip
        if found is not None:
            _measure(row, found, "float32")
        yield row


def as_json(found: list[Row], checked: dict[str, Any], checked_cuda: dict[str, Any]) -> str:
    """One line a kernel, so that a change is seen."""
    about = {
        "predicted": "no figure here was measured, but those named so",
        "triton": triton.__version__,
        "nvcc": cuda.version(),
        "torch": torch.__version__.split("+")[0],
        "overhead": OVERHEAD,
        "wait": WAIT,
        "devices": {number: asdict(device) for number, device in DEVICES.items()},
        "limits": GUIDE,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    for key, facts in (("checked", checked), ("checked_cuda", checked_cuda)):
        each = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in facts.items())
        lines.append(f' "{key}": {{\n  {each}}}')
    lines.append(' "rows": [\n  ' + ",\n  ".join(_line(row) for row in found) + "]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(row: Row) -> str:
    own = {k: rounded(v) for k, v in vars(row).items() if k != "kernels"}
    kernels = ",\n   ".join(json.dumps({k: rounded(v) for k, v in x.items()}) for x in row.kernels)
    return json.dumps(own)[:-1] + ', "kernels": [\n   ' + kernels + "]}"


def rounded(x: Any) -> Any:
    return float(f"{x:.4g}") if isinstance(x, float) else x
