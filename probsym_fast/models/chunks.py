"""Running the samples in chunks, so that memory does not grow with their number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from probsym_fast._checkpointing import restored_buffers
from probsym_fast._checks import as_int, transformed
from probsym_fast._memory import free_memory, peak_memory
from probsym_fast.draws import RandomState
from probsym_fast.models.backbones.fused import OnePass

if TYPE_CHECKING:
    from probsym_fast.models.passes import Pass

MARGIN = 0.9  # share of the memory to use; the rest is for fragmentation and other allocations


class Chunks:
    """How many samples run at once.

    size: a number of samples; None: all; "auto": all if they fit in memory, else the largest chunk that does. "auto"
    measures at the first step, at the first step without gradients, and when samples or graphs become more. It takes
    the peak memory of 1, 2, 4, ... samples, forward and backward, including the distribution. Where not all fit, but
    would if the backbone computed its layers again (`OnePass`), it does so from then on. An out-of-memory error
    (torch.OutOfMemoryError) halves the size for good and runs the step again. Under a torch.func transform and in a
    compiled program nothing is measured. memory: bytes that a step may use with "auto"; None: what the GPU has; on a CPU
    all samples then run at once.
    Raises TypeError if size or memory is no int, ValueError if it is below 1 and for a memory without "auto".
    """

    def __init__(self, size: int | str | None = None, memory: int | None = None):
        self._size, self._memory = check_sizes("Chunks", "size", size, memory)
        self._fit = {grad: Fit() for grad in (True, False)}  # with gradients or without

    def __repr__(self) -> str:
        return f"Chunks({self.size!r}, memory={self.memory})"

    @property
    def size(self) -> int | str | None:
        return self._size

    @size.setter
    def size(self, size: int | str | None) -> None:
        self._size, self._memory = check_sizes("Chunks", "size", size, self._memory)

    @property
    def memory(self) -> int | None:
        return self._memory

    @memory.setter
    def memory(self, memory: int | None) -> None:
        self._size, self._memory = check_sizes("Chunks", "size", self._size, memory)

    def size_for(self, samples: int) -> int:
        """How many of `samples` run at once. "auto": the size found so far, or all of them."""
        size = self._fit[torch.is_grad_enabled()].size if isinstance(self.size, str) else self.size  # "auto"
        return min(size or samples, samples)

    def halve(self, samples: int) -> bool:
        """Halves the chunk size from now on, for steps like the present one.

        Returns False, and changes nothing, unless the size is "auto" and more than one sample runs at once.
        """
        size, grad = self.size_for(samples), torch.is_grad_enabled()
        if self.size != "auto" or size == 1:
            return False
        half, fit = -(-size // 2), self._fit[grad]
        self._fit[grad] = Fit(max(samples, fit.samples), fit.graphs, half, half)
        warnings.warn(f"Symmetrized: out of memory with {size} samples at once; {half} from now on", stacklevel=2)
        return True

    def run(self, forward: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward.result` in chunks. "auto" measures first, and halves the chunks after an out-of-memory error."""
        samples, batch = forward.samples, forward.batch
        if self.size != "auto" or samples == 1 or transformed() or torch.compiler.is_compiling():
            return forward.result(self.size_for(samples))
        before, fit = RandomState(batch.device), self._fit[torch.is_grad_enabled()]
        if samples > fit.samples or batch.size > fit.graphs:
            self._measure(forward)
            before.restore()
        while True:
            try:
                with restored_buffers(forward.model, after_errors_only=True):
                    return forward.result(self.size_for(samples))
            except torch.OutOfMemoryError:
                if not self.halve(samples):
                    raise
            release_memory(batch.device)  # outside the handler: the error keeps the tensors of its frames alive
            before.restore()

    def _measure(self, forward: Pass) -> None:
        samples, batch, grad = forward.samples, forward.batch, torch.is_grad_enabled()
        free = free_memory(batch.device) if self.memory is None else self.memory
        size, fit, leaves = samples, self._fit[grad], forward.leaves()
        if free is not None:
            if self.memory is None and grad:  # leaves room for gradients and Adam's two moments
                free -= 3 * sum(p.numel() * p.element_size() for p in forward.model.parameters() if needs_gradient(p))

            def step(count: int) -> None:
                with restored_buffers(forward.model):
                    total = forward.probe(count)
                    if total.requires_grad:
                        torch.autograd.grad(total, leaves, allow_unused=True)

            def fitting() -> int:
                return largest(lambda count: peak_memory(lambda: step(count), batch.device), samples, free)

            backbone: Any = forward.model.backbone
            size = fitting()
            if grad and size < samples and recomputes(backbone, batch):
                kept, size = size, fitting()
                if size < samples:  # chunks all the same, which compute layers again themselves
                    size, backbone.recompute = kept, False
            release_memory(batch.device)
        size = min(size, fit.most or size)
        self._fit[grad] = Fit(max(samples, fit.samples), max(batch.size, fit.graphs), size, fit.most)


