"""The Triton kernels without a GPU: values and gradients under the interpreter, and every configuration compiled."""
# ruff: noqa: E402 - the imports come after the question whether triton is there

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

import probsym_fast
from benchmarks.gpu_model import check, sass
from benchmarks.gpu_model.launches import Launch, Launches, all_compiled, compiled
from probsym_fast.ops import OPS, _extension
from probsym_fast.ops import triton as triton_ops
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops._patches import padded_axis, patch_size
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from probsym_fast.ops.triton import KERNELS, _launch
from probsym_fast.ops.triton import _lazy as through
from probsym_fast.ops.triton import _sort_by_key as _group
from probsym_fast.ops.triton.items import Items, weight_rows
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.helpers import ptx
from tests.helpers.gpu_clock import Clock
from tests.helpers.gpu_driver import Driver

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


HALVES = "embed or readout", "not (embed or readout)"  # of about the same length


@pytest.fixture(scope="module", autouse=True)
def interpreted(request):
    """triton_interpreted.py in processes of its own, since triton reads TRITON_INTERPRET when it is imported: begun before
    the first test here where its own are selected, so that it runs beside the compilations."""
    wanted = [x.callspec.params["half"] for x in request.session.items if "half" in getattr(x, "fixturenames", ())]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops/triton_interpreted.py"]
    settings = {"cwd": ROOT, "env": os.environ | {"TRITON_INTERPRET": "1"}, "capture_output": True, "text": True}
    with ThreadPoolExecutor(len(HALVES)) as pool:
        yield {half: pool.submit(subprocess.run, [*command, "-k", half], check=False, **settings) for half in wanted}


# --- every configuration compiled ---

SMALLER = {86: torch.float32, 89: torch.bfloat16, 120: torch.bfloat16}
SHARED = 99 * 1024  # bytes that a program may have on the smallest of compute capability 8 and above


class Emulated(Launches):
    """Takes the place of `_launch.launch`: compiles, and runs the compiled code on CPU tensors."""

    def __call__(self, kernel, grid, arguments, settings):
        super().__call__(kernel, grid, arguments, settings)
        launch = self.every[-1]
        made, (_, constants, _), size = compiled(launch, 90), launch.source, grid(settings)
        given = [x for i, x in enumerate(arguments) if (i,) not in constants]
        ptx.run(made.asm["ptx"], launch.options["num_warps"], made.metadata.shared, size, given)


def launches_of(name: str, dtype: torch.dtype, monkeypatch, precisions=("ieee", "tf32")) -> list:
    """The launches of an op, forward and backward, for sizes as in the experiments; nothing runs.

    precisions: what torch lets products of float32 be in.
    """
    launches, matmul = Launches(), torch.backends.cuda.matmul
    monkeypatch.setattr(_launch, "launch", launches)
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in precisions if dtype == torch.float32 else ("ieee",):
            CASES[name](dtype)
    finally:
        matmul.fp32_precision = before
    return list(launches.kept.items())


def aggregate_case(dtype):
    x, edges, ptr = (
        torch.zeros(130, 10, 64, dtype=dtype),
        torch.zeros(2, 512, dtype=torch.int64),
        torch.arange(0, 129, 64),
    )
    for virtual, own in ((ptr, torch.ones(())), (None, None)):
        through("aggregate", "forward")(x, edges, virtual, own)
        through("aggregate", "backward")(x, x, edges, virtual, own, True, own is not None)


def items_case(name, dtype):
    """Pairs and nodes, tokens as wide as a ViT and narrow, one channel and many; one token of the whole matrix."""
    sizes = ((2, 188, 14, 8, 768, "zeros"), (1, 188, 196, 9, 768, "zeros"), (2, 20, 1, 1, 64, "zeros"))
    padded = ((2, 444, 14, 7, 768, "reflect"),)
    for axes, N, grid, C, D, pad_mode in sizes + padded * (name == "embed"):
        S, B, P = 2, 2, patch_size(N, grid)
        ptr, rank = torch.arange(0, B * N + 1, N), torch.arange(N).expand(B, S, N)
        items = torch.zeros(axes, 60, dtype=torch.int64)
        soft = [torch.zeros(B, S, N) for _ in range(3)]
        axis = padded_axis(N, grid, pad_mode, False, rank.device)
        weight = torch.zeros(*[P] * axes, C, D, dtype=dtype).movedim((-1, -2), (0, 1))
        tokens, values = torch.zeros(B, S, grid**axes, D, dtype=dtype), torch.zeros(60, C, dtype=dtype)
        rest = ptr, rank, rank, *soft, 0.5, *axis, weight
        first, second = (items, values) if name == "embed" else (tokens, items)
        out = tokens if name == "embed" else values
        for bias in (torch.zeros(D if name == "embed" else C, dtype=dtype), None)[: 2 if C == 8 else 1]:
            through(name, "forward")(first, second, *rest, bias)
        through(name, "backward")(out, first, second, *rest, True, True, True, True)


