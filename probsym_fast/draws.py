"""Counter-based random numbers: each depends only on (seed, stream, row, sample, place), not on earlier draws.

So a sample's noise is the same for any chunking of the samples and on any device.
"""

from __future__ import annotations

import operator

import numpy
import torch
from torch import Tensor

from probsym_fast._checks import check_count, check_type, transformed
from probsym_fast.ops import noise

KINDS = "independent", "antithetic", "stratified"


class Draws:
    """The noise of one forward pass: samples `first`, `first + 1`, ... of the seed.

    generator: source of the seed, a torch.Generator or NumPy's; None: torch's global generator. A GPU's generator waits for
    the GPU. seed: given instead, an int (also NumPy's) of 64 bits or a () int64 tensor. Where operations are recorded
    (torch.compile, torch.export, a CUDA graph) every run of the recording draws its own numbers: from the seed tensor, else
    from torch's global generator, on `device`.

    kind: "independent" samples. "antithetic": samples 2k and 2k + 1 mirror each other: z and -z, u and 1 - u, and for
    uniform elements of O(d) and SO(d) g and a partner. "stratified": the same, but these elements run through the signs of
    the axes, 2^d or 2^(d - 1) consecutive samples. Each single sample keeps its distribution, so no expectation changes. A
    mean over whole blocks has less variance for functions that are odd in the noise, and more for even ones.

    Raises TypeError for another seed or generator. ValueError for a seed of more than 64 bits, and for both together.
    RuntimeError for a generator where operations are recorded (pass a seed), and under torch.jit.trace, which would freeze
    the numbers (use torch.export). Under torch.vmap without a seed too, unless its randomness is "same" or "different".
    """

    def __init__(
        self,
        generator: torch.Generator | numpy.random.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        first: int = 0,
        kind: str = "independent",
        device: torch.device | str | None = None,
    ):
        check_kind("Draws", kind)
        if torch.jit.is_tracing():
            raise RuntimeError("Draws: torch.jit.trace would freeze the random numbers; use torch.export")
        if generator is not None and seed is not None:
            raise ValueError("Draws: either generator or seed must be None, got both")
        if seed is None:
            seed = _drawn_seed(generator, device)
        self.seed, self.kind = check_seed("Draws", "seed", seed), kind
        self.first = check_count("Draws", "first", first, least=0)
        self.forks: tuple[int, ...] = ()

    def __repr__(self) -> str:
        kind = "" if self.kind == "independent" else f", kind={self.kind!r}"
        forks = "".join(f".fork({k})" for k in self.forks)
        return f"Draws(seed={self.seed!r}, first={self.first}{kind}){forks}"

    def _with(self, forks: tuple[int, ...], **changes) -> Draws:
        draws = Draws(**{"seed": self.seed, "first": self.first, "kind": self.kind, **changes})
        draws.forks = forks
        return draws

    def starting(self, first: int) -> Draws:
        """The same numbers from sample `first` on, for a later chunk."""
        return self._with(self.forks, first=first)

    def seeded(self, seed: int | Tensor) -> Draws:
        """The same samples and kind, with the numbers of another seed."""
        return self._with((), seed=seed)

    def fork(self, number: int) -> Draws:
        """Other, independent numbers."""
        return self._with((*self.forks, number))

    def place(self, samples: int, block: int, device: torch.device | str = "cpu") -> Tensor:
        """(samples,) int64: the position of each sample in its block of `block` samples."""
        return torch.arange(self.first, self.first + samples, device=device) % block

    def uniform(
        self,
        shape: tuple[int, ...],
        stream: str,
        *,
        rows: Tensor | None = None,
        device: torch.device | str = "cpu",
        block: int | None = None,
    ) -> Tensor:
        """U[0, 1) of shape (rows, S, ...), float64 with 32 random bits.

        stream: name of the purpose; another name gives other numbers. rows: (shape[0],) int64 keys of the rows in place
        of 0, 1, ... . block: number of consecutive samples that share their numbers; None: as the kind says, mirrored
        or one by one.
        """
        return self._noise(shape, stream, rows, device, block, normal=False)

    def normal(
        self,
        shape: tuple[int, ...],
        stream: str,
        *,
        rows: Tensor | None = None,
        device: torch.device | str = "cpu",
        block: int | None = None,
    ) -> Tensor:
        """N(0, 1) of shape (rows, S, ...), float64; arguments as in `uniform`."""
        return self._noise(shape, stream, rows, device, block, normal=True)

    def _noise(self, shape, stream, rows, device, block, *, normal: bool) -> Tensor:
        check_type("Draws", "stream", stream, str, "a str")
        check_type("Draws", "rows", rows, Tensor | None, "a Tensor or None")
        device = torch.device(device)
        if isinstance(self.seed, Tensor):
            seed = self.seed.to(device)
        else:  # a fill: a copy would wait for the GPU
            seed = torch.full((), self.seed, dtype=torch.int64, device=device)
        mirrored = block is None and self.kind != "independent"
        return noise(
            seed,
            shape,
            stream,
            normal=normal,
            rows=None if rows is None else rows.to(device),
            first=self.first,
            forks=self.forks,
            block=2 if mirrored else 1 if block is None else block,
            mirrored=mirrored,
        )


