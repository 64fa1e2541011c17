"""Charged five-body trajectories in three dimensions: predict the positions one time unit ahead.

The set of Satorras, Hoogeboom, Welling, "E(n) Equivariant Graph Neural Networks" (ICML 2021, arXiv
2102.09844), after Kipf et al. (ICML 2018, arXiv 1802.04687), drawn from the same random stream. Positions,
velocities, charges and time are dimensionless (unit masses, unit Coulomb constant).

Close encounters are chaotic: a rounding error of 1e-16 may grow to the size of the system before frame 40. So
charges equal the published ones exactly, and positions agree within 1e-3 for about 95 % of the trajectories.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from probsym_fast._progress import announced
from probsym_fast.data._store import cache_dir, load_arrays, save_arrays

SEED = 43
SPLITS = {"train": slice(0, 10_000), "valid": slice(10_000, 12_000), "test": slice(12_000, 14_000)}
BODIES = 5
SPEED = 0.5  # initial speed of every body
DT = 0.001  # time step
STEPS_PER_FRAME = 100
FRAMES = 49
BOX = 5.0  # initial positions beyond +-BOX are reflected
MAX_FORCE = 100.0  # bound of each component of the total force on a body


def initial_conditions(count: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `count` simulations of the published random stream, before reflection.

    A simulation draws, in this order: 5 uniforms (charge -1 below 1/2, else +1), 3 x 5 normals (positions), 3 x 5 normals
    (velocities, scaled to speed 0.5), and twice 49 x 3 x 5 normals, which the published generator uses for measurement
    noise of size zero.

    Returns charges (count, 5), positions (count, 5, 3) and velocities (count, 5, 3), all float64.
    """
    random = np.random.RandomState(seed)
    used, unused = 2 * 3 * BODIES, 2 * FRAMES * 3 * BODIES
    uniform = np.empty((count, BODIES))
    normal = np.empty((count, used))
    for i in range(count):
        uniform[i] = random.random_sample(BODIES)
        normal[i] = random.standard_normal(used + unused)[:used]
    positions, velocities = normal.reshape(count, 2, 3, BODIES).transpose(1, 0, 3, 2)
    velocities = velocities * SPEED / np.sqrt((velocities**2).sum(-1, keepdims=True))
    return np.where(uniform < 0.5, -1.0, 1.0), positions.copy(), velocities


