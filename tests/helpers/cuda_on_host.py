"""csrc/cuda compiled for the host against the CUDA runtime of tests/cuda_host, which runs kernels thread for thread."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "cuda_host"
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-psabi", f"-I{HOST}"]
TRACED = ["-fsanitize=thread"]  # its calls arrive in emulator.cpp; its own library is not linked


def unable() -> str | None:
    """Why it cannot run here."""
    if COMPILER is None:
        return "no C++ compiler"
    return None if sys.platform == "linux" else "coroutines by ucontext"


def compiled(source: Path, to: Path, flags: list[str], csrc: Path = ROOT / "csrc") -> Path:
    """The object file of a source, with csrc's headers from another folder where one is given."""
    path = to / f"{source.stem}.o"
    command = [COMPILER, *FLAGS, *flags, f"-I{csrc}", "-c", "-x", "c++", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def linked(path: Path, objects: list[Path], flags: list[str] | None = None) -> Path:
    subprocess.run([COMPILER, "-shared", *map(str, objects), *(flags or []), "-o", str(path)], check=True)
    return path


def rows_library(folder: Path) -> Path:
    """rows.cpp: every row kernel."""
    objects = compiled(HOST / "emulator.cpp", folder, ["-O2"]), compiled(HOST / "rows.cpp", folder, ["-O1", *TRACED])
    return linked(folder / "rows.so", list(objects))


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