def embed_matrix_case(dtype):
    """As wide as a ViT and of a width that 16 does not divide, one channel and several, several samples and one."""
    for B, S, N, grid, C, D in ((2, 2, 188, 14, 1, 768), (2, 1, 20, 3, 3, 70)):
        P, soft = patch_size(N, grid), [torch.zeros(B, S, N) for _ in range(3)]
        matrix, order = torch.zeros(B, N, N, C, dtype=dtype), torch.arange(N).expand(B, S, N)
        axis = padded_axis(N, grid, "zeros", False, matrix.device)
        weight = torch.zeros(P, P, C, D, dtype=dtype).permute(3, 2, 0, 1)
        rest = matrix, None, order, order, *soft, 0.5, *axis, weight
        through("embed_matrix", "forward")(*rest, torch.zeros(D, dtype=dtype) if S == 2 else None)
        tokens = torch.zeros(B, S, grid**2, D, dtype=dtype)
        through("embed_matrix", "backward")(tokens, *rest, True, True, True, True)


def embed_image_case(dtype):
    """A ViT's patches; more channels than four, patches that 16 does not divide, a matrix in float64."""
    for B, S, C, H, W, P, D, kind in (
        (2, 2, 3, 224, 224, 16, 384, torch.float32),
        (2, 1, 5, 21, 28, 7, 70, torch.float64),
    ):
        pixels, weight = torch.zeros(B, C, H, W, dtype=dtype), torch.zeros(D, C, P, P, dtype=dtype)
        frames, bias = torch.zeros(B, S, 2, 2, dtype=kind), torch.zeros(D, dtype=dtype) if C == 3 else None
        for replicate in (False, True):
            tokens = through("embed_image", "forward")(pixels, frames, weight, bias, replicate)
            through("embed_image", "backward")(tokens, pixels, frames, weight, replicate, True, True, True, True)


def embed_turned_case(dtype):
    for B, S, C, H, P, D in ((2, 8, 3, 224, 16, 384), (2, 1, 5, 28, 7, 70)):
        pixels, weight = torch.zeros(B, C, H, H, dtype=dtype), torch.zeros(D, C, P, P, dtype=dtype)
        turns, bias = torch.zeros(B, S, dtype=torch.int64), torch.zeros(D, dtype=dtype) if C == 3 else None
        tokens = through("embed_turned", "forward")(pixels, turns, weight, bias)
        through("embed_turned", "backward")(tokens, pixels, turns, weight, True, True, True)


def node_identifiers_case(dtype):
    for B, S, N, D in ((16, 10, 64, 64), (2, 1, 188, 7)):
        ptr, rank = torch.arange(0, B * N + 1, N), torch.arange(N).expand(B, S, N)
        soft, weight = [torch.zeros(B, S, N) for _ in range(3)], torch.zeros(N, D, dtype=dtype)
        arguments = ptr, rank, rank, *soft, 0.5, weight
        out = through("node_identifiers", "forward")(*arguments, B * N)
        through("node_identifiers", "backward")(out, *arguments, True, True)


def act_orthogonal_case(dtype):
    frames = torch.zeros(2, 3, 3, 3)
    for C, mean, inverse in ((1, True, False), (16, False, True), (16, True, True)):
        for vectors in (torch.zeros(2, 5, 3, C, dtype=dtype), torch.zeros(2, 3, 5, 3, C, dtype=dtype)):
            out = through("act_orthogonal", "forward")(vectors, frames, inverse, mean)
            through("act_orthogonal", "backward")(out, vectors, frames, inverse, mean, True, True)


def orthogonal_frame_case(dtype):
    for d in (1, 2, 3):
        x = torch.zeros(33, d, d, dtype=dtype)
        for special in (False, True):
            through("orthogonal_frame", "forward")(x, special)
        through("orthogonal_frame", "backward")(x, x, x)


def linear_batch_norm_relu_case(dtype):
    for M, C in ((45_500, 64), (45_511, 9), (300, 128)):
        x, linear, (weight, bias) = torch.zeros(M, 2, dtype=dtype), torch.zeros(C, 2, dtype=dtype), torch.zeros(2, C)
        y, mean, variance = through("linear_batch_norm_relu", "forward")(x, linear, weight, bias, 1e-5)
        through("linear_batch_norm_relu", "backward")(y, x, linear, weight, bias, mean, variance, 1e-5, True, True)


def noise_case(dtype):
    """Uniform and normal, named rows and counted ones, of a fork and of none, mirrored and not."""
    seed, shape = torch.tensor(3), [5, 4, 300]
    for rows, forks, streams, mirrored in (
        (torch.arange(5), [2], [2**40], False),
        (None, None, [-(2**40), 2**41], True),
    ):
        through("noise", "forward")(seed, rows, shape, 0, forks, streams, 2, mirrored)


def transformer_case(dtype):
    """As in the experiments: 25 tokens, width 64, four heads; only some tokens read, and lengths."""
    sizes = [8, 64, 1, 4, 64, 3]
    x, row = torch.zeros(2, 25, 8, dtype=dtype), torch.zeros(transformer_count(sizes, 25), dtype=dtype)
    y, kept = through("transformer", "forward")(x, row, None, sizes, [0, 6], True, 1e-5, True)
    through("transformer", "backward")(y, x, row, kept, None, sizes, [0, 6], True, 1e-5, True, True)
    through("transformer", "forward")(x, row, torch.full((2,), 25), sizes, [], True, 1e-5, False)


def message_passing_case(dtype):
    """As in the experiments: 5 nodes, width 60, two edge features."""
    x, edges = torch.zeros(6, 5, 6, dtype=dtype), torch.zeros(2, 5, 5, 2, dtype=dtype)
    row, sizes = torch.zeros(message_count(6, 2, 60, 1, 60), dtype=dtype), (60, 1, 60)
    y, kept = through("message_passing", "forward")(x, edges, row, *sizes, True)
    through("message_passing", "backward")(y, x, edges, row, kept, *sizes, True, True, True)