def recomputes(backbone: nn.Module, batch: Any) -> bool:
    """Lets the backbone compute its layers again, if it runs as one op and does not do so yet: chunks would run every layer
    once more.
    """
    if not isinstance(backbone, OnePass) or backbone.recompute:
        return False
    weight = next(backbone.parameters(), None)
    backbone.recompute = weight is not None and backbone.why_not(batch.device, weight.dtype) is None
    return backbone.recompute


def needs_gradient(p: Tensor) -> bool:
    """Whether a parameter's gradient has yet to be allocated."""
    return p.requires_grad and p.grad is None


def check_sizes(
    owner: str, name: str, size: int | str | None, memory: int | None = None
) -> tuple[int | str | None, int | None]:
    """size and memory as Python ints. Raises as `Chunks`; `name` is what the owner calls the size."""
    if size is not None and not (isinstance(size, str) and size == "auto"):
        size = _checked_size(f"{owner}: {name}", size, "an int >= 1, None or 'auto'")
    if memory is not None:
        memory = _checked_size(f"{owner}: memory", memory, "an int >= 1 or None")
        if size != "auto":
            raise ValueError(f"{owner}: memory must be None unless {name} is 'auto', got {memory} and {size!r}")
    return size, memory


def _checked_size(argument: str, size: Any, wanted: str) -> int:
    found = as_int(size)
    if found is None or found < 1:
        raise (TypeError if found is None else ValueError)(f"{argument} must be {wanted}, got {size!r}")
    return found


class Fit(NamedTuple):
    """What "auto" found to fit: `size` samples at once, for at most `samples` samples and `graphs` graphs.

    most: the largest size left by out-of-memory errors. None: nothing found yet.
    """

    samples: int = 0
    graphs: int = 0
    size: int | None = None
    most: int | None = None


def largest(peak: Callable[[int], int], samples: int, free: int) -> int:
    """The most samples in 1..`samples` whose peak(count) stays within MARGIN of the free bytes; at least 1.

    Measures 1, 2, 4, ... until a count exceeds the memory or raises torch.OutOfMemoryError, then extends the line
    through the last two points. Small counts alone would mislead: there fixed costs hide the cost per sample.
    """
    room, points, most = MARGIN * free, [(0, 0), (1, peak(1))], samples
    while points[-1][0] < samples and points[-1][1] <= room:
        count = min(2 * points[-1][0], samples)
        try:
            points.append((count, peak(count)))
        except torch.OutOfMemoryError:
            most = count - 1
            break
    (before, low), (count, high) = points[-2:]
    slope = max((high - low) / (count - before), 1)
    return max(1, min(most, count + math.floor((room - high) / slope)))


def step_with_smaller_chunks(
    model: nn.Module, chunks: Chunks, samples: int, step: Callable[[], Any], device: torch.device
) -> Any:
    """step(): forward, loss and backward of the model; after an out-of-memory error again, with half the chunk.

    For errors in the backward pass, which the model cannot see. Earlier gradients are accumulated to, as backward does;
    those of a failed step are dropped, and random state and buffers are restored. Raises the error, with gradients and
    buffers restored, if `chunks` is not "auto" or runs one sample, and any other error.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    held, before = [p.grad for p in parameters], RandomState(device)
    while True:
        for p in parameters:
            p.grad = None
        try:
            with restored_buffers(model, after_errors_only=True):
                result = step()
        except BaseException as error:
            for p, old in zip(parameters, held, strict=True):
                p.grad = old
            if not isinstance(error, torch.OutOfMemoryError) or not chunks.halve(samples):
                raise
        else:
            for p, old in zip(parameters, held, strict=True):
                if old is not None:
                    p.grad = old if p.grad is None else old.add_(p.grad)
            return result
        release_memory(device)
        before.restore()


def release_memory(device: torch.device) -> None:
    """Returns the GPU's unused memory, which is fragmented after an error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
