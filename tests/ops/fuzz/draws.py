"""The random choices of one case: sizes, magnitudes, layouts in memory, and what is refused."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = {torch.float64: 200, torch.float32: 30, torch.bfloat16: 30, torch.float16: 0}  # of the units of tensors
WIDE = torch.float64, torch.float32


@dataclass
class Leaf:
    """A floating input: what its entries are multiples of, so that bounds of numbers of order 1 hold for any."""

    tensor: Tensor
    unit: float


@dataclass
class Case:
    """call(backend, leaves) -> results in the given units; the gradients are asked for of `wanted` leaves."""

    call: Callable[[str, SimpleNamespace], tuple[Tensor, ...]]
    leaves: dict[str, Leaf]
    units: tuple[float, ...]
    combined: float  # the unit of a sum of the results that have gradients
    refused: bool
    wanted: list[str]
    amplified: float  # how much larger than a last digit of 1 what rounds within the op may come out


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.leaves: dict[str, Leaf] = {}
        self.refused, self.amplified = False, 1.0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, *options):
        return self.random.choice(options)

    def size(self, least: int = 0, most: int = 9) -> int:
        """Mostly small, often the least."""
        few, any_number = (self.random.randint(least, n) for n in (min(most, least + 4), most))
        return self.random.choice((least, least + 1, few, few, any_number))

    def spoil(self) -> bool:
        """Whether an argument is to be one that is refused."""
        spoilt = not self.refused and self.chance(0.03)
        self.refused |= spoilt
        return spoilt

    def unit(self, most: int | None = None) -> float:
        most = EXPONENTS[self.dtype] if most is None else min(most, EXPONENTS[self.dtype])
        return 2.0 ** self.random.randint(-most, most) if self.chance(0.2) else 1.0

    def integers(self, least: int, below: int, *shape: int) -> Tensor:
        return torch.randint(least, below, shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def numbers(self, *shape: int) -> Tensor:
        """float64 of order 1: any, with ties, with zeros, all alike, of very different magnitudes."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.pick("any", "any", "ties", "zeros", "alike", "alike along an axis", "magnitudes")
        if kind == "ties":
            return self.integers(-2, 3, *shape).double()
        if kind == "zeros":
            return x * (self.uniform(*shape) < self.pick(0.0, 0.5))
        if kind == "alike":
            return torch.full(shape, self.pick(1.0, -0.75), dtype=torch.float64)
        if kind == "alike along an axis" and x.numel() and x.ndim:
            return x.narrow(self.random.randrange(x.ndim), 0, 1).expand(shape).clone()
        return x * 2.0 ** -self.integers(0, 12, *shape) if kind == "magnitudes" else x

    def laid_out(self, x: Tensor) -> Tensor:
        """x in some layout: contiguous, with its axes stored in another order, within a larger tensor, repeated."""
        if not x.ndim or self.chance(0.4):
            return x.contiguous()
        axis = self.random.randrange(x.ndim)
        kind = self.pick("order", "gaps", "repeated")
        if kind == "order":
            order = self.random.sample(range(x.ndim), x.ndim)
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
        if kind == "repeated" and x.shape[axis]:
            first = x.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(x), x):
                return first.contiguous().expand(x.shape)
        if not x.numel():
            return x
        shape = [2 * n + 1 if i == axis else n for i, n in enumerate(x.shape)]
        wide = x.new_full(shape, float("nan") if x.is_floating_point() else -(10**9))
        return wide.narrow(axis, 1, 2 * x.shape[axis]).unflatten(axis, (-1, 2)).select(axis + 1, 0).copy_(x)

    def index(self, x: Tensor) -> Tensor:
        return self.laid_out(x.to(DEVICE))

    def leaf(self, name: str, x: Tensor, unit: float = 1.0, dtype: torch.dtype | None = None) -> None:
        """A floating input, rounded to the dtype, that of the case unless another is given."""
        self.leaves[name] = Leaf(self.laid_out((x * unit).to(DEVICE, dtype or self.dtype)), unit)

    def case(self, call, *units: float) -> Case:
        wanted = [name for name in self.leaves if self.chance(0.8)]
        units = units or (1.0,)
        return Case(call, self.leaves, units, units[0], self.refused, wanted, self.amplified)

    def slots(self) -> int:
        few, many = (self.random.randint(1, n) for n in (12, 70))
        return self.random.choice((1, 2, 3, few, few, few, few, many))
