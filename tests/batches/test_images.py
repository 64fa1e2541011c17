"""`psf.Images`: what it holds, what it moves, and what it refuses."""

import re

import pytest
import torch

import probsym_fast as psf
from probsym_fast.groups import Dihedral, Orthogonal, SpecialOrthogonal


def images(**fields) -> psf.Images:
    given = {"pixels": torch.randn(2, 3, 4, 4), "mask": torch.arange(32).view(2, 4, 4), "key": torch.tensor([5, 1])}
    return psf.Images(**{**given, **fields})


def test_fields():
    batch = images()
    batch.check()
    assert batch.size == 2 and batch.dtype == torch.float32 and batch.device == torch.device("cpu")
    assert batch.num_nodes is None and batch.center is None and torch.equal(batch.names(2), batch.key)
    wide = batch.to(torch.float64)
    assert wide.dtype == torch.float64 and wide.mask.dtype == torch.int64
    psf.Images(torch.zeros(0, 1, 3, 5)).check()
    images(mask=None, key=None).check()
    images(mask=torch.rand(2, 4, 4)).check()


class Turns(torch.nn.Module):
    """Matrices from the noise only."""

    outputs = ("matrices",)

    def noise_shape(self, batch, samples):
        return batch.size, samples, 2, 2

    def forward(self, batch, noise):
        return {"matrices": noise}


def test_what_reads_the_key():
    """Fixed noise of a learned distribution follows the images' keys; other distributions draw by the place in the batch."""
    batch, group = images(), SpecialOrthogonal(2)
    swapped = images(pixels=batch.pixels.flip(0), mask=None, key=batch.key.flip(0))
    net = psf.models.ImageScores(channels=3)
    energy = psf.distributions.RotationEnergy(group, net, psf.models.MovedImages(), refine=False)
    fixed = psf.distributions.Learned(group, Turns(), psf.distributions.Normal(fixed=3))
    for distribution, by_key in ((fixed, True), (psf.distributions.Uniform(group), False), (energy, False)):
        g, again = (distribution(x, 2, psf.Draws(seed=1))[0] for x in (batch, swapped))
        renamed, _ = distribution(batch.replace(key=batch.key + 1), 2, psf.Draws(seed=1))
        assert torch.equal(g, again.flip(0)) is by_key
        assert torch.equal(g, renamed) is not by_key


def test_the_mask_moves_along():
    """Labels keep their pixels in exact groups. Matrices take the nearest label, and 0 outside."""
    pixels = torch.arange(1.0, 33).view(2, 1, 4, 4)
    batch, group = images(pixels=pixels, mask=pixels[:, 0].long()), Dihedral(4)
    g = group.uniform(batch, 1, psf.Draws(seed=2))
    moved = batch.moved(group, g)
    assert torch.equal(moved.pixels, batch.carried(group, g, pixels, "chw")) and torch.equal(moved.key, batch.key)
    assert torch.equal(moved.pixels[:, 0].long(), moved.mask) and not torch.equal(moved.mask, batch.mask)
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # 37 degrees
    for k, sign in ((0, 1.0), (1, -1.0)):
        group, frame = (SpecialOrthogonal(2), Orthogonal(2))[k], turn @ torch.diag(torch.tensor([1.0, sign]))
        moved = batch.moved(group, frame.expand(2, 1, 2, 2))
        assert moved.mask.dtype == torch.int64
        for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist():
            x, y = (frame.T @ torch.tensor([j - 1.5, 1.5 - i])).tolist()
            row, column = round(1.5 - y), round(x + 1.5)
            inside = 0 <= row < 4 and 0 <= column < 4
            assert torch.equal(moved.mask[:, i, j], batch.mask[:, row, column] if inside else torch.zeros(2).long())
        assert (moved.mask == 0).any()
        soft = batch.replace(mask=batch.mask.float()).moved(group, frame.expand(2, 1, 2, 2))
        assert torch.equal(soft.mask, soft.pixels[:, 0])  # as the pixels


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": None}, TypeError, "pixels must be a Tensor, got NoneType"),
        ({"pixels": torch.zeros(3, 4, 4)}, ValueError, "pixels must have 4 axes (B, C, H, W), got (3, 4, 4)"),
        ({"pixels": torch.zeros(2, 3, 4, 4).byte()}, TypeError, "pixels must be floating point, got torch.uint8"),
        *(
            (
                {"pixels": torch.zeros(shape), "mask": None},
                ValueError,
                f"pixels must have a channel and a pixel or more, got {shape}",
            )
            for shape in ((2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0))
        ),
        ({"mask": torch.zeros(2, 1, 4, 4)}, ValueError, "mask must have 3 axes (B, H, W), got (2, 1, 4, 4)"),
        ({"mask": torch.zeros(2, 5, 4)}, ValueError, "axis 1 of mask must be height = 4, got (2, 5, 4)"),
        ({"mask": torch.zeros(2, 4, 5)}, ValueError, "axis 2 of mask must be width = 4, got (2, 4, 5)"),
        ({"mask": [0]}, TypeError, "mask must be a Tensor or None, got list"),
        ({"mask": torch.zeros(2, 4, 4, device="meta")}, RuntimeError, "mask must be on cpu as pixels is, got meta"),
        ({"key": torch.zeros(3).long()}, ValueError, "axis 0 of key must be batch = 2, got (3,)"),
        ({"key": torch.zeros(2)}, TypeError, "key must be an int64 Tensor, got torch.float32"),
        ({"key": torch.tensor([0, -1])}, ValueError, "key must be in 0..2^43 - 1, got -1"),
    ],
)
def test_what_is_refused(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'Images: {message}')}$"):
        images(**changes).check()
    with pytest.raises(TypeError, match=r"^Images.replace: fields must be of pixels, mask, key, got x$"):
        images().replace(x=1)
