"""Groups of the plane on images: exact symmetries of a square, interpolation by matrices, layouts, and what is refused."""

import math
import re

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.groups import (
    Cyclic,
    Dihedral,
    Draws,
    Euclidean,
    Finite,
    Orthogonal,
    SpecialOrthogonal,
    Symmetric,
    move_images,
    plane_of,
)
from probsym_fast.models import Folded, LayoutReadout
from tests.conftest import assert_near
from tests.groups.test_groups import S, check_axioms

TURN, FLIP = [[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]
EXACT = {
    "C4": Cyclic(4),
    "D4": Dihedral(4),
    "generated": Finite.generated({"vhw": torch.tensor([TURN, FLIP])}),
    "C2": Cyclic(2),
    "D2": Dihedral(2),
    "D1": Dihedral(1),
}
TWICE = {"C2", "D2", "D1"}  # of rectangles too
MIXED = {"SO2": SpecialOrthogonal(2), "O2": Orthogonal(2), "C8": Cyclic(8), "D3": Dihedral(3)}


def images(B: int = 2, C: int = 2, H: int = 5, W: int = 5) -> psf.Images:
    return psf.Images(torch.randn(B, C, H, W, dtype=torch.float64))


def by_torch(x: torch.Tensor, number: int) -> torch.Tensor:
    """x (..., H, W) under a symmetry of a square."""
    return torch.rot90(x.flip(-2) if number > 3 else x, number % 4, (-2, -1))


# --- the symmetries of a square ---


@pytest.mark.parametrize("size", [(5, 5), (4, 4), (3, 6), (4, 5)], ids=str)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("layout", ["chw", "hw", "hwc", "vhw", "chcwv"])
def test_exact_groups(name, size, layout):
    """The axioms hold to equality; turns are those of torch, and vectors turn along."""
    group, (H, W) = EXACT[name], size
    if H != W and name not in TWICE:
        message = f"{group}: images must be square for turns by 90 degrees, got {H} x {W}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            group.act(group.identity(images(H=H, W=W), 1), images(H=H, W=W).pixels, "chw")
        return
    batch, sizes = images(H=H, W=W), {"h": H, "w": W, "c": 3, "v": 2}
    g, h, k = (group.uniform(batch, S, Draws(seed=i)) for i in range(3))
    x = torch.randn(2, S, *(sizes[letter] for letter in layout), dtype=torch.float64)
    check_axioms(group, batch, (g, h, k), x, layout)
    assert torch.equal(group.act(g, group.act(g, x, layout, inverse=True), layout), x)
    assert torch.equal(group.act(g, group.act(h, x, layout), layout), group.act(group.compose(g, h), x, layout))
    assert not group.keeps("hw") and group.keeps("c")
    every = group.elements(batch)
    numbers, found = plane_of(group, every)[0], group.act(every, x[:, 0], layout)
    assert len(set(numbers.tolist())) == group.order and numbers.dtype == torch.int64
    places = 1 + layout.index("h"), 1 + layout.index("w")
    for s, number in enumerate(numbers.tolist()):
        expected = by_torch(x[:, 0].movedim(places, (-2, -1)), number).movedim((-2, -1), places)
        if "v" in layout:
            frame = torch.linalg.matrix_power(torch.tensor(TURN), number % 4)
            frame = (frame @ torch.tensor(FLIP) if number > 3 else frame).to(x)
            axis = 1 + layout.index("v")
            expected = (expected.movedim(axis, -1) @ frame.T).movedim(-1, axis)
        assert torch.equal(found[:, s], expected)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.complex64]
)
def test_values_of_any_type_are_moved_exactly(dtype):
    """By numbers, and by the same elements as matrices: the nearest pixel for integers."""
    group, plain = Dihedral(4), Orthogonal(2)
    x = (100 * torch.rand(2, 1, 6, 6)).to(dtype)
    every = group.elements(psf.Images(torch.zeros(2, 1, 6, 6)))
    frames = group.act(every, torch.eye(2).expand(2, 2, 2), "vc")
    expected = torch.stack([by_torch(x, number) for number in range(8)], 1)
    assert torch.equal(group.act(every, x, "chw"), expected)
    found = plain.act(frames, x, "chw")
    assert found.dtype == dtype
    if dtype.is_floating_point or dtype.is_complex:
        assert_near(found.cfloat(), expected.cfloat(), {torch.float32: 1e-2 if dtype == torch.bfloat16 else 1e-5})
    else:
        assert torch.equal(found, expected)


