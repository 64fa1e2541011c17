"""A network of one batch axis on inputs of B inputs and S samples."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCES = nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.RNNBase  # of torch, by default with the batch second
# names by which networks take the valid tokens, the clearest first, and what they mean
MASKS = {
    "lengths": lambda lengths, L: lengths,
    "src_key_padding_mask": lambda lengths, L: ~_valid(lengths, L),
    "key_padding_mask": lambda lengths, L: ~_valid(lengths, L),
    "attention_mask": lambda lengths, L: _valid(lengths, L),
    "mask": lambda lengths, L: _valid(lengths, L),
}


def _valid(lengths: Tensor, L: int) -> Tensor:
    """(M, L) which tokens are valid."""
    return torch.arange(L, device=lengths.device) < lengths[:, None]


def masks_of(net: nn.Module) -> list[str]:
    """The names in MASKS that the network's forward takes."""
    return [name for name in MASKS if name in inspect.signature(net.forward).parameters]


def _needs(net: nn.Module) -> list[tuple[str, int]]:
    """The names in MASKS without a default in the network's forward, and their places among the positional inputs."""
    parameters = inspect.signature(net.forward).parameters.values()
    return [(p.name, k) for k, p in enumerate(parameters) if p.name in MASKS and p.default is p.empty]


class Folded(nn.Module):
    """net on (B, S, ...) as on (B S, ...): for networks that take one batch axis, such as `nn.TransformerEncoder`.

    forward(x, *others, lengths=None): all inputs (B, S, ...); those with one sample, (B, 1, ...), are repeated. lengths
    (B, S) int64, the valid tokens of each sequence, reach the network under the first of these names that it takes:
    `lengths` (M,); `src_key_padding_mask`, `key_padding_mask` (M, L), True where not valid; `attention_mask`, `mask` (M, L),
    True where valid. Without lengths an x (B, S, L, ...) has all tokens valid for those that have no default.
    Raises ValueError for batch_first=False, and where there are lengths and the network takes none of these.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        for part in net if isinstance(net, nn.Sequential) else [net]:
            sequences = isinstance(part, SEQUENCES)
            if sequences and any(getattr(inner, "batch_first", True) is False for inner in part.modules()):
                raise ValueError(f"Folded: net must have batch_first=True, got {type(part).__name__} with False")
        self.net, self._masks, self._needs = net, masks_of(net), _needs(net)

    def forward(self, x: Tensor, *others: Tensor, lengths: Tensor | None = None) -> Any:
        B, S = x.shape[:2]
        given = [y.expand(B, S, *y.shape[2:]).reshape(B * S, *y.shape[2:]) for y in (x, *others)]
        names = [name for name, place in self._needs if place >= len(given)] if x.ndim == 4 else []
        if lengths is not None:
            if not self._masks:
                name = type(self.net).__name__
                raise ValueError(f"Folded: {name} must take one of {', '.join(MASKS)} for padded inputs, got none")
            names = names or self._masks[:1]
        elif names:
            lengths = torch.full((B, S), x.shape[2], device=x.device)
        named = {name: MASKS[name](lengths.reshape(B * S), x.shape[2]) for name in names if lengths is not None}
        y = self.net(*given, **named)
        return torch.utils._pytree.tree_map(lambda part: part.unflatten(0, (B, S)), y)