def check_kind(owner: str, kind: str, name: str = "kind") -> None:
    """ValueError unless the argument `name` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{owner}: {name} must be one of {KINDS}, got {kind!r}")


def _drawn_seed(
    generator: torch.Generator | numpy.random.Generator | None, device: torch.device | str | None
) -> int | Tensor:
    """62 random bits. Where operations are recorded, a tensor on the device that every run draws again."""
    if not isinstance(generator, torch.Generator | numpy.random.Generator | None):
        raise TypeError(f"Draws: generator must be torch's or numpy's Generator, got {type(generator).__name__}")
    compiling = torch.compiler.is_compiling()
    if generator is not None and (compiling or (isinstance(generator, numpy.random.Generator) and _capturing())):
        raise RuntimeError("Draws: a generator cannot be recorded; pass seed=, an int or a () int64 tensor")
    if isinstance(generator, numpy.random.Generator):
        return int(generator.integers(2**62))
    if compiling:
        return torch.randint(2**62, (), device=device)
    if transformed():  # vmap may ask for a different seed per example
        try:
            where = device if generator is None else generator.device
            return torch.randint(2**62, (), generator=generator, device=where)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise RuntimeError(
                'Draws: vmap must have randomness "same" or "different", or a seed, got neither'
            ) from error
    if not _capturing():
        return int(
            torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device)
        )
    device = "cuda" if generator is None else generator.device
    return torch.randint(2**62, (), generator=generator, device=device)  # the capture registers the GPU's generators


def check_seed(owner: str, name: str, seed: int | Tensor) -> int | Tensor:
    """A seed as the int64 with its bits, or the () tensor itself.

    Raises TypeError for other types, ValueError for an int of more than 64 bits and for a tensor of another shape.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{owner}: {name} must be an int or a () int64 Tensor, got {seed.dtype}")
        if seed.ndim != 0:
            raise ValueError(f"{owner}: {name} must be an int or a () int64 Tensor, got shape {tuple(seed.shape)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | numpy.integer | torch.SymInt):
        kind = type(seed).__name__
        got = (
            kind if torch.compiler.is_compiling() else f"{kind} {seed!r}"
        )  # a compiler cannot print a value of NumPy's
        raise TypeError(f"{owner}: {name} must be an int or a () int64 Tensor, got {got}")
    if isinstance(seed, numpy.integer):  # index() of a SymInt would fix a compiled program to this seed
        seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{owner}: {name} must be an int of 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class RandomState:
    """Snapshot of the global random state of the CPU and a device; `restore` brings it back."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


def seed_generators(seed: int) -> None:
    """torch.manual_seed for the CPU and for GPUs in use.

    With CUDA built but not in use, torch's own function formats the caller's stack at every call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def seeded(seed: int, purpose: str, step: int) -> torch.Generator:
    """A generator for one draw: the same (seed, purpose, step) gives the same noise, independent of earlier draws.

    It is on the CPU: of a generator on a GPU `Draws` reads a seed, for which the host waits.
    """
    mixed = seed
    for part in (*purpose.encode(), step):
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)