def reflect(positions: np.ndarray, velocities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One reflection at the walls: x > 5 to 10 - x with v = -|v|, x < -5 to -10 - x with v = |v|."""
    above, below = positions > BOX, positions < -BOX
    speed = np.abs(velocities)
    return (
        np.select([above, below], [2 * BOX - positions, -2 * BOX - positions], positions),
        np.select([above, below], [-speed, speed], velocities),
    )


def simulate(
    charges: ArrayLike,
    positions: ArrayLike,
    velocities: ArrayLike,
    frames: Sequence[int] = (30, 40),
    *,
    block: int = 4096,
    workers: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Trajectories of charged bodies by leapfrog steps of dt = 0.001, in float64.

    Force on body i: sum over j of q_i q_j (x_i - x_j) / |x_i - x_j|^3, each component of the sum clamped to
    +-100. The initial state is reflected (`reflect`); then every step is v += dt F(x), x += dt v. Frame k is the
    state after 100 (k + 1) steps: positions at time 0.1 (k + 1), velocities half a step earlier.

    Args:
        charges: (M, n), n >= 2.
        positions, velocities: (M, n, 3), finite.
        frames: frames to keep, in 0..48 and in any order; the simulation ends at the last one.
        block: simulations advanced together (about 1 KB of buffers each); does not change the result.
        workers: threads, by default one per core; does not change the result.
        advance: called from the threads with the number of simulations times steps since its last call.

    Returns positions and velocities, (M, len(frames), n, 3) float64. Cost: about 300 operations per step and
    simulation for n = 5. Raises ValueError for wrong arguments, and if bodies meet in one point.
    """
    charges, positions, velocities = (np.asarray(a, np.float64) for a in (charges, positions, velocities))
    if charges.ndim != 2 or charges.shape[1] < 2:
        raise ValueError(f"simulate: charges must be (M, n) with n >= 2, got {charges.shape}")
    for name, array in (("positions", positions), ("velocities", velocities)):
        if array.shape != (*charges.shape, 3):
            raise ValueError(f"simulate: {name} must be (M, n, 3) = {(*charges.shape, 3)}, got {array.shape}")
    frames = _checked_frames(frames)
    workers = _cores() if workers is None else workers
    if block < 1 or workers < 1:
        raise ValueError(f"simulate: block and workers must be at least 1, got {block} and {workers}")
    positions, velocities = reflect(positions, velocities)

    count = len(charges)
    length = max(1, math.ceil(count / max(1, math.ceil(count / block))))  # blocks of equal length
    blocks = [slice(start, start + length) for start in range(0, count, length)]
    kept = np.empty((2, count, len(frames), *positions.shape[1:]))
    pool = ThreadPoolExecutor(max(1, min(workers, len(blocks))))
    try:
        tasks = [
            pool.submit(_leapfrog, charges[b], positions[b], velocities[b], frames, kept[:, b], advance) for b in blocks
        ]
        for task in tasks:
            task.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if not (finite := np.isfinite(kept).all((0, 2, 3, 4))).all():
        where = np.flatnonzero(~finite)[:5].tolist()
        raise ValueError(f"simulate: bodies must stay at distinct finite points, got others in simulations {where}")
    return kept[0], kept[1]


def _leapfrog(charges, positions, velocities, frames, kept, advance) -> None:
    """Simulates a block of M and writes positions and velocities to kept (2, M, len(frames), n, 3).

    Arrays are (n, 3, M) or (pairs, 3, M), simulations innermost, all allocated once. Pairs are grouped by the
    difference of their indices, so that the bodies of a group are two slices.
    """
    x, v = (np.ascontiguousarray(a.transpose(1, 2, 0)) for a in (positions, velocities))
    q = np.ascontiguousarray(charges.T)
    n, _, count = x.shape
    gaps = range(1, n)
    charge_product = np.concatenate([q[gap:] * q[:-gap] for gap in gaps])  # (pairs, M)
    pair = np.empty((len(charge_product), 3, count))  # x_i - x_j, then the force on i
    groups = np.split(pair, np.cumsum([n - gap for gap in gaps])[:-1])  # views
    square = np.empty_like(pair)
    distance2, factor = np.empty_like(charge_product), np.empty_like(charge_product)
    force = np.empty_like(x)
    places = {STEPS_PER_FRAME * (frame + 1): place for place, frame in enumerate(frames)}
    with np.errstate(divide="ignore", invalid="ignore"):  # bodies in one point; `simulate` raises afterwards
        for step in range(1, max(places) + 1):
            for gap, group in zip(gaps, groups, strict=True):
                np.subtract(x[gap:], x[:-gap], out=group)
            np.multiply(pair, pair, out=square)
            np.add(square[:, 0], square[:, 1], out=distance2)
            np.add(distance2, square[:, 2], out=distance2)
            np.sqrt(distance2, out=factor)
            np.multiply(factor, distance2, out=factor)
            np.divide(charge_product, factor, out=factor)
            np.multiply(pair, factor[:, None], out=pair)
            force.fill(0)
            for gap, group in zip(gaps, groups, strict=True):
                force[gap:] += group
                force[:-gap] -= group
            np.clip(force, -MAX_FORCE, MAX_FORCE, out=force)
            np.multiply(force, DT, out=force)
            np.add(v, force, out=v)
            np.multiply(v, DT, out=force)
            np.add(x, force, out=x)
            if step in places:
                kept[0, :, places[step]] = x.transpose(2, 0, 1)
                kept[1, :, places[step]] = v.transpose(2, 0, 1)
            if advance and step % STEPS_PER_FRAME == 0:
                advance(count * STEPS_PER_FRAME)


class NBody(torch.utils.data.Dataset):
    """A split of the published charged five-body set, generated at first use (seconds) and kept in a file.

    Args:
        split: "train" (10,000 simulations), "valid" (2,000) or "test" (2,000).
        root: folder of the file; by default `cache_dir()/nbody`.
        count: only the first `count` simulations of the split.
        frames: frame of the input, frame of the target.
        force: generate again even if the file exists.

    Attributes, all float32 (M simulations, n = 5 bodies): positions (M, n, 3) and velocities (M, n, 3) at the
    input frame, charges (M, n), target (M, n, 3) positions at the target frame. Item i (number, slice or
    index tensor) is (positions, velocities, charges, target). Several processes may generate at once.

    Raises ValueError for a wrong argument and for a damaged file, which it does not replace.
    """

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        count: int | None = None,
        frames: tuple[int, int] = (30, 40),
        force: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"NBody: split must be one of {list(SPLITS)}, got {split!r}")
        self.frames = _checked_frames(frames)
        if len(self.frames) != 2:
            raise ValueError(f"NBody: frames must be (input, target), got {frames}")
        part = SPLITS[split]
        size = part.stop - part.start
        if not (count is None or 1 <= count <= size):
            raise ValueError(f"NBody: count must be in 1..{size} for split {split!r}, got {count}")
        part = slice(part.start, part.start + (count or size))
        folder = cache_dir() / "nbody" if root is None else Path(root)
        self.path = folder / "charged5-{}-{}.npz".format(*self.frames)
        total = max(s.stop for s in SPLITS.values())
        about = {"seed": SEED, "count": total, "frames": self.frames, "dt": DT}
        if force or not self.path.exists():
            save_arrays(self.path, _generate(total, self.frames), about)
        points = (total, BODIES, 3)
        arrays, _ = load_arrays(
            self.path,
            {"charges": (total, BODIES), "positions": points, "velocities": points, "target": points},
            about,
            mend="delete the file or run `probsym data get nbody --force`",
        )
        self.positions, self.velocities, self.charges, self.target = (
            torch.from_numpy(arrays[name][part].astype(np.float32))
            for name in ("positions", "velocities", "charges", "target")
        )

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.positions[index], self.velocities[index], self.charges[index], self.target[index]

    def constant_velocity(self) -> Tensor:
        """The simplest prediction: positions + time between the frames * velocities, (M, n, 3) float32.

        Its mean squared error on the test split is 0.109 (0.108 on the published file).
        """
        start, end = self.frames
        return self.positions + (end - start) * STEPS_PER_FRAME * DT * self.velocities


def _generate(total: int, frames: tuple[int, int]) -> dict[str, np.ndarray]:
    steps = total * STEPS_PER_FRAME * (max(frames) + 1)
    with announced(f"n-body: simulating {total} trajectories up to frame {max(frames)}", steps) as advance:
        charges, positions, velocities = initial_conditions(total)
        kept = simulate(charges, positions, velocities, frames, advance=advance)
        (x, target), (v, _) = (a.astype(np.float32).swapaxes(0, 1) for a in kept)
    return {"charges": charges.astype(np.int8), "positions": x, "velocities": v, "target": target}


def _checked_frames(frames: Sequence[int]) -> tuple[int, ...]:
    frames = tuple(frames)
    if not frames or len(set(frames)) < len(frames) or not set(frames) <= set(range(FRAMES)):
        raise ValueError(f"frames must be distinct numbers in 0..{FRAMES - 1}, got {frames}")
    return tuple(int(frame) for frame in frames)


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
