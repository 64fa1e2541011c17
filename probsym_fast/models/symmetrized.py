"""The symmetrized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from probsym_fast._checks import check_count, check_type
from probsym_fast.batches import check_batch
from probsym_fast.distributions import Distribution
from probsym_fast.draws import check_kind
from probsym_fast.groups import Batch, Draws
from probsym_fast.groups.elements import samples_of
from probsym_fast.models.chunks import Chunks, check_sizes, step_with_smaller_chunks
from probsym_fast.models.estimates import Estimate, estimate
from probsym_fast.models.passes import Pass
from probsym_fast.models.reductions import check_reduction

if TYPE_CHECKING:  # torch may be built without
    from torch.distributed.device_mesh import DeviceMesh


class Symmetrized(nn.Module):
    """f(x) = mean over S samples g ~ p(g|x) of g . backbone(g^-1 . x): equivariant for any backbone.

    backbone: any module that takes what `embed` returns, with axes (B, S) in front.
    embed: module, embed(batch, group, g) -> tensors (B, S, ...), the inverse action and the tokens: one Tensor, a tuple (the
        backbone's positional inputs) or a dict (its keyword inputs); anything else is a TypeError.
    readout: module, readout(outputs, batch, group, g) -> prediction: the action on the outputs and the mean over samples.
    distribution: p(g|x), a `Distribution` or any module with `group` and forward(batch, samples, draws) -> (g, penalties).
    draws: kind of the noise, "independent", "antithetic" or "stratified" (`groups.Draws`).
    chunk, memory: samples that run at once, None for all, or "auto" within so many bytes: the arguments of `Chunks`.
    All three may be set later: `model.draws`, `model.chunk`, `model.memory`, checked as here. `model.chunks` holds the last
    two and what "auto" has found; a new chunk or memory begins with nothing found.

    The elements are drawn for all samples at once and are the same whatever the chunk. With a chunk, prediction and
    gradients are those of all samples together up to rounding, as long as samples do not see each other in the backbone
    (batch statistics are a chunk's) and it draws no random numbers (dropout draws others). In training every chunk, and the
    distribution where it learns, is computed again in the backward pass: memory is that of one chunk, or of the
    distribution for all samples, layer by layer, where that is more (statistics over all samples keep it from being taken
    apart). In inference it is that of one chunk and of the elements of all samples. Where torch.compile meets them, chunks in
    training run as they are: compile the backbone instead.
    samples_mesh: processes over which `forward` spreads the samples (one axis of a DeviceMesh), which have the same batch and
        generators in the same state. Each draws all elements and keeps its own, or in inference draws its own alone; see
        `models.processes.mean_over_processes` for what the gradients mean.
    torch.func transforms work on the model (`torch.func.functional_call`): the ops take their references, and chunks keep
    what they compute. vmap wants randomness="same". In training mode the transform must hold the buffers too, since running
    statistics are written in place.
    Raises TypeError for parts of another type, ValueError for other values.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed: nn.Module,
        readout: nn.Module,
        distribution: Distribution,
        *,
        draws: str = "independent",
        chunk: int | str | None = None,
        memory: int | None = None,
        samples_mesh: DeviceMesh | None = None,
    ):
        super().__init__()
        for name, part in (("backbone", backbone), ("embed", embed), ("readout", readout)):
            check_type("Symmetrized", name, part, nn.Module, "an nn.Module")
        if not (isinstance(distribution, nn.Module) and hasattr(distribution, "group")):  # others' own are taken too
            got = distribution.__name__ if isinstance(distribution, type) else type(distribution).__name__
            raise TypeError(f"Symmetrized: distribution must be a Distribution, or a module with a group, got {got}")
        self.backbone, self.embed, self.readout, self.distribution = backbone, embed, readout, distribution
        check_sizes("Symmetrized", "chunk", chunk, memory)
        self.draws, self.chunks, self.samples_mesh = draws, Chunks(chunk, memory), samples_mesh

    def extra_repr(self) -> str:
        memory = "" if self.memory is None else f", memory={self.memory}"
        return f"draws={self.draws!r}, chunk={self.chunk!r}{memory}"

    @property
    def draws(self) -> str:
        """The kind of the noise."""
        return self._draws

    @draws.setter
    def draws(self, draws: str) -> None:
        check_kind("Symmetrized", draws, "draws")
        self._draws = draws

    @property
    def chunks(self) -> Chunks:
        """How many samples run at once, and what "auto" has found."""
        return self._chunks

    @chunks.setter
    def chunks(self, chunks: Chunks) -> None:
        check_type("Symmetrized", "chunks", chunks, Chunks, "a Chunks (for a number of samples or 'auto' set chunk)")
        self._chunks = chunks

    @property
    def chunk(self) -> int | str | None:
        """Samples that run at once; None: all; "auto": what fits. Setting another than "auto" drops the memory."""
        return self.chunks.size

    @chunk.setter
    def chunk(self, chunk: int | str | None) -> None:
        size, _ = check_sizes("Symmetrized", "chunk", chunk)
        self.chunks = Chunks(size, self.memory if size == "auto" else None)

    @property
    def memory(self) -> int | None:
        """Bytes that a step may take with chunk "auto"; None: what the device has."""
        return self.chunks.memory

    @memory.setter
    def memory(self, memory: int | None) -> None:
        self.chunks = Chunks(*check_sizes("Symmetrized", "chunk", self.chunk, memory))

    def forward(
        self,
        batch: Batch,
        samples: int = 1,
        generator: torch.Generator | numpy.random.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        reduce: str = "mean",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction, averaged over `samples` draws a graph, and the penalties (scalars).

        The noise comes from `generator` (None: torch's global one), or is that of `seed`, an int or a () int64 tensor: the
        same numbers eager, compiled and exported. Raises RuntimeError for a generator where a program is recorded
        (torch.compile, torch.export), and under torch.jit.trace.

        reduce: "mean"; "none": every sample's own prediction, (S, ...); "max": the largest of them, entry by entry;
        "weighted": their mean by weights (B, S), >= 0, of any sum but 0, with a gradient (weighted frames). All but "mean"
        read out sample by sample. Raises TypeError where samples is no int and weights no floating-point Tensor, ValueError
        where samples is below 1, for another reduce and for weights that do not fit, and what the batch's `check` raises.
        """
        check_batch("Symmetrized", batch)
        samples = check_count("Symmetrized", "samples", samples)
        check_reduction(reduce, weights, batch, samples)
        if self.samples_mesh is not None and reduce != "mean":
            raise ValueError(f"Symmetrized: reduce must be 'mean' with a samples_mesh, got {reduce!r}")
        draws = Draws(generator, seed=seed, kind=self.draws, device=batch.device)
        return self.chunks.run(Pass(self, batch, samples, draws=draws, reduce=reduce, weights=weights))

    def estimate(
        self,
        batch: Batch,
        samples: int,
        generator: torch.Generator | numpy.random.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        tolerance: float | None = None,
        step: int = 8,
    ) -> Estimate:
        """Inference with its standard error: the mean, `step` samples at a time, until the error is small enough.

        Stops where the largest standard error of all outputs is at most the tolerance (looked at after every step, which
        waits for the GPU), or with `samples`; None: with these. Samples that depend on each other count together as a block,
        so that step and samples are rounded up to whole blocks. A standard error of few blocks may be far too small: with
        less than 8 (`averages.LEAST_BLOCKS`) it stops nothing. The noise is that of `forward`. Runs without gradients.

        Raises RuntimeError in training mode, where samples see each other, TypeError for a tolerance that is no number,
        ValueError for one below 0 and where processes share the samples (samples_mesh), and as `forward`.
        """
        return estimate(self, batch, samples, Draws(generator, seed=seed, kind=self.draws), tolerance, step)

    def apply_elements(self, batch: Batch, g: Any) -> Tensor:
        """The prediction for group elements given by hand. Raises what the batch's `check` raises."""
        check_batch("Symmetrized", batch)
        batch.check()
        return self.chunks.run(Pass(self, batch, samples_of(g), elements=g))[0]

    def step_with_smaller_chunks(self, step: Callable[[], Any], samples: int) -> Any:
        """step(): a forward pass with so many samples, the loss and its backward pass. Where memory ends with chunk="auto",
        in the backward pass too, once more in chunks of half the size (see `chunks.step_with_smaller_chunks`)."""
        return step_with_smaller_chunks(self, self.chunks, samples, step, next(self.parameters()).device)
