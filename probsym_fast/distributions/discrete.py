"""Distributions over finitely many elements per input: sampling, and weights for the mean of all of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from probsym_fast._checks import check_bool, check_count
from probsym_fast.batches import Batch, check_batch
from probsym_fast.distributions.distribution import Distribution, Penalties, returned
from probsym_fast.draws import Draws
from probsym_fast.groups import Group
from probsym_fast.groups.elements import taken

SMALLEST = 2.0**-33  # added to uniform noise of 32 bits, whose logarithm is then finite


class Discrete(Distribution):
    """M elements per input with probabilities p. Subclasses define `candidates`.

    `forward` draws independent samples. A plain mean over them has no gradient to p: only the penalties train it. Antithetic
    draws mirror the uniform numbers that pick the elements, stratified ones spread them evenly over blocks.

    `elements_and_weights` is for a weighted mean (`reduce="weighted"`), which has one. samples = M: every element, weighted
    by p: the exact mean. Fewer: samples without replacement, weighted by p / q, q the probability that an element is among
    them; without the division by the sum of weights, the weighted sum is an unbiased estimate of the mean, and so is its
    gradient. With the division both have a bias that falls with the number of samples. Without it P(sum of weights > w) falls
    only as w^-(S + 1), with the sum of the products of S + 1 different p as a factor, largest for uniform p: S = 1 has no
    finite variance. Then divide, or draw with replacement.
    replacement: independent samples, each of weight 1 with the gradient of `S / (S - 1) log p`: straight-through, in that
    the values are those of plain samples and only the gradient knows of p. The gradient of their weighted mean is that of
    the score function, with the mean of the others as baseline: unbiased for S >= 2 independent draws. One sample has none.
    best: no sampling. In `forward` every sample is the element of the largest p (canonicalization: one is enough), and
    `elements_and_weights` gives the S largest, by falling p, weighted by p. It goes before `replacement`. Of equal ones it
    takes the first: a model is then equivariant only where p has one maximum. Like it, it can be set later.

    Subclasses whose candidates depend on noise that all samples of a call share set `shares_noise` (`Distribution`).

    Raises TypeError if group is no `Group`, and replacement or best no bool.
    Source: sampling without replacement and its weights, Kool et al. 2020 (arXiv 2002.06043).
    """

    def __init__(self, group: Group, replacement: bool = False, best: bool = False):
        super().__init__(group)
        self.replacement = check_bool(type(self).__name__, "replacement", replacement)
        self.best = check_bool(type(self).__name__, "best", best)

    @property
    def most(self) -> int | None:
        """The largest number of samples of `elements_and_weights`, the number of elements; None: unknown or without limit."""
        return None if self.replacement and not self.best else self.number

    @property
    def number(self) -> int | None:
        """M, where all inputs have as many elements."""
        return None

    @abstractmethod
    def candidates(self, batch: Any, draws: Draws) -> tuple[Any, Tensor, Penalties]:
        """All elements (B, M), the logarithms (B, M) of their probabilities, and penalties.

        draws: noise that all samples share; it does not depend on the first sample. A class that draws from it says so by
        `shares_noise = True`: samples of a call then depend on each other, and no number of them averages this noise.
        """

    def _candidates(self, batch: Batch, draws: Draws) -> tuple[Any, Tensor, Penalties]:
        found = self.candidates(batch, draws.starting(0).fork(0))
        return returned(type(self).__name__, "candidates", found, "elements, log_p, penalties")

    def _taken(self, g: Any, index: Tensor | None, draws: Draws) -> Any:
        """The elements index (B, S), or all, of what `_candidates` gives. draws: noise of each sample's own."""
        return g if index is None else taken(g, index)

    def draw(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        draws = draws or Draws()
        g, log_p, penalties = self._candidates(batch, draws)
        return self._taken(g, self._picked(log_p, samples, draws), draws), penalties

    def elements_and_weights(
        self, batch: Batch, samples: int, draws: Draws | None = None
    ) -> tuple[Any, Tensor, Penalties]:
        """Elements (B, S), weights (B, S) >= 0 with a gradient to p, and penalties.

        Raises as `forward`. ValueError for more samples than there are elements, unless they are drawn with replacement.
        """
        owner = type(self).__name__
        samples, draws = check_count(owner, "samples", samples), draws or Draws()
        check_batch(owner, batch)
        batch.check()
        g, log_p, penalties = self._candidates(batch, draws)
        M = log_p.shape[1]
        if self.replacement and not self.best:
            index = self._picked(log_p, samples, draws)
            chosen = log_p.gather(1, index)
            return (
                self._taken(g, index, draws),
                ((chosen - chosen.detach()) * (samples / max(1, samples - 1))).exp(),
                penalties,
            )
        if samples > M:
            raise ValueError(f"{owner}: samples must be at most the number of elements, {M}, got {samples}")
        draws = draws.starting(0)
        if samples == M:
            return self._taken(g, None, draws), log_p.exp(), penalties
        if self.best:
            chosen, index = log_p.topk(samples)
            return self._taken(g, index, draws), chosen.exp(), penalties
        noise = draws.fork(1).uniform((batch.size, 1, M), "without replacement", device=log_p.device)
        gumbel = -(-(noise[:, 0] + SMALLEST).log()).log()
        keys, index = (log_p.detach() + gumbel).topk(samples + 1)
        index = index[:, :samples]
        log_p = log_p.gather(1, index)
        q = -torch.expm1(-(log_p.detach() - keys[:, samples:]).exp())  # of being among the first
        return self._taken(g, index, draws), (log_p.exp() / torch.where(q > 0, q, 1)).to(log_p.dtype), penalties

    def _picked(self, log_p: Tensor, samples: int, draws: Draws) -> Tensor:
        """(B, S) numbers of elements: the best, or by the inverse of the distribution function."""
        if self.best:
            return log_p.argmax(1, keepdim=True).expand(-1, samples)
        block = self.group.block(draws.kind) if draws.kind == "stratified" else None
        shape, device = (log_p.shape[0], samples), log_p.device
        u = draws.fork(1).uniform(shape, "candidate", device=device, block=block)
        if block is not None:
            u = (u + draws.place(samples, block, device) / block) % 1
        share = log_p.detach().double().exp().cumsum(1)
        return torch.searchsorted(share / share[:, -1:], u, right=True).clamp(max=log_p.shape[1] - 1)