def mlp_case(dtype):
    """Three layers of width 64, two at once and one; an activation before the first and after the last."""
    widths = [64] * 4
    x, row = torch.zeros(40, 64, dtype=dtype), torch.zeros(mlp_count(widths), dtype=dtype)
    y, kept = through("mlp", "forward")(x, row, widths, 2, True, True, True)
    through("mlp", "backward")(y, x, row, kept, widths, 2, True, True, True, True)


def gin_case(dtype):
    """As in the experiments: 10 samples, width 64."""
    x, edges = torch.zeros(130, 10, 64, dtype=dtype), torch.zeros(2, 512, dtype=torch.int64)
    ptr, row, sizes = torch.tensor([0, 65, 130]), torch.zeros(gin_count(64, 2, 64), dtype=dtype), (2, 64, 2, True)
    y, kept = through("gin", "forward")(x, edges, ptr, row, *sizes, True)
    through("gin", "backward")(y, x, edges, ptr, row, kept, *sizes, True, True)


def vector_edge_convolution_case(dtype):
    """As in the experiments: clouds of 5 nodes in space, width 21, 4 neighbours."""
    x, maps, pool, row = torch.zeros(2, 3, 5, 40), torch.zeros(21, 4), torch.zeros(21, 21), torch.zeros(21)
    arguments = x.to(dtype), maps, maps, pool, row, row, None, None, torch.full((40,), 5)
    y, *known = through("vector_edge_convolution", "forward")(*arguments, 4)
    through("vector_edge_convolution", "backward")(y, *arguments, *known, 4, True)


def permute_case(dtype):
    x, slots = torch.zeros(2, 3, 188, 4, dtype=dtype), torch.arange(188).expand(2, 3, 188)
    t = torch.zeros(2, 3, 188, dtype=dtype)
    arguments = x, slots, slots, None, t, t, t, 0.1, True
    through("permute", "backward")(through("permute", "forward")(*arguments), *arguments, True, True)


def slots_case(dtype, run):
    """A warp a row, and rows in memory; float32, with fewer registers: several rows a warp."""
    for N in (188, 1100) if dtype == torch.float64 else (16,):
        x = torch.zeros(2, 3, N, dtype=dtype)
        run(x, torch.full((2,), N) if N == 188 else None)


def soft_permutation_case(dtype):
    def run(scores, num_nodes):
        t, log_r, log_c, order, _ = through("soft_permutation", "forward")(scores, num_nodes, 0.1, 20, True)
        settings = order, t, num_nodes, 0.1, 20, True
        through("soft_permutation", "backward")(t, log_r, log_c, scores, *settings)

    slots_case(dtype, run)


def permutation_entropy_case(dtype):
    def run(t, num_nodes):
        entropy = through("permutation_entropy", "forward")(t, t, t, num_nodes, 0.1)
        through("permutation_entropy", "backward")(entropy, t, t, t, num_nodes, 0.1)

    slots_case(dtype, run)


CASES = {
    "soft_permutation": soft_permutation_case,
    "permutation_entropy": permutation_entropy_case,
    "noise": noise_case,
    "act_orthogonal": act_orthogonal_case,
    "orthogonal_frame": orthogonal_frame_case,
    "aggregate": aggregate_case,
    "linear_batch_norm_relu": linear_batch_norm_relu_case,
    "embed": lambda dtype: items_case("embed", dtype),
    "embed_image": embed_image_case,
    "embed_matrix": embed_matrix_case,
    "embed_turned": embed_turned_case,
    "gin": gin_case,
    "message_passing": message_passing_case,
    "mlp": mlp_case,
    "node_identifiers": node_identifiers_case,
    "permute": permute_case,
    "readout": lambda dtype: items_case("readout", dtype),
    "transformer": transformer_case,
    "vector_edge_convolution": vector_edge_convolution_case,
}


def test_every_op_has_a_case():
    assert set(CASES) == set(KERNELS)
    for name in KERNELS:
        built = name in _extension.CUDA_KERNELS and _extension.has_kernels("cuda")
        expected = "cuda" if built else "triton", "reference"
        assert OPS[name].backends("cuda") == BACKENDS[name, "cuda"] == expected
        assert probsym_fast.info()["ops"][name]["cuda"] == list(expected)


BY_HAND = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "every"),
    [(90, True), (80, False), (100, False), *(pytest.param(x, True, marks=BY_HAND) for x in (80, 100))],
)
def test_compiles_without_spills(architecture, every, monkeypatch):
    """What the ops launch, with each configuration that can be chosen: registers and stack are read from the cubin.

    every: all launches, else the first of each kernel in each dtype. float16 differs from bfloat16 in one type: the first
    of each kernel. For 9.0 the loops are compared with those of benchmarks/results/gpu-predicted.json.
    """
    found = {}
    for name in CASES:
        for dtype in KERNELS[name]:
            launches = launches_of(name, dtype, monkeypatch)
            if not every or dtype == torch.float16:
                launches = {kernel: ((kernel, key), launch) for (kernel, key), launch in reversed(launches)}.values()
            if every or dtype != torch.float16:
                found |= dict(launches)
    assert found
    binaries = all_compiled(found.values(), architecture)
    for ((kernel, _), launch), made in zip(found.items(), binaries, strict=True):
        (used,) = sass.usage(made.asm["cubin"]).values()
        assert made.metadata.shared <= SHARED, (kernel, launch[1], made.metadata.shared)
        assert used["REG"] <= 65536 // (32 * launch[2]["num_warps"]), (kernel, used)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, launch[1], used)
    if architecture == 90:
        (version, before), now = check.kept(), check.checked(zip(found.values(), binaries, strict=True))
        worse = check.worse(now, before, version == triton.__version__)
        assert now and not worse, "\n".join(worse)


