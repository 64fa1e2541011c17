"""Training over several processes: split by data, by data and parameters, or by samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType, fully_shard

from probsym_fast.models import Symmetrized
from probsym_fast.training.settings import Training


class Layout(NamedTuple):
    """A process's place: rank = place along the data * processes along the samples + place along the samples."""

    data: int  # processes along the data
    samples: int  # processes along the samples
    place: int  # along the data

    @property
    def share(self) -> tuple[int, int]:
        """(k, processes) for `EpochSampler.share`."""
        return self.place, self.data


def layout(settings: Training, rank: int, processes: int) -> Layout:
    """The layout of `rank` among the processes. Raises ValueError if the settings do not suit their number."""
    samples = 1
    if settings.strategy == "samples":
        samples = settings.sample_devices or processes
        if processes % samples:
            raise ValueError(
                f"config: training.sample_devices must divide the {processes} processes, got {settings.sample_devices}"
            )
    data = processes // samples
    if settings.batch % data:
        raise ValueError(f"config: training.batch must be a multiple of the {data} devices, got {settings.batch}")
    return Layout(data, samples, rank // samples)


def check_chunks(model: Symmetrized, settings: Training, where: Layout) -> None:
    """Raises ValueError for chunks "auto" with FSDP2: each chunk gathers parameters, and sizes may differ by process."""
    if settings.strategy == "fsdp" and where.data > 1 and model.chunks.size == "auto":
        raise ValueError(
            f"config: samples.chunk must be a number or null when training.strategy is fsdp, got {model.chunks.size!r}"
        )


def strategy(settings: Training) -> Strategy | str:
    """Lightning's strategy: "auto" (DDP with several processes), or FSDP2 over all processes."""
    devices = torch.cuda.device_count() if isinstance(settings.devices, str) else settings.devices  # a str: "auto"
    if settings.strategy != "fsdp" or devices * settings.nodes <= 1:
        return "auto"
    return FullySharded(devices * settings.nodes, 1, save_distributed_checkpoint=False)  # one file, as on one device


class FullySharded(ModelParallelStrategy):
    """FSDP2 that restores a run through the trainer's checkpoint plugin, which Lightning's own class bypasses."""

    def load_checkpoint(self, checkpoint_path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        assert self.model is not None  # set up before a checkpoint is loaded
        state = self.checkpoint_io.load_checkpoint(checkpoint_path)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, state["state_dict"], options=options)
        for optimizer, moments in zip(self.optimizers, state["optimizer_states"], strict=True):
            named = FullyShardedDataParallel.rekey_optim_state_dict(moments, OptimStateKeyType.PARAM_NAME, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return state


def spread(model: Symmetrized, settings: Training, where: Layout, device: str) -> None:
    """Spreads the model over the processes, once they are connected.

    FSDP2 shards parameters, gradients and moments over all processes. It gathers them in two units, the backbone and the
    rest. It cannot work block by block, because backbones read parts of their last block without calling it.
    """
    if settings.strategy == "samples" and where.samples > 1:
        shape = where.data, where.samples
        model.samples_mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "samples"))["samples"]
    if settings.strategy == "fsdp" and where.data > 1:
        mesh = init_device_mesh(device, (where.data,), mesh_dim_names=("data",))
        fully_shard(model.backbone, mesh=mesh)
        fully_shard(model, mesh=mesh)
