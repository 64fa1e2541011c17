"""embed_image: images moved by matrices and by quarter turns."""

import re

import pytest
import torch
from torch.nn.functional import affine_grid, conv2d, grid_sample

from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import OPS, embed_image
from tests.conftest import assert_near
from tests.helpers.items import DTYPES, assert_same, bit_equal_on_any_threads, check, value_and_gradients

BACKENDS = OPS["embed_image"].backends("cpu")
PADDING = {"zeros": "zeros", "replicate": "border"}
# C, H, W, P, Q, D
SIZES = [
    (3, 12, 12, 4, 4, 7),
    (1, 8, 12, 8, 4, 33),
    (4, 14, 21, 7, 7, 16),
    (2, 5, 3, 5, 1, 3),
    (3, 28, 28, 14, 14, 9),  # those of the usual vision transformers
    (3, 32, 32, 16, 16, 8),
    (5, 32, 32, 32, 32, 20),
]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad_mode", PADDING)
def test_kernels(device, pad_mode, dtype):
    """Several images of several tiles of patches."""
    pixels, weight, bias = make((3, 48, 36, 6, 4, 40), device=device)
    leaves = [pixels, frames_of(2, 3, device), weight, bias]
    check("embed_image", lambda backend, *x: embed_image(*x, pad_mode=pad_mode, backend=backend), leaves, dtype)
    turns, leaves = torch.arange(8, device=device).repeat(2, 1), make((3, 36, 36, 6, 4, 40), device=device)
    check("embed_turned", lambda backend, x, *y: embed_image(x, turns, *y, backend=backend), leaves, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    leaves = [(x := make(SIZES[0]))[0], frames_of(2, 3), *x[1:]]
    full = value_and_gradients(lambda *x: embed_image(*x, backend=backend), leaves)[1:]
    for wanted in ([0], [1], [2], [3], [0, 2], [1, 3]):
        found = value_and_gradients(lambda *x: embed_image(*x, backend=backend), leaves, wanted)[1:]
        assert_same(found, [full[i] for i in wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend):
    pixels, weight, bias = make(SIZES[0])
    for plane in (torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, dtype=torch.int64)):
        leaves = [pixels[:0], weight, bias]
        call = lambda x, w, b, plane=plane: embed_image(x, plane, w, b, backend=backend)  # noqa: E731
        found = value_and_gradients(call, leaves)
        assert found[0].shape == (0, 3, 9, 7) and not found[2].any() and not found[3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_outside(backend):
    """Places that no 32-bit number counts: zero, or the nearest corner."""
    pixels, weight, bias = make((1, 4, 4, 2, 2, 3), S=2)
    far = torch.diag(torch.tensor([1e300, 1e12], dtype=torch.float64)).expand(2, 2, 2, 2)
    zero = embed_image(pixels, far, weight, backend=backend)
    assert_near(zero, torch.zeros_like(zero))
    corners = embed_image(pixels, far, weight, bias, pad_mode="replicate", backend=backend)
    assert_near(
        corners,
        embed_image(
            pixels[..., [[0], [3]], [0, 3]].repeat_interleave(2, 2).repeat_interleave(2, 3),
            torch.zeros(2, 2).long(),
            weight,
            bias,
            backend=backend,
        ),
    )


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
@pytest.mark.parametrize("B", [1, 3])
def test_bit_equal_on_any_threads(B):
    pixels, weight, bias = (x.float() for x in make((3, 48, 48, 8, 8, 40), B))
    leaves = [pixels, frames_of(B, 5).float(), weight, bias]
    bit_equal_on_any_threads(lambda *x: embed_image(*x, backend="cpu"), leaves)
    turns = torch.arange(5).repeat(B, 1)
    bit_equal_on_any_threads(lambda x, *y: embed_image(x, turns, *y, backend="cpu"), [pixels, weight, bias])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    pixels, weight, bias = make((3, 12, 12, 4, 4, 33))
    leaves, frames = [pixels, weight, bias], frames_of(2, 3)
    inner = PatchWeight(33, 3, 4, 4)().double().detach().copy_(weight)
    other = [pixels.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), inner, torch.stack([bias, bias], 1)[:, 0]]
    call = lambda x, w, b: embed_image(x, frames.mT.contiguous().mT, w, b, backend=backend)  # noqa: E731
    assert_same(value_and_gradients(call, other), value_and_gradients(call, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_autocast(backend):
    pixels, weight, bias = make(SIZES[0])
    leaves = [pixels.bfloat16(), frames_of(2, 3).float(), weight.bfloat16(), bias.bfloat16()]
    exact = value_and_gradients(lambda *x: embed_image(*x, backend="reference"), [x.double() for x in leaves])
    found = value_and_gradients(lambda *x: embed_image(*x, backend="auto"), leaves)
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in leaves)]
    for x, y in zip(found, exact, strict=True):  # rounded once
        assert_near(x, y, {torch.bfloat16: 8e-3, torch.float32: 8e-3})
    leaves = [leaves[0], *(x.float() for x in leaves[1:])]
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda *x: embed_image(*x, backend=backend), leaves)
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in leaves)]
    assert_near(found[0], exact[0], {torch.float32: 1e-5})  # autocast does not reach the op


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    pixels, weight, bias = make((2, 4, 6, 2, 3, 5), S=2)
    turns = torch.zeros(2, 2).long()
    for arguments, error, message in (
        ({"pixels": pixels[:, :1]}, ValueError, "pixels must be (B, C, H, W) with C = 2, got (2, 1, 4, 6)"),
        ({"pixels": pixels[0]}, ValueError, "pixels must be (B, C, H, W) with C = 2, got (2, 4, 6)"),
        ({"pixels": pixels[..., 1:]}, ValueError, "pixels must be whole patches of 2 x 3, got 4 x 5"),
        ({"pixels": pixels.float()}, TypeError, "pixels must be torch.float64 as weight is, got torch.float32"),
        ({"pixels": pixels.to("meta")}, RuntimeError, "pixels must be on cpu as weight is, got meta"),
        ({"weight": weight[0]}, ValueError, "weight must be (D, C, P, Q), got (2, 2, 3)"),
        ({"weight": weight[:0]}, ValueError, "weight must be (D, C, P, Q), got (0, 2, 2, 3)"),
        ({"bias": bias[1:]}, ValueError, "bias must be (5,), got (4,)"),
        ({"pixels": None}, TypeError, "pixels must be a Tensor, got NoneType"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
        ({"plane": [0, 1]}, TypeError, "plane must be a floating point or int64 Tensor, got list"),
        ({"plane": turns.int()}, TypeError, "plane must be a floating point or int64 Tensor, got torch.int32"),
        ({"plane": turns[:1]}, ValueError, "plane must be (B, S) with B = 2 and S >= 1, got (1, 2)"),
        ({"plane": turns[:, :0]}, ValueError, "plane must be (B, S) with B = 2 and S >= 1, got (2, 0)"),
        ({"plane": bias}, ValueError, "plane must be (B, S, 2, 2) with B = 2 and S >= 1, got (5,)"),
        ({"plane": turns.to("meta")}, RuntimeError, "plane must be on cpu, got meta"),
        ({"plane": turns - 1}, ValueError, "plane must hold quarter turns 0 to 7, got -1"),
        ({"plane": turns + 8}, ValueError, "plane must hold quarter turns 0 to 7, got 8"),
        ({"plane": turns + 5}, ValueError, "pixels must be square for quarter turn 5, got 4 x 6"),
        ({"plane": frames_of(2, 2) / 0}, ValueError, "plane must be finite, got inf or nan"),
        ({"pad_mode": "border"}, ValueError, "pad_mode must be one of ('zeros', 'replicate'), got 'border'"),
    ):
        given = {"pixels": pixels, "plane": turns, "weight": weight, "bias": bias} | arguments
        with pytest.raises(error, match=f"^embed_image: {re.escape(message)}$"):
            embed_image(**given, backend=backend)
