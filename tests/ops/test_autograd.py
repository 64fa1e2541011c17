"""The gradient made from the names in the schemas: in C++ (csrc/autograd.cpp) and, without the extension, in Python."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from probsym_fast._memory import peak_memory
from probsym_fast.ops import _extension, _op

SCHEMA = "(Tensor a, Tensor? b, Tensor index, float scale) -> (Tensor product, Tensor doubled, Tensor where)"
NAMES = itertools.count()


def reference(a, b, index, scale):
    product = scale * (a if b is None else a * b)
    return product, 2 * a, index + 1


def backward(d_product, d_doubled, product, a, b, scale, needs_b):
    zeros = torch.zeros_like(a)
    d_product = zeros if d_product is None else d_product
    d_a = scale * (d_product if b is None else d_product * b) + 2 * (zeros if d_doubled is None else d_doubled)
    return d_a, scale * d_product * a if needs_b else None


def make(side, required="", others=None):
    """A throwaway op a*b with a kernel in Python, made differentiable from its schema on the given side.

    others: of `Op.gradient`; its backward does not take `index`.
    """
    name = f"test_product_{next(NAMES)}"
    op = _op.Op(name, SCHEMA, reference=reference, shapes=reference)
    del _op.OPS[name]
    op.gradient(
        f"(Tensor{required} d_product, Tensor? d_doubled, Tensor product, Tensor a, Tensor? b, float scale, bool needs_b)"
        " -> (Tensor d_a, Tensor d_b)",
        shapes=backward,
        others=others,
    )
    asked = []

    def recorded(*arguments):
        asked.append(arguments[-1])
        return backward(*arguments)

    _op.LIBRARY.impl(name, reference, "CPU")
    _op.LIBRARY.impl(f"{name}_backward", recorded, "CPU")
    make_differentiable(op, side)
    return op, asked


def make_differentiable(op, side):
    _op.differentiate(op) if side == "python" else _extension.make_differentiable()(op.name, op.second)


@pytest.fixture(params=["python", "cpp"])
def side(request):
    if request.param == "cpp" and _extension.make_differentiable() is None:
        pytest.skip("the extension is not built")
    return request.param


def test_gradients_values_and_what_is_asked_for(side):
    op, asked = make(side, "?")
    a = torch.randn(5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    index = torch.arange(5)
    assert torch.autograd.gradcheck(lambda a, b: op.kernel(a, b, index, 0.5)[:2], (a, b))
    assert torch.autograd.gradcheck(lambda a: op.kernel(a, None, index, 0.5)[:2], (a,))
    asked.clear()
    op.kernel(a, b.detach(), index, 0.5)[0].sum().backward()
    op.kernel(a, b, index, 0.5)[1].sum().backward()
    assert asked == [False, True]
    assert b.grad is None or not b.grad.any()
    product, doubled, where = op.kernel(a, b, index, 0.5)
    assert product.requires_grad and doubled.requires_grad and not where.requires_grad
    with torch.no_grad():
        assert not op.kernel(a, b, index, 0.5)[0].requires_grad


def test_no_gradient_in_means_none_out_where_the_backward_needs_one(side):
    op, asked = make(side)
    a = torch.randn(3, requires_grad=True)
    _, doubled, _ = op.kernel(a, None, torch.arange(3), 1.0)
    (gradient,) = torch.autograd.grad(doubled.sum(), a, allow_unused=True)
    assert gradient is None and not asked


def test_a_second_derivative_without_a_definition_says_what_to_do(side):
    op, _ = make(side, "?")
    a = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.kernel(a, None, torch.arange(3), 1.0)[0].pow(2).sum(), a, create_graph=True)
    message = f'^{op.name}: the kernels have no second derivative; use backend="reference" for it$'
    with pytest.raises(RuntimeError, match=message):
        gradient.sum().backward()


INDEX = {"index": lambda known: torch.arange(len(known["a"]))}


def test_second_and_third_derivatives(side):
    """To each input, with gradients of one result or of both, and where a gradient is not asked for."""
    op, _ = make(side, "?", INDEX)
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in "ab")
    f = lambda a, b: op.kernel(a, b, torch.arange(3), 0.5)  # noqa: E731
    for some in (f, lambda a, b: f(a, b)[0], lambda a, b: f(a, b)[1]):
        assert torch.autograd.gradgradcheck(lambda a, b, some=some: some(a, b)[:2], (a, b))
    assert torch.autograd.gradgradcheck(lambda a: f(a, b.detach())[0], (a,))
    assert torch.autograd.gradgradcheck(lambda a: op.kernel(a, None, torch.arange(3), 0.5)[:2], (a,))
    y = f(a, b)[0].pow(2).sum()  # (a b / 2)^2
    (first,) = torch.autograd.grad(y, a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a, create_graph=True)
    assert torch.allclose(second, b**2 / 2)
    assert torch.allclose(torch.autograd.grad(second.sum(), b)[0], b)


def test_second_derivatives_of_low_precision_are_computed_in_float32(side):
    op, _ = make(side, "?", INDEX)
    a = torch.rand(5).bfloat16().requires_grad_()
    (first,) = torch.autograd.grad(op.kernel(a, a, torch.arange(5), 0.5)[0].pow(2).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)  # of a^4 / 4
    assert second.dtype == torch.bfloat16
    assert torch.allclose(second.float(), 3 * a.detach().float() ** 2, rtol=3e-2)


def test_a_second_derivative_that_raises(side):
    """The error of Python arrives as it is."""

    def missing(known):
        raise KeyError("no index")

    op, _ = make(side, "?", {"index": missing})
    a = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.kernel(a, None, torch.arange(3), 1.0)[0].pow(2).sum(), a, create_graph=True)
    with pytest.raises(KeyError, match="no index"):
        gradient.sum().backward()


def test_second_derivatives_keep_nothing(side):
    op, _ = make(side, "?", INDEX)
    a = torch.randn(1000, dtype=torch.float64, requires_grad=True)

    def step(checkpoints=True):
        run = lambda x: op.kernel(x.sin(), x, torch.arange(1000), 0.5)[0]  # noqa: E731
        y = checkpoint(run, a, use_reentrant=False) if checkpoints else run(a)
        (first,) = torch.autograd.grad(y.sum(), a, create_graph=True)
        return torch.autograd.grad(first.square().sum(), a)[0]

    assert torch.equal(step(), step(checkpoints=False))
    assert peak_memory(lambda: [step().sum().item() for _ in range(20)], "cpu") <= peak_memory(step, "cpu")


def test_names_without_meaning_are_refused(side):
    name = f"test_product_{next(NAMES)}"
    op = _op.Op(name, SCHEMA, reference=reference, shapes=reference)
    del _op.OPS[name]
    op.gradient("(Tensor d_product, Tensor c) -> Tensor d_a", shapes=backward)
    with pytest.raises((ValueError, RuntimeError), match=r"_backward: .*c"):
        make_differentiable(op, side)


def test_a_checkpoint_that_ends_its_recomputation_early_leaves_nothing_behind(side):
    """It throws while the last op's tensors are kept: results, node and context must not hold each other for ever."""
    op, _ = make(side)
    a = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    index = torch.arange(1000)

    def step():
        product, *_ = checkpoint(lambda: op.kernel(a.sin(), None, index, 0.5), use_reentrant=False)
        product.sum().backward()
        a.grad = None

    step()
    assert peak_memory(lambda: [step() for _ in range(20)], "cpu") <= peak_memory(step, "cpu")
