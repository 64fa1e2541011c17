"""Counter-based noise: its distribution, independence of everything it should be independent of, and its fixed values."""

import re
import zlib

import numpy
import pytest
import torch

from probsym_fast.groups import Draws, Product, Symmetric
from probsym_fast.ops.reference.noise import GOLDEN, MASK, mix, mix_int, signed

COUNT = 60_000
SHAPES = {"rows": (COUNT, 1, 1), "samples": (1, COUNT, 1), "places": (1, 1, COUNT), "all": (30, 40, 50)}


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Times sqrt(count): N(0, 1) where independent."""
    x, y = x.flatten() - x.mean(), y.flatten() - y.mean()
    return (x @ y / (x.norm() * y.norm())).item() * len(x) ** 0.5


def chi_square(counts: torch.Tensor) -> float:
    """Of equally likely cells, in standard deviations from its mean."""
    expected = counts.sum() / counts.numel()
    cells = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - cells).item() / (2 * cells) ** 0.5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2**61])
def test_uniform_along_every_axis(shape, seed):
    u = Draws(seed=seed).uniform(shape, "test").flatten()
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert len(u.unique()) > len(u) - 10  # 32 bits: about 0.4 pairs of equals
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5
    assert chi_square((u * 256).long().bincount(minlength=256)) < 5
    for lag in (1, 2, 50):  # neighbours, as cells of a 16 x 16 table and by correlation
        cells = (u[:-lag] * 16).long() * 16 + (u[lag:] * 16).long()
        assert chi_square(cells.bincount(minlength=256)) < 5
        assert abs(correlation(u[:-lag], u[lag:])) < 5
    low = (u * 2**32).long()
    for bit in range(32):
        assert abs((low >> bit & 1).double().mean() - 0.5) < 5 * 0.5 / len(u) ** 0.5


def test_normal():
    z = Draws(seed=3).normal((30, 40, 50), "test").flatten()
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * (variance / n) ** 0.5
    cells = (torch.special.ndtr(z) * 256).long().clamp(0, 255)
    assert chi_square(cells.bincount(minlength=256)) < 5
    assert abs(correlation(z[:-1], z[1:])) < 5
    assert z.isfinite().all()


def test_other_seeds_streams_rows_and_samples_are_independent():
    shape = (20, 30, 50)
    base = Draws(seed=1)
    u = base.uniform(shape, "test")
    others = [Draws(seed=seed).uniform(shape, "test") for seed in (0, 2, 3, 2**32 + 1, 2**61 + 1)]
    others += [base.uniform(shape, stream) for stream in ("tesT", "noise", "")]
    others += [base.fork(k).uniform(shape, "test") for k in range(4)]
    others += [base.fork(0).fork(1).uniform(shape, "test"), base.fork(1).fork(0).uniform(shape, "test")]
    others += [base.starting(30).uniform(shape, "test"), base.uniform(shape, "test", rows=torch.arange(20, 40))]
    others += [u.transpose(0, 1).reshape(shape), u.flip(0), u.flip(1), u.flip(2)]
    for k, other in enumerate(others):
        assert abs(correlation(u, other)) < 5, k
        assert (u == other).sum() < 60 if k < len(others) - 4 else True
    for k, first in enumerate(others[:-4]):
        for second in others[:k]:
            assert abs(correlation(first, second)) < 5
    matrix = torch.corrcoef(u.transpose(0, 1).flatten(1)) * 1000**0.5  # between samples
    assert (matrix - matrix.diag().diag()).abs().max() < 5


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_chunks_of_samples_give_the_same_numbers(draw):
    draws = Draws(seed=7)
    whole = getattr(draws, draw)((5, 10, 3, 2), "test")
    chunks = [
        getattr(draws.starting(first), draw)((5, count, 3, 2), "test") for first, count in ((0, 4), (4, 1), (5, 5))
    ]
    assert torch.equal(torch.cat(chunks, 1), whole)
    later = Draws(seed=7, first=2)
    assert torch.equal(getattr(later, draw)((5, 8, 3, 2), "test"), whole[:, 2:])
    assert torch.equal(
        getattr(later.fork(3), draw)((5, 8, 3), "a"), getattr(draws.fork(3), draw)((5, 10, 3), "a")[:, 2:]
    )
    assert torch.equal(getattr(draws, draw)((3, 10, 3, 2), "test"), whole[:3])  # fewer rows, samples, places
    assert torch.equal(getattr(draws, draw)((5, 10, 4), "test"), whole.flatten(2)[..., :4])
    assert torch.equal(getattr(draws, draw)((5, 10), "test"), whole.flatten(2)[..., 0])


def test_rows_are_named():
    draws = Draws(seed=7)
    whole = draws.uniform((100, 3, 2), "test")
    names = torch.tensor([99, 0, 17, 17])
    assert torch.equal(draws.uniform((4, 3, 2), "test", rows=names), whole[names])
    far = torch.tensor([-1, 2**62, 5 * 2**20])
    assert len(draws.uniform((3, 3, 2), "test", rows=far).unique()) == 18


def test_empty_shapes():
    for shape in ((0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0)):
        assert Draws(seed=0).uniform(shape, "test").shape == shape
        assert Draws(seed=0).normal(shape, "test").shape == shape


def test_seed_from_generator_or_global_or_given():
    first, second = (Draws(torch.Generator().manual_seed(seed)).seed for seed in (1, 2))
    assert first != second and Draws(torch.Generator().manual_seed(1)).seed == first
    generator = torch.Generator().manual_seed(1)
    assert Draws(generator).seed != Draws(generator).seed
    state = torch.get_rng_state()
    draws = Draws(torch.Generator().manual_seed(1))
    for user in (draws, Draws(seed=4), draws.starting(3), draws.fork(1)):
        user.uniform((2, 2, 2), "test")
        user.normal((2, 2), "test")
    assert torch.equal(torch.get_rng_state(), state)
    one = Draws().seed
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert Draws().seed == one
    assert repr(Draws(seed=4, first=2)) == "Draws(seed=4, first=2)"
    assert repr(Draws(seed=4).fork(1).fork(0).starting(3)) == "Draws(seed=4, first=3).fork(1).fork(0)"


def test_seeds_of_every_kind_give_the_same_numbers():
    draw = lambda seed: Draws(seed=seed).normal((2, 3, 4), "test")  # noqa: E731
    for seed in (torch.tensor(5), numpy.int32(5), numpy.uint64(5)):
        assert torch.equal(draw(seed), draw(5))
    assert torch.equal(draw(torch.tensor(-1)), draw(2**64 - 1)) and torch.equal(draw(-1), draw(2**64 - 1))
    first, again = (Draws(numpy.random.default_rng(7)) for _ in range(2))
    assert first.seed == again.seed != Draws(numpy.random.default_rng(8)).seed


NO_SEED = "Draws: seed must be an int or a () int64 Tensor, got "
REFUSED = {
    NO_SEED + "float 3.0": (TypeError, {"seed": 3.0}),
    NO_SEED + "bool True": (TypeError, {"seed": True}),
    NO_SEED + "str '3'": (TypeError, {"seed": "3"}),
    NO_SEED + "torch.int32": (TypeError, {"seed": torch.tensor(3, dtype=torch.int32)}),
    NO_SEED + "shape (1,)": (ValueError, {"seed": torch.tensor([3])}),
    "Draws: seed must be an int of 64 bits, got 18446744073709551616": (ValueError, {"seed": 2**64}),
    "Draws: generator must be torch's or numpy's Generator, got int": (TypeError, {"generator": 3}),
    "Draws: either generator or seed must be None, got both": (
        ValueError,
        {"generator": torch.Generator(), "seed": 3},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_seeds_and_generators_are_refused(message):
    kind, arguments = REFUSED[message]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        Draws(**arguments)


def test_mixing_is_splitmix64():
    """Its published outputs from state 0; the tensor form agrees with Python's integers."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [mix_int(GOLDEN * k) for k in range(1, 5)] == expected
    x = [0, 1, 2**63, MASK, *(GOLDEN * k & MASK for k in range(100))]
    tensor = torch.tensor([signed(k) for k in x])
    kept = tensor.clone()
    assert mix(tensor).tolist() == [signed(mix_int(k)) for k in x]
    assert torch.equal(tensor, kept)


