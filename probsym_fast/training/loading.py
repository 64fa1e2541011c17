"""Loading batches: order, shares of several processes, workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from probsym_fast.draws import seeded


class EpochSampler(Sampler):
    """Index tensors of whole batches; the order of an epoch depends only on (seed, epoch).

    share: (k, processes) gives process k its part of every batch. Batches do not depend on the number of processes, with one
    exception: a last batch too small to give each process an item joins the one before. So all processes take the same
    number of steps, as collectives require.
    """

    def __init__(self, count: int, batch: int, *, shuffle: bool = False, drop_last: bool = False, seed: int = 0):
        self.count, self.batch, self.shuffle, self.drop_last, self.seed = (
            count,
            batch,
            shuffle,
            drop_last,
            seed,
        )
        self.epoch = 0
        self.share = 0, 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._sizes())

    def _sizes(self) -> list[int]:
        """Batch sizes over all processes."""
        full, rest = divmod(self.count, self.batch)
        sizes = [self.batch] * full + [rest] * (rest > 0 and not self.drop_last)
        _, processes = self.share
        if len(sizes) > 1 and sizes[-1] < processes:
            sizes[-2:] = [sizes[-2] + sizes[-1]]
        if sizes and sizes[-1] < processes:
            raise ValueError(f"EpochSampler: count must be at least the {processes} processes, got {self.count}")
        return sizes

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=seeded(self.seed, "order", self.epoch))
        first, step = self.share
        sizes = self._sizes()
        yield from (batch[first::step] for batch in order[: sum(sizes)].split(sizes))


class WorkerDied(RuntimeError):
    """A process that loads batches died."""


class Batches(DataLoader):
    """A loader whose workers start at the first batch.

    A resumed trainer makes the iterator before it sets the sampler's epoch; earlier workers would load the wrong epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator's class
        try:
            yield from super().__iter__()
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # a worker died while passing a batch
            if self.num_workers == 0 or str(error).startswith("Caught"):  # an error of the data set
                raise
            raise WorkerDied(f"{type(error).__name__}: {error}") from error


def batches(dataset: Dataset, sampler: EpochSampler, workers: int = 0) -> DataLoader:
    """A loader for in-memory data sets that take an index tensor: one index per batch, no collation.

    workers: persistent processes that load ahead, into pinned memory if torch sees a GPU.
    """
    ahead = workers > 0
    pin = ahead and torch.cuda.is_available()
    return Batches(
        dataset, sampler=sampler, batch_size=None, num_workers=workers, persistent_workers=ahead, pin_memory=pin
    )
