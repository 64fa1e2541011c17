"""torch.func on the ops: "auto" takes the reference, with every transform; kernels refuse by name."""

import pytest
import torch
from torch.autograd import forward_ad

from probsym_fast.ops import OPS, using_backend
from probsym_fast.ops._patches import slots_of_places
from tests.conftest import GRADIENT, assert_near
from tests.ops.test_autograd import make, side  # noqa: F401
from tests.ops.test_backends import CALLS, every_kernel, every_op

SHAPE = (2, 2, 3, 3)


def leaf() -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


def weighted(name: str, backend: str = "auto"):
    """x -> a scalar of the op's result."""

    def f(x):
        y = CALLS[name](x, backend)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()

    return f


def jacobian(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda x: CALLS[name](x, "reference"), x)


@every_op
def test_jacobians_backward_and_forward(name):
    """vjp and vmap, jvp and vmap."""
    x = leaf()
    f, expected = lambda x: CALLS[name](x, "auto"), jacobian(name, x)
    assert_near(torch.func.jacrev(f)(x), expected, GRADIENT)
    assert_near(torch.func.jacfwd(f)(x), expected, GRADIENT)


@every_op
def test_a_derivative_in_forward_mode(name):
    x, v = leaf(), leaf()
    expected = jacobian(name, x).flatten(-4) @ v.flatten()
    value, found = torch.func.jvp(lambda x: CALLS[name](x, "auto"), (x,), (v,))
    assert_near(value, CALLS[name](x, "reference"))
    assert_near(found, expected, GRADIENT)
    with forward_ad.dual_level(), torch.no_grad():
        found = forward_ad.unpack_dual(CALLS[name](forward_ad.make_dual(x, v), "auto")).tangent
    assert_near(found, expected, GRADIENT)


@every_op
def test_gradients_of_many_inputs_at_once(name):
    """grad within vmap and vmap within grad: with the straight-through gradient in both."""
    f, many = weighted(name), torch.stack([leaf() for _ in range(3)])
    with using_backend("reference"):
        expected = torch.stack([torch.autograd.functional.jacobian(f, x) for x in many])
    assert_near(torch.vmap(torch.func.grad(f))(many), expected, GRADIENT)
    assert_near(torch.func.grad(lambda many: torch.vmap(f)(many).sum())(many), expected, GRADIENT)


@every_op
def test_second_derivatives(name):
    """Forward over backward."""
    x, v = leaf(), leaf()
    with using_backend("reference"):
        _, expected = torch.autograd.functional.hvp(weighted(name), x, v)
    _, found = torch.func.jvp(torch.func.grad(weighted(name)), (x,), (v,))
    assert_near(found, expected, {torch.float64: 1e-9})


@every_op
def test_jacobians_of_kernels_take_batches_of_gradients(name):
    """The backward kernel under vmap, as torch.autograd.functional.jacobian(vectorize=True) has it."""
    x = leaf()
    found = torch.autograd.functional.jacobian(lambda x: CALLS[name](x, "auto"), x, vectorize=True)
    assert_near(found, jacobian(name, x), GRADIENT)


@every_kernel
def test_a_named_kernel_refuses(name, device, backend):
    x = torch.randn(SHAPE, device=device)
    message = (
        f'{name}: the kernels support neither torch.func .*got backend {backend!r} under one; use backend="reference"$'
    )
    f = lambda x: CALLS[name](x, backend).sum()  # noqa: E731
    for transform in (
        lambda: torch.func.grad(f)(x),
        lambda: torch.vmap(f)(x[None]),
        lambda: torch.func.jvp(f, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=message):
            transform()
    if name in ("orthogonal_frame", "act_orthogonal", "linear_batch_norm_relu"):  # a single op, that has this kernel
        with using_backend(backend), pytest.raises(RuntimeError, match=message):
            torch.func.grad(weighted(name))(x)


def test_a_call_of_the_kernel_itself_refuses(side):  # noqa: F811
    op, _ = make(side, "?")
    f = lambda a: op.kernel(a, None, torch.arange(3), 1.0)[0].sum()  # noqa: E731
    for transform in (torch.func.grad, torch.vmap, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=rf'{op.name}: .*got a direct call under one; use backend="reference"$'):
            transform(f)(torch.ones(3, 3) if transform is torch.vmap else torch.ones(3))


def test_every_kernel_refuses():
    key = "FuncTorchDynamicLayerFrontMode"
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(op.qualified, key) for op in OPS.values())


def test_half_precision_is_computed_in_float32():
    """As the reference has it: kernels that take float16 do not count."""
    x = leaf().half()
    for name in ("act_orthogonal", "embed", "aggregate"):
        found, expected = torch.func.grad(weighted(name))(x), torch.func.grad(weighted(name, "reference"))(x)
        assert torch.equal(found, expected)


def test_nothing_made_under_a_transform_is_kept():
    """Places of the slots are made once; a tensor that belongs to a transform would be dead after it."""
    torch.func.grad(lambda x: x.sum() + slots_of_places(11, 7, "zeros", False, x.device).sum())(torch.ones(3))
    slots = slots_of_places(11, 7, "zeros", False, torch.device("cpu"))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(slots)
    assert slots.tolist() == [*range(11), -1, -1, -1]


def test_values_are_checked_where_there_are_any():
    """grad has values to look at, vmap has none."""
    x = leaf()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="matrices must be finite"):
        torch.func.grad(weighted("orthogonal_frame"))(x)
    assert torch.vmap(weighted("orthogonal_frame"))(torch.stack([x, leaf()])).isfinite().tolist() == [False, True]


def test_a_transform_that_is_compiled():
    """It records the reference, and without a transform the kernel where there is one."""
    x, f, recorded = leaf(), weighted("embed"), []

    def look(graph, _):
        recorded.append(graph.code)
        return graph.forward

    found = torch.compile(torch.func.grad(f), backend=look, fullgraph=True)(x)
    assert_near(found, torch.func.grad(f)(x), GRADIENT)
    torch.compile(f, backend=look, fullgraph=True)(x)
    assert ["probsym_fast.embed" in code for code in recorded] == [False, OPS["embed"].backends("cpu")[0] == "cpu"]
