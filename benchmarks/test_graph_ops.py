"""Group action and tokens, and the whole distribution, beside their dense references."""

import subprocess
import sys

import pytest
import torch

from benchmarks.harness import Row, compare
from benchmarks.inputs import dense_graphs, molecules, one_hot
from benchmarks.test_ops import kernel
from probsym_fast import ops
from probsym_fast.distributions import GIN
from probsym_fast.groups import Graphs
from probsym_fast.models import PatchWeight

WIDTH, GRID = 768, 14  # of a ViT-B/16


def check(variants: dict) -> None:
    """All variants give the first's tensors to 2e-3 of the largest entry, before anything is timed."""
    results = {name: function() for name, function in variants.items()}
    exact = results["reference"]
    for name, found in results.items():
        for x, y in zip(found, exact, strict=True):
            error = (x - y).abs().max() / y.abs().max().clamp(min=1e-20)
            assert error < 2e-3, (name, error)


def run_all(case, embed, scores, num_nodes, leaves, device, seconds, record, operations, bytes):
    """embed(p, backend) -> tokens; times the forward on given permutations, then scores to all gradients."""
    backend = kernel("embed", device)
    with torch.no_grad():
        p = ops.soft_permutation(scores, num_nodes)
        d_tokens = torch.randn_like(embed(p, backend))

    def forward(backend):
        with torch.no_grad():
            return (embed(p, backend),)

    def both(backend):
        p = ops.soft_permutation(scores, num_nodes, backend=backend)
        return torch.autograd.grad(embed(p, backend), (scores, *leaves), d_tokens)

    for name, function in (("forward", forward), ("forward and backward, incl. permutation", both)):
        variants = {"kernel": lambda f=function: f(backend), "reference": lambda f=function: f("reference")}
        check(variants)
        counted = {"operations": operations, "bytes": bytes} if name == "forward" else {}
        rows = compare(f"action + tokens, {name}, {case}", variants, device=device, seconds=seconds, **counted)
        record(rows, variants["kernel"]) if name != "forward" else record.rows(rows)


def test_peptides(device, seconds, record):
    torch.manual_seed(0)
    nodes, N, channels, samples = 151, 444, 8, 8
    edge_index, ptr = (x.to(device) for x in molecules([nodes]))
    attributes = one_hot(edge_index.shape[1], channels).to(device)
    patch = -(-N // GRID)
    weight, bias = PatchWeight(WIDTH, channels, patch, patch)().to(device), torch.zeros(WIDTH, device=device)
    weight = weight.detach().requires_grad_()
    scores = torch.randn(1, samples, N, device=device, requires_grad=True)
    edges = edge_index.shape[1]
    embed = lambda p, backend: ops.embed_edges(  # noqa: E731
        edge_index, attributes, ptr, p, weight, bias.requires_grad_(), grid=GRID, backend=backend
    )
    run_all(
        f"Peptides-like (N {N}, {edges} edges, {samples} samples)",
        embed,
        scores,
        ptr.diff(),
        (weight, bias),
        device,
        seconds,
        record,
        operations=2 * samples * edges * WIDTH,
        bytes=4 * samples * (GRID**2 + edges) * WIDTH,
    )


def test_pattern(device, seconds, record):
    torch.manual_seed(0)
    sizes, N, channels, samples = [60, 118, 176, 118], 188, 4, 2  # mean 118, as the data set has
    matrix = dense_graphs(sizes, N, channels, 0.4).to(device)
    patch = -(-N // GRID)
    weight = PatchWeight(WIDTH, channels, patch, patch)().detach().to(device).requires_grad_()
    bias = torch.zeros(WIDTH, device=device, requires_grad=True)
    scores = torch.randn(len(sizes), samples, N, device=device, requires_grad=True)
    used = sum(min(GRID, -(-n // patch)) ** 2 for n in sizes) * samples  # tokens with valid slots
    run_all(
        f"PATTERN-like (N {N}, mean 118, 40 % dense, {len(sizes)} graphs, {samples} samples)",
        lambda p, backend: ops.embed_matrix(matrix, p, weight, bias, grid=GRID, backend=backend),
        scores,
        torch.tensor(sizes, device=device),
        (weight, bias),
        device,
        seconds,
        record,
        operations=2 * used * patch * patch * channels * WIDTH,
        bytes=4 * len(sizes) * samples * GRID**2 * WIDTH,
    )


def test_distribution(device, seconds, record):
    """GIN to soft permutation and entropy: one adjacency and linear-time Sinkhorn beside the dense one."""
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
    """At the rows of an EXP batch: 100 graphs, 10 samples, 64 channels."""
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
    check(variants)
    counted = {"bytes": 4 * 7 * x.numel(), "operations": 6 * x.numel() * 64}  # x, z and y; x, z, d_y and d_x
    rows = compare(
        "linear_batch_norm_relu, forward and backward, (45500, 64, 64)",
        variants,
        device=device,
        seconds=seconds,
        **counted,
    )
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
