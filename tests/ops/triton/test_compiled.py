"""Every configuration of every kernel compiles: what it takes of registers, stack and shared memory."""

import ast
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

import probsym_fast
from benchmarks.gpu_model import check, sass
from benchmarks.gpu_model.launches import all_compiled, compiled
from probsym_fast.ops import OPS, _extension
from probsym_fast.ops import triton as triton_ops
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops.triton import KERNELS
from tests.ops.triton.cases import CASES, launches_of

pytestmark = pytest.mark.usefixtures("interpreted")  # begins before the compilations, which take minutes
OTHERS = {86: torch.float32, 89: torch.bfloat16, 100: torch.bfloat16, 120: torch.bfloat16}
SHARED = 99 * 1024  # bytes that a program may have on the smallest of compute capability 8 and above


def test_every_op_has_a_case():
    assert set(CASES) == set(KERNELS)
    for name in KERNELS:
        built = name in _extension.CUDA_KERNELS and _extension.has_kernels("cuda")
        expected = "cuda" if built else "triton", "reference"
        assert OPS[name].backends("cuda") == BACKENDS[name, "cuda"] == expected
        assert probsym_fast.info()["ops"][name]["cuda"] == list(expected)


def check_fits(kernel, launch, made):
    """Shared memory and registers suffice for a program, and nothing is spilled: read from the cubin."""
    (used,) = sass.usage(made.asm["cubin"]).values()
    assert made.metadata.shared <= SHARED, (kernel, launch[1], made.metadata.shared)
    assert used["REG"] <= 65536 // (32 * launch[2]["num_warps"]), (kernel, used)
    assert used["STACK"] == used["LOCAL"] == 0, (kernel, launch[1], used)


BY_HAND = [pytest.mark.slow, pytest.mark.exhaustive]


def covering(launches: dict) -> dict:
    """Of each kernel every configuration that can be chosen, and every kind that check.key tells apart: type, precision,
    dimensions. Not every pair of the two."""
    found, seen = {}, set()
    for known, launch in launches.items():
        blocks = tuple((name, x) for name, x in launch.named.items() if name.startswith("BLOCK"))
        facts = {check.key(launch), (launch.kernel, repr(launch.options), blocks)}
        if facts - seen:
            found[known] = launch
        seen |= facts
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "which"),
    [
        (90, "covering"),
        (80, "first"),
        *(pytest.param(x, "every", marks=BY_HAND) for x in (80, 90, 100)),
    ],
)
def test_compiles_without_spills(architecture, which, monkeypatch):
    """What the ops launch, with each configuration that can be chosen.

    every: all launches. first: that of each kernel in each dtype. float16 differs from bfloat16 in one type: the first of
    each kernel. For 9.0 the loops are compared with those of benchmarks/results/gpu-predicted.json.
    """
    found = {}
    for name in CASES:
        for dtype in KERNELS[name]:
            launches = launches_of(name, dtype, monkeypatch)
            if which == "first" or dtype == torch.float16:
                launches = {kernel: ((kernel, key), launch) for (kernel, key), launch in reversed(launches)}.values()
            if which != "first" or dtype != torch.float16:
                found |= dict(launches)
    every = check.first(found.values())
    if which == "covering":
        found = covering(found)
        assert check.first(found.values()) == every
    assert found
    binaries = all_compiled(found.values(), architecture)
    for ((kernel, _), launch), made in zip(found.items(), binaries, strict=True):
        check_fits(kernel, launch, made)
    if architecture == 90:
        (version, before), now = check.kept(), check.checked(zip(found.values(), binaries, strict=True))
        worse = check.worse(now, before, version == triton.__version__)
        assert now and not worse, "\n".join(worse)


@pytest.mark.slow
def test_compiles_for_other_gpus(monkeypatch):
    """As above, one launch of each kernel, for each of these architectures a share of the kernels."""
    launches = {}
    for name in CASES:
        for dtype in (x for x in KERNELS[name] if x in OTHERS.values()):
            for (kernel, _), launch in launches_of(name, dtype, monkeypatch):
                launches.setdefault(kernel, []).append((dtype, launch))
    assert len(launches) > 20
    taken = []
    for number, (kernel, some) in enumerate(sorted(launches.items())):
        architecture = list(OTHERS)[number % len(OTHERS)]
        fitting = [launch for dtype, launch in some if dtype == OTHERS[architecture]] or [launch for _, launch in some]
        taken.append((kernel, architecture, fitting[number % len(fitting)]))
    assert {architecture for _, architecture, _ in taken} == set(OTHERS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(lambda some: compiled(some[2], some[1]), taken))
    for (kernel, _, launch), made in zip(taken, binaries, strict=True):
        check_fits(kernel, launch, made)


def test_kernels_keep_to_what_triton_3_6_parses():
    """It refuses an assignment to nested tuples, and only where a kernel is launched for the first time."""
    kernels = 0
    for path in Path(triton_ops.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            marks = [ast.unparse(x) for x in getattr(function, "decorator_list", ())]
            if not any(mark.startswith(("kernel", "triton.jit")) for mark in marks):
                continue
            kernels += 1
            for node in ast.walk(function):
                for target in node.targets if isinstance(node, ast.Assign) else ():
                    nested = [x for x in getattr(target, "elts", ()) if isinstance(x, (ast.Tuple, ast.List))]
                    assert not nested, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
    assert kernels > 60


def test_one_thread_at_a_time_parses(monkeypatch, tmp_path):
    parse, busy, overlaps = ast.parse, threading.Lock(), []

    def slow(*arguments, **settings):
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.02)  # the other threads get here, if nothing stops them
        if not overlaps[-1]:
            busy.release()
        return parse(*arguments, **settings)

    launches = [launch for _, launch in launches_of("orthogonal_frame", torch.float32, monkeypatch)][:4]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ast, "parse", slow)
    all_compiled(launches, 90, threads=4)
    assert len(overlaps) >= len(launches) == 4 and not any(overlaps)
