"""Images as tokens and pixels, and their readouts: against dense definitions, and equivariant."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probsym_fast as psf
from probsym_fast.models import ClassReadout, ImageTokens, MaskReadout, MovedImages, TokenReadout
from tests.conftest import assert_near

D4, SO2 = psf.groups.Dihedral(4), psf.groups.SpecialOrthogonal(2)


def images(*sizes: int) -> psf.Images:
    return psf.Images(torch.randn(3, 2, *(sizes or (8, 8)), dtype=torch.float64))


def turned(x, k):
    """The element k of D4, by torch."""
    return (x.flip(-2) if k > 3 else x).rot90(k % 4, (-2, -1))


def turned_back(x, k):
    x = x.rot90(-(k % 4), (-2, -1))
    return x.flip(-2) if k > 3 else x


@pytest.mark.parametrize("pad_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("group", [D4, SO2, psf.groups.Cyclic(3)], ids=str)
def test_tokens_are_convolutions_of_moved_images(group, pad_mode):
    batch = images(8, 8)
    embed = ImageTokens(6, (4, 2), 2, pad_mode=pad_mode).double()
    embed.norm = nn.LayerNorm(6).double()
    g = group.uniform(batch, 5, psf.Draws(seed=1))
    (tokens,) = embed(batch, group, g)
    (moved,) = MovedImages(pad_mode=pad_mode)(batch, group, g)
    assert tokens.shape == (3, 5, 8, 6) and moved.shape == (3, 5, 2, 8, 8)
    expected = F.conv2d(moved.flatten(0, 1), embed.weight, embed.bias, stride=(4, 2))
    assert_near(tokens, embed.norm(expected.flatten(2).mT).unflatten(0, (3, 5)))
    if group is D4:
        each = [[turned_back(x, int(k)) for k in row] for x, row in zip(batch.pixels, g, strict=True)]
        assert torch.equal(moved, torch.stack([torch.stack(row) for row in each]))


def test_drawn_as_a_convolution_is():
    tokens, conv = ImageTokens(400, (4, 5), 3), nn.Conv2d(3, 400, (4, 5))
    for name in ("weight", "bias"):
        drawn, wanted = getattr(tokens, name), getattr(conv, name)
        assert drawn.shape == wanted.shape and abs(drawn.std() / wanted.std() - 1) < 0.1
        assert drawn.abs().max() <= wanted.abs().max() * 1.05
    assert ImageTokens(4, 2, bias=False).bias is None


def test_images_to_score_are_small():
    """The longer side is averaged to 4 pixels before the image moves; small images stay as they are."""
    batch, half = images(8, 16), psf.groups.Cyclic(2)
    g = half.elements(batch)
    (x,) = MovedImages(side=4)(batch, half, g)
    small = F.avg_pool2d(batch.pixels, 4)
    assert_near(x, torch.stack([small, small.rot90(2, (-2, -1))], 1))
    assert torch.equal(MovedImages(side=16)(batch, half, g)[0][:, 0], batch.pixels)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("head", [nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 4), nn.Tanh()), None])
def test_classes(head, average):
    features = torch.randn(3, 5, 6)
    logits = features if head is None else head(features)
    wanted = (logits if average == "logits" else logits.softmax(2)).mean(1)
    readout = ClassReadout(head, average=average)
    assert_near(readout(features, None, None, None), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = readout(features.bfloat16(), None, None, None)
    assert found.dtype == (torch.bfloat16 if head is None else torch.float32)


def test_a_linear_head_runs_once_for_all_samples():
    shapes = []
    head = nn.Linear(6, 4)
    head.register_forward_hook(lambda _, given, made: shapes.append(tuple(made.shape)))
    ClassReadout(head)(torch.randn(3, 5, 6), None, None, None)
    ClassReadout(head, average="probabilities")(torch.randn(3, 5, 6), None, None, None)
    assert shapes == [(3, 4), (3, 5, 4)]


def test_maps_are_turned_back():
    """Tokens on their grid, tokens as pixels, dense outputs: each sample by its element, then the mean."""
    batch = images()
    g = D4.uniform(batch, 3, psf.Draws(seed=2))
    tokens = torch.randn(3, 3, 16, 6, dtype=torch.float64)
    maps = tokens.unflatten(2, (4, 4)).permute(0, 1, 4, 2, 3)

    def back(x):
        return torch.stack(
            [sum(turned(y, int(k)) for y, k in zip(*pair, strict=True)) / 3 for pair in zip(x, g, strict=True)]
        )

    assert_near(TokenReadout()(tokens, batch, D4, g), back(maps))
    assert_near(MaskReadout()(maps, batch, D4, g), back(maps))
    readout = MaskReadout(6, 5, 2).double()
    weight = readout.head.weight.view(5, 2, 2, 6).permute(3, 0, 1, 2)
    bias = readout.head.bias.view(5, 2, 2)
    pixels = F.conv_transpose2d(maps.flatten(0, 1), weight, stride=2) + bias.repeat(1, 4, 4)
    assert_near(readout(tokens, batch, D4, g), back(pixels.unflatten(0, (3, 3))))


def test_borders_of_turned_maps():
    """Turned by 45 degrees, a map of ones stays one with its border repeated, else it loses the corners."""
    batch = images()
    c = 0.5**0.5
    g = torch.tensor([[c, -c], [c, c]], dtype=torch.float64).expand(3, 1, 2, 2)
    ones = torch.ones(3, 1, 5, 8, 8, dtype=torch.float64)
    assert_near(MaskReadout()(ones, batch, SO2, g), ones[:, 0])
    lost = MaskReadout(pad_mode="zeros")(ones, batch, SO2, g)
    assert lost[..., 0, 0].abs().max() == 0 and (lost[..., 3:5, 3:5] - 1).abs().max() < 1e-12
    tokens = ones.flatten(3).mT
    assert_near(TokenReadout(8, pad_mode="zeros")(tokens, batch, SO2, g), lost)


@pytest.mark.parametrize("readout", [TokenReadout(), MaskReadout(6, 5, 2)], ids=["tokens", "masks"])
def test_one_program_for_grids_of_any_size(readout):
    """Squares, without a grid."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(readout, fullgraph=True, dynamic=True, backend=backend)
    for side in (3, 4, 7, 12):
        tokens, g = torch.randn(3, 2, side**2, 6), SO2.uniform(images(), 2).float()
        assert_near(run(tokens, None, SO2, g), readout(tokens, None, SO2, g))
    assert len(seen) == 1


