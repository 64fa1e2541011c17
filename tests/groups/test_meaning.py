"""Layouts, products and elements: what is ambiguous is right or refused."""

import re

import pytest
import torch

from probsym_fast import ops
from probsym_fast.distributions import Uniform
from probsym_fast.groups import (
    Draws,
    Euclidean,
    Group,
    Orthogonal,
    Product,
    SpecialEuclidean,
    SpecialOrthogonal,
    Symmetric,
    Translation,
)
from probsym_fast.ops import Permutation, SoftPermutation
from tests.conftest import assert_near
from tests.groups.test_groups import GROUPS, N, S, clouds, data, dimension
from tests.helpers.strangers import Shifts


@pytest.mark.parametrize("group", [*GROUPS, Symmetric(N) * Shifts(7)], ids=repr)
@pytest.mark.parametrize("layout", ["nu", "nV", " ", "np ", "é"])
def test_unknown_letters(group, layout):
    g = group.uniform(clouds(d=dimension(group)), S)
    letter = next(x for x in layout if x not in "nvpc")
    letters = "nvpchw" if "h" in group.moves else "nvpc"
    message = f"{group}: layout must use only the letters {letters!r}, got {letter!r} in {layout!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        group.act(g, torch.ones(2, *[3] * len(layout)), layout)
    with pytest.raises(TypeError, match=f"^{re.escape(str(group))}: layout must be a str, got int$"):
        group.act(g, torch.ones(2, 3), 3)


@pytest.mark.parametrize("group", [Translation(3), Euclidean(3), SpecialEuclidean(2)], ids=repr)
@pytest.mark.parametrize("inverse", [False, True])
def test_points_of_other_sizes_are_not_broadcast(group, inverse):
    g = group.uniform(clouds(d=group.d), S)
    for shape, axis in (((2, N, 1), 2), ((2, S, N, 1), 3)):
        message = f"{group}: axis {axis} of x must have size {group.d}, got {shape}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            group.act(g, torch.ones(shape), "np", inverse=inverse)
    with pytest.raises(ValueError, match=re.escape("2 axes after the batch, got (2, 3)")):
        group.act(g, torch.ones(2, 3), "np", inverse=inverse)


MOVES = {
    "Symmetric(5)": "n",
    "Orthogonal(3)": "vp",
    "SpecialOrthogonal(3)": "vp",
    "Translation(3)": "p",
    "Euclidean(3)": "vp",
    "Symmetric(5) * Translation(2)": "np",
    "Symmetric(5) * Euclidean(3)": "nvp",
}


@pytest.mark.parametrize("group", [g for g in GROUPS if repr(g) in MOVES], ids=repr)
@pytest.mark.parametrize("layout", ["np", "nv", "nnc", "v", "c", "n", "cp"])
def test_a_group_keeps_what_it_does_not_move(group, layout):
    """keeps says so, and the action agrees."""
    keeps = not set(layout) & set(MOVES[repr(group)])
    assert group.keeps(layout) is keeps
    d = dimension(group)
    x = data(layout, d, (2, S))
    moved = group.act(group.uniform(clouds(d=d), S, Draws(seed=5)), x, layout)
    assert torch.equal(moved, x) is keeps


def test_a_group_of_someone_elses_keeps_nothing_unless_it_says_so():
    class Silent(Shifts):
        moves = None

    for layout in ("np", "v", "c", ""):
        assert not Silent(N).keeps(layout) and not (Silent(N) * Orthogonal(3)).keeps(layout)
    assert (Shifts(N) * Orthogonal(3)).keeps("c") and not (Shifts(N) * Orthogonal(3)).keeps("nc")
    assert (Silent(N) * Orthogonal(3)).moves is None and (Shifts(N) * Orthogonal(3)).moves == "nvp"


def test_letters_of_a_factors_own():
    """A product hands them to the factor that has them; to the others they are channels."""

    class Cells(Shifts):
        """Shifts of an axis "w"."""

        moves = "w"

    group = Symmetric(N) * Cells(4) * Orthogonal(3)
    g = group.uniform(clouds(), S, Draws(seed=3))
    x = torch.randn(2, S, N, 4, 3, dtype=torch.float64)
    expected = Orthogonal(3).act(g[2], Symmetric(N).act(g[0], x, "ncv"), "ncv")
    for b in range(2):
        for k, shift in enumerate(g[1][b].tolist()):
            expected[b, k] = expected[b, k].roll(shift, 1)
    assert_near(group.act(g, x, "nwv"), expected)
    assert_near(group.act(g, group.act(g, x, "nwv"), "nwv", inverse=True), x)
    assert group.keeps("c") and not group.keeps("w")
    with pytest.raises(ValueError, match=re.escape("layout must use only the letters 'nvpcw', got 'u' in 'nu'")):
        group.act(g, x[..., 0, 0], "nu")


