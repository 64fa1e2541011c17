"""transformer: whole networks on sequences."""

import pytest
import torch

from probsym_fast.ops.triton import _lazy as launcher
from tests.ops.triton.inputs import sequences
from tests.ops.triton.interpreted.checks import check


@pytest.mark.parametrize(
    ("M", "L", "more", "read", "gelu", "keep"),
    [
        (3, 4, {}, [], True, True),
        (2, 17, {"in_features": 0, "width": 20, "feedforward": 70, "out_features": 0, "layers": 1}, [], False, False),
        (1, 33, {"heads": 1, "width": 20, "layers": 1}, [32, 0, 32], True, True),
        (2, 1, {"out_features": 0, "width": 9, "heads": 3}, [0], True, False),
        (0, 3, {}, [], True, True),
    ],
)
def test_transformer(M, L, more, read, gelu, keep):
    """Several blocks of rows, of features and of hidden features; with and without embedding and head; no sequences."""
    x, row, sizes = sequences(M, L, **more)
    check("transformer", [x, row, None, sizes, read, gelu, 1e-5, keep, False], [0, 1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy
def test_transformer_of_some_sequences_at_a_time(monkeypatch):
    """What is computed again is the same to the bit, and in any parts nearly; NaN in one sequence reaches no other."""
    x, row, sizes = sequences(3, 4, layers=1, heads=1)
    x[1, 2] = torch.nan
    run, turn = launcher("transformer", "forward"), launcher("transformer", "backward")
    found = []
    for bytes_, keep in ((2**26, True), (2**26, False), (1, True)):
        monkeypatch.setattr("probsym_fast.ops.triton.transformer.BYTES", bytes_)
        y, kept = run(x, row, None, sizes, [], True, 1e-5, keep)
        d_x, _ = turn(torch.ones_like(y), x, row, kept, None, sizes, [], True, 1e-5, True, False)
        found.append((y, d_x))
    for whole, again, parts in zip(*found, strict=True):
        assert whole.flatten(1).isnan().any(1).tolist() == [False, True, False]
        torch.testing.assert_close(again, whole, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(parts, whole, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_a_norm_whose_variance_overflows():
    """Every output of its sequence is NaN, as on a CPU."""
    x, row, sizes = sequences(3, 4, layers=1, heads=1)
    x[1, 2, 0] = 1e30
    y, _ = launcher("transformer", "forward")(x, row, None, sizes, [], True, 1e-5, False)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of numpy, where the kernel takes another value
@pytest.mark.parametrize("more", [{}, {"in_features": 0, "out_features": 0}])
def test_transformer_of_lengths(more, monkeypatch):
    """What follows the end of a sequence is neither read nor counted, and its norm does not divide by zero; in parts too."""
    monkeypatch.setattr("probsym_fast.ops.triton.transformer.BYTES", 1)
    x, row, sizes = sequences(2, 3, layers=1, **more)
    lengths, eps, keep = torch.tensor([1, 3]), 1e-5 if sizes[0] else 0.0, bool(sizes[0])
    check("transformer", [x, row, lengths, sizes, [], True, eps, keep, False], [0, 1])
    x[torch.arange(3) >= lengths[:, None]] = torch.nan
    y, kept = launcher("transformer", "forward")(x, row, lengths, sizes, [], True, eps, False)
    gradients = launcher("transformer", "backward")(y, x, row, kept, lengths, sizes, [], True, eps, True, True)
    assert all(t.isfinite().all() for t in (y, *gradients))
    assert not y[0, 1:].any() and not gradients[0][0, 1:].any()
