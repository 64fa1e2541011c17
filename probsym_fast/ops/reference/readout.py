"""readout, dense: a transposed convolution, a crop, permutation matrices, the mean over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops._patches import check_items
from probsym_fast.ops.reference._dense import local_nodes, permutation_matrix


def check_values(tokens: Tensor, items: Tensor, ptr: Tensor, *_) -> None:
    check_items("readout", "at", items, ptr)


def readout(tokens, items, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias) -> Tensor:
    """tokens (B, S, grid^k, D), weight (D, C, P[, P]), items (k, M) -> values (M, C)."""
    check_values(tokens, items, ptr)
    B, S, _ = rank.shape
    k = weight.ndim - 2
    convolve = torch.nn.functional.conv_transpose2d if k == 2 else torch.nn.functional.conv_transpose1d
    x = tokens.flatten(0, 1).mT.unflatten(-1, (grid,) * k)
    z = convolve(x, weight, stride=weight.shape[-1]).movedim(1, -1).unflatten(0, (B, S))
    places = slots.argsort(stable=True)[-rank.shape[-1] :]  # of slots 0, 1, ...; places without a slot sort first
    p = permutation_matrix(rank, order, ptr.diff(), t, log_r, log_c, tau, tokens.dtype)
    for axis in range(k):
        z = z.index_select(2 + axis, places)
    if k == 1:
        y = torch.einsum("bsui,bsic->buc", p, z) / S
    else:
        y = torch.einsum("bsuic,bsvi->buvc", torch.einsum("bsuj,bsjic->bsuic", p, z), p) / S
    graph, local = local_nodes(items, ptr)
    place = (graph, *local)
    y = y[place]
    return y if bias is None else y + bias  # the same for every permutation: not in P's gradient
