"""Offsets into tensors of more than 2^31 numbers take 64 bits, in the compiled address arithmetic of every kernel.

The PTX of each launch is evaluated for its last block, and in the last turn of each loop. Lists in memory hold what they may
hold at most. No number of 32 bits on the way to an address may have been too large for them.
"""

import pytest
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu_model import counts, source
from benchmarks.gpu_model.lanes import Warps
from benchmarks.gpu_model.launches import Launch, compiled
from benchmarks.gpu_model.record import recorded
from probsym_fast.ops.triton import KERNELS
from probsym_fast.ops.triton._launch import MOST
from tests.ops.triton.large import CALLS, IN_PARTS, SMALL

ONE_OF = {"permutation_entropy": "soft_permutation", "permute": "soft_permutation"}  # in the calls of others


def held(launch: Launch, pointer: str) -> int:
    """The largest number that a list holds: as `SMALL` says, else the largest count that is not refused."""
    found = SMALL.get(f"{launch.kernel}.{pointer}", SMALL.get(pointer))
    return MOST if found is None else found(launch.named)


def too_large(launch: Launch, ptx: str, warps: int) -> list[str]:
    """The lines of accesses whose offset has not fitted in 32 bits."""
    loops = source.loops(launch.function, launch.kernel, launch.named | {"launched": launch.grid})

    def turns(code, loop):
        known = loops.get(counts._source(code, loop, loops))
        return 1.0 if known is None or known.trips is None else known.trips

    grid = (*launch.grid, 1, 1)[:3]
    block = tuple(x - 1 for x in grid)
    found = Warps(ptx, 32 * warps, launch.numbers, block, grid, lambda pointer: held(launch, pointer), turns)
    assert any(x.pointer for x in found.accesses), launch.kernel
    return sorted({f"{x.frames[0][0]}:{x.frames[0][1]} {x.kind} {x.pointer}" for x in found.accesses if x.wrapped})


def launches(name: str) -> list[Launch]:
    """Of each compiled kernel the launch with the largest tensor."""
    every = [x for part in recorded(CALLS[name]) for x in part.steps if isinstance(x, Launch)]
    return list({x.key: x for x in sorted(every, key=largest)}.values())


def largest(launch: Launch) -> int:
    return max(x.numel() for x in launch.named.values() if isinstance(x, Tensor))


HEAD = """
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b32 	%r2, [_kernel_param_1];
	mov.u32 	%r3, %ctaid.x;
	mov.u32 	%r1, %tid.x;
"""
LOOP = """
	mov.b32 	%r4, 0;
$L__BB0_1:
	mul.wide.s32 	%rd2, %r4, 4;
	add.s64 	%rd3, %rd1, %rd2;
	ld.global.b32 	%r9, [%rd3];
	add.s32 	%r4, %r4, %r2;
	@%p1 bra 	$L__BB0_1;
"""
WIDE = "\tmul.wide.s32 %rd2, %r3, %r2;\n\tadd.s64 %rd3, %rd1, %rd2;\n\tld.global.b32 %r9, [%rd3];\n"
NARROW = "\tmad.lo.s32 %r4, %r3, %r2, %r1;\n\tmul.wide.s32 %rd2, %r4, 4;\n\tadd.s64 %rd3, %rd1, %rd2;\n"
READ = "\tld.global.b32 %r9, [%rd3];\n"
ROWS = "\tmul.lo.s32 %r6, %r3, %r2;\n\tmad.lo.s32 %r4, %r1, %r2, %r6;\n"
ROWS += "\tmul.wide.s32 %rd2, %r4, 4;\n\tadd.s64 %rd3, %rd1, %rd2;\n"
MASKED = ROWS + "\tsetp.lt.s32 %p2, %r1, 1;\n\t@%p2 ld.global.b32 %r9, [%rd3];\n"
LISTED = "\tld.global.b32 %r5, [%rd1];\n\tmul.lo.s32 %r4, %r5, %r2;\n\tadd.s32 %r4, %r4, %r3;\n"
LISTED += "\tcvt.s64.s32 %rd2, %r4;\n\tadd.s64 %rd3, %rd1, %rd2;\n\tst.global.b32 [%rd3], %r9;\n"


@pytest.mark.parametrize(
    ("code", "block", "turns", "wrapped"),
    [
        (WIDE, 2**22, 1, [False]),
        (NARROW + READ, 2**21 - 1, 1, [False]),  # the last number below 2^31
        (NARROW + READ, 2**21, 1, [True]),
        (ROWS + READ, 2**21 - 1, 1, [True]),  # the rows after that of the first thread
        (MASKED, 2**21 - 1, 1, [False]),  # only the first thread reads
        (LOOP, 0, 2**21 - 1, [False, False]),
        (LOOP, 0, 2**21 + 1, [False, True]),  # in its first turn, and in its last
        (LISTED, 0, 1, [False, True]),
    ],
)
def test_a_number_that_32_bits_do_not_hold_is_seen(code, block, turns, wrapped):
    """As a fault of a kernel would look: block times a row of 1024, the turns of a loop, a number in a list."""
    given = {"p_x": None, "row": 1024}
    found = Warps(HEAD + code, 32, given, (block,), (block + 1,), lambda pointer: 2**22, lambda code, loop: turns)
    assert [x.wrapped for x in found.accesses] == wrapped and {x.pointer for x in found.accesses} == {"p_x"}


def test_every_op_is_called():
    assert {ONE_OF.get(name, name) for name in KERNELS} == set(CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_offsets_of_large_tensors(name):
    faults, found = [], launches(name)
    for launch in found:
        made = compiled(launch, 90)
        faults += [f"{launch.kernel}: {x}" for x in too_large(launch, made.asm["ptx"], made.metadata.num_warps)]
    assert not faults, "\n".join(faults)
    assert max(map(largest, found)) > 2**31 or name in IN_PARTS
