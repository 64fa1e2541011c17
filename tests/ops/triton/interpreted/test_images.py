"""embed_image and embed_turned: tokens of images that are moved and turned."""

import pytest
import torch

from probsym_fast.ops.triton import _lazy as launcher
from tests.conftest import assert_near
from tests.helpers.items import weights
from tests.ops.test_embed_image import frames_of
from tests.ops.triton.interpreted.checks import BOUND, check, in_dtypes

# C, H, W, P, Q, D: more channels than are read at a time; images of a row and of a pixel
IMAGES = [(3, 4, 12, 4, 6, 7), (6, 4, 6, 2, 3, 4), (2, 3, 1, 1, 1, 2)]


def image_arguments(sizes, dtype=torch.float32):
    C, H, W, P, Q, D = sizes
    weight = weights(D, C, P, Q) / (C * P * Q) ** 0.5
    return torch.randn(2, C, H, W).to(dtype), weight.to(dtype), torch.randn(D).to(dtype)


@pytest.mark.parametrize(("dtype", "sizes"), in_dtypes(*((x,) for x in IMAGES)))
@pytest.mark.parametrize("replicate", [False, True])
def test_images_moved(sizes, replicate, dtype):
    """Rotations, reflections, one that shows the image from afar; one sample."""
    x, weight, bias = image_arguments(sizes, dtype)
    check("embed_image", [x, frames_of(2, 3).float(), weight, bias, replicate], [0, 1, 2, 3], BOUND[dtype])
    if sizes == IMAGES[-1]:
        check("embed_image", [x, frames_of(2, 1).float(), weight, None, replicate], [0, 1, 2])


def test_images_of_several_blocks():
    x, weight, _ = image_arguments((1, 32, 32, 32, 32, 5))
    check("embed_image", [x, frames_of(2, 1).float(), weight, None, False], [0, 1, 2])


@pytest.mark.parametrize("replicate", [False, True])
def test_images_by_any_matrix(replicate):
    """No inverse, nearly none, a narrow one, one that magnifies; in float64 the gradient has its dtype."""
    x, weight, _ = image_arguments((1, 4, 6, 2, 3, 5))
    frames = torch.tensor(
        [[0, 0, 0, 0], [1.1, 2.2, 0.55, 1.1], [1, 2.2, 0.5, 1.14], [2.1, 0, 1, 0.13], [0.11, 0.3, 0.21, 0.1]]
    )
    frames = frames.view(5, 2, 2).expand(2, 5, 2, 2).contiguous()
    check("embed_image", [x, frames, weight, None, replicate], [0, 1, 2])
    wide, d = frames.double(), torch.randn(2, 5, 4, 5)
    if replicate:
        found, expected = (
            launcher("embed_image", "backward")(d, x, f, weight, True, False, True, False, False)[1]
            for f in (wide, frames)
        )
        assert found.dtype == torch.float64
        assert_near(found.float(), expected.double(), BOUND)


@pytest.mark.parametrize(("dtype", "sizes"), in_dtypes(((3, 18, 18, 6, 9, 7),), (IMAGES[1],)))
def test_images_turned(sizes, dtype):
    x, weight, bias = image_arguments(sizes, dtype)
    turns = torch.stack([torch.arange(8), torch.arange(8).flip(0)])
    turns = turns if sizes[1] == sizes[2] else turns // 2 * 2
    check("embed_turned", [x, turns, weight, bias], [0, 2, 3])
    check("embed_turned", [x, turns[:, 5:6], weight, None], [2])


def test_images_in_parts(monkeypatch):
    """Of three samples, which end within an image and beyond it."""
    x, weight, bias = image_arguments((2, 6, 6, 3, 2, 4))
    monkeypatch.setattr("probsym_fast.ops.triton.images.BYTES", 4 * 2 * 6 * 6 * 3)
    check("embed_image", [x, frames_of(2, 4).float(), weight, bias, False], [0, 1, 2, 3])
    check("embed_turned", [x, torch.arange(8).view(2, 4), weight, bias], [0, 2, 3])


@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0)])
def test_images_of_nothing(B, S):
    x, weight, bias = torch.randn(B, 2, 4, 6), torch.randn(5, 2, 2, 3), torch.randn(5)
    check("embed_image", [x, torch.zeros(B, S, 2, 2), weight, bias, False], [0, 1, 2, 3])
    check("embed_turned", [x, torch.zeros(B, S, dtype=torch.int64), weight, bias], [0, 2, 3])
