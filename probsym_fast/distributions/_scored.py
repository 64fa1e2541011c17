"""What energies share: probabilities by the scores of any network, and their penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._autocast import promoted, without_autocast
from probsym_fast._checks import check_type, looks_at_values
from probsym_fast._inputs import embedded
from probsym_fast.batches import Batch
from probsym_fast.distributions.discrete import Discrete
from probsym_fast.distributions.distribution import Penalties
from probsym_fast.groups import Group, narrow


class Scored(Discrete):
    """A `Discrete` with log p the log-softmax over candidates g of the scores s(g^-1 x) of a network.

    Raises TypeError for parts of another type. A call raises ValueError for scores that are not finite (on a GPU only in
    debug mode).
    """

    def __init__(self, group: Group, network: nn.Module, embed: nn.Module | None, **settings: bool):
        super().__init__(group, **settings)
        owner = type(self).__name__
        check_type(owner, "network", network, nn.Module, "an nn.Module")
        check_type(owner, "embed", embed, nn.Module | None, "an nn.Module or None")
        self.network, self.embed = network, embed

    def scored(self, batch: Batch, g: Any, count: int, axes: str) -> Tensor:
        """log p of the candidates g (B, count), in float32 or better. axes: their names in errors."""
        with without_autocast(batch.device):
            found = self._scores(batch, g, count, axes)
            return found.to(promoted(found.dtype, torch.float32)).log_softmax(1)

    def _scores(self, batch: Any, g: Any, count: int, axes: str) -> Tensor:
        if self.embed is None:
            each = [self._score(batch, self.group.inverse(narrow(g, k, 1))) for k in range(count)]
            return torch.stack(each, 1)
        arguments, keywords = embedded(self.embed, batch, self.group, g)
        return self._checked(self.network(*arguments, **keywords), (batch.size, count), axes)

    def _score(self, batch: Any, g: Any) -> Tensor:
        return self._checked(self.network(batch.moved(self.group, g)), (batch.size,), "(B,)")

    def _checked(self, found: Any, shape: tuple[int, ...], axes: str) -> Tensor:
        owner = type(self).__name__
        if not isinstance(found, Tensor):
            raise TypeError(f"{owner}: the network's scores must be a Tensor, got {type(found).__name__}")
        if tuple(found.shape) not in (shape, (*shape, 1)):
            raise ValueError(f"{owner}: the network's scores must be {axes} = {shape}, got {tuple(found.shape)}")
        if looks_at_values(found) and not found.isfinite().all():
            raise ValueError(f"{owner}: the network's scores must be finite, got NaN or infinity")
        return found.reshape(shape)


def penalties(log_p: Tensor, prior: Tensor | None) -> Penalties:
    """ "entropy" of p and, with a prior (M,) or (B, M), "prior": KL(prior | p); means over the batch."""
    found = {"entropy": -(log_p.exp() * log_p).sum(1).mean()}
    if prior is not None:
        prior = prior.to(log_p)
        found["prior"] = (torch.special.xlogy(prior, prior) - prior * log_p).sum(1).mean()
    return found
