"""Conformations of molecules with energies and forces by GFN2-xTB (Bannwarth et al. 2019, doi 10.1021/acs.jctc.8b01176).

Two kinds: molecular dynamics of one molecule (`dynamics`), and displaced geometries of the 162 molecules of the G2 set (`g2`;
Curtiss et al. 1997, doi 10.1063/1.473182; geometries of ase). Energies in eV, positions in Å, forces in eV/Å.
Needs tblite and ase, the extra `molecules`, to make a set; not to read one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from probsym_fast._progress import announced
from probsym_fast.data._store import cache_dir, load_arrays, save_arrays
from probsym_fast.data.geometries import GEOMETRIES, geometry

COUNTS = {"train": 1000, "valid": 200, "test": 500}  # frames of a molecule
DISPLACED = {"train": 8, "valid": 1, "test": 2}  # geometries of each G2 molecule
NOISE = 0.05  # Å, standard deviation of each coordinate's displacement (G2)
TEMPERATURE = 500.0  # K, as in MD17 (Chmiela et al. 2017): wide enough to leave the harmonic region
STEP = 0.5  # fs
FRICTION = 0.01  # 1/fs: velocities forget in 100 fs
STRIDE = 20  # steps between frames
WARMUP = 400  # steps before the first frame of a run
RUN = 50  # frames of one run, which starts from the minimum with its own velocities and noise
METHOD = "GFN2-xTB"

Frame = tuple[np.ndarray, np.ndarray, float, np.ndarray]  # numbers (n,), positions (n, 3), energy, forces (n, 3)


class Conformations(Dataset):
    """M conformations of up to n atoms, in float64 on the CPU.

    numbers: (M, n) int64 atomic numbers, 0 for padding. positions: (M, n, 3), energies: (M,), forces: (M, n, 3).
    num_nodes: (M,) int64, atoms of each. An index (number, slice or index tensor) gives these five, in this order.
    """

    def __init__(self, numbers: Tensor, positions: Tensor, energies: Tensor, forces: Tensor):
        self.numbers, self.positions, self.energies, self.forces = numbers, positions, energies, forces
        self.num_nodes = (numbers > 0).sum(1)

    def __len__(self) -> int:
        return len(self.energies)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        values = self.numbers, self.positions, self.energies, self.forces, self.num_nodes
        return tuple(x[index] for x in values)  # type: ignore[return-value]


def dynamics(
    molecule: str,
    split: str = "train",
    count: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    force: bool = False,
) -> Conformations:
    """Frames of molecular dynamics, simulated at first use and kept in a file.

    Langevin dynamics at 500 K with steps of 0.5 fs and friction 0.01 / fs; a frame every 10 fs. Frames come in runs of 50.
    Each run starts at the minimum, turned at random, with velocities from the Maxwell distribution, and warms up for
    200 fs. Splits share no run. On one core a step takes 4 ms (ethanol) to 10 ms (aspirin).

    Args:
        molecule: "ethanol" (9 atoms), "aspirin" (21) or "alanine_dipeptide" (22).
        split: "train", "valid" or "test".
        count: number of frames; None: 1,000, 200 and 500. Fewer frames are the first of more.
        seed: 0 to 2^32 - 1. A run depends only on (seed, split, run), so on one machine with one thread (OMP_NUM_THREADS=1)
            it repeats; elsewhere rounding errors grow.
        root: folder of the file; by default `cache_dir()/dynamics`.
        force: simulate again even if the file exists.

    A stopped simulation continues with the run that it was in. Raises ValueError for wrong arguments and for a damaged file,
    ModuleNotFoundError without tblite or ase.
    """
    if molecule not in GEOMETRIES:
        raise ValueError(f"dynamics: molecule must be one of {', '.join(GEOMETRIES)}, got {molecule!r}")
    count = _checked("dynamics", split, count, COUNTS[split] if split in COUNTS else 0, seed)
    settings = {"temperature": TEMPERATURE, "step": STEP, "friction": FRICTION, "stride": STRIDE, "warmup": WARMUP}
    about = {"set": f"md_{molecule}", "split": split, "count": count, "seed": seed, "method": METHOD, **settings}
    path = (cache_dir() / "dynamics" if root is None else Path(root)) / f"{molecule}-{split}-{count}-seed{seed}.npz"
    lengths = [min(RUN, count - first) for first in range(0, count, RUN)]

    def part(number: int, advance: Callable[[int], object]) -> list[Frame]:
        return list(simulate(molecule, _random(seed, split, number), lengths[number], advance))

    steps = sum(WARMUP + STRIDE * length for length in lengths)
    text = f"md_{molecule}: {count} frames ({split})"
    return _made(path, about, text, len(lengths), steps, part, count, force)


def g2(
    split: str = "train", count: int | None = None, seed: int = 0, root: str | Path | None = None, force: bool = False
) -> Conformations:
    """The 162 molecules of G2, 1 to 14 atoms of 14 elements, each with displaced geometries (seconds to make).

    Every coordinate is displaced by a normal number of 0.05 Å, since at the minimum all forces would vanish; then the
    molecule is turned at random. The spin is that of the set.

    split: "train", "valid" or "test": 8, 1 and 2 geometries of each molecule. count: another number of geometries of each.
    seed, root, force and errors: as for `dynamics`.
    """
    count = _checked("g2", split, count, DISPLACED[split] if split in DISPLACED else 0, seed)
    about = {"set": "g2", "split": split, "count": count, "seed": seed, "method": METHOD, "noise": NOISE}
    path = (cache_dir() / "g2" if root is None else Path(root)) / f"g2-{split}-{count}-seed{seed}.npz"

    def part(number: int, advance: Callable[[int], object]) -> list[Frame]:
        random, (ase, TBLite) = _random(seed, split, number), _tools()
        frames = []
        for name in ase.collections.g2.names:
            atoms = ase.collections.g2[name]
            spin = round(abs(float(atoms.get_initial_magnetic_moments().sum())))
            atoms.calc = TBLite(method=METHOD, multiplicity=spin + 1, verbosity=0)
            displaced = atoms.positions + NOISE * random.standard_normal(atoms.positions.shape)
            atoms.positions = (displaced - displaced.mean(0)) @ _rotation(random)
            frames.append(_frame(atoms))
            advance(1)
        return frames

    text = f"g2: {count} displaced geometries of 162 molecules ({split})"
    return _made(path, about, text, count, 162 * count, part, 162 * count, force)


def simulate(
    molecule: str, random: np.random.RandomState, frames: int, advance: Callable[[int], object] = int
) -> Iterator[Frame]:
    """The frames of one run. advance: called with the number of steps done."""
    (ase, TBLite), (symbols, start) = _tools(), geometry(molecule)
    atoms = ase.Atoms(symbols, np.array(start) @ _rotation(random))
    atoms.calc = TBLite(method=METHOD, verbosity=0)
    fs, masses = ase.units.fs, atoms.get_masses()[:, None]
    atoms.set_momenta(random.standard_normal((len(atoms), 3)) * np.sqrt(masses * ase.units.kB * TEMPERATURE))
    langevin = ase.md.langevin.Langevin(
        atoms, STEP * fs, temperature_K=TEMPERATURE, friction=FRICTION / fs, fixcm=False, rng=random
    )
    langevin.run(WARMUP)
    advance(WARMUP)
    for _ in range(frames):
        langevin.run(STRIDE)
        advance(STRIDE)
        yield _frame(atoms)


def _frame(atoms: Any) -> Frame:
    positions = atoms.positions - atoms.positions.mean(0)
    return atoms.numbers.copy(), positions, float(atoms.get_potential_energy()), atoms.get_forces().copy()


def _rotation(random: np.random.RandomState) -> np.ndarray:
    """Uniform in SO(3), from a unit quaternion."""
    q = random.standard_normal(4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _random(seed: int, split: str, number: int) -> np.random.RandomState:
    return np.random.RandomState((seed, list(COUNTS).index(split), number))


def _made(
    path: Path,
    about: dict[str, Any],
    text: str,
    parts: int,
    work: int,
    part: Callable[[int, Callable[[int], object]], list[Frame]],
    count: int,
    force: bool,
) -> Conformations:
    """The set in the file, which is made part by part if it is missing; finished parts are kept next to it."""
    mend = f"delete the file or run `probsym data get {about['set']} --force`"
    if force or not path.exists():
        begun, done, frames = path.with_suffix(".part.npz"), 0, []
        if force:
            begun.unlink(missing_ok=True)
        if begun.exists():
            arrays, stored = load_arrays(begun, _shapes(None), about, mend=mend)
            done, frames = stored["parts"], list(zip(*(arrays[name] for name in _shapes(None)), strict=True))
        with announced(text, work) as advance:
            advance(work * done // parts)
            for number in range(done, parts):
                frames += part(number, advance)
                save_arrays(begun, _arrays(frames), {**about, "parts": number + 1})
        save_arrays(path, _arrays(frames), {**about, "tblite": _version()})
        begun.unlink(missing_ok=True)
    arrays, _ = load_arrays(path, _shapes(count), about, mend=mend)
    return Conformations(*(torch.from_numpy(arrays[name]) for name in _shapes(count)))


def _shapes(count: int | None) -> dict[str, tuple[int | None, ...]]:
    return {"numbers": (count, None), "positions": (count, None, 3), "energies": (count,), "forces": (count, None, 3)}


def _arrays(frames: list[Frame]) -> dict[str, np.ndarray]:
    """Frames padded to the largest molecule."""
    numbers, positions, energies, forces = zip(*frames, strict=True)
    n = max(map(len, numbers))

    def padded(values: Any) -> np.ndarray:
        return np.stack([np.pad(x, [(0, n - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in values])

    return {
        "numbers": padded(numbers).astype(np.int64),
        "positions": padded(positions),
        "energies": np.array(energies),
        "forces": padded(forces),
    }


def _checked(owner: str, split: str, count: int | None, default: int, seed: int) -> int:
    if split not in COUNTS:
        raise ValueError(f"{owner}: split must be one of {', '.join(COUNTS)}, got {split!r}")
    count = default if count is None else count
    if count < 1:
        raise ValueError(f"{owner}: count must be at least 1, got {count}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{owner}: seed must be in 0..2^32 - 1, got {seed}")
    return count


def _tools() -> tuple[Any, Any]:
    """The module ase with what is used of it, and tblite's calculator for it."""
    try:
        import ase.collections
        import ase.md.langevin
        import ase.units
        from tblite.ase import TBLite
    except ModuleNotFoundError as error:
        text = f'{error.name} is needed to make molecules: pip install "probsym_fast[molecules]"'
        raise ModuleNotFoundError(text, name=error.name) from None
    return ase, TBLite


def _version() -> str:
    from importlib.metadata import version

    return version("tblite")