# --- factors that would share something ---


@pytest.mark.parametrize(
    ("group", "layout", "shared"),
    [
        (Symmetric(N) * Symmetric(N), "np", "n"),
        (Symmetric(N) * Shifts(N), "nnc", "n"),
        (Orthogonal(3) * SpecialOrthogonal(3), "nv", "v"),
        (Orthogonal(3) * Translation(3), "np", "p"),
        (Translation(3) * Euclidean(3), "np", "p"),
    ],
    ids=repr,
)
def test_two_factors_do_not_move_one_axis(group, layout, shared):
    """Their actions do not commute: the product of their inverses, in the same order, undoes nothing."""
    batch = clouds()
    g = group.uniform(batch, S)
    message = f"{group}: the factors must move different axes of x, got layout {layout!r} with {shared!r} moved by two"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        group.act(g, data(layout, 3, (2,)), layout)
    x = data("c", 3, (2, S))
    assert torch.equal(group.act(g, x, "c"), x)


def test_two_factors_do_not_read_one_output():
    outputs = {"scores": torch.randn(2, S, N), "matrices": torch.randn(2, S, 3, 3)}
    for group, name in (
        (Symmetric(N) * Symmetric(N), "scores"),
        (Symmetric(N) * Euclidean(3) * SpecialOrthogonal(3), "matrices"),
    ):
        message = f"{group}: each output must be read by one factor, got {name!r} read by two"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            group.project(outputs, clouds())
        g, _ = Uniform(group)(clouds(), S)  # drawing shares nothing
        assert len(g) == len(group.factors)
    g, penalties = (Symmetric(N) * Euclidean(3)).project(outputs, clouds())
    assert list(penalties) == ["entropy"] and g[0].shape == (2, S, N)
    assert (Symmetric(N) * Euclidean(3)).outputs == ("scores", "matrices")


def test_two_factors_do_not_return_one_penalty():
    class Priced(Shifts):
        moves = "w"

        def project(self, outputs, batch, **settings):
            return self.identity(batch, S), {"entropy": torch.zeros(())}

    group = Symmetric(N) * Priced(4)
    with pytest.raises(ValueError, match=r"each penalty must come from one factor, got 'entropy' from two$"):
        group.project({"scores": torch.randn(2, S, N)}, clouds())


# --- gradients that an element would drop ---


def soft(samples: int = S) -> SoftPermutation:
    scores = torch.randn(2, samples, N, dtype=torch.float64, requires_grad=True)
    return ops.soft_permutation(scores, tau=0.1)


def test_compose_and_inverse_drop_no_gradient():
    group, p = Symmetric(N), soft()
    hard = group.uniform(clouds(), S)
    product = group * Orthogonal(3)
    frames = product.factors[1].uniform(clouds(), S)
    wanted = (
        "the result carries no gradient, so the permutation must not require one, got a SoftPermutation that does;"
        " use p.detach() or torch.no_grad()"
    )
    for name, run in (
        ("inverse", p.inverse),
        ("inverse", lambda: group.inverse(p)),
        ("inverse", lambda: product.inverse((p, frames))),
        ("compose", lambda: group.compose(p, hard)),
        ("compose", lambda: group.compose(hard, p)),
        ("compose", lambda: product.compose((hard, frames), (p, frames))),
    ):
        with pytest.raises(RuntimeError, match=f"^{re.escape(f'{name}: {wanted}')}$"):
            run()
    for way_out in (p.detach(), soft().detach()):
        assert type(way_out) is SoftPermutation and not way_out.requires_grad
    q = p.detach()
    assert torch.equal(q.dense(), p.dense()) and q.narrow(1, 1).shape == (2, 1, N)
    x = data("nc", 3, (2, S))
    with torch.no_grad():
        assert torch.equal(group.inverse(p).order, p.rank)
    assert_near(group.act(group.inverse(q), group.act(q, x, "nc"), "nc"), x)
    assert_near(group.act(group.compose(q, hard), x, "nc"), group.act(q, group.act(hard, x, "nc"), "nc"))
    assert hard.detach() is hard and not hard.requires_grad


