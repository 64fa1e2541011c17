"""The Triton kernels on CPU tensors under triton's interpreter, against the float64 reference: run by test_triton.py in a
process of its own, where TRITON_INTERPRET=1 stands before triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy
from tests.conftest import assert_near
from tests.ops.graphs import batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rounded once to the dtype, relative to the largest entry
BOUND = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True, params=["atomics", "deterministic"])
def mode(request):
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def garbage_in_fresh_memory(monkeypatch):
    def poisoned(make):
        def call(*arguments, **settings):
            x = make(*arguments, **settings)
            return x.fill_(float("nan") if x.is_floating_point() else -(10**9))

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


class Through(torch.autograd.Function):
    """The launchers of an op as the dispatcher calls them, by the names in the op's schemas."""

    @staticmethod
    def forward(ctx, name, *arguments):
        out = _lazy(name, "forward")(*arguments)
        ctx.name, ctx.arguments, ctx.out = name, arguments, out
        return out

    @staticmethod
    def backward(ctx, d_out):
        op = OPS[ctx.name]
        names = [x.name for x in op.kernel._schema.arguments]
        (result,) = (x.name for x in op.kernel._schema.returns)
        known = dict(zip(names, ctx.arguments, strict=True)) | {f"d_{result}": d_out, result: ctx.out}
        known |= {f"needs_{x}": needed for x, needed in zip(names, ctx.needs_input_grad[1:], strict=True)}
        found = _lazy(ctx.name, "backward")(*(known[x.name] for x in op.backward._schema.arguments))
        found = found if isinstance(found, tuple) else (found,)
        gives = dict(zip((x.name for x in op.backward._schema.returns), found, strict=True))
        for x, needed in zip(names, ctx.needs_input_grad[1:], strict=True):
            if needed:
                given = known[x]
                assert gives[f"d_{x}"].shape == given.shape and gives[f"d_{x}"].dtype == given.dtype
        return None, *(gives.get(f"d_{x}") if known[f"needs_{x}"] else None for x in names)


def check(name, arguments, leaves):
    """Values and gradients to the arguments numbered `leaves`, against the reference in float64."""

    def run(call, arguments):
        made = [
            x.detach().requires_grad_(i in leaves) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(arguments)
        ]
        out = call(*made)
        combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
        return out.detach(), *torch.autograd.grad(out, [made[i] for i in leaves], combination)

    found = run(lambda *x: Through.apply(name, *x), arguments)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    expected = run(OPS[name].reference, exact)
    lowest = min(
        (x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()), key=lambda d: d.itemsize
    )
    for x, y in zip(found, expected, strict=True):
        if not y.numel():
            assert x.shape == y.shape
            continue
        assert_near(x, y, {dtype: max(BOUND[dtype], BOUND[lowest] if x.ndim == 0 else 0) for dtype in DTYPES})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (300,)])
@pytest.mark.parametrize("virtual", [False, True])
def test_aggregate(shape, dtype, virtual):
    data = batch([5, 4, 1, 9, 0], 9)
    x = torch.randn(19 + 5 * virtual, *shape).to(dtype)
    check("aggregate", [x, data.edges, data.ptr if virtual else None, torch.tensor(1.3)], [0, 3])
    check("aggregate", [x, data.edges, data.ptr if virtual else None, None], [0])


@pytest.mark.parametrize("nodes", [0, 4])
def test_aggregate_of_nothing(nodes):
    x = torch.randn(nodes, 3)
    check("aggregate", [x, torch.zeros(2, 0, dtype=torch.int64), None, torch.tensor(0.5)], [0, 3])
