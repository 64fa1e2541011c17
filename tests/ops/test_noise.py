"""The noise op: every backend against integers, whatever the threads, the place in a vector, or the compiler."""

import math
import re
import zlib

import pytest
import torch

from probsym_fast import ops
from probsym_fast.draws import KINDS
from probsym_fast.groups import Draws
from probsym_fast.ops.noise import OP
from probsym_fast.ops.reference.noise import GOLDEN, MASK, mix_int
from tests.conftest import implementations, kernels_of

SHAPES = [(1, 1), (3, 5), (2, 3, 7), (18, 4, 2), (5, 2, 513), (1, 1, 1024), (700, 3), (0, 3, 2), (3, 0), (2, 2, 0)]
SEEDS = [0, 1, -1, 2**62 - 1, -(2**63)]


def bits(seed: int, stream: str, row: int, sample: int, place: int, forks=()) -> int:
    """The definition in Python's integers."""
    for k in forks:
        seed = mix_int(seed + GOLDEN * (k + 1)) >> 2
    purpose = mix_int(zlib.crc32(stream.encode()) * GOLDEN)
    key = mix_int(mix_int(mix_int((seed ^ purpose) & MASK) + row * GOLDEN) + sample * GOLDEN)
    return mix_int(key + (place + 1) * GOLDEN) >> 32


def seed_on(device, seed: int) -> torch.Tensor:
    return torch.tensor(seed, device=device)


