"""Runs of a row: as a function of its numbers, and forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from tests.programs.rows import Row, Size

SIZE = Size(2, 9, 5)


def floats(found) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]


def leaves(inputs: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    """The inputs in a dtype, rounded to bfloat16, which every dtype holds. All that are floating need gradients."""
    return tree_map(lambda x: x.bfloat16().to(dtype).requires_grad_() if x.is_floating_point() else x, inputs)


def flat(found: list[Tensor]) -> Tensor:
    return torch.cat([x.double().flatten() for x in found]) if found else torch.zeros(0).double()


def function(row: Row) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(x, f): all floating inputs in one float64 vector, and from it all floating outputs."""
    program = row.program(False).double()
    inputs, spec = tree_flatten(row.sample(SIZE, False, torch.float64))

    def f(x: Tensor) -> Tensor:
        sizes = [y.numel() if y.is_floating_point() else 0 for y in inputs]
        parts = zip(inputs, x.split(sizes), strict=True)
        return flat(floats(program(spec.unflatten([part.view(y.shape) if part.numel() else y for y, part in parts]))))

    return flat(floats(inputs)), f


def is_seed(x: Tensor) -> bool:
    return x.shape == () and not x.is_floating_point()


def seeded(row: Row) -> bool:
    return any(map(is_seed, row.leaves(SIZE)))


def scalar(y: Tensor) -> Tensor:
    """A number of which no derivative vanishes."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()


def backward(found) -> None:
    torch.manual_seed(0)
    terms = [(x, (x.float() * torch.randn_like(x.float())).sum()) for x in floats(found)]
    sum(term for x, term in terms if x.requires_grad).backward()
