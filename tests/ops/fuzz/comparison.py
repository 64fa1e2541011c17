"""A case against the float64 reference: values, every gradient, refusals."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from probsym_fast.ops import OPS
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.helpers.items import HALF
from tests.ops.fuzz.cases import CASES
from tests.ops.fuzz.draws import DEVICE, WIDE, Case, Draw

NEARBY = 8  # inputs with other last digits: where a sign is theirs, one of them has the other sign
LAST_DIGITS = 16  # an error of as many last digits of the input is none of the op's


def outcome(case: Case, backend: str, leaves: dict[str, Tensor], combination: Callable[[Tensor, int], Tensor]):
    """The results, and the gradients of a combination of them to the wanted leaves; or the type of the refusal.

    combination: the gradient that comes in to the i-th result that has one.
    """
    made = {name: x.detach().requires_grad_(name in case.wanted) for name, x in leaves.items()}
    try:
        results = case.call(backend, SimpleNamespace(**{"bias": None, "own": None} | made))
    except (TypeError, ValueError) as error:
        return type(error)
    smooth = [x for x in results if x.requires_grad]
    gradients = {}
    if smooth:
        wanted = [made[name] for name in case.wanted]
        given = [combination(x, i) for i, x in enumerate(smooth)]
        found = torch.autograd.grad(smooth, wanted, given, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(case.wanted, found, strict=True))
    return [x.detach() for x in results], gradients


def last_digits_changed(x: Tensor, eps: float, way: int) -> Tensor:
    """x with its last digit one up or down, as the digits say: equal numbers, and twice or minus one, change alike."""
    digits = torch.frexp(x.abs()).mantissa
    return x * (1 + eps * (digits * 1e6 + way).sin().sign())


def check(name: str, seed: int) -> None:
    """Raises AssertionError where a case of an op differs from the float64 reference, by value, gradient or refusal."""
    op, make = CASES[name]
    d = Draw(seed)
    case = make(d)
    kernels = OPS[op].backends(DEVICE.type) if op else ("made",)
    lacking = op is not None and d.dtype == torch.float64 and d.dtype not in OPS[op].kernel_dtypes(DEVICE.type)
    backend = kernels[-1] if lacking or d.chance(0.2) else kernels[0]

    def combination(x: Tensor, i: int) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
        return drawn.to(DEVICE, d.dtype).to(x.dtype)

    before = {name: x.tensor.clone() for name, x in case.leaves.items()}
    found = outcome(
        case,
        backend,
        {name: x.tensor for name, x in case.leaves.items()},
        lambda x, i: d.laid_out(combination(x, i)),
    )
    for name, x in case.leaves.items():
        assert torch.equal(x.tensor.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"
    exact = {name: x.tensor.double().contiguous() for name, x in case.leaves.items()}
    expected = outcome(case, "reference", exact, combination)
    if isinstance(found, type) or isinstance(expected, type):
        assert found is expected, f"{backend} gives {named(found)}, the reference {named(expected)}"
        assert case.refused, f"refused: {named(found)}"
        return
    assert not case.refused, "what must be refused was not"

    eps = torch.finfo(torch.promote_types(d.dtype, torch.float32)).eps
    nearby, floor = [], eps * case.amplified

    def sensitivity(part: int, key) -> float:
        """How much a result moves with the last digits of the input."""
        while len(nearby) < NEARBY:
            changed = {name: last_digits_changed(x, eps, len(nearby)) for name, x in exact.items()}
            nearby.append(outcome(case, "reference", changed, combination))
        return max(float((other[part][key] - expected[part][key]).abs().max()) for other in nearby)

    for i, (x, y) in enumerate(zip(found[0], expected[0], strict=True)):
        if x.is_floating_point():
            near(
                f"result {i}",
                x,
                y,
                VALUE if x.dtype in WIDE else HALF,
                case.units[i],
                lambda i=i: sensitivity(0, i) + floor * case.units[i],
            )
        else:
            assert torch.equal(x, y), f"result {i} differs"
    assert found[1].keys() == expected[1].keys(), f"gradients to {sorted(found[1])}, not {sorted(expected[1])}"
    for name, x in found[1].items():
        leaf = case.leaves[name]
        assert x.dtype == leaf.tensor.dtype, f"the gradient to {name} is {x.dtype}"
        unit = case.combined / leaf.unit
        near(
            f"the gradient to {name}",
            x,
            expected[1][name],
            GRADIENT,
            unit,
            lambda name=name, unit=unit: sensitivity(1, name) + floor * unit,
        )


def near(
    what: str, found: Tensor, expected: Tensor, table: dict, unit: float, sensitivity: Callable[[], float]
) -> None:
    """By the table; where that fails, by it and what rounding only the inputs would do."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, not {tuple(expected.shape)}"
    if not found.numel():
        return
    assert not found.isnan().any(), f"{what} is not a number"
    dtype, most = found.dtype, torch.finfo(found.dtype).max  # what is beyond it is infinite, or the largest number
    found, expected = (x.double().clamp(-most, most) / unit for x in (found, expected))
    try:
        assert_near(found, expected, table, dtype)
    except AssertionError:
        bound = (
            table[dtype] * expected.abs().max().clamp(min=1.0 if table is VALUE else 1e-3)
            + LAST_DIGITS * sensitivity() / unit
        )
        error = (found - expected).abs().max()
        assert error <= bound, f"{what}: off by {error:.2g}, at most {bound:.2g} allowed"


def named(outcome) -> str:
    return outcome.__name__ if isinstance(outcome, type) else "results"


def failure(name: str, seed: int) -> str | None:
    """What is wrong in a case, in one line that repeats it."""
    try:
        check(name, seed)
    except Exception as error:  # a crash in an op is a finding, too
        text = " ".join(str(error).split())[:200]
        return f"python -m tests.ops.fuzz --op {name} --seed {seed}  # {type(error).__name__}: {text}"
    return None
