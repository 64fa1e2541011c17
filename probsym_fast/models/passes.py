"""One forward pass of a symmetrized model: the samples' elements, predictions and reduction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probsym_fast._checkpointing import checkpointed, checkpointing_layers
from probsym_fast._inputs import embedded
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups import narrow
from probsym_fast.groups.elements import tensors
from probsym_fast.models.processes import mean_over_processes
from probsym_fast.models.reductions import weights_of_rows

if TYPE_CHECKING:
    from probsym_fast.models.symmetrized import Symmetrized


class Pass:
    """A forward pass with `samples` group elements per graph, drawn with `draws` or given as `elements`.

    The methods take `size`, how many samples run at once (chosen by `Chunks.run`). Elements are drawn for all samples
    together and do not depend on it. reduce, weights: as in `Symmetrized.forward`.
    """

    def __init__(
        self,
        model: Symmetrized,
        batch: Batch,
        samples: int,
        *,
        draws: Draws | None = None,
        elements: Any = None,
        reduce: str = "mean",
        weights: Tensor | None = None,
    ):
        self.model, self.batch, self.samples, self.draws, self.given = model, batch, samples, draws, elements
        self.reduce, self.weights = reduce, weights

    def result(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The reduced prediction and the penalties."""
        if self.given is None and self.model.samples_mesh is not None:
            return self._over_processes(size)
        g, penalties = self.elements(size)
        if self.reduce == "mean":
            return self.mean(g, self.samples, size), penalties
        each = self.each(g, size)
        if self.reduce == "weighted":
            assert self.weights is not None  # `check_reduction`
            each = (weights_of_rows(self.model.readout, self.batch, self.weights, each) * each).sum(0)
        return each.amax(0) if self.reduce == "max" else each, penalties

    def elements(self, size: int) -> tuple[Any, dict[str, Tensor]]:
        """The elements of all samples, and the penalties.

        If the samples run in chunks, the backward pass computes a learned distribution again, layer by layer.
        """
        if self.given is not None:
            return self.given, {}
        distribution = self.model.distribution
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in distribution.parameters())
        if size >= self.samples or not learns:
            return distribution(self.batch, self.samples, self.draws)

        def draw() -> tuple[Any, dict[str, Tensor]]:
            with checkpointing_layers():
                return distribution(self.batch, self.samples, self.draws)

        return checkpointed(draw, device=self.batch.device, modules=[distribution])

    def predict(self, g: Any, count: int, each: bool = False) -> Tensor:
        """The mean prediction over the `count` samples of g; with `each` one prediction per sample, (count, ...)."""
        model, batch, group = self.model, self.batch, self.model.distribution.group
        arguments, keywords = embedded(model.embed, batch, group, g)
        outputs = model.backbone(*arguments, **keywords)
        if not each:
            return model.readout(outputs, batch, group, g)
        parts = ((outputs.narrow(1, s, 1), narrow(g, s, 1)) for s in range(count))
        return torch.stack([model.readout(y, batch, group, one) for y, one in parts])

    def mean(self, g: Any, samples: int, size: int) -> Tensor:
        """The mean over the `samples` of g: chunk means weighted by count / samples, summed in float32 or better."""
        if size >= samples:
            return self.predict(g, samples)
        total = None
        for count, y in self._in_chunks(g, samples, size):
            if total is None:
                total = y.to(torch.promote_types(y.dtype, torch.float32)) * (count / samples)
            else:
                total = total.add_(y, alpha=count / samples)
        assert total is not None  # there are at least two chunks
        return total.to(y.dtype)

    def each(self, g: Any, size: int) -> Tensor:
        """(S, ...) the prediction of each sample."""
        parts = [y for _, y in self._in_chunks(g, self.samples, size, each=True)]
        return torch.cat(parts) if parts[1:] else parts[0]

    def probe(self, count: int) -> Tensor:
        """A scalar from a pass with `count` samples at once, to measure the memory of the pass and its gradients."""
        if self.given is None:
            g, penalties = self.model.distribution(self.batch, count, self.draws)
        else:
            g, penalties = narrow(self.given, 0, count), {}
        return sum(penalties.values(), self.predict(g, count).float().sum())

    def leaves(self) -> list[Tensor]:
        """The tensors that receive gradients: parameters and given elements."""
        some = [*self.model.parameters(), *tensors(self.given)]
        return [x for x in some if x.requires_grad]

    def _in_chunks(self, g: Any, samples: int, size: int, each: bool = False) -> Iterator[tuple[int, Tensor]]:
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

    def _over_processes(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean, with each process computing its share of the samples.

        In inference the samples are independent, so every process draws only its own. Penalties are means over samples.
        """
        model, batch, draws, mesh = self.model, self.batch, self.draws, self.model.samples_mesh
        assert draws is not None and mesh is not None  # `result`
        seen = torch.is_grad_enabled() or any(module.training for module in model.modules())
        g, penalties = self.elements(size) if seen else (None, {})

        def part(first: int, count: int) -> dict[str, Tensor]:
            if seen:
                some, own = narrow(g, first, count), {}
            else:
                some, own = model.distribution(batch, count, draws.starting(first))
            return {"": self.mean(some, count, size), **own}

        means = mean_over_processes(part, self.samples, mesh, own=model.training)
        return means.pop(""), penalties | means
