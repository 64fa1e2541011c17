"""csrc/cuda compiled for the host against the CUDA runtime of tests/cuda_host, which runs kernels thread for thread."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HOST = ROOT / "tests" / "cuda_host"
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
TORCH = Path(torch.__file__).parent
WARNINGS = ["-Wall", "-Werror", "-Wno-psabi", "-Wno-attributes"]  # the last of torch's headers
INCLUDED = [f"-I{HOST}", "-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    *WARNINGS,
    *INCLUDED,
]  # hidden: a process loads several libraries
TRACED = ["-fsanitize=thread"]  # its calls arrive in emulator.cpp; its own library is not linked
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def unable() -> str | None:
    """Why it cannot run here."""
    if COMPILER is None:
        return "no C++ compiler"
    return None if sys.platform == "linux" else "coroutines by ucontext"


def compiled(source: Path, to: Path, flags: list[str], csrc: Path = CSRC) -> Path:
    """The object file of a source, with csrc's headers from another folder where one is given."""
    path = to / f"{source.name}.o"
    command = [COMPILER, *FLAGS, *flags, f"-I{csrc}", "-c", "-x", "c++", source, "-o", path]
    subprocess.run(list(map(str, command)), check=True)
    return path


def linked(path: Path, objects: list[Path]) -> Path:
    subprocess.run(list(map(str, [COMPILER, "-shared", *objects, *LIBRARIES, "-o", path])), check=True)
    return path


ROWS = {HOST / "emulator.cpp": ["-O2"], HOST / "rows.cpp": ["-O1", *TRACED]}
LAUNCHES = {HOST / "launches.cpp": ["-O0"]}
LAUNCHES |= {
    CSRC / "cuda" / f"{op}.torch.cpp": ["-O0", "-include", "traced_torch.h"]
    for op in ("soft_permutation", "permutation_entropy")
}


def whole(folder: Path) -> Path:
    """The library of all kernels and their launches."""
    return linked(folder / "cuda.so", [compiled(source, folder, flags) for source, flags in (ROWS | LAUNCHES).items()])


def once(tmp_path_factory, name: str, make: Callable[[Path], Path]) -> Path:
    """make(a folder), once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            done.write_text(str(make(folder)))
        return Path(done.read_text())


def built(tmp_path_factory) -> Path:
    """The whole library; its objects lie beside it."""
    return once(tmp_path_factory, "cuda_on_host", whole)
