"""The tests of interpreted/, in processes of their own: the last file here, as they have run beside the others."""

import pytest

from tests.ops.conftest import HALVES


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_kernels_under_the_interpreter(half, interpreted):
    status, text = interpreted[half].result()
    assert status == 0, text
