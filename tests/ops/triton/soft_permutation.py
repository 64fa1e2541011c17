"""The launchers of soft_permutation and permutation_entropy against the reference, compiled or interpreted."""

import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from tests.conftest import GRADIENT, VALUE, assert_near


def check_soft_permutation(scores, num_nodes, tau, iterations, normalize, wanted=(1, 1, 1)):
    """Values and gradients of scores (B, S, N), and of the entropy of what it gives.

    wanted: which of t, log_r and log_c have a gradient.
    """
    settings, dtype, N = (num_nodes, tau, iterations, normalize), scores.dtype, scores.shape[-1]
    exact = scores.double().clone().requires_grad_()
    *found, order, rank = launcher("soft_permutation", "forward")(scores, *settings, False)
    *expected, its_order, its_rank = OPS["soft_permutation"].reference(exact, *settings)
    assert torch.equal(order, its_order) and torch.equal(rank, its_rank)
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, VALUE)
        assert num_nodes is None or not x.masked_select(torch.arange(N) >= num_nodes[:, None, None]).any()
    presorted, sorted_again = (
        launcher("soft_permutation", "forward")(found[0], num_nodes, tau, iterations, False, x) for x in (True, False)
    )
    assert all(torch.equal(x, y) for x, y in zip(presorted, sorted_again, strict=True))
    weights = [torch.randn_like(scores) for _ in wanted]
    known = [x if one else None for x, one in zip(weights, wanted, strict=True)]
    gradient = launcher("soft_permutation", "backward")(*known, scores, order, found[0], *settings)
    loss = sum((x * y).sum() for x, y, one in zip(weights, expected, wanted, strict=True) if one)
    assert_near(gradient, torch.autograd.grad(loss, exact)[0], GRADIENT)

    exact, d_entropy = [x.double().clone().requires_grad_() for x in found], torch.tensor(-3.0, dtype=dtype)
    entropy = launcher("permutation_entropy", "forward")(*found, num_nodes, tau)
    expected = OPS["permutation_entropy"].reference(*exact, num_nodes, tau)
    assert entropy.dtype == dtype
    assert_near(entropy, expected, VALUE)
    gradients = launcher("permutation_entropy", "backward")(d_entropy, *found, num_nodes, tau)
    for x, y in zip(gradients, torch.autograd.grad(expected, exact, d_entropy.double()), strict=True):
        assert_near(x, y, GRADIENT)
