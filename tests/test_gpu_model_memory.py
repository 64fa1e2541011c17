"""What the model of the GPU kernels says of memory: conflicts of banks, coalescing, masks, and how long a warp waits."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_model import sass, source
from benchmarks.gpu_model.counts import executed
from benchmarks.gpu_model.lanes import Warps, width
from benchmarks.gpu_model.latency import ARITHMETIC, SIGNALLED, WAIT, latency, registers

HEAD = """
	.file	1 "/a/kernel.py"
	.loc	1 10 0
	mov.u32 	%r1, %tid.x;
	ld.param.b32 	%r2, [_kernel_param_1];
	ld.param.b64 	%rd1, [_kernel_param_0];
"""


def of(ptx: str, threads: int = 32, number: int = 64) -> list[tuple[float, float]]:
    """Passes and bytes of each access. The kernel has a pointer and a number."""
    found = Warps(HEAD + ptx, threads, {"p_x": None, "n": number})
    return [one.cost(one.bits) for one in found.accesses]


@pytest.mark.parametrize(
    ("address", "access", "passes"),
    [
        ("shl.b32 %r3, %r1, 2;", "ld.shared.b32 %r9, [%r3];", 1),
        ("shl.b32 %r3, %r1, 3;", "ld.shared.b32 %r9, [%r3+4];", 2),
        ("shl.b32 %r3, %r1, 7;", "st.shared::cta.b32 [ %r3 + 0 ], %r9;", 32),
        ("mul.lo.s32 %r3, %r1, 132;", "ld.shared.b32 %r9, [%r3];", 1),
        ("and.b32 %r3, %r1, 0;", "ld.shared.b32 %r9, [%r3];", 1),
        ("shl.b32 %r3, %r1, 4;", "ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r3];", 4),
        ("shl.b32 %r3, %r1, 7;", "ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r3];", 32),
        ("shl.b32 %r3, %r1, 3;", "ld.shared.v2.b32 {%r8, %r9}, [%r3];", 2),
        ("shl.b32 %r3, %r1, 7;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r3];", 32),
        (
            "shl.b32 %r4, %r1, 7; and.b32 %r5, %r1, 7; shl.b32 %r6, %r5, 4; xor.b32 %r3, %r4, %r6;",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r3];",
            4,
        ),
    ],
)
def test_passes_through_the_banks(address, access, passes):
    """Words of one bank go one after the other, equal words together; a swizzle takes the conflicts away."""
    lines = "\n".join(f"\t{line.strip()};" for line in (address + access).split(";") if line.strip())
    assert of(lines) == [(passes, 0.0)]


def test_accesses_that_became_one_are_counted_at_their_width():
    """Four words of a thread at a stride of 64 bytes: 16 passes each, or 16 for all of them at once."""
    found = Warps(HEAD + "\tshl.b32 %r3, %r1, 6;\n\tld.shared.b32 %r9, [%r3];\n", 32, {"p_x": None, "n": 0})
    (one,) = found.accesses
    assert one.cost(32) == (16, 0) and one.cost(128) == (16, 0)


@pytest.mark.parametrize(
    ("stride", "access", "passes", "sectors"),
    [
        (4, "ld.global.b32 %r9, [%rd3];", 1, 4),
        (8, "ld.global.b32 %r9, [%rd3];", 2, 8),
        (256, "ld.global.b32 %r9, [%rd3];", 32, 32),
        (16, "st.global.v4.b32 [ %rd3 + 0 ], { %r6, %r7, %r8, %r9 };", 4, 16),
        (0, "ld.global.b32 %r9, [%rd3];", 1, 1),
        (2, "ld.global.b16 %rs1, [%rd3];", 1, 2),
    ],
)
def test_lines_and_sectors_of_global_memory(stride, access, passes, sectors):
    address = f"\tmul.wide.s32 %rd2, %r1, {stride};\n\tadd.s64 %rd3, %rd1, %rd2;\n"
    assert of(f"{address}\t{access}\n", threads=64) == [(passes, 32.0 * sectors)]


def test_threads_that_a_mask_leaves_out():
    """By the arguments of the launch. A condition on a loaded number holds, and so does one that holds in no thread."""
    rows = "\tmul.wide.s32 %rd2, %r1, 256;\n\tadd.s64 %rd3, %rd1, %rd2;\n"
    masked = rows + "\tsetp.lt.s32 %p1, %r1, %r2;\n\t@%p1 ld.global.b32 %r9, [%rd3];\n"
    assert [of(masked, number=n)[0][0] for n in (64, 10, 0)] == [32, 10, 32]
    assert of(masked, threads=64, number=40)[0][0] == 20  # one warp whole, of the other a quarter
    loaded = rows + "\tld.global.b32 %r4, [%rd1];\n\tsetp.lt.s32 %p1, %r1, %r4;\n\t@%p1 ld.global.b32 %r9, [%rd3];\n"
    assert [x[0] for x in of(loaded)] == [1, 32]


def test_rows_that_are_looked_up():
    """row = list[thread / 8]: each its own line. What depends on numbers in shared memory is not known."""
    found = """
	shr.u32 %r3, %r1, 3;
	mul.wide.u32 %rd2, %r3, 4;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b32 %r4, [%rd3];
	mul.wide.s32 %rd4, %r4, 4096;
	and.b32 %r5, %r1, 7;
	mul.wide.u32 %rd5, %r5, 16;
	add.s64 %rd6, %rd4, %rd5;
	ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd6];
