"""One forward pass of a symmetrized model: the samples' elements, predictions and reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probsym_fast._autocast import promoted
from probsym_fast._checkpointing import checkpointed, checkpointing_layers
from probsym_fast._inputs import embedded
from probsym_fast.batches import Batch
from probsym_fast.distributions.distribution import returned
from probsym_fast.draws import Draws
from probsym_fast.groups import narrow
from probsym_fast.groups.elements import samples_of, tensors
from probsym_fast.models.predictions import check_prediction, is_inexact, mapped, real_leaves
from probsym_fast.models.processes import mean_over_processes
from probsym_fast.models.reductions import Reduction, check_weights

if TYPE_CHECKING:
    from probsym_fast.models.symmetrized import Symmetrized


class Pass:
    """A forward pass with `samples` group elements per graph, drawn with `draws` or given as `elements`.

    The methods take `size`, how many samples run at once (chosen by `Chunks.run`). Elements are drawn for all samples
    together and do not depend on it. A prediction is a Tensor or a pytree of tensors (`predictions`).
    """

    def __init__(
        self,
        model: Symmetrized,
        batch: Batch,
        samples: int,
        *,
        draws: Draws | None = None,
        elements: Any = None,
        reduction: Reduction | None = None,
    ):
        self.model, self.batch, self.samples, self.draws, self.given = model, batch, samples, draws, elements
        self.reduction = reduction or Reduction()

    def result(self, size: int) -> tuple[Any, dict[str, Tensor]]:
        """The reduced prediction and the penalties."""
        if self.given is None and self.model.samples_mesh is not None:
            return self._over_processes(size)
        weights, samples = None, self.samples
        if self.reduction.draws_weights:
            g, weights, penalties = self._with_weights(size)
            if weights.shape[1] != samples:  # a distribution may give a whole orbit
                samples = weights.shape[1]
                size = self.model.chunks.size_for(samples)
        else:
            g, penalties = self.elements(size)
        if self.reduction.kind == "mean":
            return self.mean(g, samples, size), penalties
        return self.reduction.of(self.each(g, samples, size), self.model, self.batch, weights), penalties

    def elements(self, size: int) -> tuple[Any, dict[str, Tensor]]:
        """The elements of all samples, and the penalties."""
        return (self.given, {}) if self.given is not None else self._drawn(self.model.distribution, size)

    def _with_weights(self, size: int) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """The elements with weights (B, S) that the distribution gives them, and the penalties."""
        self.batch.check()
        distribution: Any = self.model.distribution
        owner, found = type(distribution).__name__, self._drawn(distribution.elements_and_weights, size)
        g, weights, penalties = returned(owner, "elements_and_weights", found, "elements, weights, penalties")
        check_weights(owner, weights, (self.batch.size, samples_of(g)))
        return g, weights, penalties

    def _drawn(self, draw: Callable[..., Any], size: int) -> Any:
        """draw(batch, samples, draws), of the distribution.

        If the samples run in chunks, the backward pass computes a learned distribution again, layer by layer.
        """
        distribution = self.model.distribution
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in distribution.parameters())
        if size >= self.samples or not learns:
            return draw(self.batch, self.samples, self.draws)

        def drawn() -> Any:
            with checkpointing_layers():
                return draw(self.batch, self.samples, self.draws)

        return checkpointed(drawn, device=self.batch.device, modules=[distribution])

    def predict(self, g: Any, count: int, each: bool = False) -> Any:
        """The mean prediction over the `count` samples of g; with `each` one prediction per sample, leaves (count, ...).

        Raises TypeError unless the readout returns floating-point or complex tensors.
        """
        model, batch, group = self.model, self.batch, self.model.distribution.group
        arguments, keywords = embedded(model.embed, batch, group, g)
        outputs = model.backbone(*arguments, **keywords)
        if not each:
            y = model.readout(outputs, batch, group, g)
            if not is_inexact(y):
                check_prediction(type(model.readout).__name__, y)
            return y
        parts = [model.readout(_sample(outputs, s), batch, group, narrow(g, s, 1)) for s in range(count)]
        check_prediction(type(model.readout).__name__, parts[0])
        return mapped(lambda *x: torch.stack(x), *parts)

    def mean(self, g: Any, samples: int, size: int) -> Any:
        """The mean over the `samples` of g: chunk means weighted by count / samples, summed in float32 or better."""
        if size >= samples:
            return self.predict(g, samples)
        total = y = None
        for count, y in self._in_chunks(g, samples, size):
            share = count / samples
            if total is None:
                total = mapped(lambda x: x.to(promoted(x.dtype, torch.float32)) * share, y)  # noqa: B023
            else:
                total = mapped(lambda x, more: x.add_(more, alpha=share), total, y)  # noqa: B023
        return mapped(lambda x, like: x.to(like.dtype), total, y)

    def each(self, g: Any, samples: int, size: int) -> Any:
        """The prediction of each sample: leaves (S, ...)."""
        parts = [y for _, y in self._in_chunks(g, samples, size, each=True)]
        return mapped(lambda *x: torch.cat(x), *parts) if parts[1:] else parts[0]

    def probe(self, count: int) -> Tensor:
        """A scalar from a pass with `count` samples at once, to measure the memory of the pass and its gradients."""
        if self.given is None:
            g, penalties = self.model.distribution(self.batch, count, self.draws)
        else:
            g, penalties = narrow(self.given, 0, count), {}
        sums: Any = (x.float().sum() for x in real_leaves(self.predict(g, count)))
        return sum(sums, sum(penalties.values(), torch.zeros((), device=self.batch.device)))

    def leaves(self) -> list[Tensor]:
        """The tensors that receive gradients: parameters and given elements."""
        some = [*self.model.parameters(), *tensors(self.given)]
        return [x for x in some if x.requires_grad]

    def _in_chunks(self, g: Any, samples: int, size: int, each: bool = False) -> Iterator[tuple[int, Any]]:
        """(count, prediction) for each chunk.

        With gradients on, the backward pass computes all chunks again but the last, where it starts.
        """
        model = self.model
        read = [model.embed, model.backbone, model.readout]
        for first in range(0, samples, size):
            count = min(size, samples - first)
            some = g if count == samples else narrow(g, first, count)
            if first + count == samples:
                yield count, self.predict(some, count, each)
            else:
                yield count, checkpointed(self.predict, some, count, each, device=self.batch.device, modules=read)

    def _over_processes(self, size: int) -> tuple[Any, dict[str, Tensor]]:
        """The mean, with each process computing its share of the samples.

        In inference the samples are independent, so every process draws only its own. Penalties are means over samples.
        """
        model, batch, draws, mesh = self.model, self.batch, self.draws, self.model.samples_mesh
        assert draws is not None and mesh is not None  # `result`
        seen = torch.is_grad_enabled() or any(module.training for module in model.modules())
        g, penalties = self.elements(size) if seen else (None, {})

        def part(first: int, count: int) -> tuple[Any, dict[str, Tensor]]:
            if seen:
                some, own = narrow(g, first, count), {}
            else:
                some, own = model.distribution(batch, count, draws.starting(first))
            return self.mean(some, count, size), own

        prediction, means = mean_over_processes(part, self.samples, mesh, own=model.training)
        return prediction, penalties | means


def _sample(outputs: Any, s: int) -> Any:
    """The backbone's outputs of sample s: all tensors (B, S, ...) narrowed to (B, 1, ...), and the rest as it is."""
    return mapped(lambda x: x.narrow(1, s, 1) if isinstance(x, Tensor) else x, outputs)
