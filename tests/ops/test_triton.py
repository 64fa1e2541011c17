"""The Triton kernels without a GPU: values and gradients under the interpreter, and every configuration compiled."""
# ruff: noqa: E402 - the imports stand behind the question whether triton is there

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import probsym_fast
from probsym_fast.ops import OPS
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops.triton import KERNELS, _launch
from probsym_fast.ops.triton import _lazy as through

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops/triton_interpreted.py"]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


# --- every configuration compiled ---

ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def specialised(function, arguments, settings):
    """signature, constants and attributes of a launch, as triton's own dispatch makes them."""
    named = dict(zip(function.arg_names, arguments, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        x = named[name]
        if function.params[i].is_constexpr or x is None or (isinstance(x, int) and x == 1):
            signature[name], constants[i,] = "constexpr", x
            continue
        if isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
            aligned = x.data_ptr() % 16 == 0
        elif isinstance(x, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            aligned = x % 16 == 0
        if aligned:
            attributes[i,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, LOCAL and others of a cubin, by the cuobjdump that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    (line,) = (x for x in text.splitlines() if "REG:" in x)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


class Launches:
    """Takes the place of `_launch.launch`: keeps what would be launched, once for each specialisation."""

    def __init__(self):
        self.kept = {}

    def __call__(self, kernel, grid, arguments, settings):
        assert all(isinstance(x, int) and x >= 0 for x in grid(settings))
        for configuration in kernel.configurations:
            every = settings | configuration
            options = {k: every.pop(k) for k in ("num_warps", "num_stages") if k in every}
            source = specialised(kernel.function, arguments, every)
            self.kept[kernel.name, repr((source, options))] = kernel.function, source, options


def launches_of(name: str, dtype: torch.dtype, monkeypatch) -> list:
    """The launches of an op, forward and backward, for sizes as in the experiments; nothing runs."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)
    CASES[name](dtype)
    return list(launches.kept.items())


def aggregate_case(dtype):
    x, edges, ptr = (
        torch.zeros(130, 10, 64, dtype=dtype),
        torch.zeros(2, 512, dtype=torch.int64),
        torch.arange(0, 129, 64),
    )
    for virtual, own in ((ptr, torch.ones(())), (None, None)):
        through("aggregate", "forward")(x, edges, virtual, own)
        through("aggregate", "backward")(x, x, edges, virtual, own, True, own is not None)


CASES = {
    "aggregate": aggregate_case,
}


def test_every_op_has_a_case():
    assert set(CASES) == set(KERNELS)
    for name in KERNELS:
        assert OPS[name].backends("cuda") == BACKENDS[name, "cuda"] == ("triton", "reference")
        assert probsym_fast.info()["ops"][name]["cuda"] == ["triton", "reference"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(name, architecture, monkeypatch, tmp_path):
    """Every configuration that can be chosen, for what the op launches: registers and stack are read from the cubin."""
    found = {}
    for dtype in KERNELS[name]:
        found |= dict(launches_of(name, dtype, monkeypatch))
    assert found
    for (kernel, _), (function, (signature, constants, attributes), options) in found.items():
        source = ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        used = resources(compiled.asm["cubin"], tmp_path)
        assert used["REG"] <= 65536 // (32 * options["num_warps"]), (kernel, used)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, options, constants, used)