@pytest.mark.parametrize(("device", "backend"), implementations("noise"))
@pytest.mark.parametrize("seed", SEEDS)
def test_definition(device, backend, seed):
    shape, rows = (3, 4, 2, 5), torch.tensor([7, -3, 2**62], device=device)
    u = ops.noise(seed_on(device, seed), shape, "a", rows=rows, first=2, forks=(1, 0), block=3, backend=backend)
    z = ops.noise(seed_on(device, seed), shape, "a", rows=rows, normal=True, mirrored=True, block=2, backend=backend)
    assert u.dtype == z.dtype == torch.float64
    for index in ((0, 0, 0, 0), (1, 3, 1, 2), (2, 1, 0, 4), (2, 3, 1, 4)):
        r, s, place = int(rows[index[0]]), index[1], index[2] * 5 + index[3]
        assert float(u[index]) == bits(seed, "a", r, (2 + s) // 3, place, (1, 0)) / 2**32
        radius, angle = (bits(seed, f"a/{name}", r, s // 2, place) / 2**32 for name in ("radius", "angle"))
        expected = (-1) ** s * math.sqrt(-2 * math.log1p(-radius)) * math.cos(2 * math.pi * angle)
        assert float(z[index]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("device", "backend"), kernels_of("noise"))
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_against_the_reference(device, backend, shape):
    rows = torch.arange(shape[0], device=device) * 5 - 3
    for settings in ({}, {"mirrored": True, "block": 2}, {"rows": rows, "first": 5, "block": 4, "forks": (3,)}):
        u, expected = (ops.noise(seed_on(device, 9), shape, "x", **settings, backend=b) for b in (backend, "reference"))
        assert torch.equal(u, expected) and u.shape == shape
        z, expected = (
            ops.noise(seed_on(device, 9), shape, "x", normal=True, **settings, backend=b)
            for b in (backend, "reference")
        )
        assert torch.allclose(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("device", "backend"), kernels_of("noise"))
def test_the_normal_at_every_quarter_turn_and_in_the_tail(device, backend):
    z, expected = (
        ops.noise(seed_on(device, 1), (1, 1, 2**18), "x", normal=True, backend=b) for b in (backend, "reference")
    )
    assert (z - expected).abs().max() <= 1e-14 * expected.abs().max()
    assert z.isfinite().all() and z.abs().max() > 4


@pytest.mark.parametrize("normal", [False, True])
def test_threads_and_places_change_no_bit(normal):
    """Neither how many threads share the work, nor where in a vector a number is computed."""
    draw = lambda *shape, **settings: ops.noise(torch.tensor(3), shape, "x", normal=normal, **settings)  # noqa: E731
    whole = draw(300, 5, 77)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(draw(300, 5, 77), whole)
    finally:
        torch.set_num_threads(before)
    for places in (1, 3, 8, 76):
        assert torch.equal(draw(4, 5, places), whole[:4, :, :places])
    assert torch.equal(draw(300, 2, 77, first=3), whole[:, 3:])
    assert torch.equal(draw(2, 5, 77, rows=torch.tensor([299, 17])), whole[[299, 17]])


def test_opcheck(device):
    arguments = seed_on(device, 3), None, [4, 3, 2], 1, [2], [17], 2, True
    rows = torch.arange(4, device=device)
    for op in (OP.kernel, OP.reference):
        if OP.has_kernel(device.type) or op is OP.reference:
            torch.library.opcheck(op, arguments)
            torch.library.opcheck(op, (seed_on(device, 3), rows, [4, 3, 2], 1, None, [17, 18], 1, False))


SEED = torch.tensor(0)
REFUSED = {
    "noise: seed must be an int64 Tensor, got int": (TypeError, lambda: ops.noise(3, (1, 1), "x")),
    "noise: seed must be an int64 Tensor, got torch.float32": (TypeError, lambda: ops.noise(SEED.float(), (1, 1), "x")),
    "noise: seed must be (), got (1,)": (ValueError, lambda: ops.noise(SEED[None], (1, 1), "x")),
    "noise: shape must be (rows, S, ...), got (3,)": (ValueError, lambda: ops.noise(SEED, (3,), "x")),
    "noise: block must be at least 1, got 0": (ValueError, lambda: ops.noise(SEED, (1, 1), "x", block=0)),
    "noise: first must be at least 0, got -1": (ValueError, lambda: ops.noise(SEED, (1, 1), "x", first=-1)),
    "noise: forks must be at least 0, got -2": (ValueError, lambda: ops.noise(SEED, (1, 1), "x", forks=(1, -2))),
    "noise: rows must be an int64 Tensor, got torch.int32": (
        TypeError,
        lambda: ops.noise(SEED, (1, 1), "x", rows=torch.zeros(1, dtype=torch.int32)),
    ),
    "noise: rows must be (2,) as shape says, got (3,)": (
        ValueError,
        lambda: ops.noise(SEED, (2, 1), "x", rows=torch.arange(3)),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    kind, call = REFUSED[message]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def compilations() -> list:
    """(kind, backend): every kind and every backend; the other pairs by hand."""
    backends, by_hand = OP.backends("cpu"), [pytest.mark.slow, pytest.mark.exhaustive]
    often = {(kind, backends[number % len(backends)]) for number, kind in enumerate(KINDS)}
    pairs = [(kind, backend) for kind in KINDS for backend in backends]
    return [pytest.param(*pair, marks=[] if pair in often else by_hand) for pair in pairs]


@pytest.mark.parametrize(("kind", "backend"), compilations())
def test_compiled_noise_is_eager_noise(kind, backend):
    """Inductor's own code around it, for tensors and ints as seeds: bit for bit."""

    def draw(seed):
        found = []
        for shape in ((18, 4, 2), (200, 4, 2), (3, 5), (7, 3, 300)):
            draws = Draws(seed=seed, kind=kind)
            found += [draws.uniform(shape, "noise"), draws.fork(2).normal(shape, "x") * 2 + 1]
            found += [draws.starting(3).uniform(shape, "y", block=4, rows=torch.arange(shape[0]))]
        return found

    before = torch.get_num_threads()
    with ops.using_backend(backend), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(draw, fullgraph=True)
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for seed in (3, 2**61):
                    found = [draw(seed), compiled(torch.tensor(seed))]
                    assert all(map(torch.equal, *found)), (threads, seed)
        finally:
            torch.set_num_threads(before)
