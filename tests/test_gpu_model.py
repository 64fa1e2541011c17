"""The model of the GPU kernels: what it reads, counts and says, and that its check notices what has become worse."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_model import around, check, cuda, measured, sass, source, table
from benchmarks.gpu_model.cases import all_cases, zeros
from benchmarks.gpu_model.counts import KINDS, _turns, executed, iterations
from benchmarks.gpu_model.devices import DEVICES, resident
from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.record import Call, recorded
from probsym_fast import ops
from probsym_fast.ops import triton as triton_ops
from probsym_fast.ops.triton import KERNELS, act_orthogonal, linear_batch_norm_relu

KEPT = {"stack": 0, "load": 128, "store": 64, "iteration": [100.0, 40.0]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "rows.linear: 8 bytes of registers are spilled"),
        ({"load": 64}, "rows.linear: the widest load is 64 bits, was 128"),
        ({"store": 32}, "rows.linear: the widest store is 32 bits, was 64"),
        ({"iteration": [100.0, 45.0]}, "rows.linear: [100.0, 45.0] instructions an iteration, were [100.0, 40.0]"),
        ({"iteration": [111.0]}, "rows.linear: [111.0] instructions an iteration, were [100.0, 40.0]"),
        ({"iteration": [109.0, 40.0], "load": 128, "store": 128}, None),
    ],
)
def test_what_has_become_worse_is_said(change, said):
    """Spills and widths for every compiler, instructions for the one that the table was written with."""
    found = {"rows.linear": KEPT | change}
    assert check.worse(found, {"rows.linear": KEPT}, True) == ([said] if said else [])
    other = check.worse(found, {"rows.linear": KEPT}, False)
    assert other == ([said] if said and "iteration" not in change else [])


@pytest.mark.parametrize(
    ("branches", "said"),
    [([9, 0, 1], "[9, 0, 1]"), ([10, 0, 0], "[10, 0, 0]"), ([10], "[10]"), ([9, 0, 0], None), ([3], None)],
)
def test_branches_that_have_come_are_said(branches, said):
    """In any loop, for the same compiler; loops cannot be told apart where there are others."""
    before = {"SoftPermutation": KEPT | {"branches": [9, 0, 0]}}
    found = {"SoftPermutation": KEPT | {"branches": branches}}
    expected = [f"SoftPermutation: {said} branches in its loops, were [9, 0, 0]"] if said else []
    assert check.worse(found, before, True) == expected and check.worse(found, before, False) == []


@pytest.mark.skipif(cuda.version() is None, reason="no nvcc")
@pytest.mark.slow
def test_kernels_of_cuda_against_the_table():
    """Also: no branch of the sort of a row by one warp divides it, nor of its scans."""
    (version, before), now = check.kept_cuda(), check.checked_cuda(cuda.compiled())
    worse = check.worse(now, before, version == cuda.version())
    assert not worse, "\n".join(worse)
    assert now.keys() == before.keys()
    warps = [
        facts["branches"] for kernel, facts in now.items() if re.match(r"SoftPermutation<\w+, [12468], 0>", kernel)
    ]
    assert len(warps) == 10 and not any(any(inner) for _, *inner in warps)


def launched(types: dict[str, str], **named) -> Launch:
    function = SimpleNamespace(fn=SimpleNamespace(__module__="a.products"))
    return Launch(function, (types, {}, {}), {}, "multiply", (1,), named)


def test_what_a_launch_is_known_by():
    """Its narrowest floating point type and the constants that choose another loop; float16 is as bfloat16."""
    wide, half = {"p_x": "*fp32", "p_at": "*i64", "N": "i32"}, {"p_x": "*bf16", "p_y": "*fp32"}
    launches = [
        launched(wide, N=3),
        launched(wide, N=4),
        launched(wide, PRECISION="tf32", AXES=2, BLOCK=64),
        launched(half, PRECISION="tf32", AXES=2),
        launched(half, PRECISION="tf32", AXES=1),
        launched({"p_x": "*fp16", "p_y": "*fp32"}, AXES=1),
        launched({"p_at": "*i64"}),
    ]
    first = check.first(launches)
    assert first == {
        "products.multiply, fp32": launches[0],
        "products.multiply, fp32, PRECISION = tf32, AXES = 2": launches[2],
        "products.multiply, bf16, PRECISION = tf32, AXES = 2": launches[3],
        "products.multiply, bf16, PRECISION = tf32, AXES = 1": launches[4],
        "products.multiply": launches[6],
    }


def test_kernels_are_pinned_in_each_of_their_loops():
    """The products and their precisions, tokens of one axis and of two, both halves of the float types."""
    _, known = check.kept()
    for one in ("fp32, PRECISION = tf32x3", "fp32, PRECISION = tf32", "bf16, PRECISION = tf32"):
        assert f"products.multiply, {one}" in known
    assert {f"soft_rows.reduce_rows, fp32, AXES = {axes}" for axes in (1, 2)} <= known.keys()


def test_branches_of_loops_are_counted():
    text = LISTING.replace("STG.E.64 desc[UR4][R0.64], R8 ;", "BSSY B0, `(.L_x_0) ;")
    found = check.checked_cuda(sass.parse(text))
    assert found == {"_kernel": {"stack": 0, "load": 128, "store": 0, "iteration": [3.0, 4.0], "branches": [1, 0]}}


def test_a_kernel_that_the_table_lacks_is_said():
    (said,) = check.worse({"rows.new": KEPT}, {"rows.linear": KEPT}, True)
    assert said == "rows.new: not in the table; python -m benchmarks.gpu_model --write"


LISTING = """
.text._kernel:
	//## File "/a/kernel.py", line 10
        /*0000*/                   S2R R0, SR_CTAID.X ;
