"""The samples in chunks: memory that does not grow with their number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probsym_fast._checkpointing import recomputed, unchanged
from probsym_fast._checks import as_int, transformed
from probsym_fast._memory import free_memory, peak_memory
from probsym_fast.draws import RandomState
from probsym_fast.groups import Batch

MARGIN = 0.9  # of the memory there is: fragments and other allocations take the rest
Run = Callable[[int, int], Tensor]  # (first sample, count) -> their mean, or each of them


class Chunks:
    """How many samples run at once.

    size: samples; None: all; "auto": all where they fit, else the largest chunk that does. What fits is measured at the first
    step (also the first without gradients, and where samples or graphs become more) by the peak memory of 1, 2, 4, ...
    samples, forward and backward, distribution and all. After an out-of-memory error (torch.OutOfMemoryError) the size is
    halved, for good, and the step runs again. Under a torch.func transform nothing is measured. memory: bytes that a step
    may take with "auto"; None: what the GPU has; on a CPU then all samples run at once.
    Raises TypeError where size or memory is no int, ValueError where it is below 1 and for a memory without "auto".
    """

    def __init__(self, size: int | str | None = None, memory: int | None = None):
        self._size, self._memory = check_sizes("Chunks", "size", size, memory)
        self._found = {grad: Found() for grad in (True, False)}  # with gradients or without

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

    def now(self, samples: int) -> int:
        """How many of so many samples run at once: with "auto" what has been found, all before anything has."""
        size = self._found[torch.is_grad_enabled()].size if self.size == "auto" else self.size
        return min(size or samples, samples)

    def halve(self, samples: int) -> bool:
        """Half as many samples at once from now on, in steps as the present one; whether that is fewer. "auto" alone."""
        size = self.now(samples)
        if self.size != "auto" or size == 1:
            return False
        half, found = -(-size // 2), self._found[torch.is_grad_enabled()]
        self._found[torch.is_grad_enabled()] = Found(max(samples, found.samples), found.graphs, half, half)
        warnings.warn(f"Symmetrized: out of memory with {size} samples at once; {half} from now on", stacklevel=2)
        return True

    def tried(
        self,
        attempt: Callable[[], Any],
        once: Callable[[int], Tensor],
        samples: int,
        batch: Batch,
        model: nn.Module,
        inputs: Iterable[Tensor] = (),
    ) -> Any:
        """attempt(), a forward pass of the model in chunks. "auto" measures before it, and tries again where memory ends.

        once: a scalar of the forward pass with so many samples, all at once, to be measured with its gradients, those of the
        inputs too.
        """
        if self.size != "auto" or samples == 1 or transformed():
            return attempt()
        before, found = RandomState(batch.device), self._found[torch.is_grad_enabled()]
        if samples > found.samples or batch.size > found.graphs:
            self._measure(once, samples, batch, model, inputs)
            before.restore()
        while True:
            try:
                with unchanged(model, after_errors_alone=True):
                    return attempt()
            except torch.OutOfMemoryError:
                if not self.halve(samples):
                    raise
            forget(batch.device)  # behind the handler: the error holds the tensors of its frames
            before.restore()

    def _measure(
        self, once: Callable[[int], Tensor], samples: int, batch: Batch, model: nn.Module, inputs: Iterable[Tensor]
    ) -> None:
        device, found = batch.device, self._found[torch.is_grad_enabled()]
        free = free_memory(device) if self.memory is None else self.memory
        size = samples
        if free is not None:
            parameters = [p for p in model.parameters() if p.requires_grad]
            leaves = [*parameters, *(x for x in inputs if x.requires_grad)]
            if self.memory is None and torch.is_grad_enabled():  # gradients and Adam's two moments are still to come
                free -= 3 * sum(p.numel() * p.element_size() for p in parameters if p.grad is None)
            size = largest(lambda count: peak_memory(lambda: probe(once, count, leaves, model), device), samples, free)
            forget(device)
        size = min(size, found.most or size)
        self._found[torch.is_grad_enabled()] = Found(
            max(samples, found.samples), max(batch.size, found.graphs), size, found.most
        )


def check_sizes(
    owner: str, name: str, size: int | str | None, memory: int | None = None
) -> tuple[int | str | None, int | None]:
    """size and memory with Python ints. Raises as `Chunks` for a size, which the owner calls `name`, and a memory."""
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


class Found(NamedTuple):
    """What "auto" has found: for so many samples asked for and graphs, samples at once; most: what errors have left.

    None: nothing yet.
    """

    samples: int = 0
    graphs: int = 0
    size: int | None = None
    most: int | None = None


def mean(run: Run, samples: int, size: int, device: torch.device, modules: Sequence[nn.Module]) -> Tensor:
    """The mean over all samples, `size` at once: sum over chunks of count / S run(first, count), in float32 or better.

    With gradients every chunk but the last, where the backward pass begins, is computed again in it. modules: those that
    `run` reads.
    """
    total = None
    for count, y in _in_chunks(run, samples, size, device, modules):
        if count == samples:
            return y
        if total is None:
            total = y.to(torch.promote_types(y.dtype, torch.float32)) * (count / samples)
        else:
            total = total.add_(y, alpha=count / samples)
    return total.to(y.dtype)


def each(run: Run, samples: int, size: int, device: torch.device, modules: Sequence[nn.Module]) -> Tensor:
    """`mean` without the mean: (S, ...) where run(first, count) gives (count, ...)."""
    parts = [y for _, y in _in_chunks(run, samples, size, device, modules)]
    return torch.cat(parts) if parts[1:] else parts[0]


def _in_chunks(
    run: Run, samples: int, size: int, device: torch.device, modules: Sequence[nn.Module]
) -> Iterator[tuple[int, Tensor]]:
    """(count, run(first, count)) chunk by chunk; what the last one keeps is read before any other is computed again."""
    for first in range(0, samples, size):
        count = min(size, samples - first)
        last = first + count == samples
        yield count, run(first, count) if last else recomputed(run, first, count, device=device, modules=modules)


def largest(peak: Callable[[int], int], samples: int, free: int) -> int:
    """The most samples, up to `samples` and at least 1, whose peak(count) is within MARGIN of the bytes that are free.

    Measured at 1, 2, 4, ... until one is beyond or raises torch.OutOfMemoryError, with a straight line between the last two:
    at few samples what does not grow with them hides what does.
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


def probe(once: Callable[[int], Tensor], count: int, leaves: list[Tensor], model: nn.Module) -> None:
    """Runs some samples, and their backward pass where gradients are on, without a trace."""
    with unchanged(model):
        total = once(count)
        if total.requires_grad:
            torch.autograd.grad(total, leaves, allow_unused=True)


def retried(model: nn.Module, chunks: Chunks, samples: int, step: Callable[[], Any], device: torch.device) -> Any:
    """step(): forward, loss and backward of the model; after an out-of-memory error once more with half the chunk.

    For errors in the backward pass, which the model cannot see. Gradients that were there before are added to as backward
    does, those of a step that failed are dropped; random numbers and buffers are as before it. Raises the error, gradients
    and buffers as before, where `chunks` are not "auto" or are of one sample, and any other error.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    held, before = [p.grad for p in parameters], RandomState(device)
    while True:
        for p in parameters:
            p.grad = None
        try:
            with unchanged(model, after_errors_alone=True):
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
        forget(device)
        before.restore()


def forget(device: torch.device) -> None:
    """Gives the GPU's unused memory back, which is in pieces after an error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
