"""About 2,000 cases of the fuzzer, and that it finds faults."""

import re

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops._op import Op
from tests.ops.fuzz import CASES, DEVICE, Draw, failure

EACH = 170  # cases an op


def test_every_op_is_fuzzed():
    assert {op for op, _ in CASES.values() if op} == set(OPS)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:var\\(\\)")  # of torch, for layouts and one row
@pytest.mark.parametrize("name", CASES)
def test_fuzz(name):
    failures = [line for line in (failure(name, seed) for seed in range(EACH)) if line]
    assert not failures, "\n" + "\n".join(failures)


def test_a_seed_is_one_case():
    for name, (_, make) in CASES.items():
        for seed in range(5):
            one, other = (make(Draw(seed)) for _ in range(2))
            assert (
                one.refused == other.refused and one.wanted == other.wanted and one.leaves.keys() == other.leaves.keys()
            ), name
            for x, y in zip(one.leaves.values(), other.leaves.values(), strict=True):
                assert x.unit == y.unit and x.tensor.stride() == y.tensor.stride()
                assert torch.equal(x.tensor.nan_to_num(), y.tensor.nan_to_num())


class Changed(torch.autograd.Function):
    """x, whose gradient a fault changes."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_x):
        return ctx.fault(d_x), None


def last_entry_lost(kernel):
    """The last of the results of a row that does not fill the vectors."""

    def run(*arguments):
        out = kernel(*arguments)
        lost = torch.ones_like(out)
        lost.view(-1)[-1:] = 1 if out.numel() % 8 == 0 else 1.001
        return out * lost

    return run


def gradient_a_little_off(kernel):
    return lambda x, *rest: kernel(Changed.apply(x, lambda d_x: d_x * 1.0002), *rest)


def layout_is_not_looked_at(kernel):
    """The weight's memory as if it lay contiguous."""

    def run(*arguments):
        weight = arguments[-2]
        wrong = torch.as_strided(weight, weight.shape, torch.empty(weight.shape).stride()) if dense(weight) else weight
        return kernel(*arguments[:-2], wrong, arguments[-1])

    return run


def dense(x):
    return x.untyped_storage().nbytes() >= x.element_size() * (x.numel() + x.storage_offset())


def ties_the_other_way(kernel):
    def run(scores, *rest):
        t, log_r, log_c, order, rank = kernel(scores.flip(-1), *rest)
        order = order.shape[-1] - 1 - order
        return t, log_r, log_c, order, torch.empty_like(order).scatter_(-1, order, rank.sort(-1).values)

    return run


def nan_is_let_through(kernel):
    return lambda matrices, *rest: kernel(matrices.nan_to_num(0.0, 1.0, -1.0), *rest)


FAULTS = {
    "act_orthogonal": last_entry_lost,
    "aggregate": gradient_a_little_off,
    "embed_edges": layout_is_not_looked_at,
    "orthogonal_frame": nan_is_let_through,
    "soft_permutation": ties_the_other_way,
}


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("name", FAULTS)
def test_the_fuzzer_finds_a_fault(name, monkeypatch):
    op = CASES[name][0]
    if OPS[op].backends(DEVICE.type) == ("reference",):
        pytest.skip("the kernels are not built")
    select = Op.select

    def faulty(self, backend, device, dtype):
        found = select(self, backend, device, dtype)
        return FAULTS[name](found) if self.name == op and backend != "reference" else found

    monkeypatch.setattr(Op, "select", faulty)
    line = next((line for line in (failure(name, seed) for seed in range(EACH)) if line), None)
    assert line is not None
    monkeypatch.undo()
    seed = int(re.fullmatch(rf"python -m tests\.ops\.fuzz --op {name} --seed (\d+)  # .*", line)[1])
    assert failure(name, seed) is None  # the fault's, not the fuzzer's
