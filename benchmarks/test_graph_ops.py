"""Group action and tokens, and the whole distribution, against their dense references."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import shapes
from benchmarks.harness import Row, chosen, compare
from benchmarks.inputs import dense_graphs, messages_like, molecules, one_hot, pattern_like, peptides_like, read_like
from benchmarks.shapes import GRID, WIDTH, Needs
from benchmarks.test_ops import kernel
from probsym_fast import ops
from probsym_fast.distributions import GIN
from probsym_fast.groups import Graphs
from probsym_fast.models import PatchWeight


def check(variants: dict) -> None:
    """Checks all variants against the reference, before timing: within 2e-3 of the largest entry (3e-2 in half precision)."""
    results = {name: function() for name, function in variants.items()}
    exact = results["reference"]
    for name, found in results.items():
        for x, y in zip(found, exact, strict=True):
            error = (x.float() - y.float()).abs().max() / y.float().abs().max().clamp(min=1e-20)
            bound = 2e-3 if min(z.dtype.itemsize for z in exact) == 4 else 3e-2
            assert error < bound, (name, error)


def run_all(op, needs: Needs, call, scores, num_nodes, leaves, device, seconds, record, dtype):
    """Times call(p, backend) of an op: the forward on given permutations, then everything from scores to gradients.

    On a GPU it also times torch.compile of the dense reference.
    """
    with torch.no_grad():
        p = ops.soft_permutation(scores, num_nodes)
        d_out = torch.randn_like(call(p, "auto"))

    def forward(call, soft):
        with torch.no_grad():
            return (call(p),)

    def both(call, soft):
        return torch.autograd.grad(call(soft(scores)), (scores, *leaves), d_out)

    def pair(backend, soft):
        return partial(call, backend=backend), lambda s: ops.soft_permutation(s, num_nodes, backend=soft)

    pairs = {
        "kernel": pair(kernel(op, device), kernel("soft_permutation", device)),
        "reference": pair("reference", "reference"),
    }
    if device == "cuda":
        pairs["compiled"] = tuple(torch.compile(f, dynamic=False) for f in pairs["reference"])
    for name, function in (("forward", forward), ("forward and backward, incl. permutation", both)):
        variants = chosen({variant: partial(function, *pair) for variant, pair in pairs.items()})
        check(variants)
        counted = needs.counts | {"dtype": dtype} if name == "forward" else {}
        rows = compare(f"{needs.case}, {name}", variants, device=device, seconds=seconds, **counted)
        record(rows, variants["kernel"]) if name != "forward" else record.rows(rows)


DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
every_dtype = pytest.mark.parametrize("dtype", DTYPES["cuda"], ids=str)


@every_dtype
def test_peptides(dtype, device, seconds, record):
    if dtype not in DTYPES[device]:
        pytest.skip(f"no case of {device}")
    N, channels, (sizes, samples, *graphs) = 444, 8, peptides_like(device)
    edge_index, ptr = (x.to(device) for x in graphs)
    attributes = one_hot(edge_index.shape[1], channels).to(device, dtype)
    patch = -(-N // GRID)
    weight = PatchWeight(WIDTH, channels, patch, patch)().detach().to(device, dtype).requires_grad_()
    bias = torch.zeros(WIDTH, device=device, dtype=dtype)
    scores = torch.randn(len(sizes), samples, N, device=device, requires_grad=True)
    embed = lambda p, backend: ops.embed_edges(  # noqa: E731
        edge_index, attributes, ptr, p, weight, bias.requires_grad_(), grid=GRID, backend=backend
    )
    run_all(
        "embed",
        shapes.embed(N, len(sizes), edge_index.shape[1], samples, dtype),
        embed,
        scores,
        ptr.diff(),
        (weight, bias),
        device,
        seconds,
        record,
        dtype=dtype,
    )


@every_dtype
def test_pattern(dtype, device, seconds, record):
    if dtype not in DTYPES[device]:
        pytest.skip(f"no case of {device}")
    torch.manual_seed(0)
    N, channels, (sizes, samples) = 188, 4, pattern_like(device)
    matrix = dense_graphs(sizes, N, channels, 0.4).to(device, dtype)
    patch = -(-N // GRID)
    weight = PatchWeight(WIDTH, channels, patch, patch)().detach().to(device, dtype).requires_grad_()
    bias = torch.zeros(WIDTH, device=device, dtype=dtype, requires_grad=True)
    scores = torch.randn(len(sizes), samples, N, device=device, requires_grad=True)
    run_all(
        "embed_matrix",
        shapes.embed_matrix(N, sizes, samples, channels, dtype),
        lambda p, backend: ops.embed_matrix(matrix, p, weight, bias, grid=GRID, backend=backend),
        scores,
        torch.tensor(sizes, device=device),
        (weight, bias),
        device,
        seconds,
        record,
        dtype=dtype,
    )


@every_dtype
@pytest.mark.parametrize("where", ["nodes", "pairs"])
def test_readout(where, dtype, device, seconds, record):
    """PATTERN reads every node from the diagonal's tokens; PCQM-Contact pairs of nodes from all tokens."""
    if dtype not in DTYPES[device]:
        pytest.skip(f"no case of {device}")
    sizes, samples, N = read_like(where, device)
    ptr = torch.tensor([0, *sizes], device=device).cumsum(0)
    nodes, patch = sum(sizes), -(-N // GRID)
    if where == "nodes":
        items, axes = torch.arange(nodes, device=device)[None], 1
    else:  # about as many pairs a graph as nodes
        offsets = torch.cat(
            [torch.randint(n, (2, n)) + begin for n, begin in zip(sizes, ptr.tolist(), strict=False)], 1
        )
        items, axes = offsets.to(device), 2
    tokens = torch.randn(len(sizes), samples, GRID**axes, WIDTH, device=device, dtype=dtype, requires_grad=True)
    weight = PatchWeight(WIDTH, 1, *[patch] * axes)().detach().to(device, dtype).requires_grad_()
    scores = torch.randn(len(sizes), samples, N, device=device, requires_grad=True)
    run_all(
        "readout",
        shapes.readout(where, N, len(sizes), items.shape[1], samples, dtype),
        lambda p, backend: ops.readout(tokens, ptr, p, weight, at=items, backend=backend),
        scores,
        ptr.diff(),
        (tokens, weight),
        device,
        seconds,
        record,
        dtype=dtype,
    )


def test_node_identifiers(device, seconds, record):
    """Those of EXP: 64 slots of width 64."""
    B, S, N, D, n = 100, 10, 64, 64, 45
    ptr = torch.arange(0, B * n + 1, n, device=device)
    weight = torch.randn(N, D, device=device, requires_grad=True)
    scores = torch.randn(B, S, N, device=device, requires_grad=True)
    run_all(
        "node_identifiers",
        shapes.node_identifiers(B, S, n, D),
        lambda p, backend: ops.node_identifiers(ptr, p, weight, nodes=B * n, backend=backend),
        scores,
        ptr.diff(),
        (weight,),
        device,
        seconds,
        record,
        dtype=torch.float32,
    )


@every_dtype
def test_aggregate(dtype, device, seconds, record):
    """The messages of a GIN: 64 channels of 10 samples, forward and backward."""
    if dtype not in DTYPES[device]:
        pytest.skip(f"no case of {device}")
    sizes, *graphs = messages_like(device)
    (edges, ptr), samples = (x.to(device) for x in graphs), 10
    x = torch.randn(sum(sizes) + len(sizes), samples, 64, device=device, dtype=dtype, requires_grad=True)
    own, d_out = torch.tensor(1.2, device=device, requires_grad=True), torch.randn_like(x)

    def run(call):
        return torch.autograd.grad(call(x, own), (x, own), d_out)

    def call(x, own, backend):
        return ops.aggregate(x, edges, own=own, ptr=ptr, backend=backend)

    backends = {"kernel": kernel("aggregate", device), "reference": "reference"}
    variants = {name: partial(run, partial(call, backend=backend)) for name, backend in backends.items()}
    if device == "cuda":
        variants["compiled"] = partial(run, torch.compile(partial(call, backend="reference"), dynamic=False))
    variants = chosen(variants)
    check(variants)
    needs = shapes.aggregate(edges.shape[1], tuple(x.shape), dtype)
    rows = compare(needs.case, variants, device=device, seconds=seconds, **needs.counts)
    record(rows, variants["kernel"])


def test_distribution(device, seconds, record):
    """GIN to soft permutation and entropy: linear-time Sinkhorn against the dense one."""
    torch.manual_seed(0)
    sizes, N = torch.randint(80, 222, (16,)).tolist(), 444
    edge_index, ptr = molecules(sizes)
    batch = Graphs(*(x.to(device) for x in (torch.randn(int(ptr[-1]), 9), edge_index, ptr)))
    network = GIN(9).to(device)
    noise = torch.rand(network.noise_shape(batch, 1), device=device)
    parameters = list(network.parameters())

    def step(backend):
        scores = batch.padded(network(batch, noise)["scores"], N)
        p = ops.soft_permutation(scores, batch.num_nodes, backend=backend)
        entropy = ops.permutation_entropy(p, backend=backend)
        return torch.autograd.grad(entropy, parameters, allow_unused=True)

    variants = {"kernel": lambda: step(kernel("soft_permutation", device)), "reference": lambda: step("reference")}
    rows = compare(
        "distribution, GIN to permutation, forward and backward, 16 Peptides-like graphs, S 1",
        variants,
        device=device,
        seconds=seconds,
    )
    record(rows, variants["kernel"])


def test_linear_batch_norm_relu(device, seconds, record):
    """With the rows of an EXP batch: 100 graphs, 10 samples, 64 channels."""
    x = torch.randn(45_500, 64, device=device, requires_grad=True)
    linear = torch.randn(64, 64, device=device).div_(8).requires_grad_()
    weight, bias = (f(64, device=device, requires_grad=True) for f in (torch.ones, torch.zeros))
    d_y = torch.randn_like(x)

    def plain(x, linear, weight, bias):
        return torch.nn.functional.batch_norm(x @ linear.T, None, None, weight, bias, True).relu()

    compiled, leaves, op = torch.compile(plain), (x, linear, weight, bias), ops.linear_batch_norm_relu
    fast = kernel("linear_batch_norm_relu", device)
    variants = {
        "kernel": lambda: torch.autograd.grad(op(*leaves, backend=fast)[0], leaves, d_y),
        "reference": lambda: torch.autograd.grad(op(*leaves, backend="reference")[0], leaves, d_y),
        "torch": lambda: torch.autograd.grad(plain(*leaves), leaves, d_y),
        "compiled": lambda: torch.autograd.grad(compiled(*leaves), leaves, d_y),
    }
    variants = chosen(variants)
    check(variants)
    needs = shapes.linear_batch_norm_relu(*x.shape)
    rows = compare(needs.case, variants, device=device, seconds=seconds, **needs.counts)
    record(rows, variants["kernel"])


STEP_MEMORY = """
import sys, torch
from benchmarks.test_steps import CASES
def peak():  # of the resident set since the last reset, in kB (Linux)
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
step = CASES[sys.argv[1]]("cpu").step
open("/proc/self/clear_refs", "w").write("5")
before = peak()
step(); step()
print(peak() - before, peak())
"""


@pytest.mark.parametrize("case", ["EXP-classify MLP-PS"])
def test_peak_memory(case, device, record):
    """Resident memory that two training steps add: gradients, optimiser state, activations."""
    if device != "cpu":
        pytest.skip("measures the CPU")
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", STEP_MEMORY, case], check=True, capture_output=True, text=True
    )
    added, whole = (int(x) / 1024 for x in run().stdout.split())
    note = {"peak MB": round(added), "whole process MB": round(whole), "public code MB": 3700}
    record([Row(f"{case}, training step, memory", "step", 0, 0, 0, 1, extra=note)], lambda: None)
    assert added < 1500
