"""A differentiable sort of (64, N) scores, forward and backward, beside torchsort where it is installed."""

import importlib.util

import pytest
import torch
from torch.nn.functional import cosine_similarity

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
    rows = compare(case, variants, device=device, reference=base, seconds=seconds)
    order = scores.argsort(-1, descending=True)
    exact = torch.zeros_like(weight).scatter(
        -1, order, weight
    )  # the gradient of the sorted values, with the order fixed
    sorts = {"kernel": sorted_by, "torchsort": lambda x: torchsort.soft_sort(x).flip(-1)}
    for row in rows:
        if (sort := sorts.get(row.variant)) is not None:
            values = sort(scores)
            (gradient,) = torch.autograd.grad(values, scores, weight)
            off = (values.detach() - scores.detach().gather(-1, order)).abs().max()
            row.extra = {
                "values off by": f"{off:.2g}",
                "gradient, cosine with a sort's": f"{cosine_similarity(gradient, exact, -1).mean():.3f}",
            }
    record(rows, variants["kernel"])


def test_permute(device, seconds, record):
    """The product with a matrix of 1,000 slots, forward and backward to the rows and to the permutation."""
    N = 1000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 1, N, generator=generator).to(device).requires_grad_()
    x = torch.randn(1, 1, N, 8, generator=generator).to(device).requires_grad_()
    weight = torch.randn(x.shape, generator=generator).to(device)
    p = ops.soft_permutation(scores, tau=TAU)

    def gradients(y: torch.Tensor) -> tuple:
        return torch.autograd.grad(y, (x, scores), weight, retain_graph=True)

    variants = {"permute": lambda: gradients(ops.permute(p, x)), "dense": lambda: gradients(p.dense() @ x)}
    case = f"P x, N = {N}, 8 features, forward and backward"
    record(compare(case, variants, device=device, reference="dense", seconds=seconds), variants["permute"])
