"""Random numbers from a counter: a number depends on (seed, stream, row, sample, place) alone, not on what was drawn before.

So a sample's noise is the same whether the samples are drawn together or in chunks, on any device.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # odd, bits without pattern
MASK = 2**64 - 1
KINDS = "independent", "antithetic", "stratified"


class Draws:
    """The noise of one forward pass: samples `first`, `first + 1`, ... of the seed.

    generator: the seed is drawn from it (None: torch's global generator; one of a GPU is waited for). seed: given instead.
    Where operations are recorded (torch.compile, a CUDA graph) a seed that is drawn stays a tensor, so that every run of the
    recording draws its own: by the generator, else on `device`, since a CUDA graph takes in nothing of the CPU.

    kind: "independent" samples; "antithetic": samples 2k and 2k + 1 mirror each other, z and -z, u and 1 - u, and uniform
    elements of O(d) and SO(d) g and a partner; "stratified": the same, but these elements run through the signs of the axes,
    2^d or 2^(d - 1) samples in turn. A sample alone is distributed as ever, so that no expectation changes; a mean over all
    of a block varies less where what is averaged is odd in the noise, and more where it is even.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        *,
        seed: int | Tensor | None = None,
        first: int = 0,
        kind: str = "independent",
        device: torch.device | str | None = None,
    ):
        check_kind("Draws", kind)
        if seed is None:
            recorded = _recorded()
            if generator is not None or not recorded:
                device = None if generator is None else generator.device
            elif device is None and not torch.compiler.is_compiling():
                device = "cuda"
            seed = torch.randint(2**62, (), generator=generator, device=device)
            seed = seed if recorded else int(seed)
        self.seed, self.first, self.kind = seed, first, kind

    def __repr__(self) -> str:
        kind = "" if self.kind == "independent" else f", kind={self.kind!r}"
        return f"Draws(seed={self.seed}, first={self.first}{kind})"

    def starting(self, first: int) -> Draws:
        """The same numbers from another sample on: of a later chunk."""
        return Draws(seed=self.seed, first=first, kind=self.kind)

    def seeded(self, seed: int) -> Draws:
        """The same samples and kind with numbers of another seed."""
        return Draws(seed=seed, first=self.first, kind=self.kind)

    def fork(self, number: int) -> Draws:
        """Other, independent numbers."""
        seed = self.seed + (_signed(GOLDEN * (number + 1)) if isinstance(self.seed, Tensor) else GOLDEN * (number + 1))
        return self.seeded(_shift(_mix(seed), 2) if isinstance(seed, Tensor) else _mix_int(seed) >> 2)

    def place(self, samples: int, block: int, device: torch.device | str = "cpu") -> Tensor:
        """(samples,) int64: where in its block of so many each sample stands."""
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

        stream: a name for the purpose; other names, other numbers. rows: (shape[0],) int64 that name the rows in place of
        0, 1, ... . block: so many samples in turn get the same numbers; None: as the kind says, mirrored or one by one.
        """
        bits = self._bits(shape, stream, rows, device, block)
        if self._mirrored(block):
            odd = self.place(shape[1], 2, device).view(-1, *[1] * (len(shape) - 2)).bool()
            bits = torch.where(odd, 2**32 - 1 - bits, bits)
        return bits.double().mul_(2.0**-32)

    def normal(self, shape: tuple[int, ...], stream: str, *, block: int | None = None, **where) -> Tensor:
        """N(0, 1) of shape (rows, S, ...), float64 (Box and Muller's pair of uniforms); arguments as of `uniform`."""
        mirrored = self._mirrored(block)
        where["block"] = 2 if mirrored else block or 1
        radius = self.uniform(shape, stream + "/radius", **where)
        angle = self.uniform(shape, stream + "/angle", **where)
        z = radius.neg_().log1p_().mul_(-2).sqrt_().mul_(angle.mul_(2 * math.pi).cos_())
        if mirrored:
            sign = 1 - 2 * self.place(shape[1], 2, z.device)
            z.mul_(sign.view(-1, *[1] * (len(shape) - 2)))
        return z

    def _mirrored(self, block: int | None) -> bool:
        return block is None and self.kind != "independent"

    def _bits(
        self, shape: tuple[int, ...], stream: str, rows: Tensor | None, device: torch.device | str, block: int | None
    ) -> Tensor:
        """int64 of 32 random bits."""
        count, samples, *rest = shape
        purpose, seed = _purpose(stream), self.seed
        start = _mix(seed.to(device) ^ purpose) if isinstance(seed, Tensor) else _signed(_mix_int(seed ^ purpose))
        row = torch.arange(count, device=device) if rows is None else rows.to(device)
        sample = torch.arange(self.first, self.first + samples, device=device)
        if (size := 2 if self._mirrored(block) else block or 1) > 1:
            sample = sample // size
        key = _mix(_mix(start + row * _signed(GOLDEN))[:, None] + sample * _signed(GOLDEN))
        place = torch.arange(1, math.prod(rest) + 1, device=device) * _signed(GOLDEN)
        return _shift(_mix(key[..., None] + place), 32).reshape(shape)


def check_kind(owner: str, kind: str, name: str = "kind") -> None:
    """ValueError unless the argument `name` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{owner}: {name} must be one of {KINDS}, got {kind!r}")


def _recorded() -> bool:
    """Whether operations are recorded rather than run once."""
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@torch.compiler.assume_constant_result
def _purpose(stream: str) -> int:
    return _signed(_mix_int(zlib.crc32(stream.encode()) * GOLDEN))


def _signed(x: int) -> int:
    """The int64 with the same bits."""
    x &= MASK
    return x - 2**64 if x >= 2**63 else x


def _mix_int(x: int) -> int:
    """Every bit of the result depends on every bit of x (the finalizer of SplitMix64, Steele et al. 2014)."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def _mix(x: Tensor) -> Tensor:
    """`_mix_int` of int64 tensors; products wrap."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_signed(0xBF58476D1CE4E5B9))  # in place: memory is most of the time
    x = x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits without its sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
