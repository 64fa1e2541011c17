"""The lists of used tokens, against their definition."""

import pytest
import torch

from probsym_fast.ops._patches import padded_axis
from probsym_fast.ops.triton.used_tokens import UsedTokens


@pytest.mark.parametrize(("most", "tile"), [(1024, 4096), (2, 64), (1, 4)])
@pytest.mark.parametrize(
    ("N", "grid", "axes", "S", "counts"),
    [
        (4, 2, 2, 2, [2, 4, 1]),
        (10, 5, 2, 3, [10, 0, 3, 12]),
        (9, 4, 1, 3, [9, 0, 12, 4]),
        (34, 17, 2, 1, [34, 7]),
        (5, 1, 2, 2, [0, 3]),
    ],
)
@pytest.mark.parametrize("pad_mode", ["zeros", "circular"])
def test_used_tokens(N, grid, axes, S, counts, pad_mode, most, tile, monkeypatch):
    """Of graphs without nodes, and of counts beyond N; in programs that take several rounds, of several rows each."""
    monkeypatch.setattr("probsym_fast.ops.triton.used_tokens.PROGRAMS", most)
    monkeypatch.setattr("probsym_fast.ops.triton.used_tokens.TILE", tile)
    slots = padded_axis(N, grid, pad_mode, True, torch.device("cpu"))[0]
    found = UsedTokens(slots, torch.tensor(counts), S, N, grid, axes)
    cells = torch.stack([((slots >= 0) & (slots < min(n, N))).view(grid, -1).any(1) for n in counts])
    used = (cells[:, :, None] & cells[:, None, :]).flatten(1) if axes == 2 else cells
    each = used.sum(1)
    used, tokens = used[:, None].expand(-1, S, -1).flatten(), torch.arange(len(counts) * S * used.shape[1])
    assert found.rows.tolist() == [*tokens[used].tolist(), *tokens[~used].tolist()]
    assert found.before.tolist() == [0, *each.cumsum(0).tolist()]
    assert (found.cells[:, :-1] == cells.cumsum(1) - cells.int()).all() and (found.cells[:, -1] == cells.sum(1)).all()