def test_gradients_of_exact_moves():
    """That of a permutation: <g x, y> = <x, g^-1 y>."""
    group, batch = Dihedral(4), images()
    g = group.uniform(batch, S, Draws(seed=1))
    x, y = batch.pixels.requires_grad_(), torch.randn(2, S, 2, 5, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad((group.act(g, x, "chw") * y).sum(), x)
    assert_near(found, group.act(g, y, "chw", inverse=True).sum(1))
    assert torch.autograd.gradgradcheck(lambda x: group.act(g, x.tanh(), "chw"), x)


# --- matrices ---


def interpolated(x: torch.Tensor, frames: torch.Tensor, replicate: bool) -> torch.Tensor:
    """g^-1 . x, pixel by pixel: x (B, C, H, W), frames (B, S, 2, 2)."""
    (B, C, H, W), S = x.shape, frames.shape[1]
    out = torch.zeros(B, S, C, H, W, dtype=x.dtype)
    for b, s, i, j in torch.cartesian_prod(*map(torch.arange, (B, S, H, W))).tolist():
        (a, c), (d, e) = frames[b, s].tolist()
        right, up = j - (W - 1) / 2, (H - 1) / 2 - i
        column, row = a * right + c * up + (W - 1) / 2, (H - 1) / 2 - (d * right + e * up)
        if replicate:
            column, row = min(max(column, 0), W - 1), min(max(row, 0), H - 1)
        for m in (math.floor(row), math.floor(row) + 1):
            for n in (math.floor(column), math.floor(column) + 1):
                if 0 <= m < H and 0 <= n < W:
                    out[b, s, :, i, j] += (1 - abs(row - m)) * (1 - abs(column - n)) * x[b, :, m, n]
    return out


@pytest.mark.parametrize("pad_mode", ["zeros", "replicate"])
def test_interpolation(pad_mode):
    """Values by a formula of our own, for shared images and images of each sample; derivatives of both orders."""
    group, batch = Orthogonal(2), images(H=3, W=4)
    g, x = group.uniform(batch, S, Draws(seed=2)), batch.pixels
    expected = interpolated(x, g, pad_mode == "replicate")
    assert_near(move_images(x, g, inverse=True, pad_mode=pad_mode), expected)
    assert_near(move_images(x, g.mT, pad_mode=pad_mode), expected)
    own = x[:, None] * torch.tensor([1.0, -2.0, 3.0]).view(S, 1, 1, 1)
    assert_near(
        move_images(own, g, inverse=True, pad_mode=pad_mode), expected * own.new_tensor([1, -2, 3]).view(S, 1, 1, 1)
    )
    if pad_mode == "zeros":
        assert torch.equal(group.act(g, x, "chw", inverse=True), move_images(x, g, inverse=True))
    move = lambda x, g: move_images(x, g, inverse=True, pad_mode=pad_mode)  # noqa: E731
    for inputs in ((x, g), (own, g)):
        inputs = [y.detach().requires_grad_() for y in inputs]
        assert torch.autograd.gradcheck(move, inputs, fast_mode=False)
        assert torch.autograd.gradgradcheck(move, inputs, fast_mode=True)
    _, tangents = torch.func.jvp(move, (x, g), (x.cos(), g.sin()))
    h = 1e-6
    moved = [move(x + e * x.cos(), g + e * g.sin()) for e in (h, -h)]
    assert_near(tangents, (moved[0] - moved[1]) / (2 * h), {torch.float64: 1e-7})
    each = torch.func.vmap(lambda x, g: move(x[None], g[None])[0])(x, g)
    assert_near(each, expected)


def test_many_gradients_at_once():
    x, g = images().pixels.requires_grad_(), Orthogonal(2).uniform(images(), S).requires_grad_()
    y = move_images(x, g)
    d_y = torch.randn(3, *y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, (x, g), d_y, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, (x, g), one, retain_graph=True) for one in d_y]
    for k in (0, 1):
        assert_near(found[k], torch.stack([one[k] for one in each]))