.L_x_1:
	//## File "/a/kernel.py", line 21 inlined at "/a/kernel.py", line 12
	//## File "/a/kernel.py", line 12
        /*0010*/                   LDG.E.64 R2, desc[UR4][R0.64] ;
.L_x_0:
	//## File "/a/kernel.py", line 14
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R8, desc[UR4][R6.64] ;
        /*0040*/                   FFMA R9, R8, R8, R9 ;
	//## File "/a/kernel.py", line 13
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   STG.E.64 desc[UR4][R0.64], R8 ;
	//## File "/a/kernel.py", line 11
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
        /*00a0*/                   NOP ;
$slow_path:
        /*00b0*/                   RET.REL.NODEC R2 `(_kernel) ;
"""
PTX = """
	.file	1 "/a/kernel.py"
$L__BB0_1:
	ld.global.v2.b32 {%r1, %r2}, [%rd1];
$L__BB0_2:
	ld.global.b32 %r3, [%rd2];
	.loc	1 13 5
	@%p1 bra 	$L__BB0_2;
	st.global.v2.b32 [%rd1], {%r1, %r2};
	.loc	1 11 5
	@%p2 bra 	$L__BB0_1;
"""


def loop(line: int, trips: float | None) -> source.SourceLoop:
    return source.SourceLoop("kernel.py", line, 14, "range(n)", trips)


def test_loops_of_machine_code():
    """Two nested loops, the inner one unrolled twice: of 10 iterations 5 passes, of each of 4 turns of the outer one."""
    code = sass.parse(LISTING)["_kernel"]
    assert [x.opcode for x in code.instructions][-1] == "EXIT" and len(code.instructions) == 9
    (outer,) = code.loops
    (inner,) = outer.inner
    assert (len(code.body(outer)), len(code.body(inner)), len(code.own(outer))) == (7, 4, 3)
    assert code.instructions[1].frames == (("kernel.py", 21), ("kernel.py", 12))
    assert sass.widest(code.instructions, "LDG") == 128 and sass.widest(code.body(outer), "STG") == 64
    turns = {("kernel.py", line): loop(line, trips) for line, trips in ((11, 4.0), (13, 10.0))}
    found = executed(code, PTX, turns)
    assert found.instructions == 2 + 4 * (3 + 5 * 4) and found.units["multiply"] == 20
    assert found.moved == 32 * 4 * (8 + 8 + 5 * (16 + 4))
    assert iterations(code, PTX, turns) == [2.0]
    inner_branch = code.instructions[inner.last]
    inner_branch.frames = (("kernel.py", 14),)  # as in code for 10.0: it bears the last line of the body
    assert executed(code, PTX, turns).instructions == 2 + 4 * (3 + 5 * 4)
    turns["kernel.py", 13] = loop(13, None)
    assert executed(code, PTX, turns) == "range(n)"


def test_a_loop_at_the_end_of_a_kernel_is_kept():
    """Its branch back is the last instruction; the one to itself after it is filling."""
    text = LISTING.replace("@P2 BRA `(.L_x_1)", "@P2 EXIT").replace("   EXIT ;\n.L_x_2", "   BRA `(.L_x_1) ;\n.L_x_2")
    code = sass.parse(text)["_kernel"]
    assert code.instructions[-1].base == "BRA" and len(code.instructions) == 9
    (outer,) = code.loops
    assert (outer.first, outer.last, len(outer.inner)) == (1, 8, 1)


def test_the_way_back_of_a_loop_may_end_the_code():
    """It is no filling after the end, which branches to itself."""
    text = LISTING.replace("EXIT ;\n.L_x_2:", "BRA `(.L_x_1) ;\n.L_x_2:")
    code = sass.parse(text)["_kernel"]
    assert text != LISTING and len(code.instructions) == 9 and (code.loops[0].first, code.loops[0].last) == (1, 8)


