"""noise: the same numbers as the reference's."""

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 3), (2, 2, 600), (0, 2, 3)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("forks", [None, [2, 5]])
def test_noise(shape, named, forks):
    rows = torch.arange(shape[0]) * 7 - 3 if named else None
    for streams in ([2**62], [-(2**62), 12345]):
        for block, mirrored in ((1, False), (2, True), (3, False)):
            call = torch.tensor(2**61 + 5), rows, list(shape), 3, forks, streams, block, mirrored
            found, expected = launcher("noise", "forward")(*call), OPS["noise"].reference(*call)
            assert found.shape == shape and torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
            assert streams[1:] or torch.equal(found, expected)
