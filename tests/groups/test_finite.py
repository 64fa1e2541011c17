"""Finite groups: axioms of the tables, actions, whole orbits, and what is refused."""

import itertools
import re
from collections import Counter

import pytest
import torch

from probsym_fast.distributions import Orbit, Uniform
from probsym_fast.groups import Cyclic, Dihedral, Draws, Finite, Orthogonal, Symmetric, narrow
from tests.conftest import assert_near
from tests.groups.test_groups import N, S, check_axioms, clouds
from tests.helpers.graphs import random_graphs

TURN, FLIP = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
SWAP, ROUND = torch.tensor([1, 0, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 0])
KLEIN = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
SIGNS = torch.tensor([[[1.0]], [[-1.0]]])
PHASE = torch.tensor([[[1j]]])
GROUPS = {
    "table": Finite(KLEIN, {"v": torch.diag_embed(torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]]))}),
    "squares": Finite.generated({"vp": torch.stack([TURN, FLIP])}),
    "S5": Finite.generated({"n": torch.stack([SWAP, ROUND])}),
    "both": Finite.generated({"n": ROUND[None], "vp": TURN[None]}),
    "one": Cyclic(1),
    "C6": Cyclic(6),
    "C5": Cyclic(N, "n"),
    "D5": Dihedral(N, "npv"),
    "D4": Dihedral(4),
    "D2": Dihedral(2),
    "D4 * C5": Dihedral(4) * Cyclic(N, "n"),
    "S5 * D3": Symmetric(N) * Dihedral(3),
}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("layout", ["np", "nv", "nnvc", "c", "vcv"])
def test_axioms(group, layout):
    batch = clouds(d=2)
    g, h, k = (group.uniform(batch, S, Draws(seed=i)) for i in range(3))
    x = torch.randn(2, S, *({"n": N, "c": 2}.get(letter, 2) for letter in layout), dtype=torch.float64)
    check_axioms(group, batch, (g, h, k), x, layout)
    moves = set(group.moves) & set(layout)
    assert group.keeps(layout) is not bool(moves)
    if not moves:
        assert torch.equal(group.act(g, x, layout), x)


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "S5 * D3"])
def test_orders_and_orbits(name):
    """Every element once: under any element, the same set. Stratified draws run through them."""
    group, batch = GROUPS[name], clouds(d=2)
    order = {"table": 4, "squares": 8, "S5": 120, "both": 20, "one": 1, "C6": 6, "C5": 5, "D5": 10, "D4": 8, "D2": 4}
    assert group.order == order.get(name, 40)
    key = lambda g: torch.stack(g if isinstance(g, tuple) else [g], -1).tolist()  # noqa: E731
    every = group.elements(batch)
    h = group.uniform(batch, group.order, Draws(seed=3))
    h = tuple(x[:, :1].expand(-1, group.order) for x in h) if isinstance(h, tuple) else h[:, :1].expand(every.shape)
    drawn = Uniform(group)(batch, 2 * group.order, Draws(seed=1, kind="stratified"))[0]
    assert group.block("stratified") == group.order
    halves = [narrow(drawn, first, group.order) for first in (0, group.order)]
    for b in range(2):
        all_of_them = sorted(key(every)[b])
        assert len({tuple(g) for g in all_of_them}) == group.order
        for same in (group.compose(h, every), group.compose(every, h), group.inverse(every), *halves):
            assert sorted(key(same)[b]) == all_of_them
    parts = [Orbit(group)(batch, 1, Draws(seed=2).starting(s))[0] for s in range(group.order)]
    for b in range(2):  # drawn in parts, as processes do
        assert sorted(key(part)[b][0] for part in parts) == sorted(key(every)[b])
    assert key(Orbit(group)(batch, 2 * group.order)[0]) == [2 * row for row in key(every)]