def one_of_each() -> list[tuple[Launch, object]]:
    """The first launch of each kernel, compiled for 9.0: what benchmarks/results/gpu-predicted.json keeps of them."""
    first = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in CASES:
            for dtype in KERNELS[name]:
                for _, launch in launches_of(name, dtype, monkeypatch):
                    first.setdefault(check.name(launch), launch)
    return list(zip(first.values(), all_compiled(first.values(), 90), strict=True))


@pytest.mark.parametrize(("B", "S", "N", "dtype"), [(2, 3, 12, torch.float64), (1, 1, 193, torch.float32)])
def test_compiled_soft_permutation(B, S, N, dtype, monkeypatch):
    """The compiled code: several rows a warp, which take turns in the same memory, and several warps a row."""
    monkeypatch.setattr(_launch, "launch", Emulated())
    monkeypatch.setattr(importlib.import_module("probsym_fast.ops.triton.soft_permutation"), "BYTES", 1)
    num_nodes, settings = torch.tensor([N, N // 2])[:B], (0.07, 3 if B > 1 else 2, True)
    scores, *weights = torch.randn(4, B, S, N, dtype=dtype)
    exact = scores.double().clone().requires_grad_()
    *soft, order, rank = through("soft_permutation", "forward")(scores, num_nodes, *settings)
    *expected, its_order, its_rank = OPS["soft_permutation"].reference(exact, num_nodes, *settings)
    assert torch.equal(order, its_order) and torch.equal(rank, its_rank)
    for x, y in zip(soft, expected, strict=True):
        assert_near(x, y, VALUE)
    found = through("soft_permutation", "backward")(*weights, scores, order, soft[0], num_nodes, *settings)
    loss = sum((x * y).sum() for x, y in zip(weights, expected, strict=True))
    assert_near(found, torch.autograd.grad(loss, exact)[0], GRADIENT)
    exact = [x.double().clone().requires_grad_() for x in soft]
    expected = OPS["permutation_entropy"].reference(*exact, num_nodes, settings[0])
    assert_near(through("permutation_entropy", "forward")(*soft, num_nodes, settings[0]), expected, VALUE)
    found = through("permutation_entropy", "backward")(torch.ones((), dtype=dtype), *soft, num_nodes, settings[0])
    for x, y in zip(found, torch.autograd.grad(expected, exact), strict=True):
        assert_near(x, y, GRADIENT)


def test_kernels_keep_to_what_triton_3_6_parses():
    """It refuses an assignment to nested tuples, and only where a kernel is launched for the first time."""
    kernels = 0
    for path in Path(triton_ops.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            marks = [ast.unparse(x) for x in getattr(function, "decorator_list", ())]
            if not any(mark.startswith(("kernel", "triton.jit")) for mark in marks):
                continue
            kernels += 1
            for node in ast.walk(function):
                for target in node.targets if isinstance(node, ast.Assign) else ():
                    nested = [x for x in getattr(target, "elts", ()) if isinstance(x, (ast.Tuple, ast.List))]
                    assert not nested, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
    assert kernels > 60


def test_one_thread_at_a_time_parses(monkeypatch, tmp_path):
    parse, busy, overlaps = ast.parse, threading.Lock(), []

    def slow(*arguments, **settings):
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.02)  # the other threads get here, if nothing stops them
        if not overlaps[-1]:
            busy.release()
        return parse(*arguments, **settings)

    launches = [launch for _, launch in launches_of("orthogonal_frame", torch.float32, monkeypatch)][:4]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ast, "parse", slow)
    all_compiled(launches, 90, threads=4)
    assert len(overlaps) >= len(launches) == 4 and not any(overlaps)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SMALLER)
