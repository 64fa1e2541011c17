"""The S samples of a batch spread over processes, and their mean: sample parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from probsym_fast.draws import seed_generators

if TYPE_CHECKING:  # torch may be built without
    from torch.distributed.device_mesh import DeviceMesh


def share(samples: int, rank: int, processes: int) -> tuple[int, int]:
    """(first, count): the samples of one process of several; the first samples % processes of them have one more."""
    count, more = divmod(samples, processes)
    return rank * count + min(rank, more), count + (rank < more)


def mean_over_processes(
    part: Callable[[int, int], dict[str, Tensor]], samples: int, mesh: DeviceMesh, *, own: bool
) -> dict[str, Tensor]:
    """Means over all samples of what part(first, count) gives as means over some; each process of the mesh has its `share`.

    With k of S samples here: sum over processes of k / S part(first, k), added in float32 (float64), one all-reduce each. A
    process without a sample (S below the processes) takes the first one with weight 0, so that every process runs the
    same collectives. own: noise that the global generator gives (dropout) is every process's own.

    Every process returns the whole means. Backward: the gradients of all processes' losses, one all-reduce more. So the
    gradients of the parameters averaged over the mesh, as DistributedDataParallel does, are those of one process that
    takes all samples, as long as the losses are equal; a penalty that every process computes whole is averaged too.

    mesh: one-dimensional, the processes that hold the same batch and draw the same. Raises ValueError where it has more
    dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"Symmetrized: samples_mesh must have one dimension, got {mesh.ndim}: {mesh}")
    rank, processes = mesh.get_local_rank(), mesh.size()
    first, count = share(samples, rank, processes)
    with _own_noise(rank, mesh.device_type) if own and processes > 1 else nullcontext():
        means = part(first if count else 0, max(count, 1))
    wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) * (count / samples) for name, x in means.items()}
    return {name: _Sum.apply(x, mesh.get_group()).to(means[name].dtype) for name, x in wide.items()}


@contextmanager
def _own_noise(rank: int, device: str) -> Iterator[None]:
    """Other numbers from the global generators in every process; behind it they are in step again."""
    seed = int(torch.randint(2**62, ()))  # the same in all
    with torch.random.fork_rng([] if device == "cpu" else [torch.cuda.current_device()]):
        seed_generators(seed + rank)
        yield


class _Sum(torch.autograd.Function):
    """The sum over a group's processes; backward the same sum of the gradients.

    `torch.distributed.nn` is deprecated, and the functional collectives have this gradient only from a later torch on.
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