def test_passes_through_unrolled_copies():
    assert _turns(11.0, [4, 1]) == [2.0, 3.0] and _turns(1.5, [1]) == [1.5] and _turns(6.0, [2, 2]) == [1.5, 1.5]
    assert {kind for kind, *_ in KINDS} == {"tensor", "global", "shared", "float"}


def test_turns_of_source_loops():
    """By the arguments, by hints, or unknown; a loop over what is constant counts too, for the compiler may keep it."""
    given = {"rows": 100, "TILE": 1024, "BLOCK_C": 64}
    kernel = linear_batch_norm_relu._moments
    assert [x.trips for x in source.loops(kernel.function, kernel.name, given).values()] == [7.0]
    kernel = act_orthogonal._act
    given = {"d": 3, "S": 20, "SUM": True, "BLOCK_S": 8}
    found = [x.trips for x in source.loops(kernel.function, kernel.name, given).values()]
    assert found == [3.0, 3.0, 3.0]
    del given["S"]
    assert [x.trips for x in source.loops(kernel.function, kernel.name, given).values()][1] is None


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "blocks"),
    [(90, 32, 4, 0, 16), (90, 128, 4, 0, 4), (90, 255, 8, 0, 1), (90, 32, 4, 100 << 10, 2), (120, 32, 4, 0, 12)],
)
def test_blocks_of_a_processor(architecture, registers, warps, shared, blocks):
    assert resident(DEVICES[architecture], registers, warps, shared) == blocks


def test_what_a_call_would_launch():
    """On tensors without data: the backward only where a gradient is needed."""
    forward, backward = recorded(lambda: ops.orthogonal_frame(zeros(2000, 3, 3)))
    assert [(x.op, x.direction) for x in (forward, backward)] == [
        ("orthogonal_frame", "forward"),
        ("orthogonal_frame", "backward"),
    ]
    (launch,) = forward.steps
    assert isinstance(launch, Launch) and (launch.kernel, launch.grid) == ("frames", (16,))
    assert launch.source[0]["p_a"] == "*fp32" and launch.named["M"] == 2000
    assert len(recorded(lambda: ops.orthogonal_frame(zeros(2000, 3, 3, leaf=False)))) == 1
    (aggregated,) = recorded(lambda: ops.aggregate(zeros(9, 4, leaf=False), torch.zeros(2, 3, dtype=torch.int64)))
    assert {"count", "fill"} <= {x.kernel for x in aggregated.steps if isinstance(x, Launch)}
    assert "cumsum" in {x.name for x in aggregated.steps if not isinstance(x, Launch)}


def test_every_hint_is_of_a_loop_that_is_there():
    """A loop that was rewritten would otherwise lose its prediction, and leave its hint behind."""
    loops = set()
    for path in Path(triton_ops.__file__).parent.glob("*.py"):
        loops |= {ast.unparse(x.iter) for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.For)}
    assert {text for _, text in source.HINTS} <= loops


