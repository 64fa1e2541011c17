"""Chunks where memory ends: sizes that are found, steps that are tried again, steps that fail."""

import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from probsym_fast import Symmetrized
from probsym_fast._memory import peak_memory
from probsym_fast.models import chunks as module
from probsym_fast.models.chunks import Fit
from tests.helpers.chunked import S, assert_same, noisy, outcome
from tests.helpers.graphs import random_graphs


def test_auto_halves_where_memory_ends_in_forward():
    """10 of 7 * 4 rows at once: 7, 4, then 2 samples."""
    batch = random_graphs([3, 1, 9, 5])
    f, expected = noisy("auto", most=10), outcome(noisy(2), batch)
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = outcome(f, batch)
    assert_same(found, expected)  # dropout and running statistics as if nothing had failed
    for (name, a), (_, b) in zip(f.named_buffers(), noisy_after(2, batch), strict=True):
        assert torch.equal(a, b), name
    wanted = [(7, 4), (4, 2)]
    assert [str(w.message) for w in said] == [
        f"Symmetrized: out of memory with {a} samples at once; {b} from now on" for a, b in wanted
    ]
    f.backbone.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome(f, batch)
    assert max(rows for rows, _ in f.backbone.calls) == 8  # remembered
    with torch.no_grad(), pytest.warns(UserWarning, match="out of memory") as said:
        f(batch, S)
    assert len(said) == 2  # found for itself without gradients
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        outcome(noisy("auto", most=3), batch)
    with pytest.raises(torch.OutOfMemoryError):
        outcome(noisy(4, most=10), batch)


@pytest.mark.parametrize("reduce", ["none", "max", "weighted"])
def test_auto_halves_for_every_reduction(reduce):
    batch = random_graphs([3, 1, 9, 5])
    weights = torch.rand(4, S, dtype=torch.float64) if reduce == "weighted" else None

    def gradients(f: Symmetrized) -> tuple:
        f.train().zero_grad()
        y, penalties = f(batch, S, torch.Generator().manual_seed(5), reduce=reduce, weights=weights)
        (y.square().sum() + sum(penalties.values())).backward()
        return y.detach(), {n: p.grad for n, p in f.named_parameters() if p.grad is not None}, []

    f = noisy("auto", dropout=0, most=10)
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = gradients(f)
    assert str(said[-1].message).endswith("out of memory with 4 samples at once; 2 from now on")
    assert_same(found, gradients(noisy(2, dropout=0)))
    small = noisy("auto", memory=1)
    gradients(small)
    assert small.chunks.size_for(S) == 1  # measured


def noisy_after(chunk: int, batch) -> list:
    f = noisy(chunk)
    outcome(f, batch)
    return list(f.named_buffers())