READOUTS = {
    "classes": ("features", lambda: ClassReadout(nn.Linear(12, 5))),
    "probabilities": ("features", lambda: ClassReadout(nn.Linear(12, 5), average="probabilities")),
    "tokens": ("tokens", lambda: TokenReadout((4, 4))),
    "masks": ("tokens", lambda: MaskReadout(12, 5, 2, grid=4)),
}


@pytest.mark.parametrize("name", READOUTS)
def test_exact_groups_are_equivariant(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    read, readout = READOUTS[name]
    backbone = psf.models.timm_backbone("vit_tiny_patch16_224", grid=4, read=read, depth=1, embed_dim=12, num_heads=2)
    parts = backbone, ImageTokens(12, 2, 2), readout()
    batch = images().to(torch.float32)
    model = psf.Symmetrized(*parts, psf.distributions.Orbit(D4)).eval()
    assert psf.equivariance_error(model, batch, samples=8, moves=4) < 1e-5
    whole = model(batch, 8)[0]
    model.chunk = 3
    assert_near(model(batch, 8)[0], whole)
    bare = psf.Symmetrized(*parts, psf.distributions.Identity(D4)).eval()
    assert psf.equivariance_error(bare, batch, moves=4) > 1e-2


ERRORS = [
    (lambda: ImageTokens(4, (2, 2, 2)), "ImageTokens: patch must be a number or two, got 3: (2, 2, 2)"),
    (
        lambda: MovedImages(pad_mode="reflect"),
        "MovedImages: pad_mode must be one of ('zeros', 'replicate'), got 'reflect'",
    ),
    (
        lambda: ClassReadout(average="votes"),
        "ClassReadout: average must be one of ('logits', 'probabilities'), got 'votes'",
    ),
    (
        lambda: MaskReadout(4, 2),
        "MaskReadout: width, classes and patch must be given together, got (4, 2, None)",
    ),
    (
        lambda: MaskReadout()(torch.zeros(1, 1, 4, 4), None, D4, torch.zeros(1, 1, dtype=torch.int64)),
        "MaskReadout: outputs must be (B, S, classes, H, W), got (1, 1, 4, 4)",
    ),
    (
        lambda: TokenReadout()(torch.zeros(1, 1, 8, 4), None, D4, torch.zeros(1, 1, dtype=torch.int64)),
        "TokenReadout: the number of tokens must be a square number, got 8",
    ),
    (
        lambda: TokenReadout((2, 3))(torch.zeros(1, 1, 8, 4), None, D4, torch.zeros(1, 1, dtype=torch.int64)),
        "TokenReadout: the number of tokens must be 2 x 3 = 6, got 8",
    ),
    (
        lambda: TokenReadout()(torch.zeros(1, 1, 2, 4, 4), None, D4, torch.zeros(1, 1, dtype=torch.int64)),
        "TokenReadout: outputs must be tokens (B, S, L, D), got (1, 1, 2, 4, 4)",
    ),
    (
        lambda: MovedImages()(images(6, 8), D4, D4.elements(images(6, 8))),
        "Dihedral(4): images must be square for turns by 90 degrees, got 6 x 8",
    ),
    (
        lambda: ImageTokens(4, 2, 2).double()(images(), psf.groups.Symmetric(3), None),
        "Symmetric(3): the group must act on the plane, as Dihedral(4) does",
    ),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


class Unlisted(psf.groups.Cyclic):
    """A group of someone's that does not say which axes it moves."""

    def __init__(self):
        super().__init__(4)
        self.moves = None


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (psf.groups.Dihedral(1), "got layout 'hw' with 'h' moved by two"),
        (SO2, "got layout 'hw' with 'h' moved by two"),
        (Unlisted(), "and Unlisted(4) does not list its own in `moves`"),
    ],
    ids=["finite", "angles", "unknown"],
)
@pytest.mark.parametrize("embed", [ImageTokens(4, 2, 2).double(), MovedImages()], ids=["tokens", "pixels"])
def test_two_groups_of_the_plane_in_one_product(embed, second, reason):
    """Neither factor is left out, in whatever order."""
    batch, first = images(), psf.groups.Cyclic(4)
    for group in (first * second, second * first):
        message = f"{group}: the factors must move different axes of x, {reason}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            embed(batch, group, group.uniform(batch, 2))


def test_types():
    batch = images()
    with pytest.raises(TypeError, match=r"^ImageTokens: pixels must be torch.float32 as the weights are, got torch"):
        ImageTokens(4, 2, 2)(batch, D4, D4.elements(batch))
    with pytest.raises(TypeError, match=r"^ClassReadout: head must be an nn.Module or None, got int$"):
        ClassReadout(4)
    with pytest.raises(TypeError, match=r"^ImageTokens: batch must have pixels, got PointClouds without pixels$"):
        ImageTokens(4, 2, 2)(psf.PointClouds(torch.zeros(2, 3, 2)), D4, None)