def test_bytes_that_are_touched():
    """Of what is for all tokens only the rows of those that are used; every share is of an argument that is there."""
    product = {"used": 0.25, "COMPACT": True}
    assert source.touched("multiply", "p_a", product) == 0.25 and source.touched("multiply", "p_b", product) == 1
    assert source.touched("multiply", "p_out", product) == 1 and source.touched("multiply", "p_a", {}) == 1
    arguments = set()
    for path in Path(triton_ops.__file__).parent.glob("*.py"):
        for x in ast.walk(ast.parse(path.read_text())):
            if isinstance(x, ast.FunctionDef):
                arguments |= {(x.name.strip("_"), argument.arg) for argument in x.args.args}
    assert set(source.TOUCHED) <= arguments


def test_measured_stands_beside_predicted(tmp_path):
    """Of the same architecture, and of our variants; a share is of that machine's own limit."""
    launches = [{"kernel": "_frames", "count": 1.0, "seconds": 4e-6}]
    launches.append(
        {"kernel": "void psf::cuda::each_row<psf::cuda::SoftPermutation<float>, 6, false>(psf", "seconds": 1e-6}
    )
    case = "orthogonal_frame, forward and backward, (2000, 3, 3)"
    row = {"case": case, "variant": "kernel", "median": 1e-5, "host": 3e-4, "kernels": launches}
    machine = {"device": "NVIDIA H200", "bandwidth_GB_s": 4000.0, "float32_GFLOP_s": 5e4, "bfloat16_TFLOP_s": 800.0}
    data = {"machine": machine, "rows": [row, row | {"variant": "reference", "median": 1.0}]}
    (tmp_path / "nvidia.json").write_text(json.dumps(data))
    assert measured.results(tmp_path, 80) == []
    (found,) = measured.results(tmp_path, 90)
    assert found.device.name == "H200" and found.times == {case: 1e-5}
    assert found.kernels(case) == {"frames": 4e-6, "SoftPermutation": 1e-6}
    calls = [(x, recorded(x.run)) for x in all_cases() if x.needs.case == case]
    (made,) = table.rows(calls, 90, table.compile_all(table.launches(calls), 90), found)
    assert (made.device, made.measured, made.host) == ("H200", 1e-5, 3e-4)
    assert made.share == pytest.approx(made.bytes / 4e12 / 1e-5)
    assert {x["kernel"]: x["measured"] for x in made.kernels} == {"frames": 4e-6, "frames_backward": None}


def test_the_table_has_every_op_on_every_architecture():
    data = json.loads(check.KEPT.read_text())
    of_op = {}
    for row in data["rows"]:
        of_op.setdefault(row["op"], set()).add(row["architecture"])
        assert (row["forward"] is None) == any(
            x["seconds"] is None for x in row["kernels"] if x["direction"] == "forward"
        ) or not any(x["direction"] == "forward" for x in row["kernels"])
    with_others = {"permutation_entropy"}  # in the rows of the soft permutation
    for name in set(KERNELS) - with_others:
        assert of_op.get(name) == {80, 90, 100, 120}, f"{name}: python -m benchmarks.gpu_model --write"
    assert "No figure on this page was measured" in Path(check.KEPT).with_suffix(".md").read_text()


def test_a_step_of_a_vision_transformer_around_its_backbone():
    """All of our kernels, none of the backbone's calls; tokens in the dtype of autocast."""
    step = around.step(2, graphs=3)
    whole, rest = ([x.name for x in some if isinstance(x, Call)] for some in (step.whole, step.around))
    assert any("attention" in x for x in whole) and not any("attention" in x or "gelu" in x for x in rest)
    ours = [x for x in step.around if isinstance(x, Launch)]
    assert [x.key for x in ours] == [x.key for x in step.whole if isinstance(x, Launch)]
    products = [set(x.source[0].values()) for x in ours if x.kernel in ("cut", "multiply_transposed")]
    assert products and all("*bf16" in types for types in products)
    assert set(step.facts) == {"used", "filled", "mean_nodes", "channels"} and 0 < step.facts["used"] <= 1
