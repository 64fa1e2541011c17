"""What a test sets for the whole process does not reach the next one."""

import os

import pytest
import torch


@pytest.mark.parametrize("turn", [1, 2])
def test_what_is_set_is_undone(turn):
    """Either turn finds nothing of the other's, whichever comes first."""
    assert "PL_LEFT_BEHIND" not in os.environ and os.environ.get("PATH") != "/nowhere"
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() != 7
    os.environ.update({"PL_LEFT_BEHIND": "1", "PATH": "/nowhere"})
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(7)