@pytest.mark.parametrize("kind", ["independent", "antithetic", "stratified"])
@pytest.mark.parametrize("make", [Uniform, Orbit])
def test_single_samples_are_uniform(kind, make):
    batch, group = clouds(8000, d=2), Cyclic(3) * Dihedral(2)
    g, h = make(group)(batch, 2, Draws(seed=4, kind=kind))[0]
    for place in range(2):
        counts = Counter((4 * g[:, place] + h[:, place]).tolist())
        assert len(counts) == 12 and all(abs(count - 8000 / 12) < 5 * (8000 / 12) ** 0.5 for count in counts.values())


def test_quarter_turns_are_exact():
    batch, group = clouds(1, d=2), Dihedral(4)
    x = torch.randn(1, 3, 2)
    turned = group.act(group.elements(batch), x, "nv")[0]
    a, b = x[0].unbind(-1)
    expected = [(a, b), (-b, a), (-a, -b), (b, -a), (a, -b), (b, a), (-a, b), (-b, -a)]
    for found, (p, q) in zip(turned, expected, strict=True):
        assert torch.equal(found, torch.stack([p, q], -1))


def test_shifts_and_reversals_of_nodes():
    batch, x = clouds(1, d=2), torch.arange(N)[None]
    found = Dihedral(N, "n").act(Dihedral(N, "n").elements(batch), x, "n")[0].tolist()
    assert found[:3] == [[0, 1, 2, 3, 4], [4, 0, 1, 2, 3], [3, 4, 0, 1, 2]]
    assert found[N] == [0, 4, 3, 2, 1] and found[N + 1] == [1, 0, 4, 3, 2]


def test_generated_groups_are_the_known_ones():
    """D4 by matrices acts as Dihedral(4), in another order; S5 has every permutation; phases are complex."""
    batch = clouds(1, d=2)
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    orbits = [g.act(g.elements(batch), x, "nv")[0].flatten(1) for g in (GROUPS["squares"], Dihedral(4))]
    assert (torch.cdist(*orbits) < 1e-12).sum(1).eq(1).all()
    group = GROUPS["S5"]
    places = group.act(group.elements(batch), torch.arange(N)[None], "n")[0]
    assert {tuple(p) for p in places.tolist()} == set(itertools.permutations(range(N)))
    group = Finite.generated({"v": PHASE})
    z = torch.randn(1, 3, 1, dtype=torch.complex64)
    assert group.order == 4 and torch.equal(group.act(group.elements(batch), z, "nv")[0, 1], 1j * z[0])
    with pytest.raises(TypeError, match=r"^Finite\(4\): x must be complex, got torch.float32$"):
        group.act(group.elements(batch), z.real, "nv")
    assert GROUPS["both"].n == N and GROUPS["squares"].n is None


def test_gradients_and_dtypes():
    group, batch = Dihedral(N, "nv"), clouds(d=2)
    g = group.uniform(batch, S, Draws(seed=1))
    x = torch.randn(2, N, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: group.act(g, x, "nv", inverse=True), x)
    for dtype in (torch.float32, torch.bfloat16):
        assert group.act(g, x.to(dtype), "nv").dtype == dtype
    z = torch.complex(x.detach(), x.detach().flip(0))
    assert_near(group.act(g, z, "nv").imag, group.act(g, z.imag, "nv"))


class Heights(Finite):
    """Reflections of one number per node, by hand."""

    moves = "h"

    def __init__(self):
        super().__init__([[0, 1], [1, 0]])

    def along(self, g, x, letter):
        return x * (1 - 2 * g).view(*g.shape, *[1] * (x.ndim - 2))


def test_an_action_of_ones_own():
    group = Heights() * Symmetric(N)
    batch = clouds()
    g = group.uniform(batch, S, Draws(seed=2))
    x = torch.randn(2, S, N, 1, dtype=torch.float64)
    check_axioms(group, batch, [group.uniform(batch, S, Draws(seed=i)) for i in range(3)], x, "nh")
    assert_near(group.act(g, x, "nh").abs(), Symmetric(N).act(g[1], x.abs(), "nc"))
    plain = Finite(KLEIN)
    plain.moves = "h"
    with pytest.raises(
        NotImplementedError, match=r"^Finite\(4\): along must be overridden for axes 'h' without actions$"
    ):
        plain.act(plain.elements(batch), x[:, 0], "nh")


