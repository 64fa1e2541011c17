"""A reference that runs on a GPU is reported once for each op, device type and reason; no GPU is needed to ask `select`."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from probsym_fast.ops import (
    OPS,
    _extension,
    _fallback,
    message_passing,
    orthogonal_frame,
    transformer,
    triton,
    using_backend,
)
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.transformer import weights_of as blocks_count

GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)
FROM_CSRC = _extension.CUDA_KERNELS
HERE = "uses its slower reference on this GPU:"
TRITON = {name: dtypes for name, dtypes in triton.KERNELS.items() if name != "noise"}  # which has a dtype of its own
SINGLE = {name: dtypes for name, dtypes in TRITON.items() if torch.float64 not in dtypes}
WITH_KERNELS = tuple(name for name in OPS if name in TRITON)
SILENCE = 'backend="reference" selects it without this warning.'


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    """Kernels for every op that has any, of triton only; no GPU to ask."""
    monkeypatch.setattr(_fallback, "_reported", set())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in WITH_KERNELS:
        monkeypatch.setitem(BACKENDS, (name, "cuda"), ("triton", "reference"))
        monkeypatch.setitem(OPS[name].from_python, "cuda", ("triton", triton.KERNELS[name]))
    for asked in (triton._runs_on_gpu, _extension._runs_on_gpu):
        asked.cache_clear()
    yield
    for asked in (triton._runs_on_gpu, _extension._runs_on_gpu):
        asked.cache_clear()


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [w for w in caught if "probsym_fast" in str(w.message)]  # torch warns while it compiles
    assert all(w.category is RuntimeWarning for w in ours)
    return [str(w.message) for w in ours]


def select_all(dtype=torch.float32, device=GPU, backend="auto", names=WITH_KERNELS):
    return {name: OPS[name].select(backend, device, dtype) for name in names}


def test_the_lists_are_those_of_the_sources():
    files = Path(_extension.__file__).parents[1].glob("csrc/cuda/*.torch.cpp")
    assert {path.name.removesuffix(".torch.cpp") for path in files} in (
        set(FROM_CSRC),
        set(),
    )  # none: installed without
    assert set(FROM_CSRC) < set(triton.KERNELS)  # without nvcc, triton has them


def without_kernels(monkeypatch, names):
    for name in names:
        monkeypatch.setitem(BACKENDS, (name, "cuda"), ("reference",))


def test_kernels_and_named_references_are_silent(monkeypatch):
    def everything():
        assert all(run is not OPS[name].reference for name, run in select_all().items())
        assert all(run is OPS[name].reference for name, run in select_all(backend="reference").items())
        without_kernels(monkeypatch, OPS)
        select_all(backend="reference")
        with using_backend("reference"):
            select_all()
            with FakeTensorMode():
                orthogonal_frame(torch.ones(4, 4, device=GPU))
        select_all(device=torch.device("meta"))
        for name in OPS:
            monkeypatch.setitem(BACKENDS, (name, "cpu"), ("cpu", "reference"))
        select_all(torch.float16, device=torch.device("cpu"))

    assert said(everything) == []


def test_a_dtype_that_the_kernels_do_not_take(monkeypatch):
    """By op, and once: in float64 those of triton; both GPUs are of one type."""
    found = said(lambda: [select_all(torch.float64, device) for device in (GPU, OTHER_GPU, GPU)])
    assert len(found) == len(SINGLE)
    for name, dtypes in SINGLE.items():
        names = ", ".join(str(x).removeprefix("torch.") for x in dtypes)
        lacking = f"its kernels take {names}, got torch.float64; convert the inputs"
        assert f"probsym_fast: {name} {HERE} {lacking}. {SILENCE}" in found
    lacking = [name for name, dtypes in TRITON.items() if torch.float16 not in dtypes]  # another reason than before
    assert lacking and len(said(lambda: select_all(torch.float16))) == len(lacking)


def test_ops_without_a_kernel(monkeypatch):
    """Without triton each op is named with what mends it; an op that has no kernel for GPUs says so."""
    others = tuple(name for name in OPS if name not in triton.KERNELS)
    found = said(lambda: [select_all(names=others) for _ in range(2)])
    assert found == [f"probsym_fast: {name} {HERE} it has no kernels for GPUs. {SILENCE}" for name in others]
    without_kernels(monkeypatch, OPS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = said(select_all)
    mend = "triton is not installed: `pip install triton`, in the version that this torch requires"
    assert found == [f"probsym_fast: {name} {HERE} {mend}. {SILENCE}" for name in WITH_KERNELS]
    with pytest.raises(RuntimeError, match=r"aggregate: backend must be .*, got 'triton' \(triton is not installed"):
        OPS["aggregate"].select("triton", GPU, torch.float32)
    without_cuda = f"the compiled kernels were built without CUDA: {_extension.MEND}"
    monkeypatch.setattr(_extension, "_problems", {"_cuda": without_cuda})
    message = f"got 'cuda' ({without_cuda}, and nvcc of torch's CUDA {torch.version.cuda})"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OPS["soft_permutation"].select("cuda", GPU, torch.float32)


def test_rocm_has_one_warning_and_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    triton.register({})  # would miss the ops
    without_kernels(monkeypatch, OPS)
    reason = (
        "the kernels are for NVIDIA GPUs and this torch is for ROCm 7.1: every op uses its slower reference on this GPU"
    )
    assert said(lambda: [select_all(), select_all(torch.float64)]) == [f"probsym_fast: {reason}. {SILENCE}"]
    assert OPS["aggregate"].compute_dtype("auto", GPU, torch.bfloat16) == torch.float32


def test_other_accelerators_have_one_warning():
    reason = "there are no kernels for xpu: every op uses its slower reference there"
    assert said(lambda: select_all(device=torch.device("xpu", 0))) == [f"probsym_fast: {reason}. {SILENCE}"]


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "Tesla T4"), ((8, 0), "A100"), ((12, 0), "RTX PRO 6000")])
def test_old_gpus_have_one_warning_and_the_reference(monkeypatch, capability, name):
    """Half precision is then computed in float32, as references are; a newer GPU beside it has its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability if index == 0 else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    old, ops = capability < (8, 0), tuple(TRITON)
    runs = {}
    found = said(lambda: [runs.update(select_all(names=ops)) for _ in range(2)])
    assert all((run is OPS[name].reference) == old for name, run in runs.items())
    wanted = (
        f"probsym_fast: the Triton kernels need a GPU of compute capability 8.0 or newer, this one ({name}) has 7.5. "
        "Its ops use their slower reference."
    )
    assert found == [wanted] * old
    half = torch.float32 if old else torch.bfloat16
    assert OPS["embed"].compute_dtype("auto", GPU, torch.bfloat16) == half
    assert OPS["embed"].compute_dtype("auto", OTHER_GPU, torch.bfloat16) == torch.bfloat16
    assert OPS["embed"].select("auto", OTHER_GPU, torch.float32) is OPS["embed"].kernel
    if old:
        with pytest.raises(RuntimeError, match=r"^embed: backend must be one of \('auto', 'reference'\) on cuda"):
            OPS["embed"].select("triton", GPU, torch.float32)


