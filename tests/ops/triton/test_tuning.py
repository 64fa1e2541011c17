"""The configuration of a kernel: measured once for a bucket of sizes, and kept."""

import importlib
import pkgutil
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from probsym_fast.ops import triton as triton_ops
from probsym_fast.ops.triton import _launch, _sort_by_key
from probsym_fast.ops.triton import _lazy as launcher
from tests.helpers.gpu_clock import Clock
from tests.ops.triton.inputs import axis_of

CONFIGURATIONS = {"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A timer that finds every configuration faster than the one before, an empty cache; what is measured."""
    calls = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "seconds_of", lambda run: calls.append(run) or -len(calls))
    monkeypatch.setattr(_launch, "_told", False)
    return calls


def choose(kernel, *sizes, device="cuda", dtype=torch.float32):
    return kernel._choose(torch.device(device), None, (torch.zeros(1, dtype=dtype),), sizes, {})


def test_the_fastest_configuration_is_measured_once_and_kept(measured, monkeypatch):
    """Once for a bucket of sizes, also by another process; the first in deterministic mode and in a graph capture."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    configurations, function = CONFIGURATIONS, _sort_by_key._count.function
    kernel = _launch.Kernel(function, configurations)
    assert choose(kernel, 100, device="cpu") == configurations[0]
    capturing[0] = True
    assert choose(kernel, 100) == configurations[0]
    capturing[0] = False
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(kernel, 100) == configurations[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not measured
    assert [choose(kernel, size) for size in (100, 128, 65)] == [configurations[2]] * 3
    assert choose(_launch.Kernel(function, configurations), 70) == configurations[2]  # from the cache
    assert len(measured) == 3
    choose(kernel, 129)
    choose(kernel, 100, dtype=torch.bfloat16)
    assert len(measured) == 9


def test_kept_choices_that_cannot_be_used_are_measured_again(measured, tmp_path, monkeypatch):
    """With one warning: a damaged file, and a folder that cannot be written. A choice that is none of ours is passed over."""
    function = _sort_by_key._count.function
    choose(_launch.Kernel(function, CONFIGURATIONS), 100)
    (path,) = tmp_path.rglob("configuration.json")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for damaged in (b"{'BLOCK'", b"", b"\xff\xfe\x00", b"[" * 40):
            path.write_bytes(damaged)
            measured.clear()
            assert choose(_launch.Kernel(function, CONFIGURATIONS), 100) == CONFIGURATIONS[2]
            assert len(measured) == 3
    (warning,) = said
    assert issubclass(warning.category, RuntimeWarning)
    assert "cannot keep the kernel configurations; they are measured again" in str(warning.message)
    assert (
        choose(_launch.Kernel(function, CONFIGURATIONS), 100) == CONFIGURATIONS[2] and len(measured) == 3
    )  # kept again
    for stranger in ('{"BLOCK": 7}', "3", "null"):
        path.write_text(stranger)
        measured.clear()
        choose(_launch.Kernel(function, CONFIGURATIONS), 100)
        assert len(measured) == 3
    monkeypatch.setattr(_launch, "_told", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path / "below a file"))
    with pytest.warns(RuntimeWarning, match="cannot keep the kernel configurations"):
        assert choose(_launch.Kernel(function, CONFIGURATIONS), 100) == CONFIGURATIONS[2]


def test_ragged_sizes_share_a_choice(measured, monkeypatch):
    """Batches as they come, of one bucket: what the first has measured serves all; deterministic mode takes the first."""
    taken, on_gpu = [], _launch.Kernel._choose
    monkeypatch.setattr(
        _launch.Kernel, "_choose", lambda kernel, device, *rest: on_gpu(kernel, torch.device("cuda"), *rest)
    )
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, arguments, settings: taken.append((kernel, settings)))

    def step(nodes, edges):
        x, pairs, ptr = torch.zeros(nodes, 10, 64), torch.zeros(2, edges, dtype=torch.int64), torch.tensor([0, nodes])
        launcher("aggregate", "forward")(x, pairs, None, None)
        rank, axis = torch.arange(130).expand(1, 2, 130), axis_of(130, 4)
        rest = ptr, rank, rank, *[torch.zeros(1, 2, 130)] * 3, 0.5, *axis, torch.zeros(64, 3, 33, 33)
        tokens, values = torch.zeros(1, 2, 16, 64), torch.zeros(edges, 3)
        launcher("embed", "forward")(pairs, values, *rest, None)
        launcher("embed", "backward")(tokens, pairs, values, *rest, True, True, True, True)

    sizes = ((120, 620), (128, 660), (101, 560), (110, 580))
    step(*sizes[0])
    several = len(measured)
    assert several
    for size in sizes[1:]:
        step(*size)
    assert len(measured) == several
    assert any(settings.items() >= kernel.configurations[-1].items() for kernel, settings in taken)
    step(400, 520)
    assert len(measured) > several
    several = len(measured)
    taken.clear()
    torch.use_deterministic_algorithms(True)
    try:
        step(1000, 9000)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(measured) == several
    assert all(settings.items() >= kernel.among(settings)[0].items() for kernel, settings in taken)


class NoTensors(TorchDispatchMode):
    """Refuses every operation of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"tuning called {func}")


@pytest.mark.parametrize("fastest", range(3))
def test_tuning_allocates_nothing(fastest, monkeypatch, tmp_path):
    """It runs in a step whose peak `chunk="auto"` may be measuring. Kernels shorter than their launch are told apart, too."""
    clock, seconds = Clock(monkeypatch), [2e-5, 3e-5, 4e-5]
    seconds[0], seconds[fastest] = seconds[fastest], seconds[0]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, arguments, x: clock.run(seconds[x["BLOCK"] - 1]))
    kernel, tensor = _launch.Kernel(_sort_by_key._count.function, CONFIGURATIONS), torch.zeros(1)
    with NoTensors():
        assert kernel._choose(torch.device("cuda"), None, (tensor,), (100,), {}) == CONFIGURATIONS[fastest]


def test_the_lists_of_configurations_are_short():
    modules = [
        importlib.import_module(x.name) for x in pkgutil.iter_modules(triton_ops.__path__, "probsym_fast.ops.triton.")
    ]
    kernels = [x for module in modules for x in vars(module).values() if isinstance(x, _launch.Kernel)]
    assert {len(x.configurations) for x in kernels} <= {1, 2, 3, 4} and len(kernels) > 15