def changed(row, column, value):
    table = torch.tensor(KLEIN)
    table[row, column] = value
    return table


# a loop of five elements: an identity, inverses, and no associativity
LOOP = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]
MAKE = Finite, Finite.generated, Cyclic, Dihedral


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (Finite, ("D4",), TypeError, "Finite: table must be (n, n) integers, got str"),
        (Finite, (torch.eye(2),), TypeError, "Finite: table must be (n, n) integers, got torch.float32"),
        (Finite, ([[0, 1]],), ValueError, "Finite: table must be (n, n), got (1, 2)"),
        (Finite, (changed(1, 2, 4),), ValueError, "Finite: table must be closed, entries in 0..3, got 4 at (1, 2)"),
        (Finite, ([[0, 0], [0, 0]],), ValueError, "Finite: table must have an identity, a number whose row and"),
        (Finite, ([[0, 1], [1, 1]],), ValueError, "Finite: table must have an inverse of every element, got none of 1"),
        (Finite, (LOOP,), ValueError, "Finite: table must be associative, got (1 1) 2 = 2 and 1 (1 2) = 4"),
        (Finite, (KLEIN, [1]), TypeError, "Finite: actions must map letters of axes to Tensors, got list"),
        (
            Finite,
            ([[0, 1], [1, 0]], {"v": SIGNS.abs() * 2}),
            ValueError,
            "Finite: actions['v'] must multiply as the table does, got other for 0 and 0",
        ),
        (
            Finite,
            (KLEIN, {"v": SIGNS}),
            ValueError,
            "Finite: actions['v'] must be (order, d, d) matrices, order = 4, got (2, 1, 1)",
        ),
        (Finite.generated, ({"n": torch.tensor([[0, 0]])},), ValueError, "must hold each of 0..1 once in every row"),
        (
            Finite.generated,
            ({"vp": SIGNS, "pn": SIGNS},),
            ValueError,
            "each letter must occur once in actions, got 'p'",
        ),
        (
            Finite.generated,
            ({"c": SIGNS},),
            ValueError,
            "Finite: letters of actions must be a str without 'c', got 'c'",
        ),
        (Finite.generated, ({},), ValueError, "Finite: actions must not be empty, got no letters"),
        (
            Finite.generated,
            ({"v": torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])},),
            ValueError,
            "Finite: the generators must generate at most 4096 elements, got more",
        ),
        (Cyclic, (0,), ValueError, "Cyclic: n must be at least 1, got 0"),
        (Dihedral, (2.0,), TypeError, "Dihedral: n must be an int, got float 2.0"),
        (Cyclic, (3, "vv"), ValueError, "Cyclic: axes must be different letters but 'c', got 'vv'"),
        (Orbit, (Orthogonal(2),), ValueError, "Orbit: group must be finite, with an order, got Orthogonal(2)"),
    ],
)
def test_what_is_no_group(make, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(*arguments)


def test_axes_of_other_sizes():
    batch = clouds()
    for call in (Uniform(Cyclic(N, "n")), Orbit(Cyclic(N, "n")), Uniform(Symmetric(2, "m") * Cyclic(N, "n"))):
        call(random_graphs([N, N]), 2)
        with pytest.raises(ValueError, match=r"^Cyclic\(5, 'n'\): every graph must have 5 nodes, got 4 in graph 1$"):
            call(random_graphs([N, 4]), 2)
    with pytest.raises(ValueError, match=re.escape(f"Cyclic(6): axis 3 of x must have size 2, got (2, {S}, 5, 3)")):
        Cyclic(6).act(Cyclic(6).identity(batch, S), batch.positions, "np")
    with pytest.raises(ValueError, match=re.escape("Orthogonal(3): the group must be finite to list its elements")):
        Orthogonal(3).elements(batch)
