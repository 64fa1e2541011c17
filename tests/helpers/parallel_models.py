"""Every row with weights on two processes: `python -m tests.helpers.parallel_models FOLDER`, which gets the outcomes."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from probsym_fast import Symmetrized
from tests.helpers.pairs import pair
from tests.programs.rows import ROWS, SIZES, Row, step
from tests.programs.rows.base import Program

STEPS = 3  # the first one records the static graph


def batches(row: Row) -> list[tuple]:
    """One for each process and step."""
    return [row.sample(size, True, torch.float64) for size in SIZES["batch"][: 2 * STEPS]]


def ddp(program: Program) -> nn.Module:
    return DistributedDataParallel(program, static_graph=True, broadcast_buffers=False)


def fsdp2(program: Program) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    if isinstance(program.part, Symmetrized):
        fully_shard(program.part.backbone, mesh=mesh)
    fully_shard(program, mesh=mesh)
    return program


def whole(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        return torch.zeros(p.shape, dtype=p.dtype)
    return p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad


def check(row: Row, wrap: Callable[[Program], nn.Module], rank: int) -> None:
    """Outputs, and gradients averaged over the processes, of three steps. Each process has batches of its own."""
    alone = [row.program(True).double() for _ in range(2)]
    model = wrap(row.program(True).double())
    for k in range(STEPS):
        both = [step(alone[r], row_batch, True) for r, row_batch in enumerate(batches(row)[2 * k : 2 * k + 2])]
        found = step(model, batches(row)[2 * k + rank], True)
        for x, y in zip(found, both[rank], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
        for (name, p), *q in zip(model.named_parameters(), *(x.parameters() for x in alone), strict=True):
            expected = sum(whole(x) for x in q) / 2
            assert (whole(p) - expected).abs().max() <= 1e-8 * expected.abs().max().clamp(min=1), name
        for x in (model, *alone):
            x.zero_grad()


def main(folder: Path) -> None:
    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        outcomes = {}
        for name, row in ((name, row) for name, row in ROWS.items() if row.learns):
            for wrap in (ddp, fsdp2):
                try:
                    check(row, wrap, rank)
                    outcomes[f"{name}, {wrap.__name__}"] = "equal"
                except Exception:
                    outcomes[f"{name}, {wrap.__name__}"] = traceback.format_exc()
        (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes))
        dist.destroy_process_group()

    for status, told in pair(work, folder):
        assert status == 0, told


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