def test_gradients_of_frames_and_shifts_go_through_compose_and_inverse():
    group, batch = Euclidean(3), clouds()
    matrices = torch.randn(2, S, 3, 3, dtype=torch.float64, requires_grad=True)
    g, _ = group.project({"matrices": matrices}, batch)
    h = group.inverse(group.compose(g, group.uniform(batch, S)))
    (found,) = torch.autograd.grad(group.act(h, batch.positions, "np").square().sum() + h.frame[..., 0].sum(), matrices)
    assert found.abs().max() > 0


def test_permutations_that_do_not_belong_together():
    group = Symmetric(N)
    p, q = group.uniform(clouds(), S), group.uniform(clouds(), 1)
    message = f"Symmetric(5): h must be (B, S, n) = (2, {S}, 5) as g is, got (2, 1, 5)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        group.compose(p, q)
    valid = Permutation(torch.arange(N).expand(2, S, N), torch.tensor([3, 5]))
    for g, h in ((p, valid), (valid, p)):  # the padding is moved: every node counts
        assert group.compose(g, h).num_nodes is None
    assert torch.equal(group.compose(valid, valid).num_nodes, valid.num_nodes)


# --- types ---


@pytest.mark.parametrize("kind", [Symmetric, Orthogonal, SpecialOrthogonal, Translation, Euclidean, SpecialEuclidean])
def test_sizes_must_be_ints(kind):
    name = "n" if kind is Symmetric else "d"
    for bad in (5.0, "5", True, None, torch.tensor(5)):
        message = f"{kind.__name__}: {name} must be an int, got {type(bad).__name__} {bad!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            kind(bad)


def test_factors_must_be_groups():
    for bad, got in ((5, "int"), (Symmetric, "the class Symmetric"), (Uniform(Symmetric(3)), "Uniform")):
        with pytest.raises(TypeError, match=f"^Product: each factor must be a Group, got {got}$"):
            Product(Symmetric(5), bad)
        with pytest.raises(TypeError, match="unsupported operand"):
            Symmetric(5) * bad
    assert isinstance(Symmetric(5) * Orthogonal(2), Group)


class Flip(Orthogonal):
    """A group of one's own that names neither what it moves nor what it reads."""

    moves, outputs = None, None

    def project(self, outputs, batch, **settings):
        return super().project({"matrices": outputs["scores"]}, batch)


def test_factors_that_do_not_say_what_they_share():
    batch = clouds()
    product = Flip(3) * Symmetric(N)
    g = product.uniform(batch, S)
    with pytest.raises(ValueError, match=r"and Flip\(3\) does not list its own in `moves`$"):
        product.act(g, torch.ones(2, N, 3), "np")
    assert product.act(g, torch.ones(2, 3), "v").shape == (2, S, 3)  # nobody else moves it
    assert not product.keeps("c") and product.outputs is None
    with pytest.raises(ValueError, match=r"each output must be read by one factor, got 'scores' read by two$"):
        (Flip(N) * Symmetric(N)).project({"scores": torch.randn(2, N, N)}, batch)
    with pytest.raises(ValueError, match="does not list its own"):
        (Flip(3) * Flip(3)).act(Product(Flip(3), Flip(3)).uniform(batch, S), torch.ones(2, 3), "v")


@pytest.mark.parametrize(("name", "value"), [("outputs", "scores"), ("outputs", (1,)), ("moves", ["n"])])
def test_declarations_of_another_type(name, value):
    with pytest.raises(TypeError, match=f"{name} must be "):
        type("Own", (Orthogonal,), {name: value})(3) * Symmetric(N)


@pytest.mark.parametrize("group", [Symmetric(N), Orthogonal(3), Euclidean(3)], ids=repr)
def test_other_graphs_and_samples_are_not_broadcast(group):
    g = group.uniform(clouds(), S)
    for shape, wanted in (
        ((1, N, 3), "(B,) = (2,)"),
        ((9, N, 3), "(B,) = (2,)"),
        ((2, S + 1, N, 3), f"(B, S) = (2, {S})"),
    ):
        for layout in ("nv", "cc"):
            with pytest.raises(ValueError, match=re.escape(f"act: x must begin with {wanted} as g does, got ")):
                group.act(g, torch.ones(shape), layout)
