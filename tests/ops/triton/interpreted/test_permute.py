"""permute: rows moved by soft permutations."""

import pytest
import torch

from probsym_fast.ops import soft_permutation
from tests.ops.triton.interpreted.checks import check


@pytest.mark.parametrize(("B", "S", "D"), [(2, 3, 4), (2, 1, 3), (0, 2, 3), (1, 1, 0)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_permute(B, S, D, inverse, shared, monkeypatch):
    """Rows of several blocks. Also where nothing is contiguous: some of the samples, nodes first, every second count."""
    for name in ("BLOCK", "COMBINED"):
        monkeypatch.setattr(f"probsym_fast.ops.triton.permute.{name}", 4)
    scores, num_nodes = torch.randn(B, S + 1, 9), torch.tensor([9, 9, 5, 5][: 2 * B], dtype=torch.int64)[::2]
    p = soft_permutation(scores, num_nodes, 0.5, 3, backend="reference").narrow(0, S)
    x = torch.randn(9, B, 1 if shared else S, D).permute(1, 2, 0, 3)
    check("permute", [x, p.rank, p.order, num_nodes, p.scores, p.log_r, p.log_c, 0.5, inverse], [0, 4, 5, 6])