def test_frames_of_more_dimensions(monkeypatch):
    """No kernel has them: reported for a GPU, where the reference of another op would be; silent on a CPU as ever."""
    assert said(lambda: orthogonal_frame(torch.ones(4, 4))) == []
    with FakeTensorMode():
        found = said(lambda: [orthogonal_frame(torch.ones(d, d, device=GPU)) for d in (3, 4, 4, 5)])
    lacking = "its kernels take d in (1, 2, 3), got d = {}"
    said_of = f"probsym_fast: orthogonal_frame {HERE} {{}}. {{}}"
    assert found == [said_of.format(lacking.format(d), SILENCE) for d in (4, 5)]


def test_networks_beyond_the_kernels():
    """Tokens, heads and outputs that the kernels of a GPU do not take; a CPU's do."""

    def run(device, L=3, heads=2, out=2, width=4):
        blocks = {"width": width, "layers": 1, "heads": heads, "feedforward": 4}
        count = blocks_count([0, width, 1, heads, 4, 0], L)
        transformer(torch.ones(2, L, width, device=device), torch.ones(count, device=device), **blocks)
        pairs, count = torch.ones(1, 2, 2, 1, device=device), message_count(3, 1, 4, 1, out)
        row = torch.ones(count, device=device)
        message_passing(torch.ones(2, 2, 3, device=device), pairs, row, width=4, layers=1, out_features=out)

    sizes = {}, {"L": 65}, {"L": 33, "width": 66}, {"L": 32, "width": 66}, {"out": 257}, {"width": 260, "heads": 26}
    assert said(lambda: [run("cpu", **some) for some in sizes]) == []
    with FakeTensorMode():
        found = said(lambda: [run(GPU, **some) for some in sizes])
    lacking = "64 tokens, got 65", "32 features of a head, got 33", "256 features of the width, got 260"
    expected = [f"transformer {HERE} its kernels take at most {x}" for x in lacking]
    expected.insert(2, f"message_passing {HERE} its kernels take at most 256 features of the width or output, got 257")
    assert found == [f"probsym_fast: {x}. {SILENCE}" for x in expected]


@pytest.mark.parametrize("built", [True, False])
def test_a_report_does_not_break_a_graph(monkeypatch, built):
    """Said while it is traced; the reason is a dtype, or that nothing is built."""
    if not built:
        without_kernels(monkeypatch, OPS)
    monkeypatch.setattr(_extension, "_problems", {} if built else {"_C": "the compiled kernels are not built"})
    edges, x = torch.tensor([[0, 1], [1, 2]]), torch.randn(3, 2, dtype=torch.float64)

    def sums(x):
        return OPS["aggregate"].select("auto", GPU, x.dtype)(x, edges, None, None)

    torch._dynamo.reset()
    traced = torch.compile(sums, fullgraph=True, backend="eager")
    found = said(lambda: [traced(x), traced(x)])
    assert len([m for m in found if m.startswith("probsym_fast: aggregate")]) == 1
    assert torch.equal(traced(x), sums(x))
