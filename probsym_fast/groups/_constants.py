"""Constant tensors of modules and groups."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._compilers import is_fake


class Constant:
    """A tensor with a copy on every device where it was asked for: one made at each call would wait for a GPU."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device == self.tensor.device:
            return self.tensor
        if (known := self.copies.get(device)) is not None:
            return known
        copy = self.tensor.to(device)
        if not (torch.compiler.is_compiling() or is_fake(copy)):
            self.copies[device] = copy
        return copy
