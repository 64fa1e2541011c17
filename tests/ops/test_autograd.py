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


def make(side, required=""):
    """A throwaway op a*b with a kernel in Python, made differentiable from its schema on the given side."""
    name = f"test_product_{next(NAMES)}"
    op = _op.Op(name, SCHEMA, reference=reference, shapes=reference)
    del _op.OPS[name]
    op.gradient(
        f"(Tensor{required} d_product, Tensor? d_doubled, Tensor product, Tensor a, Tensor? b, float scale, bool needs_b)"
        " -> (Tensor d_a, Tensor d_b)",
        shapes=backward,
    )
    asked = []

    def recorded(*arguments):
        asked.append(arguments[-1])
        return backward(*arguments)

    _op.LIBRARY.impl(name, reference, "CPU")
    _op.LIBRARY.impl(f"{name}_backward", recorded, "CPU")
    _op.differentiate(op) if side == "python" else _extension.differentiate()(name)
    return op, asked


@pytest.fixture(params=["python", "cpp"])
def side(request):
    if request.param == "cpp" and _extension.differentiate() is None:
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


def test_a_second_derivative_says_what_to_do(side):
    op, _ = make(side, "?")
    a = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.kernel(a, None, torch.arange(3), 1.0)[0].pow(2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative; use backend="reference"'):
        gradient.sum().backward()


def test_names_without_meaning_are_refused(side):
    name = f"test_product_{next(NAMES)}"
    op = _op.Op(name, SCHEMA, reference=reference, shapes=reference)
    del _op.OPS[name]
    op.gradient("(Tensor d_product, Tensor c) -> Tensor d_a", shapes=backward)
    with pytest.raises((ValueError, RuntimeError), match=r"_backward: .*c"):
        _op.differentiate(op) if side == "python" else _extension.differentiate()(name)


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
    assert peak_memory(lambda: [step() for _ in range(20)], "cpu") == peak_memory(step, "cpu")
