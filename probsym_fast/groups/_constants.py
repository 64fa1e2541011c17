"""Constant tensors of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._compilers import as_recorded, is_fake


class Constant:
    """A tensor with a copy on every device where it was asked for: one made at each call would wait for a GPU."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.copies: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict:
        """Without the copies: whoever loads it may lack the device."""
        return {"tensor": self.tensor, "copies": {}}

    def on(self, device: torch.device) -> Tensor:
        if (known := self.copies.get(device)) is None:
            known = self.tensor if device == self.tensor.device else as_recorded(self.tensor).to(device)
            if not (torch.compiler.is_compiling() or is_fake(known)):
                self.copies[device] = known
        return as_recorded(known)
