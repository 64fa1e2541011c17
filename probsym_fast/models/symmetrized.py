"""The symmetrized model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probsym_fast.distributions import Distribution
from probsym_fast.groups import Batch, Draws
from probsym_fast.models.samples import mean_over_processes
from probsym_fast.ops._op import check_count

if TYPE_CHECKING:  # torch may be built without
    from torch.distributed.device_mesh import DeviceMesh


class Symmetrized(nn.Module):
    """f(x) = mean over S samples g ~ p(g|x) of g . backbone(g^-1 . x): equivariant for any backbone.

    backbone: any module that takes what `embed` returns, with axes (B, S) in front.
    embed: module, embed(batch, group, g) -> tuple of tensors (B, S, ...): the inverse action and the tokens.
    readout: module, readout(outputs, batch, group, g) -> prediction: the action on the outputs and the mean over samples.
    distribution: p(g|x), which also names the group.
    samples_mesh: processes over which `forward` spreads the samples (one axis of a DeviceMesh), which have the same batch and
        generators in the same state. Each draws all elements and keeps its own; see `models.samples.mean_over_processes`
        for what the gradients mean.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed: nn.Module,
        readout: nn.Module,
        distribution: Distribution,
        samples_mesh: DeviceMesh | None = None,
    ):
        super().__init__()
        self.backbone, self.embed, self.readout, self.distribution = backbone, embed, readout, distribution
        self.samples_mesh = samples_mesh

    def forward(
        self, batch: Batch, samples: int = 1, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction, averaged over `samples` draws a graph (noise from `generator`), and the penalties (scalars).

        Raises TypeError where samples is no int, ValueError where it is below 1, and what the batch's `check` raises.
        """
        check_count("Symmetrized", "samples", samples)
        g, penalties = self.distribution(batch, samples, Draws(generator))
        if self.samples_mesh is None:
            return self._mean(batch, g), penalties
        mean = partial(self._mean, batch)
        return mean_over_processes(mean, g, samples, self.samples_mesh, own=self.training), penalties

    def apply_elements(self, batch: Batch, g: Any) -> Tensor:
        """The prediction for group elements given by hand. Raises what the batch's `check` raises."""
        batch.check()
        return self._mean(batch, g)

    def _mean(self, batch: Batch, g: Any) -> Tensor:
        group = self.distribution.group
        return self.readout(self.backbone(*self.embed(batch, group, g)), batch, group, g)
