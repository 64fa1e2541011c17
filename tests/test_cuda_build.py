"""The kernels of csrc/cuda as they are built for each architecture that setup.py names: nothing is spilled. Needs no GPU."""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from probsym_fast.ops import _extension

ARCHITECTURES = ("80", "90", "100", "120")
KERNELS = 28 + 30  # soft_permutation.cu, permutation_entropy.cu: two ops, two dtypes, seven teams; two that add up
MOST_REGISTERS, FILE_REGISTERS = 255, 65536  # a thread's; a multiprocessor's
MOST_SHARED = 9 << 10  # bytes: 8 KiB that a kernel declares, and one that the system keeps from 9.0 on
WARP, BLOCK = 32, 256


@functools.cache
def cuobjdump() -> str | None:
    """NVIDIA's tool that reads a library's machine code: the toolkit's, or triton's own."""
    found = importlib.util.find_spec("triton")
    own = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found else Path()
    return str(own) if own.is_file() else shutil.which("cuobjdump")


def unable() -> str | None:
    """Why there is nothing to look at."""
    if (problem := _extension.cuda_problem()) is not None:
        return problem
    if built := set(ARCHITECTURES) - set(re.findall(r"\d+", (_extension.gpu_architectures() or "").replace(".", ""))):
        return f"not built for {', '.join(sorted(built))} (TORCH_CUDA_ARCH_LIST)"
    return None if cuobjdump() else "no cuobjdump"


ARCHITECTURE = re.compile(r"^arch = sm_(\d+)", re.M)
NUMBERS = re.compile(r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(kernel, architecture): registers, stack, shared, local}. What is spilled lies in the stack."""
    found = {}
    parts = ARCHITECTURE.split(text)
    for gpu, part in zip(parts[1::2], parts[2::2], strict=True):
        for kernel, *numbers in NUMBERS.findall(part):
            found[kernel, gpu] = dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True))
    assert len(found) == text.count("Function ") > 0, f"not understood:\n{text}"
    return found


def threads(kernel: str) -> int:
    """Those of its launch bounds: teams of many warps have `true` as their last template argument."""
    return WARP if kernel.startswith("_ZN3psf4cuda8each_row") and "ELb0E" in kernel else BLOCK


def test_the_tool_is_understood():
    text = """Fatbin elf code:
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fPf:
  REG:42 STACK:8 SHARED:7296 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert resources(text) == {("_Z1fPf", "90"): {"registers": 42, "stack": 8, "shared": 7296, "local": 0}}
    with pytest.raises(AssertionError, match="not understood"):
        resources(text.replace("REG", "registers"))


@pytest.mark.skipif(unable() is not None, reason=str(unable()))
def test_nothing_is_spilled():
    (library,) = Path(_extension.__file__).parents[1].glob("_cuda*.so")
    command = [cuobjdump(), "--dump-resource-usage", library]
    found = resources(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kernels = defaultdict(set)
    for (kernel, gpu), used in found.items():
        if "no_work" in kernel:  # of architecture.cu
            continue
        kernels[gpu].add(kernel)
        where = f"{kernel} for {gpu}: {used}"
        assert used["stack"] == used["local"] == 0, where
        assert used["registers"] <= min(MOST_REGISTERS, FILE_REGISTERS // threads(kernel)), where
        assert used["shared"] <= MOST_SHARED, where
    assert set(kernels) == set(ARCHITECTURES)
    assert {len(names) for names in kernels.values()} == {KERNELS}