@pytest.mark.parametrize("before", [None, 2.0])
def test_steps_that_run_out_of_memory_in_backward_are_retried(before):
    """Nothing is lost: gradients of the failed attempt are dropped, those of before are added to once."""
    batch = random_graphs([3, 1, 9, 5])
    f, other = noisy("auto", most=10), noisy(2)
    f.chunks._fit[True] = Fit(S, 4, 4)  # 4 samples, 16 rows, are too many, but only in the backward pass
    f.backbone.recomputed_alone = True
    for each in (f, other):
        for p in each.parameters():
            p.grad = None if before is None else torch.full_like(p, before)

    def step(model):
        y, penalties = model(batch, S, torch.Generator().manual_seed(5))
        (y.square().sum() + sum(penalties.values())).backward()
        return y.detach()

    torch.manual_seed(3)
    expected = step(other)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="out of memory with 4 samples at once; 2 from now on"):
        found = f.step_with_smaller_chunks(lambda: step(f), S)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), q in zip(f.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, a), (_, b) in zip(f.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    f.backbone.most = 3
    kept = [None if p.grad is None else p.grad.clone() for p in f.parameters()]
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        f.step_with_smaller_chunks(lambda: step(f), S)
    for p, q in zip(f.parameters(), kept, strict=True):
        assert p.grad is q is None or torch.equal(p.grad, q)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_steps_that_fail_leave_gradients_and_statistics_alone(error):
    batch, f = random_graphs([3, 1, 9, 5]), noisy(2)
    for p in f.parameters():
        p.grad = torch.ones_like(p)
    held, buffers = [p.grad for p in f.parameters()], {name: x.clone() for name, x in f.named_buffers()}

    def step():
        y, _ = f(batch, S, torch.Generator().manual_seed(5))
        y.square().sum().backward()
        assert any(p.grad is not None for p in f.parameters())
        assert not all(torch.equal(x, buffers[name]) for name, x in f.named_buffers())
        raise error("after the backward pass")

    with pytest.raises(error, match="after the backward pass"):
        f.step_with_smaller_chunks(step, S)
    for p, old in zip(f.parameters(), held, strict=True):
        assert p.grad is old and torch.equal(old, torch.ones_like(p))
    assert all(torch.equal(x, buffers[name]) for name, x in f.named_buffers())


FAILING = """
import sys, torch
from probsym_fast._checkpointing import checkpointed

def function(x):
    if torch._C._current_graph_task_id() >= 0:
        raise torch.OutOfMemoryError("in the backward pass")
    return x.sin().cos()

x = torch.randn(5, requires_grad=True)
y = [checkpointed(function, k * x, device=x.device, modules=[]) for k in range(3)]
try:
    sum(y).sum().backward()
except torch.OutOfMemoryError as error:
    print(error)
"""


def test_a_process_whose_last_backward_pass_raised_ends_well():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", FAILING], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "in the backward pass\n", "")


@pytest.mark.parametrize("grad", [True, False])
def test_auto_measures_the_largest_chunk_within_a_limit(grad):
    batch = random_graphs([9] * 8)
    with nullcontext() if grad else torch.no_grad():
        whole = noisy("auto")
        state = torch.get_rng_state()
        whole.train()(batch, 32, torch.Generator().manual_seed(1))
        assert whole.chunks.size_for(32) == 32  # a CPU without a limit
        sizes, limits = {}, (1, 400_000, 900_000, 10**9) if grad else (1, 120_000, 300_000, 10**9)
        for limit in limits:
            f = noisy("auto", memory=limit).train()
            torch.set_rng_state(state)
            f(batch, 32, torch.Generator().manual_seed(1))
            sizes[limit] = f.chunks.size_for(32)
            assert f.backbone.norm.num_batches_tracked == -(-32 // sizes[limit])  # probes leave no trace
        none, some, more, all_of_them = sizes.values()
        assert none == 1 < some < more < 32 == all_of_them
        assert more >= 2 * some  # what does not grow with them is paid once


@pytest.mark.parametrize("limit", [400_000, 900_000, 1_500_000])
def test_a_step_stays_within_its_memory(limit):
    """As many samples as fit with their distribution and its gradients; for a larger batch they are measured again."""
    f = noisy("auto", memory=limit).train()
    for graphs in (8, 24):
        batch = random_graphs([9] * graphs)
        f(batch, 32)
        size = f.chunks.size_for(32)
        assert peak_at_once(batch, size) <= limit or size == 1
        assert peak_at_once(batch, min(2 * size, 32)) > 0.9 * limit or size == 32


def test_what_is_measured_has_its_backward_pass():
    f, passed = noisy("auto", memory=10**9).train(), set()
    for part in (f.backbone, f.distribution.network.score):
        part.register_full_backward_hook(lambda module, *_: passed.add(type(module)))
    f(random_graphs([9] * 8), 8)
    assert passed == {type(f.backbone), nn.Linear}


def peak_at_once(batch, samples: int) -> int:
    f = noisy(None).train()

    def step():
        y, penalties = f(batch, samples)
        (y.square().sum() + sum(penalties.values())).backward()

    return peak_memory(step, "cpu")


def test_auto_tries_again_where_the_distribution_runs_out_of_memory():
    batch = random_graphs([3, 1, 9, 5])
    f, other, failed = noisy("auto", dropout=0), noisy(4, dropout=0), []

    def fail(module, arguments, outputs):
        if not failed:
            failed.append(arguments[1])
            raise torch.OutOfMemoryError("the distribution")

    f.distribution.register_forward_hook(fail)
    with pytest.warns(UserWarning, match="out of memory with 7 samples at once; 4 from now on"):
        found = outcome(f, batch)
    assert failed == [S]
    assert_same(found, outcome(other, batch))
    f.chunks._fit[True] = f.chunks._fit[True]._replace(samples=1)  # as if more samples were asked for: 4 stay the most
    outcome(f, batch)
    assert f.chunks.size_for(S) == 4


def test_largest_chunk_of_a_measured_line():
    asked = []

    def peak(count: int, end: int = 100) -> int:
        asked.append(count)
        if count > end:
            raise torch.OutOfMemoryError
        return max(50, 10 * count)  # 50 bytes are taken anyway

    assert module.largest(peak, 64, free=200) == 18  # 180 bytes of it
    assert asked == [1, 2, 4, 8, 16, 32]
    assert module.largest(peak, 64, free=45) == 1
    assert module.largest(peak, 12, free=200) == 12
    assert module.largest(lambda count: peak(count, 20), 64, free=1000) == 31
    assert module.largest(lambda count: peak(count, 20), 64, free=200) == 18
    with pytest.raises(torch.OutOfMemoryError):
        module.largest(lambda count: peak(count, 0), 64, free=200)
