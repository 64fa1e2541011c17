"""Values and gradients of the launchers against the reference in float64."""

import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from tests.conftest import assert_near
from tests.ops.triton.interpreted.memory import check_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_dtypes(*cases):
    """(dtype, case): every case in float32, the first in the others, whose kernels differ in what they load and store."""
    return [(torch.float32, *case) for case in cases] + [(dtype, *cases[0]) for dtype in DTYPES[1:]]


# rounded once to the dtype, relative to the largest entry
BOUND = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
TF32 = 1e-3  # of products of float32 numbers, where they read 10 bits after the point


class Launched(torch.autograd.Function):
    """The launchers of an op as the dispatcher calls them, by the names in the op's schemas."""

    @staticmethod
    def forward(ctx, name, *arguments):
        out = launcher(name, "forward")(*arguments)
        out = out if isinstance(out, tuple) else (out,)
        check_memory(out, arguments)
        ctx.name, ctx.arguments, ctx.out = name, arguments, out
        return out[0]  # of several results the first has the gradient

    @staticmethod
    def backward(ctx, d_out):
        op = OPS[ctx.name]
        names = [x.name for x in op.kernel._schema.arguments]
        results = [x.name for x in op.kernel._schema.returns]
        known = dict(zip(names, ctx.arguments, strict=True)) | dict(zip(results, ctx.out, strict=True))
        known[f"d_{results[0]}"] = d_out
        known |= {f"needs_{x}": needed for x, needed in zip(names, ctx.needs_input_grad[1:], strict=True)}
        found = launcher(ctx.name, "backward")(*(known[x.name] for x in op.backward._schema.arguments))
        found = found if isinstance(found, tuple) else (found,)
        check_memory(found, (d_out, *ctx.arguments))
        gives = dict(zip((x.name for x in op.backward._schema.returns), found, strict=True))
        for x, needed in zip(names, ctx.needs_input_grad[1:], strict=True):
            if needed:
                given = known[x]
                assert gives[f"d_{x}"].shape == given.shape and gives[f"d_{x}"].dtype == given.dtype
        return None, *(gives.get(f"d_{x}") if known[f"needs_{x}"] else None for x in names)


def check(name, arguments, leaves, single=BOUND[torch.float32]):
    """Values and gradients to the arguments numbered `leaves`, against the reference in float64.

    single: the bound of those in float32.
    """

    def run(call, arguments):
        made = [
            x.detach().requires_grad_(i in leaves) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(arguments)
        ]
        out = call(*made)
        out = out[0] if isinstance(out, tuple) else out
        combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(lowest).to(out)
        return out.detach(), *torch.autograd.grad(out, [made[i] for i in leaves], combination)

    lowest = min(
        (x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()), key=lambda d: d.itemsize
    )
    found = run(lambda *x: Launched.apply(name, *x), arguments)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    expected = run(OPS[name].reference, exact)
    bounds = BOUND | {torch.float32: single}
    for x, y in zip(found, expected, strict=True):
        if not y.numel():
            assert x.shape == y.shape
            continue
        assert_near(x, y, {dtype: max(bounds[dtype], BOUND[lowest] if x.ndim == 0 else 0) for dtype in DTYPES})
