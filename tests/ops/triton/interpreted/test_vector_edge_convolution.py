"""vector_edge_convolution: a layer on clouds of points."""

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from probsym_fast.ops.triton.vector_channels import OF_PARTS
from probsym_fast.ops.triton.vector_pairs import nearest
from tests.ops.triton.inputs import edge_arguments
from tests.ops.triton.interpreted.checks import check


@pytest.mark.parametrize(
    ("sizes", "running", "most", "ragged"),
    [
        ((2, 3, 3, 17, 5, 2), False, 2**26, False),
        ((2, 3, 3, 17, 5, 2), False, 2**26, True),
        ((3, 2, 2, 1, 34, 1), True, 2**26, False),
        ((1, 5, 2, 7, 2, 2), False, 1, True),
        ((2, 3, 3, 0, 3, 2), True, 2**26, False),
    ],
)
def test_vector_edge_convolution(sizes, running, most, ragged, monkeypatch):
    """Several blocks of clouds and of channels; all near, one cloud at a time; two components, five; no clouds; padding."""
    monkeypatch.setattr("probsym_fast.ops.triton.vector_edge_convolution.BYTES", most)
    monkeypatch.setitem(OF_PARTS, "BLOCK_P", 4)  # of six parts of the pairs, and more
    arguments = edge_arguments(*sizes, running)
    if ragged:
        arguments[-2] = torch.arange(sizes[3]) % (sizes[2] + 1)
    check("vector_edge_convolution", arguments, [0, 1, 2, 4, 5])
    exact = OPS["vector_edge_convolution"].reference(*(t.double() if torch.is_tensor(t) else t for t in arguments))
    for found, expected in zip(launcher("vector_edge_convolution", "forward")(*arguments)[1:], exact[1:], strict=True):
        assert found.dtype in (expected.dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy
def test_clouds_of_ties_and_of_nan(fences):
    """A square, where two corners are as near; NaN stays in its cloud; numbers of no neighbour reach no memory."""
    square = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).t()[None, ..., None].contiguous()
    assert [int(nearest(square, k).sum()) for k in (1, 2, 3)] == [4, 12, 12] and nearest(square, 4) is None
    run, turn = launcher("vector_edge_convolution", "forward"), launcher("vector_edge_convolution", "backward")
    x, *rest = edge_arguments(2, 3, 2, 5, 3, 1, running=True)
    x[:, :, 1, 2] = torch.nan
    y, taken, *known = run(x, *rest)
    whole = run(x[..., 3:], *rest)[0]
    assert torch.equal(y[..., 3:], whole) and y.isnan().any(-2).any(-2).any(0).tolist() == [m == 2 for m in range(5)]
    x, rest = fences(x.nan_to_num()), [fences(t) for t in rest]
    wrong = fences(torch.full_like(taken, 255))
    gradients = turn(fences(torch.ones_like(y)), x, *rest[:-1], wrong, *known, rest[-1], True)
    assert all(t.isfinite().all() for t in gradients)
