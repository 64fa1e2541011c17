"""The launchers under the public functions, as the dispatcher calls them."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from probsym_fast.ops import OPS, Permutation, aggregate, debug, embed_edges, orthogonal_frame, readout
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops.triton import KERNELS
from probsym_fast.ops.triton import _lazy as launcher
from tests.ops.test_backends import CALLS, Calls, matrices
from tests.ops.triton.interpreted.memory import garbage

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the dispatcher reports that a kernel is replaced
every_kernel = pytest.mark.parametrize("name", [name for name in KERNELS if name in CALLS])  # with a gradient


@pytest.fixture
def in_place_of_cpu_kernels(monkeypatch, request):
    """The launchers registered for CPU tensors as `register` does for CUDA, under the public functions.

    Of the op that the test names, if it does; others keep their kernels, which are faster here.
    """
    library = torch.library.Library("probsym_fast", "IMPL")
    named = request.node.callspec.params.get("name")
    for name, dtypes in KERNELS.items() if named is None else [(named, KERNELS[named])]:
        library.impl(name, launcher(name, "forward"), "CPU", allow_override=True)
        library.impl(f"{name}_backward", launcher(name, "backward"), "CPU", allow_override=True)
        monkeypatch.setitem(OPS[name].from_python, "cpu", ("triton", dtypes))
        monkeypatch.setitem(BACKENDS, (name, "cpu"), ("triton", "reference"))
    yield
    library._destroy()


def calls_of(name, record):
    """(function, arguments) of the op's forward and of its backward."""
    calls = [(f, a) for f, a in record.calls if f.name().split("::")[1].removesuffix("_backward") == name]
    assert len(calls) == 2
    return calls


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_dispatcher(name, dtype, in_place_of_cpu_kernels):
    """Schemas, autograd with results left out, dtypes of the public functions, fake results like the real ones."""
    x = matrices().to(dtype)
    results = []
    for backend, leaf in (("triton", x), ("reference", x.double())):
        leaf = leaf.detach().requires_grad_()
        with Calls() as record:
            out = CALLS[name](leaf, backend)
            combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype).to(out)
            results.append((out, *torch.autograd.grad(out, leaf, combination)))
        if backend == "triton":
            calls = calls_of(name, record)
    for y, z in zip(*results, strict=True):
        bound = 5e-2 if dtype == torch.bfloat16 else 5e-5  # of some roundings to bfloat16 on the way
        assert (y.double() - z).abs().max() <= bound * z.abs().max().clamp(min=1)
    for function, arguments in calls:
        real = function(*arguments)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for a, b in zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]:
            assert (a is None) == (b is None)
            assert a is None or (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def strided(x):
    """x among other numbers: no two of its own are neighbours."""
    if not isinstance(x, torch.Tensor) or not x.ndim:
        return x
    return torch.stack([x, torch.full_like(x, garbage(x.dtype))], -1)[..., 0]


@every_kernel
def test_any_strides(name, in_place_of_cpu_kernels):
    """Forward and backward as the op itself calls them, once more with every tensor strided.

    Images are multiplied by torch.mm, whose rounding may depend on the strides.
    """
    rounding = 3e-6 if name in ("embed_image", "embed_turned") else 0
    leaf = matrices().requires_grad_()
    with Calls() as record:
        CALLS[name](leaf, "triton").sum().backward()
    for function, arguments in calls_of(name, record):
        pair = [function(*some) for some in (arguments, [strided(x) for x in arguments])]
        for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in pair), strict=True):
            assert (x is None) == (y is None)
            if x is not None:  # NaN where nothing is kept
                atol = rounding * x.abs().max().item() if rounding else 0
                torch.testing.assert_close(x, y, rtol=0, atol=atol, equal_nan=True)


@every_kernel
def test_the_order_of_programs_changes_no_bit(name, programs, in_place_of_cpu_kernels):
    """In deterministic mode: no program reads or adds to what another of its launch writes."""
    torch.use_deterministic_algorithms(True)
    x, results = matrices(), []
    for programs.seed in (None, 2):
        leaf = x.clone().requires_grad_()
        out = CALLS[name](leaf, "triton")
        combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append((out, *torch.autograd.grad(out, leaf, combination)))
    for y, z in zip(*results, strict=True):
        assert torch.equal(y, z)


@pytest.mark.exhaustive  # minutes; tests/programs/test_gpu.py compares all ops under autocast, on a GPU
@every_kernel
def test_kernels_compute_in_their_dtype_under_autocast(name, in_place_of_cpu_kernels):
    """Forward and backward, bit for bit, as the kernels of the CPU do."""
    x, results = matrices(), []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = CALLS[name](leaf, "triton")
            assert out.dtype == torch.float32
            results.append((out, *torch.autograd.grad(out, leaf, torch.ones_like(out))))
    for y, z in zip(*results, strict=True):
        assert torch.equal(y, z)


def test_debug_mode_checks_what_the_kernels_do_not(in_place_of_cpu_kernels):
    """With the messages of the reference; without it bad numbers pass."""
    p, ptr = Permutation(torch.arange(4).expand(1, 2, 4)), torch.tensor([0, 4])
    edges, x, nan = torch.tensor([[0, 7], [1, 2]]), torch.randn(4, 3), torch.full((2, 3, 3), torch.nan)
    tokens, weight = torch.randn(1, 2, 4, 5), torch.randn(5, 3, 2, 2)
    calls = {
        "embed_edges: edge_index must hold node numbers 0 to 3, got 7 in column 1": lambda b: embed_edges(
            edges, torch.randn(2, 3), ptr, p, weight, grid=2, backend=b
        ),
        "readout: at must hold node numbers 0 to 3, got 7 in column 1": lambda b: readout(
            tokens, ptr, p, weight, at=edges, backend=b
        ),
        "aggregate: edge_index must hold node numbers 0 to 3, got 7 and 2 in column 1": lambda b: aggregate(
            x, edges, backend=b
        ),
        "orthogonal_frame: matrices must be finite, got NaN or infinity": lambda b: orthogonal_frame(nan, backend=b),
    }
    for message, call in calls.items():
        call("triton")
        with debug():
            for backend in ("triton", "auto", "reference"):
                with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                    call(backend)
            with debug(False):
                call("auto")
        with Calls() as record:
            call("triton")
        assert record.calls  # the kernel itself again
