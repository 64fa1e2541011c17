"""The symmetrized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probsym_fast.distributions import Distribution
from probsym_fast.groups import Batch, Draws, narrow
from probsym_fast.groups._elements import samples_of, tensors
from probsym_fast.models.chunks import Chunks, recomputed, retried
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
    chunk, memory: samples that run at once, None for all, or "auto" within so many bytes: the arguments of `Chunks`.

    The elements are drawn for all samples at once and are the same whatever the chunk. With a chunk, prediction and
    gradients are those of all samples together up to rounding, as long as samples do not see each other in the backbone
    (batch statistics are a chunk's) and it draws no random numbers (dropout draws others). In training every chunk, and the
    distribution where it learns, is computed again in the backward pass: memory is that of one chunk, or of the
    distribution for all samples where that is more (statistics over all samples keep it from being taken apart).
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
        *,
        chunk: int | str | None = None,
        memory: int | None = None,
        samples_mesh: DeviceMesh | None = None,
    ):
        super().__init__()
        self.backbone, self.embed, self.readout, self.distribution = backbone, embed, readout, distribution
        self.chunks, self.samples_mesh = Chunks(chunk, memory), samples_mesh

    def forward(
        self, batch: Batch, samples: int = 1, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction, averaged over `samples` draws a graph (noise from `generator`), and the penalties (scalars).

        Raises TypeError where samples is no int, ValueError where it is below 1, and what the batch's `check` raises.
        """
        check_count("Symmetrized", "samples", samples)
        g, penalties = self._draw(batch, samples, Draws(generator))
        if self.samples_mesh is None:
            return self._mean(batch, g, samples), penalties
        mean = lambda some: self._mean(batch, some, samples_of(some))  # noqa: E731
        return mean_over_processes(mean, g, samples, self.samples_mesh, own=self.training), penalties

    def apply_elements(self, batch: Batch, g: Any) -> Tensor:
        """The prediction for group elements given by hand. Raises what the batch's `check` raises."""
        batch.check()
        return self._mean(batch, g, samples_of(g))

    def retried(self, step: Callable[[], Any], samples: int) -> Any:
        """step(): a forward pass with so many samples, the loss and its backward pass; where memory ends with chunk="auto",
        in the backward pass too, once more with half the chunk (see `chunks.retried`)."""
        return retried(self, self.chunks, samples, step, next(self.parameters()).device)

    def _draw(self, batch: Batch, samples: int, draws: Draws) -> tuple[Any, dict[str, Tensor]]:
        learns = any(p.requires_grad for p in self.distribution.parameters())
        if not learns or self.chunks.now(samples) == samples:
            return self.distribution(batch, samples, draws)
        draw = lambda: self.distribution(batch, samples, draws)  # noqa: E731
        return recomputed(draw, device=batch.device, modules=[self.distribution])

    def _mean(self, batch: Batch, g: Any, samples: int) -> Tensor:
        group = self.distribution.group

        def run(first: int, count: int) -> Tensor:
            some = g if count == samples else narrow(g, first, count)
            return self.readout(self.backbone(*self.embed(batch, group, some)), batch, group, some)

        modules = [self.embed, self.backbone, self.readout]
        return self.chunks.mean(run, samples, batch.device, modules, tensors(g))
