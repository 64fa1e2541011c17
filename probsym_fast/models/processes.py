"""Sample parallel: the S samples of a batch spread over processes, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from probsym_fast._autocast import promoted
from probsym_fast.draws import seed_generators
from probsym_fast.models.predictions import mapped

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def share(samples: int, rank: int, processes: int) -> tuple[int, int]:
    """(first, count): the samples of one process; the first samples % processes of them take one more."""
    count, more = divmod(samples, processes)
    return rank * count + min(rank, more), count + (rank < more)


def mean_over_processes(part: Callable[[int, int], T], samples: int, mesh: DeviceMesh, *, own: bool) -> T:
    """Means over all samples, from part(first, count), which returns means over some; each process has its `share`.

    Means are a Tensor or a pytree of tensors. With k of S samples here: the sum over processes of k / S part(first, k), in
    float32 or better, with one all-reduce per tensor. A process without a sample (S below the number of processes) takes the
    first one with weight 0, so that every process runs the same collectives. own: every process draws its own noise from
    the global generator (dropout).

    Every process returns the full means. The backward pass sums the gradients of all processes' losses, with one more
    all-reduce. Averaged over the mesh, as in DistributedDataParallel, the parameters' gradients equal those of one process
    with all samples, if all losses are equal; a penalty that every process computes in full is averaged too.

    mesh: one-dimensional, of the processes with the same batch and the same draws. Raises ValueError if it has more
    dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"Symmetrized: samples_mesh must have one dimension, got {mesh.ndim}: {mesh}")
    rank, processes = mesh.get_local_rank(), mesh.size()
    first, count = share(samples, rank, processes)
    with _own_noise(rank, mesh.device_type) if own and processes > 1 else nullcontext():
        means = part(first if count else 0, max(count, 1))
    wide = mapped(lambda x: x.to(promoted(x.dtype, torch.float32)) * (count / samples), means)
    return mapped(lambda x, like: _Sum.apply(x, mesh.get_group()).to(like.dtype), wide, means)


@contextmanager
def _own_noise(rank: int, device: str) -> Iterator[None]:
    """Different numbers from the global generators in every process; restores the common state on exit."""
    seed = int(torch.randint(2**62, ()))  # the same in all processes
    with torch.random.fork_rng([] if device == "cpu" else [torch.cuda.current_device()]):
        seed_generators(seed + rank)
        yield


class _Sum(torch.autograd.Function):
    """The sum over a group's processes; the backward pass sums the gradients in the same way.

    `torch.distributed.nn` is deprecated, and functional collectives have this gradient only in later versions of torch.
    """

    @staticmethod
    def forward(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, distributed.ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(d_y, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor, _: None) -> Tensor:
        return _Sum.apply(d_x, ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, group: distributed.ProcessGroup) -> tuple[Tensor, int]:
        return _Sum.apply(x, group), in_dims[0]
