"""Weights and batches in bfloat16 and float16: what must be precise stays in float32, the rest is near the float32 model.

The float32 model has the same rounded weights, and the inputs are exact in every dtype.
"""

import pytest
import torch
from torch import nn

from probsym_fast.distributions import VectorNeurons
from probsym_fast.groups import Draws
from tests.conftest import assert_near
from tests.programs.cases import cases
from tests.programs.runs import SIZE, backward, floats, leaves
from tests.test_programs import S, flat_mlp, points_transformer

HALVES = [torch.bfloat16, torch.float16]
BOUND = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative to the largest entry


def check_gradients(program: nn.Module, inputs: tuple) -> None:
    weights = list(program.parameters())
    given = [p for p in (*weights, *floats(inputs)) if p.grad is not None]
    assert given or not weights
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in given)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("row", cases(traced=False))
def test_every_row(row, training, dtype):
    """Batch statistics of Vector Neurons magnify rounding: in training their numbers need not be near."""
    found = []
    for used in (dtype, torch.float32):
        program, inputs = row.program(training).to(dtype).to(used), leaves(row.sample(SIZE, False), used)
        found.append(floats(program(inputs)))
        if row.trains or row.differentiable:
            backward(found[-1])
            check_gradients(program, inputs)
        assert all(x.isfinite().all() for x in program.buffers())
    for k, (ours, theirs) in enumerate(zip(*found, strict=True)):
        if row.kind in ("ops", "distributions"):  # scores, frames and permutations stay precise, values do not
            assert ours.dtype in (dtype, theirs.dtype)
        else:
            penalty = row.whole and k
            assert ours.dtype == (torch.float32 if penalty else dtype)
        if not (training and any(isinstance(x, VectorNeurons) for x in program.modules())):
            assert_near(ours, theirs, BOUND, dtype)


def rounded(batch, dtype: torch.dtype):
    """With features that bfloat16 holds exactly."""
    return batch.to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("make", [flat_mlp, points_transformer], ids=lambda make: make.__name__)
def test_the_elements_are_those_of_float32(make, dtype):
    """No score is rounded: the same permutations, and frames that are orthogonal to float32's precision."""
    model, batch = make()
    learned = model.distribution.to(dtype).eval()
    found = []
    for used in (dtype, torch.float32):
        g, penalties = learned.to(used)(rounded(batch, used), S, Draws(seed=4))
        p, motion = g if isinstance(g, tuple) else (g, None)
        assert p.scores.dtype == penalties["entropy"].dtype == torch.float32
        found.append((p, penalties["entropy"]))
        if motion is not None:
            assert motion.frame.dtype == torch.float32
            eye = torch.eye(3).expand_as(motion.frame)
            assert torch.allclose(motion.frame.mT @ motion.frame, eye, atol=1e-5)
    (p, entropy), (wanted, expected) = found
    exact = make is flat_mlp  # of clouds the center is rounded
    assert torch.equal(p.order, wanted.order) or not exact
    assert torch.allclose(entropy, expected, atol=1e-6 if exact else 0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_training_lowers_the_loss(dtype):
    model, batch = flat_mlp()
    model, batch = model.to(dtype), batch.to(dtype)
    optimiser, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(15):
        optimiser.zero_grad()
        y, penalties = model(batch, S, seed=1)
        loss = (y.float() - 1).square().mean() + 0.1 * penalties["entropy"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_would_lose_precision_is_refused():
    """Features in float64; those in float32 lose nothing."""
    model, batch = flat_mlp()
    network = model.distribution.network.bfloat16()
    noise = torch.rand(network.noise_shape(batch, S))
    assert network(batch, noise)["scores"].dtype == torch.float32
    with pytest.raises(
        TypeError, match=r"^GIN: x must be torch.float32 as the scores are, or below, got torch.float64$"
    ):
        network(batch.to(torch.float64), noise)