def test_only_what_is_needed_is_differentiated():
    x, g = images().pixels, Orthogonal(2).uniform(images(), S)
    for needs in ((True, False), (False, True)):
        own = [y.detach().requires_grad_(need) for y, need in zip((x, g), needs, strict=True)]
        move_images(*own).square().sum().backward()
        assert [y.grad is not None for y in own] == list(needs)


def bump(p: torch.Tensor) -> torch.Tensor:
    """A smooth function of the plane p (..., 2), near 0 outside of a radius of 16; second derivatives up to 1 / 16."""
    x, y = p.unbind(-1)
    return torch.exp(-((x - 5) ** 2) / 50 - (y + 2) ** 2 / 32)


@pytest.mark.parametrize("name", MIXED)
def test_smooth_images_turn_as_functions_do(name):
    """(g . x)(p) = x(g^-1 p) to the error of linear interpolation, sum of |second derivatives| / 8; so compositions too."""
    group, side = MIXED[name], 40
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) - (side - 1) / 2] * 2, indexing="ij")
    places = torch.stack([x, -y], -1)
    batch = psf.Images(bump(places)[None, None])
    g, h = (group.uniform(batch, S, Draws(seed=i)) for i in (4, 5))
    bound = (1 / 16 + 1 / 25) / 8
    moved = group.act(g, batch.pixels, "chw")
    frames = plane_of(group, g, torch.float64)
    assert frames.shape == (1, S, 2, 2) and frames.dtype == torch.float64
    assert_near(moved, move_images(batch.pixels, frames))
    back = places[None, None] @ frames[:, :, None]  # rows: (g^-1 p)^T = p^T g
    assert (moved[:, :, 0] - bump(back)).abs().max() < bound
    twice, once = group.act(h, moved, "chw"), group.act(group.compose(h, g), batch.pixels, "chw")
    assert (twice - once).abs().max() < 3 * bound
    assert (group.act(g, moved, "chw", inverse=True) - batch.pixels[:, None]).abs().max() < 2 * bound
    assert_near(group.act(group.identity(batch, 1), batch.pixels, "chw")[:, 0], batch.pixels)
    assert_near(group.act(group.inverse(g), batch.pixels, "chw"), group.act(g, batch.pixels, "chw", inverse=True))
    assert_near(group.act(g, batch.pixels, "chw", mean=True), moved.mean(1))
    field = group.act(g, torch.cat([batch.pixels, 0 * batch.pixels], 1), "vhw")  # a field to the right
    assert_near(field, frames[..., 0][..., None, None] * moved)


# --- products, and the plane of an element ---


def test_products():
    """Nodes with an image each: permuted, and turned together."""
    group, batch = Symmetric(3) * Cyclic(4), images()
    x = torch.randn(2, S, 3, 1, 4, 4, dtype=torch.float64)
    elements = [group.uniform(batch, S, Draws(seed=i)) for i in range(3)]
    check_axioms(group, batch, elements, x, "nchw")
    p, g = elements[0]
    assert torch.equal(group.act(elements[0], x, "nchw"), Cyclic(4).act(g, Symmetric(3).act(p, x, "nccc"), "nchw"))
    assert torch.equal(plane_of(group, elements[0]), g)
    with pytest.raises(ValueError, match="must move different axes of x, got layout 'chw' with 'h' moved by two"):
        (Cyclic(4) * Orthogonal(2)).act((g, None), x[:, 0, 0], "chw")


