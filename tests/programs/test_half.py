"""Weights and batches in bfloat16 and float16: what must be precise stays in float32, the rest is near the float32 model.

The float32 model has the same rounded weights, and the inputs are exact in every dtype.
"""

import pytest
import torch
from torch import Tensor, nn

from probsym_fast import Symmetrized, models
from probsym_fast.distributions import Uniform
from probsym_fast.groups import Draws, Euclidean, Symmetric
from tests.conftest import assert_near
from tests.helpers.modules import MODULES, S, built
from tests.test_programs import MODELS, clouds, flat_mlp, points_transformer

HALVES = [torch.bfloat16, torch.float16]
BOUND = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of whole models, relative to the largest entry
# modules whose outputs keep float32 or better: scores, frames, permutations
PRECISE = {"GIN", "VectorNeurons", "Identity", "Frame", "Learned"}


def tensors(found) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    found = list(found.values()) if isinstance(found, dict) else found
    return [x for part in found for x in tensors(part)] if isinstance(found, tuple | list) else []


def backward(found) -> None:
    torch.manual_seed(0)
    sum((x.float() * torch.randn_like(x.float())).sum() for x in tensors(found) if x.requires_grad).backward()


def check_gradients(net: nn.Module, *others: Tensor) -> None:
    given = [p for p in (*net.parameters(), *others) if p.grad is not None]
    assert given or not list(net.parameters())
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in given)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_every_module(name, training, dtype):
    _, x, run = MODULES[name]
    found = []
    for used in (dtype, torch.float32):
        net, leaf = built(name).to(dtype).to(used).train(training), x.to(used).requires_grad_()
        torch.manual_seed(1)  # of dropout
        found.append(run(net, leaf))
        backward(found[-1])
        check_gradients(net, leaf)
    for k, (ours, theirs) in enumerate(zip(*map(tensors, found), strict=True)):
        assert ours.isfinite().all()
        precise = name in PRECISE or (name == "Uniform" and k == 0) or (name.startswith("Symmetrized") and k == 1)
        assert ours.dtype == (theirs.dtype if precise else dtype)
        if not training or name not in ("VectorNeurons", "Symmetrized, clouds"):  # batch statistics magnify rounding
            assert_near(ours, theirs, BOUND, dtype)


def points_uniform():
    pieces = models.Transformer(width=16, layers=1, feedforward=16, read=range(0, 25, 6)), models.PairTokens()
    return Symmetrized(*pieces, models.NodeReadout(True), Uniform(Symmetric(5) * Euclidean(3))), clouds()


ALL = {**MODELS, "points_uniform": points_uniform}


def rounded(batch, dtype: torch.dtype):
    """With features that bfloat16 holds exactly."""
    return batch.to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_whole_models(make, training, dtype):
    model, batch = make()
    model.to(dtype).train(training)
    x, penalties = model(rounded(batch, dtype), S, seed=3)
    assert x.dtype == dtype and x.isfinite().all()
    assert all(y.dtype == torch.float32 and y.isfinite() for y in penalties.values())
    backward((x, penalties))
    check_gradients(model)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    if not training:  # in training the batch statistics of the modules before it differ
        expected, _ = model.float()(rounded(batch, torch.float32), S, seed=3)
        assert_near(x, expected, BOUND, dtype)


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
        assert p.scores.dtype == torch.float64 and penalties["entropy"].dtype == torch.float32
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
