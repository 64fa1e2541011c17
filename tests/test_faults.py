"""Tests of the tests: a fault put into a copy of a GPU kernel, or of its launch, fails the test that should find it."""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from probsym_fast.ops.reference.soft_permutation import soft_permutation as dense
from tests import test_cuda_launches, test_cuda_rows
from tests.conftest import assert_near
from tests.helpers import cuda_on_host
from tests.helpers.faults import replaced
from tests.ops import faulty_triton

on_host = pytest.mark.skipif(cuda_on_host.unable() is not None, reason=str(cuda_on_host.unable()))


def forward(library, N, S=1, scores=None, presorted=False, **options):
    """t, log_r and log_c of soft_permutation are those of the definition."""
    scores = torch.randn(1, S, N, dtype=torch.float64) if scores is None else scores
    t, log_r, log_c = (torch.full_like(scores, torch.nan) for _ in range(3))
    order, rank = (torch.full(scores.shape, -1) for _ in range(2))
    found = t, log_r, log_c, order, rank
    test_cuda_rows.call(library, "soft_permutation", scores, None, 1, S, N, 0.1, 2, True, presorted, *found, **options)
    for x, y in zip(found, dense(scores, None, 0.1, 2, True, presorted), strict=True):
        assert_near(x.double(), y.double())