def test_compiles_for_smaller_gpus(architecture, monkeypatch):
    """As above, one launch of each kernel, another for each architecture: they have about the registers and memory of 8.0."""
    launches, number = {}, list(SMALLER).index(architecture)
    for name in CASES:
        if SMALLER[architecture] in KERNELS[name]:
            for (kernel, _), launch in launches_of(name, SMALLER[architecture], monkeypatch):
                launches.setdefault(kernel, []).append(launch)
    assert len(launches) > 20
    taken = {kernel: some[len(some) * number // len(SMALLER)] for kernel, some in launches.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(lambda launch: compiled(launch, architecture), taken.values()))
    for (kernel, launch), made in zip(taken.items(), binaries, strict=True):
        (used,) = sass.usage(made.asm["cubin"]).values()
        assert made.metadata.shared <= SHARED, (kernel, launch[1], made.metadata.shared)
        assert used["REG"] <= 65536 // (32 * launch[2]["num_warps"]), (kernel, used)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, launch[1], used)


@pytest.mark.parametrize("name", ["embed", "readout"])
def test_rows_move_in_16_bytes(name, monkeypatch):
    """Token and weight rows of a width divisible by 16 are read, and tokens written, in vectors of 16 bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        for (kernel, _), launch in launches_of(name, dtype, monkeypatch):
            if kernel in ("scatter", "gather") and launch[1][1][launch[0].arg_names.index("BLOCK_D"),] >= 128:
                ptx = compiled(launch, 90).asm["ptx"]
                assert re.search(r"ld\.global\S*\.v4\.b32", ptx), (kernel, launch[1:])
                assert kernel == "gather" or re.search(r"st\.global\S*\.v4\.b32", ptx), (kernel, launch[1:])


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32")])
def test_products_are_on_the_tensor_cores(dtype, precision, monkeypatch):
    """In half precision; in float32 as three of tf32, or where torch lets its own products be in tf32. Bytes move in 16."""
    seen = {}
    for name in ("embed_matrix", "node_identifiers", "embed"):
        for (kernel, _), launch in launches_of(name, getattr(torch, dtype), monkeypatch, (precision,)):
            seen.setdefault(f"{kernel} of embed" if name == "embed" else kernel, launch)
    for kernel in ("multiply", "multiply of embed", "multiply_transposed", "reduce_matrix", "reduce_identifiers"):
        ptx = compiled(seen[kernel], 90).asm["ptx"]
        cores = re.search(r"wgmma\.mma_async|mma\.sync", ptx) is not None
        whole = dtype == "float32" and precision == "ieee"  # the digits of float32
        assert cores == (not whole or kernel != "reduce_identifiers"), kernel
        if whole and cores:
            assert len(re.findall(r"(wgmma\.mma_async|mma\.sync)\S*tf32", ptx)) >= 3, kernel
        if dtype == "bfloat16" and kernel in ("multiply", "multiply of embed"):
            assert re.search(r"cp\.async\S* \[.*\], 0x10", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)


@pytest.mark.parametrize(("name", "reads", "once"), [("embed_image", 4, 4), ("embed_turned", 1, 1)])
def test_a_place_reads_its_pixels_once(name, reads, once, monkeypatch):
    """In each channel, and is written once; coordinates are not computed again for a channel. Two places a thread."""
    channels, places = 3, 2
    for (kernel, _), launch in launches_of(name, torch.float32, monkeypatch):
        if kernel.startswith("cut") and launch.named.get("p_slopes") is None and not launch.named.get("REPLICATE"):
            made = compiled(launch, 90)
            assert len(re.findall(r"ld\.global", made.asm["ptx"])) == once + reads * channels * places
            assert len(re.findall(r"st\.global\S*\.v2\.b32", made.asm["ptx"])) == channels
            return
    raise AssertionError("no launch writes patches")


def test_images_of_any_number_share_their_kernels(monkeypatch):
    """Also 1 and multiples of 16."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)

    def run(B):
        pixels, weight, plane = torch.zeros(B, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(B, 2, 2, 2)
        tokens = through("embed_image", "forward")(pixels, plane, weight, None, True)
        through("embed_image", "backward")(tokens, pixels, plane, weight, True, True, True, True, True)
        turns = torch.zeros(B, 2, dtype=torch.int64)
        through("embed_turned", "backward")(tokens, pixels, turns, weight, True, True, True)

    run(5)
    first = set(launches.kept)
    assert len({kernel for kernel, _ in first}) == 4 and len(first) == 7
    for B in (1, 16, 7):
        run(B)
    assert set(launches.kept) == first


NETWORKS = {"gin": 6, "message_passing": 6, "mlp": 3, "transformer": 6, "vector_edge_convolution": 6}  # op -> kernels
NO_PRODUCTS = {"sum_rows", "pool", "activate", "nearest", "norm_moments", "chosen", "chosen_gradient"}
NO_PRODUCTS |= {"count", "fill", "maps_gradient"}
NARROW_READS = {"count", "fill", "nearest"}  # of integers, and of clouds, in whatever number
NARROW_WRITES = NARROW_READS | {"sum_rows", "pool", "norm_moments", "choose", "chosen"}
NARROW_WRITES |= {"attention", "attention_gradient"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_on_the_tensor_cores(name, precision, monkeypatch):
    """Where torch lets its own products be in tf32; at widths divisible by 4 all weights and rows are read in 16 bytes."""
    launches = launches_of(name, torch.float32, monkeypatch, (precision,))
    assert len({kernel for (kernel, _), _ in launches}) == NETWORKS[name]
    for ((kernel, _), launch), made in zip(launches, all_compiled([x for _, x in launches], 90), strict=True):
        ptx = made.asm["ptx"]
        cores = re.search(r"wgmma\.mma_async|mma\.sync", ptx) is not None
        assert cores == (precision == "tf32" and kernel not in NO_PRODUCTS), kernel
        wide = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\S* \[.*\], 0x10", ptx)
        assert wide or kernel in NARROW_READS, (kernel, launch[1:])
        assert re.search(r"st\.global\S*\.v4\.b32", ptx) or kernel in NARROW_WRITES, (kernel, launch[1:])


CONFIGURATIONS = {"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A timer that finds every configuration faster than the one before, an empty cache; what is measured."""
    calls = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "seconds_of", lambda run: calls.append(run) or -len(calls))
    monkeypatch.setattr(_launch, "_told", False)
    return calls


def choose(kernel, *sizes, device="cuda", dtype=torch.float32):
    return kernel._choose(torch.device(device), None, (torch.zeros(1, dtype=dtype),), sizes, {})


def test_the_fastest_configuration_is_measured_once_and_kept(measured, monkeypatch):
    """Once for a bucket of sizes, also by another process; the first in deterministic mode and in a graph capture."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    configurations, function = CONFIGURATIONS, _group._count.function
    kernel = _launch.Kernel(function, configurations)
    assert choose(kernel, 100, device="cpu") == configurations[0]
    capturing[0] = True
    assert choose(kernel, 100) == configurations[0]
    capturing[0] = False
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(kernel, 100) == configurations[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not measured
    assert [choose(kernel, size) for size in (100, 128, 65)] == [configurations[2]] * 3
    assert choose(_launch.Kernel(function, configurations), 70) == configurations[2]  # from the cache
    assert len(measured) == 3
    choose(kernel, 129)
    choose(kernel, 100, dtype=torch.bfloat16)
    assert len(measured) == 9


def test_kept_choices_that_cannot_be_used_are_measured_again(measured, tmp_path, monkeypatch):
    """With one warning: a damaged file, and a folder that cannot be written. A choice that is none of ours is passed over."""
    function = _group._count.function
    choose(_launch.Kernel(function, CONFIGURATIONS), 100)
    (path,) = tmp_path.rglob("configuration.json")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for damaged in (b"{'BLOCK'", b"", b"\xff\xfe\x00", b"[" * 40):
            path.write_bytes(damaged)
            measured.clear()
            assert choose(_launch.Kernel(function, CONFIGURATIONS), 100) == CONFIGURATIONS[2]
            assert len(measured) == 3
    (warning,) = said
    assert issubclass(warning.category, RuntimeWarning)
    assert "cannot keep the kernel configurations; they are measured again" in str(warning.message)
    assert (
        choose(_launch.Kernel(function, CONFIGURATIONS), 100) == CONFIGURATIONS[2] and len(measured) == 3
    )  # kept anew
    for stranger in ('{"BLOCK": 7}', "3", "null"):
        path.write_text(stranger)
        measured.clear()
        choose(_launch.Kernel(function, CONFIGURATIONS), 100)
        assert len(measured) == 3
    monkeypatch.setattr(_launch, "_told", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path / "below a file"))
    with pytest.warns(RuntimeWarning, match="cannot keep the kernel configurations"):
        assert choose(_launch.Kernel(function, CONFIGURATIONS), 100) == CONFIGURATIONS[2]


def test_ragged_sizes_share_a_choice(measured, monkeypatch):
    """Batches as they come, of one bucket: what the first has measured serves all; deterministic mode takes the first."""
    taken, on_gpu = [], _launch.Kernel._choose
    monkeypatch.setattr(
        _launch.Kernel, "_choose", lambda kernel, device, *rest: on_gpu(kernel, torch.device("cuda"), *rest)
    )
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, arguments, settings: taken.append((kernel, settings)))

    def step(nodes, edges):
        x, pairs, ptr = torch.zeros(nodes, 10, 64), torch.zeros(2, edges, dtype=torch.int64), torch.tensor([0, nodes])
        through("aggregate", "forward")(x, pairs, None, None)
        rank, axis = torch.arange(130).expand(1, 2, 130), padded_axis(130, 4, "zeros", False, torch.device("cpu"))
        rest = ptr, rank, rank, *[torch.zeros(1, 2, 130)] * 3, 0.5, *axis, torch.zeros(64, 3, 33, 33)
        tokens, values = torch.zeros(1, 2, 16, 64), torch.zeros(edges, 3)
        through("embed", "forward")(pairs, values, *rest, None)
        through("embed", "backward")(tokens, pairs, values, *rest, True, True, True, True)

    sizes = ((120, 620), (128, 660), (101, 560), (110, 580))
    step(*sizes[0])
    several = len(measured)
    assert several
    for size in sizes[1:]:
        step(*size)
    assert len(measured) == several
    assert any(settings.items() >= kernel.configurations[-1].items() for kernel, settings in taken)
    step(400, 520)
    assert len(measured) > several
    several = len(measured)
    taken.clear()
    torch.use_deterministic_algorithms(True)
    try:
        step(1000, 9000)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(measured) == several
    assert all(settings.items() >= kernel.among(settings)[0].items() for kernel, settings in taken)


class NoTensors(TorchDispatchMode):
    """Refuses every operation of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"tuning called {func}")


@pytest.mark.parametrize("fastest", range(3))
def test_tuning_allocates_nothing(fastest, monkeypatch, tmp_path):
    """It runs in a step whose peak `chunk="auto"` may be measuring. Kernels shorter than their launch are told apart, too."""
    clock, seconds = Clock(monkeypatch), [2e-5, 3e-5, 4e-5]
    seconds[0], seconds[fastest] = seconds[fastest], seconds[0]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, arguments, x: clock.run(seconds[x["BLOCK"] - 1]))
    kernel, tensor = _launch.Kernel(_group._count.function, CONFIGURATIONS), torch.zeros(1)
    with NoTensors():
        assert kernel._choose(torch.device("cuda"), None, (tensor,), (100,), {}) == CONFIGURATIONS[fastest]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel would stay compiled for a driver that runs nothing")
def test_a_compiled_kernel_is_launched_without_binding(monkeypatch):
    """The same grid and arguments as by triton; another kernel for what is aligned otherwise, and only then."""
    driver, bound = Driver(), []
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = _launch.kernel({"num_warps": 4})(_group._count.function.fn)
    kernel.function.add_pre_run_hook(lambda *arguments, **settings: bound.append(arguments))

    def launch(E, keys, offset=0, block=256):
        key, count, place = (torch.zeros(9000, dtype=torch.int32) for _ in range(3))
        kernel(lambda settings: (E // settings["BLOCK"],), key, count[offset:], place, E, keys, BLOCK=block)
        grid, arguments = driver.launched[-1]
        assert grid == (E // block, 1, 1) and len(arguments) == len(kernel.parameters)
        given = key.data_ptr(), count.data_ptr() + 4 * offset, place.data_ptr(), E, keys, block
        assert [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments] == list(given)

    for E, keys in ((512, 7), (1025, 16), (300, 1), (2048, 40)):
        launch(E, keys)
    assert len(bound) == 1 and len(driver.launched) == 4
    launch(512, 7, offset=1)
    launch(512, 7, offset=4)
    assert len(bound) == 2
    launch(512, 7, block=512)
    assert len(bound) == 3
    kernel(lambda settings: (0,), *bound[0], BLOCK=256)
    assert len(driver.launched) == 7
    heard = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda launched: heard.append(launched.get()))
    launch(512, 7)
    assert [x["name"] for x in heard] == ["_count"] and len(bound) == 3


def ragged_batch(B: int, generator: torch.Generator) -> None:
    """Forward and backward of every op on graphs, for B graphs of any sizes."""
    S, N, D, C, grid = 3, 24, 64, 4, 4
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, N + 1, (B,), generator=generator).cumsum(0)])
    nodes = int(ptr[-1])
    edges = torch.zeros(2, int(torch.randint(1, 200, (), generator=generator)), dtype=torch.int64)
    rank, soft, axis = (
        torch.arange(N).expand(B, S, N),
        [torch.zeros(B, S, N)] * 3,
        padded_axis(N, grid, "zeros", False, CPU),
    )
    tokens, weight, own = torch.zeros(B, S, grid**2, D), torch.zeros(6, 6, C, D).permute(3, 2, 0, 1), torch.ones(())
    x, permutation = torch.zeros(nodes + B, S, 64), (ptr, rank, rank, *soft, 0.5)
    through("aggregate", "forward")(x, edges, ptr, own)
    through("aggregate", "backward")(x, x, edges, ptr, own, True, True)
    values = torch.zeros(edges.shape[1], C)
    through("embed", "forward")(edges, values, *permutation, *axis, weight, torch.zeros(D))
    through("embed", "backward")(tokens, edges, values, *permutation, *axis, weight, True, True, True, True)
    through("readout", "forward")(tokens, edges, *permutation, *axis, weight, torch.zeros(C))
    through("readout", "backward")(values, tokens, edges, *permutation, *axis, weight, True, True, True, True)
    matrix = torch.zeros(B, N, N, C), ptr.diff(), *permutation[1:], *axis, weight
    through("embed_matrix", "forward")(*matrix, None)
    through("embed_matrix", "backward")(tokens, *matrix, True, True, True, True)
    features = through("node_identifiers", "forward")(*permutation, torch.zeros(N, 64), nodes)
    through("node_identifiers", "backward")(features, *permutation, torch.zeros(N, 64), True, True)
    row = torch.zeros(gin_count(64, 2, 4))
    y, kept = through("gin", "forward")(x[:nodes], edges, ptr, row, 2, 4, 0, True, True)
    through("gin", "backward")(y, x[:nodes], edges, ptr, row, kept, 2, 4, 0, True, True, True)
    rows, square, row = torch.zeros(nodes * S, 64), torch.zeros(64, 64), torch.zeros(64)
    y, *statistics = through("linear_batch_norm_relu", "forward")(rows, square, row, row, 1e-5)
    through("linear_batch_norm_relu", "backward")(y, rows, square, row, row, *statistics, 1e-5, True, True)


def ragged_sequences(M: int) -> None:
    """Forward and backward of the ops on sequences and on small graphs, for M of them."""
    sizes, lengths, row = [3, 8, 1, 2, 8, 2], torch.ones(M + M % 2, dtype=torch.int64)[M % 2 :], torch.zeros(10_000)
    x, row = torch.zeros(M, 4, 3), row[: transformer_count(sizes, 4)]
    y, kept = through("transformer", "forward")(x, row, lengths, sizes, [], True, 1e-5, True)
    through("transformer", "backward")(y, x, row, kept, lengths, sizes, [], True, 1e-5, True, True)
    edges, row, sizes = torch.zeros(1, 4, 4, 2), torch.zeros(message_count(3, 2, 8, 1, 2)), (8, 1, 2)
    y, kept = through("message_passing", "forward")(x, edges, row, *sizes, True)
    through("message_passing", "backward")(y, x, edges, row, kept, *sizes, True, True, True)
    rows, widths = torch.zeros(M, 8), [8, 8, 8, 8]
    row = torch.zeros(mlp_count(widths))
    y, kept = through("mlp", "forward")(rows, row, widths, 2, True, True, True)
    through("mlp", "backward")(y, rows, row, kept, widths, 2, True, True, True, True)
    clouds, maps, row = torch.zeros(2, 3, 3, M), torch.zeros(6, 4), torch.zeros(6)
    arguments = clouds, maps, maps, torch.zeros(6, 6), row, row, None, None, None
    y, *known = through("vector_edge_convolution", "forward")(*arguments, 2)
    through("vector_edge_convolution", "backward")(y, *arguments, *known, 2, True)


@pytest.mark.parametrize("bytes_", [2**28, 5000])
def test_sequences_of_any_number_share_their_kernels(bytes_, monkeypatch):
    """Also 1 and multiples of 16, at once and in parts."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)
    for name in ("transformer", "message_passing", "mlp", "vector_edge_convolution"):
        monkeypatch.setattr(importlib.import_module(f"probsym_fast.ops.triton.{name}"), "BYTES", bytes_)
    ragged_sequences(5)
    first = set(launches.kept)
    assert len({kernel for kernel, _ in first}) == 16
    for M in (1, 16, 7, 32, 33):
        ragged_sequences(M)
    assert set(launches.kept) == first


def test_ragged_batches_share_their_kernels(monkeypatch):
    """Whatever the numbers of nodes and edges, also 1 and multiples of 16: the first batch has compiled all there is.

    A last, smaller batch is another multiple of 16 in the planes of the soft permutation, which are read in wide loads.
    """
    launches, generator = Launches(), torch.Generator().manual_seed(0)
    monkeypatch.setattr(_launch, "launch", launches)
    ragged_batch(4, generator)
    first = set(launches.kept)
    assert len(first) > 30
    for _ in range(8):
        ragged_batch(4, generator)
    assert set(launches.kept) == first
    ragged_batch(3, generator)
    assert {kernel for kernel, _ in set(launches.kept) - first} <= {"reduce_matrix", "reduce_identifiers"}


def test_the_lists_of_configurations_are_short():
    modules = [
        importlib.import_module(x.name) for x in pkgutil.iter_modules(triton_ops.__path__, "probsym_fast.ops.triton.")
    ]
    kernels = [x for module in modules for x in vars(module).values() if isinstance(x, _launch.Kernel)]
    assert {len(x.configurations) for x in kernels} <= {1, 2, 3, 4} and len(kernels) > 15


def test_a_failing_kernel_names_itself_and_the_shapes(monkeypatch):
    def fails(*arguments):
        raise ValueError("no such instruction")

    monkeypatch.setattr(_launch, "launch", fails)
    with pytest.raises(
        RuntimeError, match=r"^aggregate: the kernel count failed on cpu for \[\(3,\).*no such instruction"
    ):
        through("aggregate", "forward")(torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int64), None, None)


def test_a_matrix_and_a_weight_of_two_dtypes_are_refused(monkeypatch):
    """A direct call, which nothing converts: patches are copied in words of the matrix."""
    monkeypatch.setattr(_launch, "launch", Launches())
    axis = padded_axis(4, 2, "zeros", False, torch.device("cpu"))
    order, matrix = torch.arange(4).expand(1, 1, 4).contiguous(), torch.zeros(1, 4, 4, 4)
    for given, weight in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        arguments = (
            matrix.to(given),
            None,
            order,
            order,
            *[None] * 3,
            1.0,
            *axis,
            torch.zeros(6, 4, 2, 2, dtype=weight),
            None,
        )
        with pytest.raises(TypeError, match=rf"^embed_matrix: weight must be {given} as matrix is, got {weight}$"):
            through("embed_matrix", "forward")(*arguments)


def test_items_of_no_graph_have_no_entries(monkeypatch):
    """Their values are the bias: a program that looked for entries would read an empty table."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)
    axis = padded_axis(4, 2, "zeros", False, torch.device("cpu"))
    order, weight = torch.empty(0, 1, 4, dtype=torch.int64), torch.zeros(6, 1, 2)
    items, ptr, tokens = (
        torch.zeros(1, 5, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(0, 1, 2, 6),
    )
    Items(items, ptr, order, axis[0], axis[1], 2).gather(tokens, 1.0, weight_rows(weight), None)
    assert [x.named["S"] for x in launches.every if x.kernel == "gather"] == [0, 0]


def test_more_than_32_bits_count_is_refused_before_a_launch(monkeypatch):
    def none(*arguments):
        raise AssertionError("launched")

    monkeypatch.setattr(_launch, "launch", none)
    axis = padded_axis(4, 5, "zeros", False, torch.device("meta"))
    with torch.device("meta"):
        order, ptr, many = torch.empty(1, 2**27, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64), [None] * 3
        items, weight = torch.empty(2, 3, dtype=torch.int64), torch.empty(6, 1, 1, 1)
        calls = {
            "act_orthogonal: channels of all vectors of a graph": (
                torch.empty(1, 2**30, 1, 2),
                torch.empty(1, 1, 1, 1),
            ),
            "embed: tokens": (items, torch.empty(3, 1), ptr, order, order, *many, 1.0, *axis, weight, None),
            "embed_turned: tokens": (
                torch.empty(1, 1, 1, 1),
                torch.empty(1, 2**31, dtype=torch.int64),
                torch.empty(1, 1, 1, 1),
                None,
            ),
            "embed_matrix: tokens": (torch.empty(1, 4, 4, 1), None, order, order, *many, 1.0, *axis, weight, None),
        }
        for message, arguments in calls.items():
            more = (False, False) if "act" in message else ()
            with pytest.raises(ValueError, match=rf"^{message} must be at most 2147482624 on a GPU, got \d+$"):
                through(message.split(":")[0], "forward")(*arguments, *more)


# --- at last, as it has run all the while ---


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_kernels_under_the_interpreter(half, interpreted):
    ran = interpreted[half].result()
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
