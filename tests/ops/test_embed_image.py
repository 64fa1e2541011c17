"""embed_image: images moved by matrices and by quarter turns."""

import pytest
import torch
from torch.nn.functional import affine_grid, conv2d, grid_sample

from probsym_fast.ops import OPS, embed_image
from tests.conftest import assert_near
from tests.helpers.items import assert_same, value_and_gradients

BACKENDS = OPS["embed_image"].backends("cpu")
PADDING = {"zeros": "zeros", "replicate": "border"}
# C, H, W, P, Q, D
SIZES = [(3, 12, 12, 4, 4, 7), (1, 8, 12, 8, 4, 33), (4, 14, 21, 7, 7, 16), (2, 5, 3, 5, 1, 3), (5, 32, 32, 32, 32, 20)]


def frames_of(B: int, S: int, device="cpu") -> torch.Tensor:
    """Rotations, half of them reflected, one of them stretched: some of it lies far outside."""
    angle, sign = 6.3 * torch.rand(B, S).double(), 1 - 2 * (torch.arange(S) % 2)
    frames = torch.stack([angle.cos(), -angle.sin() * sign, angle.sin(), angle.cos() * sign], -1).unflatten(-1, (2, 2))
    frames[0, 0] *= 1.7
    return frames.to(device)


def make(sizes, B=2, S=3, device="cpu") -> list[torch.Tensor]:
    """pixels, weight, bias"""
    C, H, W, P, Q, D = sizes
    leaves = torch.randn(B, C, H, W), torch.randn(D, C, P, Q) / (C * P * Q) ** 0.5, torch.randn(D)
    return [x.double().to(device) for x in leaves]


def by_grid_sample(pixels, frames, weight, bias, pad_mode):
    """The moved images of torch, whose grid has its rows downwards and its borders at -1 and 1."""
    B, S = frames.shape[:2]
    H, W = pixels.shape[-2:]
    scale = frames.new_tensor([W, -H])
    theta = frames * (scale / scale[:, None])  # x / W and -y / H to the same
    theta = torch.cat([theta, theta.new_zeros(B, S, 2, 1)], -1).flatten(0, 1)
    grid = affine_grid(theta, [B * S, 1, H, W], align_corners=False)
    x = grid_sample(pixels.repeat_interleave(S, 0), grid, padding_mode=PADDING[pad_mode], align_corners=False)
    return conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).mT.unflatten(0, (B, S))


def turned(image, k):
    """g^-1 of an image (C, H, W): turned back, then its rows flipped back."""
    image = torch.rot90(image, -(k % 4), (-2, -1))
    return image.flip(-2) if k > 3 else image


def by_copies(pixels, turns, weight, bias):
    images = [torch.stack([turned(x, int(k)) for k in row]) for x, row in zip(pixels, turns, strict=True)]
    tokens = conv2d(torch.stack(images).flatten(0, 1), weight, bias, stride=weight.shape[2:])
    return tokens.flatten(2).mT.unflatten(0, turns.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pad_mode", PADDING)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_torchs_convolution_of_its_moved_images(backend, pad_mode, sizes):
    pixels, weight, bias = make(sizes)
    leaves = [pixels, frames_of(2, 3), weight, bias]
    found = value_and_gradients(lambda *x: embed_image(*x, pad_mode=pad_mode, backend=backend), leaves)
    assert_same(found, value_and_gradients(lambda *x: by_grid_sample(*x, pad_mode), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_torchs_convolution_of_turned_copies(backend, sizes):
    leaves, square = make(sizes), sizes[1] == sizes[2]
    turns = torch.stack([torch.randperm(8), torch.arange(8)]) if square else torch.tensor([[0, 2, 4], [6, 6, 0]])
    found = value_and_gradients(lambda x, w, b: embed_image(x, turns, w, b, backend=backend), leaves)
    assert_same(found, value_and_gradients(lambda x, w, b: by_copies(x, turns, w, b), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_turns_are_matrices(backend):
    """Also at the border, where the coordinates of an exact matrix are whole."""
    pixels, weight, bias = make(SIZES[0])
    turns = torch.arange(8).expand(2, 8)
    quarter, flip = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    frames = torch.stack(
        [torch.linalg.matrix_power(quarter, k % 4) @ (flip if k > 3 else torch.eye(2)) for k in turns[0]]
    )
    for pad_mode in PADDING:
        found = embed_image(pixels, frames.expand(2, 8, 2, 2), weight, bias, pad_mode=pad_mode, backend=backend)
        assert_near(found, embed_image(pixels, turns, weight, bias, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pad_mode", PADDING)
def test_gradcheck(backend, pad_mode):
    leaves = [x.requires_grad_() for x in make((2, 6, 4, 3, 2, 3), S=2)]
    frames = frames_of(2, 2).requires_grad_()

    def f(pixels, frames, weight, bias):
        return embed_image(pixels, frames, weight, bias, pad_mode=pad_mode, backend=backend)

    assert torch.autograd.gradcheck(f, [leaves[0], frames, *leaves[1:]])
    pixels, weight, bias = make((2, 4, 4, 2, 2, 3), S=2)
    turns = torch.tensor([[0, 5], [3, 6]])
    leaves = [x.requires_grad_() for x in (pixels, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: embed_image(x, turns, w, b, backend=backend), leaves)
