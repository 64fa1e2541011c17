import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from probsym_fast.data import NBody, nbody
from probsym_fast.data.nbody import initial_conditions, reflect, simulate

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(os.environ.get("PROBSYM_SHARED", ROOT.parent / "shared")) / "data" / "nbody"
SMALL = {"train": slice(0, 6), "valid": slice(6, 9), "test": slice(9, 13)}

needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the published set is not at {PUBLISHED} (set PROBSYM_SHARED)"
)


def published(*splits):
    """charges, positions and velocities at frame 30, positions at frame 40."""
    files = [np.load(PUBLISHED / f"{split}.npz") for split in splits]
    return [np.concatenate([f[name] for f in files]) for name in ("charges", "loc_30", "vel_30", "loc_40")]


def share_within(bound, *pairs):
    """Share of the simulations for which all pairs of (M, n, 3) arrays agree within `bound`."""
    return np.mean([np.abs(a - b).max((1, 2)) < bound for a, b in pairs], axis=1)


def one_by_one(charges, positions, velocities, steps, bound=100.0):
    """One simulation, written as the definition reads, pair by pair; also counts the clamped components."""
    x, v = positions.copy(), velocities.copy()
    for i in np.ndindex(x.shape):
        if x[i] > 5:
            x[i], v[i] = 10 - x[i], -abs(v[i])
        elif x[i] < -5:
            x[i], v[i] = -10 - x[i], abs(v[i])
    kept, clamped = [], 0

    def force():
        nonlocal clamped
        total = np.zeros_like(x)
        for i in range(len(x)):
            for j in range(len(x)):
                if i != j:
                    r = x[i] - x[j]
                    total[i] += charges[i] * charges[j] * r / np.linalg.norm(r) ** 3
        clamped += (np.abs(total) > bound).sum()
        return total.clip(-bound, bound)

    v += 0.001 * force()
    for step in range(1, max(steps) + 1):
        x += 0.001 * v
        if step in steps:
            kept.append((x.copy(), v.copy()))
        v += 0.001 * force()
    return *np.array(kept).swapaxes(0, 1), clamped


def test_stream_is_drawn_in_the_published_order():
    random = np.random.RandomState(7)
    charges, positions, velocities = initial_conditions(4, seed=7)
    for i in range(4):
        q = random.choice([-1.0, 0.0, 1.0], size=(5, 1), p=[0.5, 0, 0.5])
        x, v = random.randn(3, 5), random.randn(3, 5)
        random.randn(49, 3, 5)
        random.randn(49, 3, 5)
        np.testing.assert_array_equal(charges[i], q[:, 0])
        np.testing.assert_array_equal(positions[i], x.T)
        np.testing.assert_allclose(velocities[i], (0.5 * v / np.linalg.norm(v, axis=0)).T, rtol=1e-14)


@needs_published
def test_charges_equal_the_published_ones():
    charges, *_ = initial_conditions(14_000)
    np.testing.assert_array_equal(charges, published("train", "valid", "test")[0])


@needs_published
def test_trajectories_agree_with_the_published_ones():
    count = 1000
    x, v = simulate(*initial_conditions(count))
    _, x30, v30, x40 = (a[:count] for a in published("train"))
    shares = share_within(1e-3, (x[:, 0], x30), (v[:, 0], v30), (x[:, 1], x40))
    assert (shares > [0.96, 0.95, 0.94]).all(), shares
    assert share_within(1e-5, (x[:, 1], x40)) > 0.93
    assert share_within(1e-3, (x[:, 0], x40)) < 0.01  # the measure tells frames apart


@needs_published
@pytest.mark.slow
def test_whole_set_agrees_with_the_published_one(tmp_path):
    sets = [NBody(split, root=tmp_path) for split in ("train", "valid", "test")]
    for data, split in zip(sets, ("train", "valid", "test"), strict=True):
        charges, x30, v30, x40 = published(split)
        x, v, q, target = (a.numpy() for a in data[:])
        np.testing.assert_array_equal(q, charges)
        shares = share_within(1e-3, (x, x30), (v, v30), (target, x40))
        assert (shares > 0.94).all(), (split, shares)
    error = (sets[-1].constant_velocity() - sets[-1].target).square().mean().item()
    assert error == pytest.approx(0.108, abs=0.001)