def test_known_values():
    """Results would change with these numbers, on every machine."""
    u = Draws(seed=2023).uniform((2, 2, 2), "noise", rows=torch.tensor([0, 12345]))
    assert (u * 2**32).long().flatten().tolist() == KNOWN
    z = Draws(seed=2023, first=1).normal((1, 1, 3), "noise").flatten().tolist()
    assert z == pytest.approx(KNOWN_NORMAL, abs=1e-12)
    assert torch.equal(Draws(seed=2023).fork(1).normal((2, 2), "x"), Draws(seed=KNOWN_FORK).normal((2, 2), "x"))


KNOWN = [2086510939, 3934613384, 3320045320, 3812949838, 66850421, 2720185106, 1165348297, 2278716803]
KNOWN_NORMAL = [1.96144528131057, 0.2594040173467, 0.45392857168627]
KNOWN_FORK = 1541677873552689764


def test_known_values_are_the_formula():
    """The first number of the definition, in integers."""
    start = mix_int(5 ^ mix_int(zlib.crc32(b"noise") * GOLDEN))
    row, sample, place = 3, 2, 4
    key = mix_int(mix_int(start + row * GOLDEN) + sample * GOLDEN)
    expected = (mix_int(key + (place + 1) * GOLDEN) >> 32) / 2**32
    assert Draws(seed=5).uniform((4, 3, 5), "noise")[row, sample, place] == expected


def test_same_numbers_on_every_device(device):
    draws = Draws(seed=11)
    here = draws.uniform((7, 3, 5), "test", rows=torch.arange(7) * 3)
    there = draws.uniform((7, 3, 5), "test", rows=torch.arange(7) * 3, device=device)
    assert torch.equal(there.cpu(), here)
    assert (draws.normal((7, 3, 5), "a", device=device).cpu() - draws.normal((7, 3, 5), "a")).abs().max() < 1e-12


def test_factors_of_a_product_draw_different_permutations():
    class Clouds:
        size, num_nodes, device = 50, None, torch.device("cpu")

    a, b = Product(Symmetric(6), Symmetric(6)).uniform(Clouds, 4, Draws(seed=1))
    assert (a.order == b.order).all(-1).sum() < 5
