"""The kernels of csrc/cuda, compiled by nvcc where it is on the path, for one architecture."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks import shapes
from benchmarks.gpu_model import sass
from benchmarks.gpu_model.counts import Executed, add, iterations
from benchmarks.gpu_model.devices import Device
from benchmarks.gpu_model.model import Compiled, Predicted, timed
from benchmarks.gpu_model.sass import Code
from benchmarks.shapes import ITERATIONS, SOFT

ROOT = Path(__file__).parents[2]
ARCHITECTURE = 90
SOURCES = "soft_permutation", "permutation_entropy"
# turns of the loops of a row of one warp, in their order (a row; ranges of the sort, and its steps; Sinkhorn; sides), and
# bytes a score
KERNELS = {
    "SoftPermutation": ((1, 5, 3, ITERATIONS), 4 + 3 * 4 + 2 * 8),
    "PermutationEntropy": ((1, 2), 3 * 4),
    "PermutationEntropyBackward": ((1, 2), 6 * 4),
    "SoftPermutationBackward": ((1, ITERATIONS, ITERATIONS), 6 * 4 + 8),
}


def version() -> str | None:
    """nvcc's, None where there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d+\.\d+\.\d+)", text)[-1]


def compiled() -> dict[str, Code]:
    """Kernel<float or double, K, many> -> code; {} without nvcc. Kept in build/ until the sources change."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return {}
    sources = sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "gpu_model" / digest
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    for name in SOURCES:
        if not (folder / f"{name}.cubin").exists():
            command = [nvcc, "-cubin", f"-arch=sm_{ARCHITECTURE}", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
            command += [str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(folder / f"{name}.part")]
            running.append((name, subprocess.Popen(command)))
    for name, process in running:
        if process.wait():
            raise RuntimeError(f"nvcc failed for csrc/cuda/{name}.cu")
        (folder / f"{name}.part").rename(folder / f"{name}.cubin")
    found = {}
    for name in SOURCES:
        for mangled, code in sass.read((folder / f"{name}.cubin").read_bytes()).items():
            match = re.search(r"each_rowINS0_\d+(\w+?)I([fd])EELi(\d+)ELb([01])E", mangled)
            if match is not None:
                kernel, dtype, K, many = match.groups()
                found[f"{kernel}<{'float' if dtype == 'f' else 'double'}, {K}, {many}>"] = code
    return found


def predicted(codes: dict[str, Code], device: Device) -> Iterator[tuple[shapes.Needs, list[Predicted]]]:
    """The four kernels of the soft permutation and its entropy, for every shape."""
    for shape in SOFT["cuda"] if codes else ():
        (B, S, N), (K, threads) = shape, _team(shape[2])
        found = []
        for kernel, (turns, bytes) in KERNELS.items():
            code = codes[f"{kernel}<float, {K}, {int(threads > 32)}>"]
            made = Compiled(code, "", threads // 32, _saved(kernel, K, threads), iterations(code, "", {}))
            executed = _executed(code, turns) if threads == 32 else "loops of several warps"
            found.append(timed(kernel, made, B * S, B * S * N * bytes, executed, "float32", device))
        yield shapes.soft_permutation(shape), found


def _team(N: int) -> tuple[int, int]:
    """Slots a thread, and threads, of rows in registers: as `shape_of` in csrc/cuda/plan.h."""
    for K in (1, 2, 4, 6, 8):
        if N <= 32 * K:
            return K, 32
    return 4, 128 if N <= 512 else 256


def _saved(kernel: str, K: int, threads: int) -> int:
    """Bytes of shared memory of a block: c of all iterations but the last, as `saved_numbers` in csrc/cuda/*.h."""
    return 4 * (ITERATIONS - 1) * K * threads if kernel == "SoftPermutationBackward" else 0


def _executed(code: Code, turns: tuple[int, ...]) -> Executed | str:
    every = code.every_loop()
    if len(every) != len(turns):
        return f"{len(every)} loops, {len(turns)} known"
    total = Executed()
    add(total, code.own(None), 1.0)
    for loop in every:
        around = (t for x, t in zip(every, turns, strict=True) if x.first <= loop.first and loop.last <= x.last)
        add(total, code.own(loop), float(math.prod(around)))  # itself among them
    total.turns = {id(loop): float(t) for loop, t in zip(every, turns, strict=True)}
    return total