def adds_up(library):
    sums, out = torch.randn(300, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    test_cuda_rows.run(library, "add_up", torch.float64, sums, 300, out, 1)
    assert torch.allclose(out, sums.sum())


def a_block(library):
    forward(library, 260)


def ties(library):
    forward(library, 40, scores=torch.ones(1, 1, 40, dtype=torch.float64))


def presorted(library):
    """Also scores that do not descend stay where they are."""
    forward(library, 40, scores=torch.linspace(0, 1e-3, 40, dtype=torch.float64)[None, None], presorted=True)


def in_memory(library):
    forward(library, 40, S=4, slots=test_cuda_rows.MEMORY, threads=32)


def two_workspaces(library):
    forward(library, 1025, S=2)


class Fault(NamedTuple):
    file: str  # in csrc/cuda
    text: str
    instead: str
    test: Callable
    says: str  # what the test's failure must say


OUTSIDE = "an access outside of all memory of the launch"
RACE = (
    "a race: a thread (reads what another writes|writes what another reads)|shared memory is read before it is written"
)
FAULTS = {
    "no barrier in a block's sum": Fault("team.h", "= x;\n      sync();", "= x;", a_block, RACE),
    "no barrier between sort and scans": Fault("soft_permutation.h", "team.sync();\n  const", "const", a_block, RACE),
    "no barrier before carries are read": Fault("laplace.h", "      team.sync();\n", "", a_block, RACE),
    "one half for all carries": Fault("laplace.h", "      team.turn ^= 1;\n", "", a_block, RACE),
    "no barrier while a block adds up": Fault("permutation_entropy.cu", "    __syncthreads();\n", "", adds_up, RACE),
    "a mask one too far": Fault("rows.h", "first + i < n ?", "first + i <= n ?", a_block, OUTSIDE),
    "a scan that starts at one": Fault("laplace.h", "Scan<R> f, b;", "Scan<R> f, b; f.p[0] = 1;", a_block, "<="),
    "another thread's index with a key": Fault(
        "team.h",
        "shuffle_xor(x.index, mask)",
        "shuffle_xor(x.index, mask / 2)",
        a_block,
        "a race: threads write the same memory",
    ),
    "a sum of half a warp": Fault("team.h", "mask = warp_size / 2;", "mask = warp_size / 4;", a_block, "<="),
    "a shuffle from the other side": Fault("thread.h", "__shfl_up_sync", "__shfl_down_sync", a_block, "<="),
    "a step over a thread too many": Fault(
        "laplace.h", "moved<true>(x, 1 << s)", "moved<true>(x, (1 << s) + 1)", a_block, "<="
    ),
    "sums of the thread after the next": Fault(
        "laplace.h", "moved<false>(x, 1);", "moved<false>(x, 2);", a_block, "<="
    ),
    "equal keys by the higher index": Fault("team.h", "(u.index < v.index)", "(u.index > v.index)", ties, "<="),
    "a sort of presorted scores": Fault("soft_permutation.h", "if (!p.presorted) sort", "sort", presorted, "<="),
    "blocks in one workspace": Fault(
        "launch.h", " + blockIdx.x * plan.workspace_bytes", "", in_memory, "a race: blocks"
    ),
    "a workspace for one block": Fault("launch.h", "_bytes * plan.blocks;", "_bytes;", two_workspaces, OUTSIDE),
}


@on_host
@pytest.mark.parametrize("test", [a_block, ties, presorted, in_memory, two_workspaces, adds_up])
def test_kernels_of_cuda_without_a_fault(test, tmp_path_factory):
    test(ctypes.CDLL(str(cuda_on_host.built(tmp_path_factory))))


def with_fault(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault."""
    csrc = folder / "csrc"
    shutil.copytree(cuda_on_host.CSRC, csrc)
    replaced(csrc / "cuda" / fault.file, fault.text, fault.instead)
    return csrc


@on_host
@pytest.mark.parametrize("name", FAULTS)
def test_kernels_of_cuda(name, tmp_path, tmp_path_factory):
    fault = FAULTS[name]
    built = cuda_on_host.built(tmp_path_factory)
    entry = "ADD_UP" if fault.test is adds_up else "SOFT_PERMUTATION"
    flags = ["-O0", f"-DPSF_ONLY={entry}", *cuda_on_host.TRACED]
    faulty = cuda_on_host.compiled(cuda_on_host.HOST / "rows.cpp", tmp_path, flags, with_fault(fault, tmp_path))
    library = ctypes.CDLL(str(cuda_on_host.linked(tmp_path / "faulty.so", [built.parent / "emulator.cpp.o", faulty])))
    with pytest.raises(AssertionError, match=fault.says):
        fault.test(library)


@on_host
def test_a_swapped_pointer_in_launch_code(tmp_path, tmp_path_factory):
    """Of two outputs of the same shape."""
    built = cuda_on_host.built(tmp_path_factory)
    first, second = "t.mutable_data_ptr<T>(),", "log_r.mutable_data_ptr<T>(),"
    between = "\n" + " " * 37
    fault = Fault("soft_permutation.torch.cpp", first + between + second, second + between + first, a_block, "")
    source = with_fault(fault, tmp_path) / "cuda" / fault.file
    flags = cuda_on_host.LAUNCHES[cuda_on_host.CSRC / "cuda" / fault.file]
    objects = {x.name: x for x in built.parent.glob("*.o")}
    objects[f"{fault.file}.o"] = cuda_on_host.compiled(source, tmp_path, flags)
    library = cuda_on_host.linked(tmp_path / "faulty.so", list(objects.values()))
    kept, ops = test_cuda_launches.registered(library, "probsym_faulty")
    scores = torch.randn(1, 2, 5, dtype=torch.float64)
    with pytest.raises(AssertionError):
        test_cuda_launches.check(ops, scores, None, torch.ones(1, 2, 5, dtype=torch.bool))
    kept._destroy()


KEYS = {
    "where a tensor begins": ("address % 16 == 0", "True"),
    "what 16 divides": ("4 * (x % 16 == 0)", "4"),
    "one": ("2 * (x == 1)", "0"),
    "numbers beyond 32 bits": ("narrow = -(2**31) <= x < 2**31", "narrow = True"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would stay compiled for a driver that runs nothing")
@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_the_launcher_that_lacks(name, tmp_path):
    """Then a compiled kernel would get arguments that it was not compiled for."""
    pytest.importorskip("triton")
    from probsym_fast.ops.triton import _launch
    from tests.ops.triton import test_launches

    copy = Path(shutil.copy(_launch.__file__, tmp_path / "faulty_launch.py"))
    replaced(copy, *KEYS[name])
    spec = importlib.util.spec_from_file_location("faulty_launch", copy)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    test = (
        test_launches.test_a_compiled_kernel_is_launched_without_binding
        if name == "where a tensor begins"
        else test_launches.test_numbers_that_differ_in_what_divides_them_have_kernels_of_their_own
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_launch.Kernel, "_key", faulty.Kernel._key)
        with pytest.raises(AssertionError):
            test(monkeypatch)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{fault: what its test printed and how it ended}, and that of no fault, under the interpreter."""
    pytest.importorskip("triton")

    def run(folder: Path) -> Path:
        command = [sys.executable, "-m", "tests.ops.faulty_triton", str(folder)]
        settings = {"cwd": cuda_on_host.ROOT, "env": os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}}
        subprocess.run(command, check=True, **settings)
        return folder / "outcomes.json"

    return json.loads(cuda_on_host.once(tmp_path_factory, "faulty_triton", run).read_text())


def test_kernels_of_triton_without_a_fault(outcomes):
    status, text = outcomes[""]
    assert status == 0, text


@pytest.mark.parametrize("name", faulty_triton.FAULTS)
def test_kernels_of_triton(name, outcomes):
    """The test fails by what it asserts, not by an error."""
    status, text = outcomes[name]
    assert status == 1 and "AssertionError" in text and "InterpreterError" not in text, text
