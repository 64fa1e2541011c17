"""The symmetrized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from probsym_fast._checks import check_count, check_type
from probsym_fast.batches import check_batch
from probsym_fast.distributions import Distribution
from probsym_fast.draws import check_kind as check_draws
from probsym_fast.groups import Batch, Draws
from probsym_fast.groups.elements import samples_of, tensors
from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.chunks import Chunks, check_sizes, step_with_smaller_chunks
from probsym_fast.models.estimates import Estimate, estimate
from probsym_fast.models.passes import Pass
from probsym_fast.models.reductions import Reduction, Score, check_kind, check_score

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed.device_mesh import DeviceMesh


class Symmetrized(nn.Module):
    """f(x) = mean over S samples g ~ p(g|x) of g . backbone(g^-1 . x): equivariant for any backbone.

    backbone: any module that takes what `embed` returns, with leading axes (B, S).
    embed: module, embed(batch, group, g) -> tensors (B, S, ...): the inverse action and the tokens. It returns one Tensor, a
        tuple (positional inputs of the backbone) or a dict (keyword inputs); anything else is a TypeError.
    readout: module, readout(outputs, batch, group, g) -> prediction: the action on the outputs and the mean over samples.
        A prediction is a floating-point or complex Tensor, or a pytree of them: a dict, tuple, NamedTuple or registered
        dataclass, also nested. The attributes `rows` ("graphs", "nodes" or "pairs": what the rows of a prediction belong to;
        default "graphs") and `layout` (for `equivariance_error`) are one str, or such a structure of them.
    distribution: p(g|x), a `Distribution` or any module with `group` and forward(batch, samples, draws) -> (g, penalties).
    draws: kind of the noise, "independent", "antithetic" or "stratified" (`groups.Draws`).
    chunk, memory: samples that run at once, None for all, or "auto" within `memory` bytes: the arguments of `Chunks`.
    reduce, score: the reduction where `forward` is given none. A score that is a module is trained with the model.
    You can set `model.draws`, `model.reduce`, `model.score`, `model.chunk` and `model.memory` later. `model.chunks` holds the
    last two and what "auto" has found; a new chunk or memory discards what was found.

    Elements are drawn for all samples together, whatever the chunk. Chunks change predictions and gradients only by rounding,
    unless samples interact in the backbone (batch statistics are per chunk) or it draws random numbers (dropout draws
    others). In training the backward pass computes every chunk again, and the distribution if it learns. Peak memory is
    then that of one chunk, or of the distribution for all samples, layer by layer, if that is more (its batch statistics span
    all samples). In inference it is that of one chunk plus the elements of all samples. Chunked training is not compiled;
    compile the backbone instead.
    samples_mesh: processes over which `forward` spreads the samples (one axis of a DeviceMesh), with the same batch and
        generators in the same state. Each draws all elements and keeps its own; in inference it draws only its own.
        `models.processes.mean_over_processes` explains the gradients.
    Where a second derivative is wanted (create_graph=True), every part may call `F.scaled_dot_product_attention`, whose fused
    kernels have the first only: its gradient is then that of the formula. First derivatives stay torch's.
    torch.func transforms work on the model (`torch.func.functional_call`): the ops use their references, and chunks keep all
    intermediate results. vmap needs a seed, or randomness "same" or "different". In training mode the transform must take the
    buffers as inputs too, since running statistics are updated in place.
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
        reduce: str = "mean",
        score: Score | None = None,
        chunk: int | str | None = None,
        memory: int | None = None,
        samples_mesh: DeviceMesh | None = None,
    ):
        super().__init__()
        for name, part in (("backbone", backbone), ("embed", embed), ("readout", readout)):
            check_type("Symmetrized", name, part, nn.Module, "an nn.Module")
        if not (isinstance(distribution, nn.Module) and hasattr(distribution, "group")):  # not only `Distribution`
            got = distribution.__name__ if isinstance(distribution, type) else type(distribution).__name__
            raise TypeError(f"Symmetrized: distribution must be a Distribution, or a module with a group, got {got}")
        self.backbone, self.embed, self.readout, self.distribution = backbone, embed, readout, distribution
        check_sizes("Symmetrized", "chunk", chunk, memory)
        self.draws, self.chunks, self.samples_mesh = draws, Chunks(chunk, memory), samples_mesh
        check_score(score)
        self.reduce, self.score = reduce, score

    if TYPE_CHECKING:  # nn.Module's returns Any

        def __call__(
            self,
            batch: Batch,
            samples: int | None = None,
            generator: torch.Generator | numpy.random.Generator | None = None,
            *,
            seed: int | Tensor | None = None,
            reduce: str | None = None,
            weights: Tensor | None = None,
            score: Score | None = None,
        ) -> tuple[Any, dict[str, Tensor]]: ...

    def extra_repr(self) -> str:
        memory = "" if self.memory is None else f", memory={self.memory}"
        reduce = "" if self.reduce == "mean" else f", reduce={self.reduce!r}"
        return f"draws={self.draws!r}{reduce}, chunk={self.chunk!r}{memory}"

    @property
    def draws(self) -> str:
        """The kind of the noise."""
        return self._draws

    @draws.setter
    def draws(self, draws: str) -> None:
        check_draws("Symmetrized", draws, "draws")
        self._draws = draws

    @property
    def reduce(self) -> str:
        """The reduction where `forward` is given none."""
        return self._reduce

    @reduce.setter
    def reduce(self, reduce: str) -> None:
        check_kind(reduce)
        self._reduce = reduce

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
        """Samples that run at once; None: all; "auto": as many as fit. Setting anything but "auto" drops the memory."""
        return self.chunks.size

    @chunk.setter
    def chunk(self, chunk: int | str | None) -> None:
        size, _ = check_sizes("Symmetrized", "chunk", chunk)
        self.chunks = Chunks(size, self.memory if size == "auto" else None)

    @property
    def memory(self) -> int | None:
        """Bytes that a step may use with chunk "auto"; None: what the device has."""
        return self.chunks.memory

    @memory.setter
    def memory(self, memory: int | None) -> None:
        self.chunks = Chunks(*check_sizes("Symmetrized", "chunk", self.chunk, memory))

    def forward(
        self,
        batch: Batch,
        samples: int | None = None,
        generator: torch.Generator | numpy.random.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        reduce: str | None = None,
        weights: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The prediction, averaged over `samples` draws per graph, and the penalties (scalars).

        The noise comes from `generator` (None: torch's global one) or from `seed`, an int or a () int64 tensor. A seed
        gives the same numbers in eager, compiled and exported programs. Raises RuntimeError for a generator where a
        program is recorded (torch.compile, torch.export), and under torch.jit.trace.

        samples: None: those of the distribution (`default_samples`), one, or of an `Orbit` every element.

        reduce: None: the model's own. "mean"; "none": the prediction of each sample, (S, ...); "max": the elementwise
            maximum; "best": per input the prediction of the sample with the highest score, the first of equals; "weighted":
            the mean with weights that are normalised to sum to 1. All but "mean" read out sample by sample.
        weights: of "weighted", (B, S), >= 0 with a nonzero sum, with a gradient (weighted frames). None: the softmax of the
            score over the samples; without a score the weights of the distribution, whose elements_and_weights(batch,
            samples, draws) returns (g, weights (B, S), penalties). It may give another number of samples (a whole orbit).
        score: of "best" and "weighted": a key of a dict prediction, (B,) or (B, 1) per sample; a function of the predictions
            of all samples, leaves (S, ...), that returns (S, B); or a Tensor (B, S). None: the model's own. It must be
            invariant, or the model is not equivariant. "best" passes gradients through the prediction that it takes, and
            none to the score. Weights from a score or a distribution are a ratio of two means over samples: biased by
            O(1 / S), and exact over a whole orbit.

        Raises TypeError if samples is no int, weights no floating-point Tensor, score of another type, or a leaf of the
        prediction no floating-point or complex Tensor, and for complex ones with "max". ValueError if samples is below 1,
        for another reduce, and for weights or scores that do not fit. Also raises what the batch's `check` raises.
        """
        check_batch("Symmetrized", batch)
        if samples is None:
            samples = getattr(self.distribution, "default_samples", 1)
        samples = check_count("Symmetrized", "samples", samples)
        reduction = self._reduction(reduce, weights, score)
        reduction.check(batch, samples, self.distribution)
        if self.samples_mesh is not None and reduction.kind != "mean":
            raise ValueError(f"Symmetrized: reduce must be 'mean' with a samples_mesh, got {reduction.kind!r}")
        draws = Draws(generator, seed=seed, kind=self.draws, device=batch.device)
        return self._run(Pass(self, batch, samples, draws=draws, reduction=reduction))

    def _run(self, forward: Pass) -> tuple[Any, dict[str, Tensor]]:
        """In chunks. Any part may have torch's fused attention: its second derivatives are added here, for all of them."""
        given = [x for x in tree_leaves(forward.batch) if isinstance(x, Tensor)]
        return every_derivative(lambda *_: self.chunks.run(forward), *given, *tensors(forward.given))

    def _reduction(self, reduce: str | None, weights: Tensor | None, score: Score | None) -> Reduction:
        """With the model's own for what is not given, as far as it has a use."""
        kind = self.reduce if reduce is None else reduce
        if score is None and (kind == "best" or (kind == "weighted" and weights is None)):
            score = self.score
        return Reduction(kind, weights, score)

    def estimate(
        self,
        batch: Batch,
        samples: int | None = None,
        generator: torch.Generator | numpy.random.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        tolerance: float | None = None,
        step: int | None = None,
    ) -> Estimate:
        """Inference with its standard error: draws `step` samples at a time until the error is small enough.

        samples: None: those of `forward`, where their mean has no noise (a whole `Orbit`).
        step: None: 8, and with weights at most the elements of the distribution.

        Stops once the largest standard error of all outputs is at most the tolerance, or after `samples` samples.
        tolerance None: always `samples`. The error is read after every step, which waits for the GPU. Samples that
        depend on each other count as one block, so step and samples are rounded up to whole blocks. The standard error
        of few blocks may be far too small, so it stops only after at least 8 blocks (`estimates.LEAST_BLOCKS`). The
        noise is that of `forward`. A whole `Orbit`, and a weighted mean over all elements of an `Energy`, have no noise:
        they are computed once, with a standard error of 0. Runs without gradients.

        With reduce="weighted" every step is a call of its own, with `step` samples (at most as many as the distribution has
        elements) and noise of its own. The prediction is the mean of these weighted means, a step counts as one block, and at
        least 8 steps are drawn before it stops. The error is that of this mean: it leaves out the bias of the weighted mean
        of `step` samples, O(1 / step). Steps are calls of their own for a plain mean, too, where all samples of a call share
        noise, as those of `RotationEnergy` do (its `shares_noise`).

        Raises RuntimeError in training mode, where samples interact, and under torch.vmap for a tolerance. TypeError for
        a tolerance that is no number, and without samples where elements are drawn at random. ValueError for a tolerance
        below 0, with a samples_mesh and for another reduce than "mean" and "weighted", and as `forward`.
        """
        return estimate(self, batch, samples, Draws(generator, seed=seed, kind=self.draws), tolerance, step)

    def apply_elements(
        self,
        batch: Batch,
        g: Any,
        *,
        reduce: str | None = None,
        weights: Tensor | None = None,
        score: Score | None = None,
    ) -> Any:
        """The prediction for given group elements (B, S). reduce, weights, score: as in `forward`, but no weights are drawn.

        Raises as `forward`.
        """
        check_batch("Symmetrized", batch)
        batch.check()
        samples, reduction = samples_of(g), self._reduction(reduce, weights, score)
        reduction.check(batch, samples, None)
        return self._run(Pass(self, batch, samples, elements=g, reduction=reduction))[0]

    def step_with_smaller_chunks(self, step: Callable[[], Any], samples: int) -> Any:
        """step(): a forward pass with `samples` samples, the loss and its backward pass.

        With chunk="auto" an out-of-memory error, also in the backward pass, runs it again with half the chunk size (see
        `chunks.step_with_smaller_chunks`).
        """
        return step_with_smaller_chunks(self, self.chunks, samples, step, next(self.parameters()).device)