def test_shifts_of_rows_and_columns():
    """Axes that are listed by name are shifted, each on its own."""
    group, x = Cyclic(4, "h") * Cyclic(5, "w"), torch.randn(2, 3, 4, 5)
    g = group.elements(psf.Images(x))
    found = group.act(g, x, "chw")
    assert found.shape == (2, 20, 3, 4, 5)
    for s in (0, 7, 19):
        assert torch.equal(found[:, s], x.roll((int(g[0][0, s]), int(g[1][0, s])), (-2, -1)))


@pytest.mark.parametrize(
    ("group", "layout", "message"),
    [
        (Cyclic(4), "wh", "Cyclic(4): layout must have 'h' and 'w' once each, in this order, got 'wh'"),
        (Orthogonal(2), "hc", "Orthogonal(2): layout must have 'h' and 'w' once each, in this order, got 'hc'"),
        (Dihedral(3), "hwh", "Dihedral(3): layout must have 'h' and 'w' once each, in this order, got 'hwh'"),
        (Orthogonal(3), "chw", "Orthogonal(3): layout must use only the letters 'nvpc', got 'h' in 'chw'"),
        (Euclidean(2), "chw", "Euclidean(2): layout must use only the letters 'nvpc', got 'h' in 'chw'"),
        (Cyclic(4, "n"), "chw", "Cyclic(4, 'n'): layout must use only the letters 'ncvp', got 'h' in 'chw'"),
    ],
    ids=str,
)
def test_what_is_no_image(group, layout, message):
    g = group.identity(psf.PointClouds(torch.zeros(2, 4, getattr(group, "d", 2))), 1)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('ncvp', 'nvpc'))}$"):
        group.act(g, torch.zeros(2, *[4] * len(layout)), layout)


@pytest.mark.parametrize(
    "group", [Symmetric(4), Orthogonal(3), Cyclic(4, "n"), Cyclic(4, "vh"), Symmetric(2) * Cyclic(3, "n")]
)
def test_what_has_no_plane(group):
    with pytest.raises(ValueError, match=r": the group must act on the plane, as Dihedral\(4\) does, got one without"):
        plane_of(group, (None, None))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], torch.zeros(2, 1)), TypeError, "x must be a Tensor, got list"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 1).int()), TypeError, "plane must be a floating point or int64 Tensor,"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 1)), ValueError, "plane must be (B, S, 2, 2), got (2, 1)"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2).long()), ValueError, "plane must be (B, S), got (2,)"),
        ((torch.zeros(3, 4, 4), torch.zeros(2, 1).long()), ValueError, "x must be (B, [S,] C, H, W) with B and S of (2, 1)"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([[0], [8]])), ValueError, "plane must hold numbers 0 to 7, got 8"),
        (
            (torch.zeros(2, 3, 4, 5), torch.tensor([[0], [7]])),
            ValueError,
            "x must be square images for quarter turn 7, got 4 x 5",
        ),
    ],
)  # fmt: skip
def test_what_is_not_moved(arguments, error, message):
    with pytest.raises(error, match=f"^move_images: {re.escape(message)}"):
        move_images(*arguments)
    with pytest.raises(ValueError, match=r"^move_images: pad_mode must be one of .*, got 'reflect'$"):
        move_images(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1).long(), pad_mode="reflect")


SHEAR = torch.tensor([[1.0, 1.0], [0.0, -1.0]])  # its own inverse


@pytest.mark.parametrize(
    ("element", "got"),
    [
        (torch.eye(3), "torch.float64 (2, 3, 3)"),
        (torch.eye(2, dtype=torch.complex64), "torch.complex128 (2, 2, 2)"),
        (SHEAR, "others"),
    ],
)
def test_images_need_orthogonal_matrices(element, got):
    message = f"Finite: actions['hw'] must be real orthogonal matrices (order, 2, 2) for images, got {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Finite([[0, 1], [1, 0]], {"hw": torch.stack([torch.eye(len(element)).to(element), element])})