"""
    assert of(found) == [(1, 32.0), (4, 512.0)]
    unknown = "\tshl.b32 %r3, %r1, 2;\n\tld.shared.b32 %r4, [%r3];\n\tld.shared.b32 %r5, [%r4];\n"
    assert of(unknown) == [(1, 0.0)]


def test_division_and_products_are_computed():
    """As a compiler writes t / 12 and t % 12."""
    found = """
	mul.hi.u32 %r3, %r1, 715827883;
	shr.u32 %r4, %r3, 1;
	mul.lo.s32 %r5, %r4, 12;
	sub.s32 %r6, %r1, %r5;
	mad.lo.s32 %r7, %r4, 1024, %r6;
	mul.wide.s32 %rd2, %r7, 4;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b32 %r9, [%rd3];
	div.s32 %r10, %r1, %r2;
	rem.s32 %r11, %r1, %r2;
	shl.b32 %r12, %r10, 7;
	shl.b32 %r13, %r11, 2;
	add.s32 %r14, %r12, %r13;
	ld.shared.b32 %r15, [%r14];
"""
    # rows of 12, 12 and 8: 2 sectors, 2 and 1; of the second in rows of 8 words, 4 deep
    assert of(found, number=8) == [(3, 160.0), (4, 0.0)]


CODE = """
.text._kernel:
	//## File "/a/kernel.py", line 10
        /*0000*/                   LDG.E R2, desc[UR4][R0.64] ;
        /*0010*/                   LDG.E R4, desc[UR4][{address}] ;
.L_x_0:
	//## File "/a/kernel.py", line 14
        /*0020*/                   FFMA R9, {factor}, R8, R9 ;
        /*0030*/                   LDS R10, [R11] ;
	//## File "/a/kernel.py", line 13
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   FADD R9, R9, R4 ;
        /*0060*/                   EXIT ;
"""


def alone(turns: float, address: str = "R0.64", factor: str = "R8") -> float:
    code = sass.parse(CODE.format(address=address, factor=factor))["_kernel"]
    return latency(code, {id(code.loops[0]): turns}, None, 1.0)


def test_a_warp_alone_waits_for_what_it_reads():
    """Loads beside each other once, a chain of two twice; each turn of a loop for the sum of the one before."""
    assert WAIT < alone(1) < WAIT + 20 and 2 * WAIT < alone(1, address="R2.64") < 2 * WAIT + 20
    assert alone(2001) - alone(1001) == 1000 * ARITHMETIC  # the sum of the turn before ...
    assert alone(201, factor="R10") - alone(101, factor="R10") == 100 * (SIGNALLED + 1)  # ... or its shared memory


def test_registers_of_instructions():
    code = sass.parse(CODE.format(address="R2.64", factor="R8"))["_kernel"]
    assert registers(code.instructions[1]) == (["R4"], ["UR4", "R2", "R3"])
    wide = sass.Instruction(0, "LDG.E.128", "R4, desc[UR4][R2.64]", "@!P0", ())
    assert registers(wide) == (["R4", "R5", "R6", "R7"], ["P0", "UR4", "R2", "R3"])
    compared = sass.Instruction(0, "ISETP.GE.AND", "P1, PT, R4, R5, P2", "", ())
    assert registers(compared) == (["P1"], ["R4", "R5", "P2"])
    assert registers(sass.Instruction(0, "STG.E", "desc[UR4][R2.64], R9", "", ()))[0] == []
    assert [width(sass.Instruction(0, x, "", "", ())) for x in ("LDSM.16.M88.4", "LDS.U16", "STS.64")] == [128, 16, 64]


def test_conflicts_and_part_full_blocks_are_counted():
    """Passes in place of lines, by source line; of a block that is a quarter full a quarter of the accesses."""
    ptx = (
        HEAD
        + """
	shl.b32 %r3, %r1, 5;
$L__BB0_1:
	.loc	1 14 3
	ld.shared.b32 %r10, [%r3];
	fma.rn.f32 %f1, %f2, %f2, %f1;
	.loc	1 13 5
	@%p1 bra 	$L__BB0_1;
"""
    )
    code = sass.parse(CODE.format(address="R0.64", factor="R8"))["_kernel"]
    counted = source._per(10, 4, 10)
    assert (counted, counted.full, (counted * 0.5).full) == (1, 0.25, 0.25)
    for full in (1.0, counted.full):
        turns = {("kernel.py", 13): source.SourceLoop("kernel.py", 13, 14, "range(n)", 5.0, full)}
        found = executed(code, ptx, turns, Warps(ptx, 32, {"p_x": None, "n": 0}))
        assert found.lines == 2 + 5 * 8 * full and found.instructions == 4 + 5 * 3


def test_what_matrix_instructions_read():
    """Of 9.0: both factors from shared memory, or the left one from registers."""
    both = sass.Instruction(0, "HGMMA.64x64x8.F32.TF32", "R24, gdesc[UR4], R24, gsb0", "", ())
    left = sass.Instruction(0, "HGMMA.64x64x8.F32.TF32", "R24, R4, gdesc[UR4], R24", "", ())
    assert sass.operand_bytes(left) * 4 == 64 * 8 * 4 and sass.operand_bytes(both) * 4 == 2 * 64 * 8 * 4
    assert sass.operand_bytes(sass.Instruction(0, "FFMA", "R1, R2, R3, R4", "", ())) == 0
