"""What a GPU has measured, beside what is predicted for it: by case, and by kernel."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_model.devices import DEVICES, Device

OURS = "kernel", "one pass", "embed_image"  # variants of the benchmarks that are ours
BEFORE = "-before"  # ends the name of a results file
TEMPLATE = re.compile(r"psf::cuda::(?:\w+<psf::cuda::)?(\w+)<")  # names of csrc/cuda as a profiler has them


@dataclass
class Results:
    """Of one GPU. machine: as the results files say it. rows: of the variants that are ours, by case."""

    machine: dict[str, Any]
    device: Device
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def times(self) -> dict[str, float]:
        return {case: row["median"] for case, row in self.rows.items()}

    def limit(self, bytes: int, operations: int, kind: str) -> float:
        """Seconds, by the bandwidth and the rates measured on that machine; those of tf32 are not."""
        half = kind == "half"
        rate = 1e12 * self.machine["bfloat16_TFLOP_s"] if half else 1e9 * self.machine["float32_GFLOP_s"]
        return max(bytes / (1e9 * self.machine["bandwidth_GB_s"]), 0 if kind == "tf32" else operations / rate)

    def kernels(self, case: str) -> dict[str, float]:
        """Median seconds of a launch by kernel, in the rows of a case: forward and backward come last."""
        found: dict[str, float] = {}
        for name in sorted(x for x in self.rows if x.startswith(case)):
            found |= {name_of(x["kernel"]): x["seconds"] for x in self.rows[name].get("kernels", ())}
        return found


def name_of(kernel: str) -> str:
    """As the model names it."""
    found = TEMPLATE.search(kernel)
    return found.group(1) if found else kernel.strip("_")


def devices(architecture: int) -> list[Device]:
    """The GPUs of an architecture whose figures are known, the one of the table first."""
    found = [DEVICES[architecture]]
    if architecture == 90:
        source = "NVIDIA H200 data sheet; an H100 with faster memory"
        found.append(replace(DEVICES[90], name="H200", source=source, bandwidth=4.8e12))
    return found


def results(folder: Path, architecture: int) -> list[Results]:
    """Of every GPU of this architecture that has a results file in the folder; those of `BEFORE` are of older kernels."""
    found: dict[str, Results] = {}
    for path in sorted(folder.glob("*.json")):
        data = {} if path.stem.endswith(BEFORE) else json.loads(path.read_text())
        machine = data.get("machine", {}) if isinstance(data, dict) else {}
        for device in devices(architecture):
            if device.name.split(" SXM")[0] in machine.get("device", "").split():
                here = found.setdefault(device.name, Results(machine, device))
                here.rows |= {row["case"]: row for row in data["rows"] if row["variant"] in OURS}
    return list(found.values())
