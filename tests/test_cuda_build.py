"""nvcc compiles every csrc/cuda/*.cu for each architecture that setup.py names, with nothing spilled; needs no GPU."""

import functools
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100", "120")
KERNELS = {"soft_permutation.cu": 28, "permutation_entropy.cu": 30}  # two ops, two dtypes, seven teams; two that add up
MOST_REGISTERS, FILE_REGISTERS, MOST_SHARED = (
    255,
    65536,
    8 << 10,
)  # a thread's; a multiprocessor's; bytes a kernel declares
WARP, BLOCK = 32, 256


@functools.cache
def unable() -> str | None:
    """Why the files cannot be compiled here."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    lacking = [x for x in ARCHITECTURES if f"compute_{x}" not in known.split()]
    return f"nvcc does not know compute {', '.join(lacking)}" if lacking else None


def compile_verbosely(source: Path, output: Path) -> str:
    """What ptxas says of every kernel."""
    targets = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in ARCHITECTURES]
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        *targets,
        "-Xptxas",
        "-v",
        "-c",
        str(source),
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.stdout + done.stderr


NUMBERS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<gpu>\w+)'\n"
    r".*Function properties for \w+\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)\n"
)


def resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(kernel, architecture): stack, stores, loads, registers, shared}."""
    found = {}
    for match in NUMBERS.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = {name: int(match[name]) for name in ("stack", "stores", "loads", "registers")}
        found[match["kernel"], match["gpu"]] = numbers | {"shared": int(shared[1]) if shared else 0}
    assert len(found) == text.count("Compiling entry function"), f"not understood:\n{text}"
    return found


def threads(kernel: str) -> int:
    """Those of its launch bounds: teams of many warps have `true` as their last template argument."""
    return WARP if kernel.startswith("_ZN3psf4cuda8each_row") and "ELb0E" in kernel else BLOCK


def test_ptxas_output_is_understood():
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 8 bytes cumulative stack size, 7296 bytes smem, 400 bytes cmem[0]
"""
    numbers = {"stack": 8, "stores": 16, "loads": 24, "registers": 42, "shared": 7296}
    assert resources(text) == {("_Z1fPf", "90"): numbers}
    with pytest.raises(AssertionError, match="not understood"):
        resources(text.replace("spill stores", "stores of spills"))


@pytest.mark.slow
@pytest.mark.skipif(unable() is not None, reason=str(unable()))
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_spilled(tmp_path, source):
    found = resources(compile_verbosely(ROOT / "csrc" / "cuda" / source, tmp_path / "object.o"))
    kernels = defaultdict(set)
    for (kernel, gpu), used in found.items():
        kernels[gpu].add(kernel)
        where = f"{kernel} for {gpu}: {used}"
        assert used["stack"] == used["stores"] == used["loads"] == 0, where
        assert used["registers"] <= min(MOST_REGISTERS, FILE_REGISTERS // threads(kernel)), where
        assert used["shared"] <= MOST_SHARED, where
    assert set(kernels) == set(ARCHITECTURES)
    assert all(names == kernels["80"] for names in kernels.values())
    assert len(kernels["80"]) == KERNELS.get(source, len(kernels["80"])) > 0
