"""The n-body generator against the published set, and how data files are written and refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from probsym_fast.data import NBody
from probsym_fast.data import nbody as module
from probsym_fast.data._store import load_arrays, save_arrays, write_atomically

SHARED = Path(os.environ.get("PROBSYM_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "nbody"
published = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published n-body set is not at {SHARED}")


@pytest.fixture(scope="module")
def stream():
    return module.initial_conditions(14_000)


@published
def test_all_charges_and_most_trajectories_equal_the_published_ones(stream):
    """All 14,000 charges; positions within 1e-3 for at least 94 % (close encounters are chaotic)."""
    near = {30: [], 40: []}
    for split, part in (("train", slice(0, 10_000)), ("valid", slice(10_000, 12_000)), ("test", slice(12_000, 14_000))):
        with np.load(SHARED / f"{split}.npz") as file:
            arrays = {name: file[name] for name in file.files}
        charges = arrays["charges"].reshape(-1, 5)
        assert np.array_equal(charges, stream[0][part])
        some = slice(part.start, part.start + 400)
        x, _ = module.simulate(*(a[some] for a in stream), frames=(30, 40))
        for k, frame in enumerate((30, 40)):
            theirs = arrays[next(n for n in arrays if str(frame) in n and n[0] in "lp")][:400]
            theirs = theirs if theirs.shape[-1] == 3 else theirs.swapaxes(1, 2)
            near[frame].append(np.abs(x[:, k] - theirs).max((1, 2)) < 1e-3)
    assert np.concatenate(near[30]).mean() >= 0.94
    assert np.concatenate(near[40]).mean() >= 0.94


def test_the_stream_is_deterministic_and_in_order(stream):
    few = module.initial_conditions(7)
    for a, b in zip(few, stream, strict=True):
        assert np.array_equal(a, b[:7])
    assert set(np.unique(stream[0])) == {-1.0, 1.0}
    assert np.allclose(np.linalg.norm(stream[2], axis=-1), 0.5)


def test_simulation_does_not_depend_on_blocks_workers_or_frames(stream):
    start = [a[:37] for a in stream]
    x, v = module.simulate(*start, frames=(0, 2))
    for settings in ({"block": 5, "workers": 2}, {"block": 37, "workers": 1}):
        y, w = module.simulate(*start, frames=(0, 2), **settings)
        assert np.array_equal(x, y)
        assert np.array_equal(v, w)
    swapped, _ = module.simulate(*start, frames=(2, 0))
    assert np.array_equal(swapped, x[:, ::-1])


def test_forces_are_those_of_the_definition(stream):
    """Leapfrog written out for one simulation: reflected start, clamped total force, velocities half a step behind."""
    q, x, v = (a[3].copy() for a in stream)
    x[0, 0], v[0, 0] = 5.5, 0.3
    found, speed = module.simulate(q[None], x[None], v[None], frames=(0,))
    x[0, 0], v[0, 0] = 4.5, -0.3
    for _ in range(100):
        r = x[:, None] - x[None]
        distance = np.linalg.norm(r, axis=-1) + np.eye(5)
        force = (q[:, None] * q / distance**3)[..., None] * r
        v = v + 0.001 * np.clip(force.sum(1), -100, 100)
        x = x + 0.001 * v
    assert np.abs(found[0, 0] - x).max() < 1e-9
    assert np.abs(speed[0, 0] - v).max() < 1e-9


def test_force_is_clamped_and_collisions_are_refused():
    x = np.zeros((1, 2, 3))
    x[0, 1, 0] = 1e-3
    still = np.zeros((1, 2, 3))
    _, v = module.simulate(np.ones((1, 2)), x, still, frames=(0,))
    assert np.abs(v).max() <= 100 * 0.001 * 100
    with pytest.raises(ValueError, match=r"bodies must stay at distinct finite points"):
        module.simulate(np.ones((1, 2)), np.zeros((1, 2, 3)), still, frames=(0,))
    with pytest.raises(ValueError, match=r"positions must be \(M, n, 3\) = \(1, 2, 3\), got \(1, 3, 3\)"):
        module.simulate(np.ones((1, 2)), np.zeros((1, 3, 3)), still)
    with pytest.raises(ValueError, match=r"frames must be distinct numbers in 0..48, got \(49,\)"):
        module.simulate(np.ones((1, 2)), x, still, frames=(49,))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A set of 12 simulations to frame 1."""
    parts = {"train": slice(0, 6), "valid": slice(6, 9), "test": slice(9, 12)}
    monkeypatch.setattr(module, "SPLITS", parts)
    return lambda split="train", **more: NBody(split, tmp_path, frames=(0, 1), **more)


def test_cache_is_used_checked_and_written_whole(tiny, tmp_path, monkeypatch):
    first = tiny()
    (path,) = tmp_path.iterdir()
    made = path.stat().st_mtime_ns
    again = tiny()
    assert path.stat().st_mtime_ns == made
    assert torch.equal(first.positions, again.positions)
    assert first.positions.dtype == torch.float32
    assert len(tiny("test")) == 3
    assert len(tiny(count=2)) == 2
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(whole[200:204], b"\xff\xfe\xfd\xfc", 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"expected .*, got .*; to mend it, delete the file or run"):
            tiny()
        assert path.read_bytes() == damaged
    assert len(tiny(force=True)) == 6

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "simulate", interrupted)
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        tiny()
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'valid', 'test'\], got 'val'"):
        tiny("val")
    with pytest.raises(ValueError, match=r"count must be in 1..6 for split 'train', got 7"):
        tiny(count=7)


def test_constant_velocity_baseline():
    """0.108 on the published test split."""
    test = NBody("test")
    error = (test.constant_velocity() - test.target).square().mean().item()
    assert abs(error - 0.108) < 0.002


def test_nothing_is_left_half_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_store_round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.npz"
    save_arrays(path, {"x": np.arange(6.0).reshape(2, 3)}, {"kind": "test"})
    arrays, about = load_arrays(path, {"x": (None, 3)}, {"kind": "test"})
    assert np.array_equal(arrays["x"], np.arange(6.0).reshape(2, 3))
    assert about == {"kind": "test"}
    for shapes, metadata, message in (
        ({"y": (2, 3)}, {}, "without"),
        ({"x": (3, 2)}, {}, r"x of shape \(3, 2\), got \(2, 3\)"),
        ({"x": (2, 3)}, {"kind": "other"}, "metadata kind = other, got test"),
    ):
        with pytest.raises(ValueError, match=message):
            load_arrays(path, shapes, metadata)
    np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"expected a readable \.npz file"):
        load_arrays(tmp_path / "b.npz", {"x": (1,)})