def test_simulate_follows_the_definition():
    charges, positions, velocities = initial_conditions(4, seed=1)
    positions[0, 1] = positions[0, 0] + [0.03, 0.02, -0.01]  # close enough to be clamped
    positions[1, 2] = [6.5, -7.0, 5.0]
    velocities[1, 2] = [0.4, -0.3, 0.1]
    x, v = simulate(charges, positions, velocities, frames=(0, 2))
    for i in range(4):
        expected_x, expected_v, clamped = one_by_one(charges[i], positions[i], velocities[i], (100, 300))
        np.testing.assert_allclose(x[i], expected_x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(v[i], expected_v, rtol=1e-9, atol=1e-9)
        assert clamped > 0 or i > 0
    unclamped, *_ = one_by_one(charges[0], positions[0], velocities[0], (100, 300), bound=np.inf)
    assert np.abs(unclamped - x[0]).max() > 1e-3


def test_reflect():
    x, v = reflect(np.array([5.0, -5.0, 5.5, 5.5, -6.0, -6.0]), np.array([1.0, -1.0, 1.0, -1.0, 2.0, -2.0]))
    np.testing.assert_array_equal(x, [5.0, -5.0, 4.5, 4.5, -4.0, -4.0])
    np.testing.assert_array_equal(v, [1.0, -1.0, -1.0, -1.0, 2.0, 2.0])


def test_gentle_trajectories_conserve_energy_and_momentum():
    random = np.random.default_rng(0)
    corners = np.stack(np.meshgrid([-2, 2], [-2, 2], [-2, 2]), -1).reshape(8, 3)[:5]
    positions = corners + 0.3 * random.standard_normal((3, 5, 3))
    velocities = 0.3 * random.standard_normal((3, 5, 3))
    charges = np.ones((3, 5))
    x, v = simulate(charges, positions, velocities, frames=(0, 20, 48))
    i, j = np.triu_indices(5, 1)
    energy = 0.5 * (v**2).sum((2, 3)) + (1 / np.linalg.norm(x[:, :, i] - x[:, :, j], axis=-1)).sum(-1)
    np.testing.assert_allclose(energy, energy[:, :1].repeat(3, 1), rtol=1e-3)
    assert ((v[:, 2] ** 2).sum((1, 2)) > 1.4 * (v[:, 0] ** 2).sum((1, 2))).all()  # they fly apart
    np.testing.assert_allclose(v.sum(2), velocities.sum(1)[:, None].repeat(3, 1), atol=1e-12)


def test_two_bodies_and_no_simulations():
    charges, positions, velocities = initial_conditions(2)
    x, _ = simulate(charges[:, :2], positions[:, :2], velocities[:, :2], frames=(0,))
    expected, _, _ = one_by_one(charges[0, :2], positions[0, :2], velocities[0, :2], (100,))
    np.testing.assert_allclose(x[0], expected, rtol=1e-9)
    assert simulate(charges[:0], positions[:0], velocities[:0])[0].shape == (0, 2, 5, 3)


def test_frames_are_kept_in_the_order_asked_for():
    start = initial_conditions(3)
    x, v = simulate(*start, frames=(0, 1, 4))
    for frames, places in (((4, 0), [2, 0]), ((1,), [1])):
        for all_frames, some in zip((x, v), simulate(*start, frames=frames), strict=True):
            np.testing.assert_array_equal(some, all_frames[:, places])


def test_nothing_depends_on_blocks_workers_or_the_run():
    start = initial_conditions(23)
    expected = simulate(*start, frames=(3,), block=23, workers=1)
    for block, workers in ((23, 1), (1, 1), (5, 1), (5, 3), (8, 2), (1000, 4)):
        for a, b in zip(expected, simulate(*start, frames=(3,), block=block, workers=workers), strict=True):
            np.testing.assert_array_equal(a, b)
    again = initial_conditions(23)
    assert all(np.array_equal(a, b) for a, b in zip(start, again, strict=True))


def test_progress_adds_up():
    done = []
    simulate(*initial_conditions(7), frames=(1, 3), block=3, workers=2, advance=done.append)
    assert sum(done) == 7 * 400


def test_simulate_refuses():
    q, x, v = initial_conditions(2)
    for arguments, message in (
        ((q[0], x, v), r"charges must be \(M, n\) with n >= 2, got \(5,\)"),
        ((q[:, :1], x, v), r"charges must be \(M, n\) with n >= 2, got \(2, 1\)"),
        ((q, x[:1], v), r"positions must be \(M, n, 3\) = \(2, 5, 3\), got \(1, 5, 3\)"),
        ((q, x, v.swapaxes(1, 2)), r"velocities must be \(M, n, 3\) = \(2, 5, 3\), got \(2, 3, 5\)"),
        ((q, x, v, (30, 49)), r"distinct numbers in 0..48, got \(30, 49\)"),
        ((q, x, v, (1, 1)), r"distinct numbers in 0..48, got \(1, 1\)"),
        ((q, x, v, ()), r"distinct numbers in 0..48, got \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(*arguments)
    with pytest.raises(ValueError, match="block and workers must be at least 1, got 0 and 1"):
        simulate(q, x, v, block=0, workers=1)
    x[1, 3] = x[1, 2]
    with pytest.raises(ValueError, match=r"distinct finite points, got others in simulations \[1\]"):
        simulate(q, x, v, frames=(0,))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A set of 13 simulations, cached below tmp_path."""
    monkeypatch.setattr(nbody, "SPLITS", SMALL)
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    return tmp_path / "nbody" / "charged5-0-2.npz"


@pytest.fixture
def no_generation(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("must not generate")

    return lambda: monkeypatch.setattr(nbody, "simulate", refuse)


def test_splits_follow_each_other(small, capsys):
    charges, *start = initial_conditions(13)
    x, v = simulate(charges, *start, frames=(0, 2))
    for split, part in SMALL.items():
        data = NBody(split, frames=(0, 2))
        assert len(data) == part.stop - part.start
        for got, expected in zip(data[:], (x[:, 0], v[:, 0], charges, x[:, 1]), strict=True):
            assert got.dtype == torch.float32
            np.testing.assert_array_equal(got.numpy(), expected[part].astype(np.float32))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # one at the start and one at the end of the only generation
    assert lines[0].startswith("n-body: simulating 13")
    assert "done in" in lines[1]


def test_items_and_count(small):
    data = NBody("train", count=4, frames=(0, 2))
    assert len(data) == 4
    assert [tuple(a.shape) for a in data[1]] == [(5, 3), (5, 3), (5,), (5, 3)]
    assert [len(a) for a in data[torch.tensor([0, 3, 3])]] == [3] * 4
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert all(torch.equal(a, b) for a, b in zip(batch, data[:], strict=True))


@pytest.mark.parametrize("frames", [(0, 2), (2, 0)])
def test_constant_velocity_covers_the_time_between_the_frames(small, frames):
    data = NBody("test", frames=frames)
    span = 0.1 * (frames[1] - frames[0])  # a frame is 100 steps of 0.001
    torch.testing.assert_close(data.constant_velocity(), data.positions + span * data.velocities)


@needs_published
def test_constant_velocity_error_on_the_published_test_set(small):
    data = NBody("test", frames=(0, 10))  # ten frames apart, as 30 and 40 are
    _, data.positions, data.velocities, data.target = (torch.from_numpy(a) for a in published("test"))
    error = (data.constant_velocity() - data.target).square().mean().item()
    assert error == pytest.approx(0.108, abs=5e-4)


def test_cache_is_reused(small, no_generation, tmp_path):
    first = NBody("valid", frames=(0, 2))
    assert first.path == small
    no_generation()
    assert torch.equal(NBody("valid", frames=(0, 2)).target, first.target)
    for fresh in ({"force": True}, {"root": tmp_path / "other"}):
        with pytest.raises(AssertionError, match="must not generate"):
            NBody("valid", frames=(0, 2), **fresh)
    assert [p.name for p in small.parent.iterdir()] == [small.name]


def test_damaged_cache_is_refused_and_can_be_forced(small, no_generation):
    target = NBody("test", frames=(0, 2)).target
    small.write_bytes(small.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"readable .npz file, got .*`probsym data get nbody --force`") as error:
        NBody("test", frames=(0, 2))
    assert str(small) in str(error.value)
    assert torch.equal(NBody("test", frames=(0, 2), force=True).target, target)
    no_generation()
    assert torch.equal(NBody("test", frames=(0, 2)).target, target)


def test_cache_of_another_set_is_refused(small, monkeypatch):
    NBody("test", frames=(0, 2))
    monkeypatch.setattr(nbody, "SEED", 44)
    with pytest.raises(ValueError, match="metadata seed = 44, got 43"):
        NBody("test", frames=(0, 2))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_interrupted_generation_leaves_nothing(small, monkeypatch, failure):
    calls = []

    def advance(amount):
        calls.append(amount)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(nbody, "announced", lambda text, total: nullcontext(advance))
    with pytest.raises(failure):
        NBody("train", frames=(0, 2))
    assert len(calls) == 2
    assert not list(small.parent.parent.rglob("*.*"))


@pytest.mark.slow
def test_two_processes_may_generate_at_once(small):
    code = f"""
from probsym_fast.data import NBody, nbody
nbody.SPLITS = {SMALL!r}
NBody("train", frames=(0, 2), force=True)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [p.name for p in small.parent.iterdir()] == [small.name]
    assert len(NBody("train", frames=(0, 2))) == 6


def test_loader_refuses(small):
    with pytest.raises(ValueError, match=r"split must be one of .* got 'dev'"):
        NBody("dev")
    with pytest.raises(ValueError, match=r"frames must be \(input, target\), got \(1, 2, 3\)"):
        NBody("train", frames=(1, 2, 3))
    for count in (0, 7):
        with pytest.raises(ValueError, match=rf"count must be in 1..6 for split 'train', got {count}"):
            NBody("train", count=count)
    assert not small.parent.exists()
