"""Running statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probsym_fast._checks import transformed


@torch.no_grad()
def move_statistics(owner: str, running: Sequence[Tensor], seen: Sequence[Tensor], momentum: float) -> None:
    """running <- (1 - momentum) running + momentum seen, in place.

    Raises RuntimeError under a torch.func transform that does not take the buffers as inputs and so cannot change them.
    """
    for before, now in zip(running, seen, strict=True):
        try:
            before.lerp_(now.to(before.dtype), momentum)
        except RuntimeError as error:
            if not transformed():
                raise
            raise RuntimeError(
                f"{owner}: running statistics cannot change under this torch.func transform in training mode; call "
                "eval(), or make the buffers inputs of the transform (torch.func.functional_call)"
            ) from error