def test_a_subclass_says_what_it_moves():
    class Frames(Orthogonal):
        moves = "v"

    group = Frames(2)
    assert group.moves == "v" and group.keeps("hw")
    with pytest.raises(ValueError, match="must use only the letters 'nvpc', got 'h' in 'chw'"):
        group.act(torch.eye(2).expand(1, 1, 2, 2), torch.zeros(1, 1, 4, 4), "chw")
    with pytest.raises(ValueError, match="the group must act on the plane"):
        plane_of(group, torch.eye(2).expand(1, 1, 2, 2))


# --- models ---


class Moved(nn.Module):
    """The images of g^-1: (B, S, C, H, W)."""

    def forward(self, batch, group, g):
        return (group.act(g, batch.pixels, "chw", inverse=True),)


class Pooled(nn.Module):
    layout = "c"

    def forward(self, outputs, batch, group, g):
        return outputs.square().mean((1, 3, 4))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("readout", [Pooled(), LayoutReadout("chw")], ids=["class", "dense"])
def test_models_over_the_whole_orbit(name, readout):
    """A convolution that is not symmetric at all: dense outputs turn along, and the class stays."""
    torch.manual_seed(0)
    group = EXACT[name]
    backbone = Folded(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()))
    model = psf.Symmetrized(backbone, Moved(), readout, psf.distributions.Orbit(group)).eval()
    batch = psf.Images(torch.randn(3, 2, 6, 6), mask=torch.ones(3, 6, 6).long())
    assert psf.equivariance_error(model, batch, samples=group.order, moves=3) < 1e-6
    assert psf.equivariance_error(model, batch, samples=1, moves=3) > 1e-2
    if name in TWICE:
        rectangles = psf.Images(torch.randn(3, 2, 4, 6))
        assert psf.equivariance_error(model, rectangles, samples=group.order, moves=3) < 1e-6


def test_models_of_any_angle():
    """The noise of random turns falls with their number, down to what interpolation leaves."""
    torch.manual_seed(0)
    backbone = Folded(nn.Sequential(nn.Conv2d(1, 3, 24), nn.Tanh()))  # of the whole image
    model = psf.Symmetrized(backbone, Moved(), Pooled(), psf.distributions.Uniform(SpecialOrthogonal(2))).eval()
    y, x = torch.meshgrid(*[torch.arange(24.0) - 11.5] * 2, indexing="ij")
    batch = psf.Images(bump(torch.stack([2 * x, -2 * y], -1)).expand(4, 1, -1, -1))
    few, many = (psf.equivariance_error(model, batch, samples=S, moves=4, scale=1.0) for S in (1, 64))
    assert few / many > 4  # 1 / sqrt(S): 8
    orbit = psf.Symmetrized(backbone, Moved(), Pooled(), psf.distributions.Orbit(Cyclic(8))).eval()
    one, every = (psf.equivariance_error(orbit, batch, samples=S, moves=4, scale=1.0) for S in (1, 8))
    assert every < one / 10


def test_programs_for_images_of_any_size():
    backbone = Folded(nn.Conv2d(2, 3, 3, padding=1))
    parts = backbone, Moved(), LayoutReadout("chw"), psf.distributions.Uniform(SpecialOrthogonal(2))
    model, seed = psf.Symmetrized(*parts).eval(), torch.tensor(5)
    program = psf.export(model, psf.Images(torch.randn(3, 2, 8, 10)), 4, dynamic=("batch", "height", "width"))
    for shape in ((5, 2, 12, 9), (1, 2, 7, 7)):
        pixels = torch.randn(shape)
        with torch.no_grad():
            assert_near(program.module()(pixels, seed), model(psf.Images(pixels), 4, seed=seed)[0])


