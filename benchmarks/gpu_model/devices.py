"""Published figures of one GPU of each architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Rates are dense and per second; those of a processor (SM) per clock cycle."""

    name: str
    source: str  # of its figures
    processors: int
    clock: float  # boost, Hz
    bandwidth: float  # bytes
    float32: float  # operations
    tf32: float
    half: float  # bfloat16 and float16, sums in float32
    float64_lanes: int  # of a processor
    float32_lanes: int
    warps: int  # that a processor holds at most
    blocks: int
    shared: int  # bytes of shared memory of a processor
    second_cache: int  # bytes a cycle that its L2 gives
    synchronous: float = 1.0  # share of the rate of matrix instructions that mma.sync reaches

    def rate(self, kind: str) -> float:
        return {"float32": self.float32, "tf32": self.tf32, "half": self.half, "float64": self._float64}[kind]

    def lanes(self, unit: str) -> int:
        """Threads a cycle of a processor's unit, as `counts.UNITS` names it."""
        return {"integer": 64, "special": 16, "multiply": self.float32_lanes, "float64": self.float64_lanes}[unit]

    @property
    def _float64(self) -> float:
        return 2 * self.float64_lanes * self.processors * self.clock


REGISTERS, RESERVED = 65_536, 1024  # of a processor; bytes of shared memory that a block takes for itself
GUIDE = "limits of a processor: CUDA C++ Programming Guide 13, compute capabilities"
# Bytes a cycle, of the Ampere architecture white paper. NVIDIA names none for the later ones: taken to be as many, of B200
# for each of its two dies.
SECOND_CACHE = 5120
SYNCHRONOUS = 0.62  # of the rate of wgmma on 9.0: Luo et al., arXiv 2402.13499
DEVICES = {
    80: Device(
        "A100 SXM 80 GB", "NVIDIA A100 data sheet (2021) and Ampere architecture white paper",
        108, 1.41e9, 2.039e12, 19.5e12, 156e12, 312e12, 32, 64, 64, 32, 164 << 10, SECOND_CACHE,
    ),
    90: Device(
        "H100 SXM", "NVIDIA H100 data sheet and Hopper architecture white paper",
        132, 1.98e9, 3.35e12, 66.9e12, 494.7e12, 989.4e12, 64, 128, 64, 32, 228 << 10, SECOND_CACHE, SYNCHRONOUS,
    ),
    100: Device(
        "B200", "NVIDIA HGX B200 data sheet (per GPU); 148 processors as the driver reports them",
        148, 1.98e9, 8.0e12, 75e12, 1.1e15, 2.25e15, 64, 128, 64, 32, 228 << 10, 2 * SECOND_CACHE,
    ),
    120: Device(
        "RTX 5090", "NVIDIA RTX Blackwell architecture white paper",
        170, 2.407e9, 1.792e12, 104.8e12, 104.8e12, 209.5e12, 2, 128, 48, 24, 100 << 10, SECOND_CACHE,
    ),
}  # fmt: skip


def resident(device: Device, registers: int, warps: int, shared: int) -> int:
    """Blocks that a processor holds at a time. shared: bytes of a block, without those that it takes for itself."""
    of_a_warp = -(-32 * max(1, registers) // 256) * 256  # registers come in these units
    by_registers = REGISTERS // of_a_warp // 4 * 4 // warps if warps >= 4 else REGISTERS // of_a_warp // warps
    of_a_block = -(-(shared + RESERVED) // 128) * 128
    return max(1, min(by_registers, device.warps // warps, device.blocks, device.shared // of_a_block))
