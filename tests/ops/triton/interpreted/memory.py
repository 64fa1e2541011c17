"""Memory that a kernel must set, and memory that it must leave alone."""

import torch

ROOM = 4096  # numbers around a tensor


def garbage(dtype: torch.dtype) -> float:
    """NaN, or a number that points nowhere."""
    return float("nan") if dtype.is_floating_point else 255 if dtype == torch.uint8 else -(10**9)


def check_memory(results, arguments) -> None:
    """As a compiled program expects it of an op: each result begins its own memory, and all of it is set."""
    made = [x for x in results if isinstance(x, torch.Tensor) and x.numel()]
    assert all(x.storage_offset() == 0 for x in made)
    assert len({x.untyped_storage().data_ptr() for x in made}) == len(made)
    numbers = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if all(x.isfinite().all() for x in numbers):
        assert all(x.isfinite().all() for x in made)


class Fences:
    """Tensors in the middle of memory that must be left alone: NaN, and numbers that point nowhere."""

    def __init__(self):
        self.kept = []

    def __call__(self, x):
        if not isinstance(x, torch.Tensor) or not x.ndim:
            return x
        memory = torch.full((x.numel() + 2 * ROOM,), garbage(x.dtype), dtype=x.dtype)
        inside = memory[ROOM : ROOM + x.numel()].view(x.shape)
        self.kept.append((memory, x.numel()))
        return inside.copy_(x)

    def stand(self):
        for memory, count in self.kept:
            for side in (memory[:ROOM], memory[ROOM + count :]):
                assert (side.isnan() if side.is_floating_point() else side == garbage(side.dtype)).all()
