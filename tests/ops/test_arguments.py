"""Integer arguments and weights of other axes: refused by every op alike."""

import re

import pytest
import torch

from probsym_fast.ops import Permutation, embed_edges, embed_matrix, embed_nodes, node_identifiers, readout
from tests.helpers.items import batch, weights


@pytest.mark.parametrize("grid", ["1", 1.5, 2.0, True, None])
def test_grid_and_tokens_must_be_ints(grid):
    data = batch([4, 2], 5, C=2, S=1)
    p, w = Permutation(data.order), weights(3, 2, 5, 5)
    calls = {
        "embed_edges: grid": lambda: embed_edges(data.edges, data.attr, data.ptr, p, w, grid=grid),
        "embed_matrix: grid": lambda: embed_matrix(torch.ones(2, 5, 5, 2).double(), p, w, grid=grid),
        "embed_nodes: tokens": lambda: embed_nodes(data.x, data.ptr, p, w[..., 0], tokens=grid),
    }
    for name, call in calls.items():
        message = f"{name} must be an int, got {type(grid).__name__} {grid!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call()
    with pytest.raises(ValueError, match=r"^embed_nodes: tokens must be at least 1, got 0$"):
        embed_nodes(data.x, data.ptr, p, w[..., 0], tokens=0)


@pytest.mark.parametrize("ndim", range(6))
def test_weights_of_other_axes(ndim):
    data = batch([4, 2], 5, C=2, S=1)
    p, w = Permutation(data.order), torch.ones([3, 2, 5, 5, 1][:ndim]).double()
    tokens = torch.ones(2, 1, 1, 3).double()
    calls = {
        "embed_edges": (4, lambda: embed_edges(data.edges, data.attr, data.ptr, p, w, grid=1)),
        "embed_matrix": (4, lambda: embed_matrix(torch.ones(2, 5, 5, 2).double(), p, w, grid=1)),
        "embed_nodes": (3, lambda: embed_nodes(data.x, data.ptr, p, w, tokens=1)),
        "readout": (3, lambda: readout(tokens, data.ptr, p, w, at="nodes")),
        "readout of pairs": (4, lambda: readout(tokens, data.ptr, p, w, at=data.edges)),
        "node_identifiers": (2, lambda: node_identifiers(data.ptr, p, torch.ones([5, 3, 1, 1, 1][:ndim]).double())),
    }
    for name, (wanted, call) in calls.items():
        if ndim == wanted:
            assert call().isfinite().all()
        else:
            with pytest.raises(ValueError, match=rf"^{name.split()[0]}: weight must be \(.*, got \([0-9, ]*\)$"):
                call()