X, TURNS, FRAMES = torch.rand(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.int64), torch.eye(2).expand(2, 1, 2, 2)
PAIR = psf.groups.Symmetric(3) * psf.groups.Cyclic(4)
C4, C5, ROTATIONS = psf.groups.Cyclic(4), psf.groups.Cyclic(5), psf.groups.SpecialOrthogonal(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plane_of(None, TURNS), TypeError, "plane_of: group must be a Group, got NoneType"),
        (
            lambda: plane_of(C5, TURNS, torch.int64),
            TypeError,
            "plane_of: dtype must be a floating point dtype, got torch.int64",
        ),
        (lambda: plane_of(C4, 7), TypeError, "Cyclic(4): g must be a Tensor, got int"),
        (lambda: plane_of(C4, FRAMES), TypeError, "Cyclic(4): g must be int64, got torch.float32"),
        (lambda: plane_of(C5, TURNS - 1), ValueError, "Cyclic(5): g must hold numbers 0 to 4, got -1"),
        (lambda: plane_of(PAIR, TURNS), TypeError, f"{PAIR}: g must be a tuple of the factors' elements, got Tensor"),
        (lambda: plane_of(PAIR, (TURNS,)), ValueError, f"{PAIR}: g must have 2 parts, got 1"),
        (
            lambda: plane_of(ROTATIONS, TURNS),
            TypeError,
            "SpecialOrthogonal(2): g must be a floating point or complex Tensor, got torch.int64",
        ),
        (lambda: C4.act(7, X, "chw"), TypeError, "Cyclic(4): g must be a Tensor, got int"),
        (lambda: C4.act(TURNS.bool(), X, "chw"), TypeError, "Cyclic(4): g must be int64, got torch.bool"),
        (lambda: C4.act(TURNS + 7, X, "chw"), ValueError, "Cyclic(4): g must hold numbers 0 to 3, got 7"),
        (lambda: C4.act(TURNS[:, 0], X, "chw"), ValueError, "Cyclic(4): g must be (B, S), got (2,)"),
        (lambda: C4.act(TURNS, None, "chw"), TypeError, "act: x must be a Tensor, got NoneType"),
        (lambda: C4.compose(TURNS, TURNS + 4), ValueError, "Cyclic(4): h must hold numbers 0 to 3, got 4"),
        (lambda: C4.inverse(TURNS + 4), ValueError, "Cyclic(4): g must hold numbers 0 to 3, got 4"),
        (lambda: ROTATIONS.act(None, X, "chw"), TypeError, "SpecialOrthogonal(2): g must be a Tensor, got NoneType"),
        (
            lambda: ROTATIONS.act(torch.eye(3).expand(2, 1, 3, 3), X, "chw"),
            ValueError,
            "SpecialOrthogonal(2): g must be (B, S, 2, 2), got (2, 1, 3, 3)",
        ),
        (
            lambda: PAIR.act(TURNS, X, "nhw"),
            TypeError,
            f"{PAIR}: g must be a tuple of the factors' elements, got Tensor",
        ),
        (
            lambda: psf.groups.Symmetric(3).act(TURNS, X, "nhw".replace("hw", "cc")),
            TypeError,
            "Symmetric(3): g must be a Permutation, got Tensor",
        ),
        (
            lambda: move_images(X, FRAMES * float("nan")),
            ValueError,
            "move_images: plane must be finite, got inf or nan",
        ),
        (lambda: move_images(X[..., :0], FRAMES), ValueError, "move_images: x must have pixels, got (2, 3, 4, 0)"),
    ],
)
def test_elements_that_are_none(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("plane", [TURNS + 1, FRAMES], ids=["exact", "interpolated"])
def test_nan_in_pixels_spreads(plane):
    x = X.clone()
    x[0, 1, 2, 0] = torch.nan
    for y in (move_images(x, plane), psf.ops.embed_image(x, plane, torch.rand(5, 3, 4, 4))):
        assert y.isnan().flatten(1).any(1).tolist() == [True, False]
