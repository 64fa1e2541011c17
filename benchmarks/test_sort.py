"""A differentiable sort of (64, N) scores, forward and backward, beside torchsort where it is installed."""

import importlib.util

import pytest
import torch

from benchmarks.harness import compare
from probsym_fast import ops

ROWS, TAU = 64, 0.1


def sorted_by(scores: torch.Tensor, **settings) -> torch.Tensor:
    """The values in descending order, with the soft permutation's gradient to their order too."""
    return ops.permute(ops.soft_permutation(scores, tau=TAU, **settings), scores, inverse=True, **settings)


@pytest.mark.parametrize("N", [100, 1000, 10_000])
def test_sort(N, device, seconds, record):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(ROWS if N <= 1000 else 8, N, generator=generator).to(device).requires_grad_()
    weight = torch.randn(scores.shape, generator=generator).to(device)
    variants = {
        "kernel": lambda: torch.autograd.grad(sorted_by(scores), scores, weight),
        "permutation only": lambda: torch.autograd.grad(ops.soft_permutation(scores, tau=TAU).log_r, scores, weight),
    }
    if N <= 100:
        variants["reference"] = lambda: torch.autograd.grad(sorted_by(scores, backend="reference"), scores, weight)
    if importlib.util.find_spec("torchsort"):
        import torchsort

        variants["torchsort"] = lambda: torch.autograd.grad(torchsort.soft_sort(scores), scores, weight)
    base = "torchsort" if "torchsort" in variants else "permutation only"
    case = f"differentiable sort, {tuple(scores.shape)}, forward and backward"
    record(compare(case, variants, device=device, reference=base, seconds=seconds), variants["kernel"])
