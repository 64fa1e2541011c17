"""p(g|x) of a finite group by the scores of any network."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from probsym_fast._checks import check_float, looks_at_values
from probsym_fast.batches import Batch, check_batch
from probsym_fast.distributions._scored import Scored, penalties
from probsym_fast.distributions.distribution import Penalties
from probsym_fast.draws import Draws
from probsym_fast.groups import Group


class Energy(Scored):
    """p(g|x) proportional to exp(s(g^-1 x)) over all elements g of a finite group, for any network s: p(hg|hx) = p(g|x).

    network: any module. Without `embed` it takes a batch and returns (B,) or (B, 1) scores; it is called with the batch
    moved by the inverse of every element (`batch.moved`), one after another. With `embed`, a module embed(batch, group, g)
    as in `Symmetrized`, it takes what this returns, for all elements at once, and returns (B, order) or (B, order, 1).

    Penalties, means over the batch: "entropy" of p, and where a `prior` is given "prior", the Kullback-Leibler divergence
    KL(prior | p). prior: (order,) probabilities of the elements in the order of `group.elements`; all at the identity where
    the data are upright already: then it is -log p(identity | x).

    `forward` draws independent samples; `elements_and_weights` gives the whole orbit or some of it, with weights that train
    the network: see `Discrete`, also for `replacement` and for `best`, which makes it a canonicalization. The network runs
    without autocast, as distributions do, and its scores are normalised in float32 or better.

    Raises TypeError for parts of another type. ValueError unless the group is finite, for a prior that is no distribution
    of its elements, and for scores of another shape.
    """

    prior: Tensor | None

    def __init__(
        self,
        group: Group,
        network: nn.Module,
        embed: nn.Module | None = None,
        *,
        prior: Tensor | None = None,
        replacement: bool = False,
        best: bool = False,
    ):
        super().__init__(group, network, embed, replacement=replacement, best=best)
        if group.order is None:
            raise ValueError(f"Energy: group must be finite, with an order, got {group}")
        if prior is not None:
            check_float("Energy", prior=prior)
            if tuple(prior.shape) != (group.order,):
                raise ValueError(f"Energy: prior must be ({group.order},), got {tuple(prior.shape)}")
            if looks_at_values(prior) and not ((prior >= 0).all() and abs(float(prior.sum()) - 1) < 1e-5):
                raise ValueError(f"Energy: prior must be >= 0 with sum 1, got {prior.tolist()}")
        if prior is None:
            self.prior = None
        else:
            self.register_buffer("prior", prior)

    @property
    def number(self) -> int | None:
        return self.group.order

    def is_exact(self, samples: int, weighted: bool) -> bool:
        chosen = self.best or (weighted and not self.replacement and samples == self.number)
        return chosen and not self.shares_noise

    def log_probabilities(self, batch: Batch) -> Tensor:
        """log p(g|x) of all elements, (B, order), in the order of `group.elements`. Gradients: the network's."""
        check_batch("Energy", batch)
        batch.check()
        return self._log_probabilities(batch, self.group.elements(batch))

    def candidates(self, batch: Batch, draws: Draws) -> tuple[Any, Tensor, Penalties]:
        g = self.group.elements(batch)
        log_p = self._log_probabilities(batch, g)
        return g, log_p, penalties(log_p, self.prior)

    def _log_probabilities(self, batch: Batch, g: Any) -> Tensor:
        return self.scored(batch, g, cast(int, self.group.order), "(B, order)")
