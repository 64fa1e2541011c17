"""Every op against its dense reference and torch.compile of it; compares results before timing."""

import subprocess
import sys

import pytest
import torch

from benchmarks import shapes
from benchmarks.harness import Row, chosen, compare
from benchmarks.shapes import ITERATIONS, TAU
from probsym_fast import PointClouds, ops
from probsym_fast.distributions.vector_layers import EdgeConvolution
from probsym_fast.groups import Symmetric
from probsym_fast.ops import OPS
from probsym_fast.ops.permutation import Relaxation, sorted_distance


def kernel(op: str, device: str) -> str:
    return OPS[op].backends(device)[0]


def through_ops(scores, weights, backend):
    """Forward and backward of soft permutation and entropy, gradients into every output."""
    p = ops.soft_permutation(scores, tau=TAU, backend=backend)
    e = ops.permutation_entropy(p, backend=backend)
    return torch.autograd.grad([p.scores, p.log_r, p.log_c, e], scores, [*weights, torch.ones_like(e)])[0]


def as_learned(scores, weights, clouds):
    """The same as a learned distribution calls it: ties broken by noise, sorted in float64, relaxed in float32."""
    p, penalties = Symmetric(scores.shape[-1]).project(
        {"scores": scores}, clouds, relaxation=Relaxation(TAU, ITERATIONS)
    )
    e = penalties["entropy"]
    return torch.autograd.grad([p.scores, p.log_r, p.log_c, e], scores, [*weights, torch.ones_like(e)])[0]


def dense_core(scores, weights, iterate):
    """The same without the package; iterations and entropy share the matrix."""
    s = torch.nn.functional.normalize(scores, dim=-1)
    t = s.sort(dim=-1, descending=True).values
    log_k = -sorted_distance(t) / TAU
    log_p, log_r, log_c = iterate(log_k)
    entropy = 0
    for dim in (-1, -2):
        p = log_p.exp().clamp(min=1e-12)
        p = p / p.sum(dim, keepdim=True)
        entropy = entropy - (p * p.log()).sum(dim)
    e = (entropy.sum(-1).mean(-1) / t.shape[-1]).mean()
    return torch.autograd.grad([t, log_r, log_c, e], scores, [*weights, torch.ones_like(e)])[0]


def published(log_k):
    """The published form: the logarithms of the whole matrix, normalised by logsumexp."""
    log_p, log_r, log_c = log_k, 0, 0
    for _ in range(ITERATIONS):
        z = log_p.logsumexp(-1, keepdim=True)
        log_p, log_r = log_p - z, log_r - z.squeeze(-1)
        z = log_p.logsumexp(-2, keepdim=True)
        log_p, log_c = log_p - z, log_c - z.squeeze(-2)
    return log_p, log_r, log_c


def scaling(log_k):
    """The fastest dense form we know: r = 1 / (K c), c = 1 / (K r) by matrix-vector products."""
    k = log_k.exp()
    c = torch.ones_like(k[..., :1])
    for _ in range(ITERATIONS):
        r = 1 / (k @ c)
        c = 1 / (k.mT @ r)
    log_r, log_c = r.squeeze(-1).log(), c.squeeze(-1).log()
    return log_k + log_r[..., None] + log_c[..., None, :], log_r, log_c


@pytest.mark.parametrize("number", range(3))
def test_soft_permutation_and_entropy(number, device, seconds, record):
    shape = shapes.SOFT[device][number]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator).to(device).requires_grad_()
    weights = [torch.randn(shape, generator=generator).to(device) for _ in range(3)]
    nodes = torch.zeros(shape[0], shape[2], 1, device=device)
    clouds = PointClouds(nodes, nodes, nodes[:, None].expand(-1, shape[2], -1, -1))
    fast = lambda: through_ops(scores, weights, kernel("soft_permutation", device))  # noqa: E731
    slow = lambda: through_ops(scores, weights, "reference")  # noqa: E731
    compiled = torch.compile(lambda s: ops.soft_permutation(s, tau=TAU, backend="reference"), dynamic=False)
    entropy = torch.compile(lambda p: ops.permutation_entropy(p, backend="reference"), dynamic=False)

    def inductor():
        p = compiled(scores)
        e = entropy(p)
        return torch.autograd.grad([p.scores, p.log_r, p.log_c, e], scores, [*weights, torch.ones_like(e)])[0]

    variants = {
        "kernel": fast,
        "as a distribution calls it": lambda: as_learned(scores, weights, clouds),
        "reference": slow,
        "compiled": inductor,
        "published": lambda: dense_core(scores, weights, published),
        "scaling": lambda: dense_core(scores, weights, scaling),
    }
    variants = chosen(variants)
    exact = through_ops(scores.detach().double().requires_grad_(), [w.double() for w in weights], "reference")
    for name, function in variants.items():
        error = (function().double() - exact).abs() / exact.abs().max()
        if "distribution" in name:  # its noise orders scores that are nearly equal in another way, here and there
            error = error.flatten().kthvalue(int(0.99 * error.numel())).values
        assert error.max() < 2e-4, (name, error.max())
    needs = shapes.soft_permutation(shape)
    rows = compare(needs.case, variants, device=device, seconds=seconds, **needs.counts)
    record(rows, fast)


PEAK = """
import sys, torch
from benchmarks.test_ops import through_ops
def peak():  # of the resident set since the last reset, in kB (Linux)
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
backend, shape = sys.argv[1], tuple(map(int, sys.argv[2:]))
make = lambda s: (torch.randn(s, requires_grad=True), [torch.randn(s) for _ in range(3)])
through_ops(*make((1, 1, 4)), backend)
inputs = make(shape)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
through_ops(*inputs, backend)
print(peak() - before)
"""


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_peak_memory(backend, device, record):
    """Extra resident memory of forward and backward; the reference runs an eighth of the batch, times eight."""
    if device != "cpu" or backend not in OPS["soft_permutation"].backends("cpu"):
        pytest.skip(f"measures the CPU backend {backend!r}")
    shape = (16, 10, 444) if backend == "cpu" else (2, 10, 444)
    command = [sys.executable, "-c", PEAK, backend, *map(str, shape)]
    run = lambda: subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: E731
    megabytes = int(run().stdout) / 1024 * 16 / shape[0]
    note = {"peak MB": round(megabytes, 1)} | ({} if backend == "cpu" else {"from": f"{shape}, times 8"})
    record([Row("soft_permutation + entropy, (16, 10, 444), memory", backend, 0, 0, 0, 1, extra=note)], lambda: None)
    if backend == "cpu":
        assert megabytes < 30


def test_permute(device, seconds, record):
    """The values in their order, on a given permutation; the gradient to the permutation too."""
    B, N = 64, 1000
    scores = torch.randn(B, 1, N, device=device, requires_grad=True)
    x, weight = (torch.randn(B, 1, N, device=device, requires_grad=True) for _ in range(2))
    p = ops.soft_permutation(scores)
    leaves = x, p.scores, p.log_r, p.log_c

    def run(backend):
        return torch.autograd.grad(ops.permute(p, x, inverse=True, backend=backend), leaves, weight, retain_graph=True)

    variants = {"kernel": lambda: run(kernel("permute", device)), "reference": lambda: run("reference")}
    for found, wanted in zip(*(f() for f in variants.values()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    needs = shapes.permute(B, N)
    record(compare(needs.case, variants, device=device, seconds=seconds / 2, **needs.counts), variants["kernel"])


@pytest.mark.parametrize("normal", [False, True])
def test_noise(normal, device, seconds, record):
    """Numbers from a counter, in float64; torch: its own generator."""
    shape, seed = (128, 10, 188), torch.tensor(3, device=device)
    own = torch.randn if normal else torch.rand
    variants = {
        backend: lambda backend=backend: ops.noise(seed, shape, "model", normal=normal, backend=backend)
        for backend in (kernel("noise", device), "reference")
    }
    variants = {"kernel": next(iter(variants.values())), "reference": variants["reference"]}
    variants["torch"] = lambda: own(shape, dtype=torch.float64, device=device)
    torch.testing.assert_close(variants["kernel"](), variants["reference"]())
    needs = shapes.noise(shape, normal)
    rows = compare(f"{needs.case}, forward", variants, device=device, seconds=seconds / 2, **needs.counts)
    record(rows, variants["kernel"])


@pytest.mark.parametrize("special", [False, True])
def test_orthogonal_frame(special, device, seconds, record):
    a = torch.randn(2000, 3, 3, device=device, requires_grad=True)
    w = torch.randn(2000, 3, 3, device=device)

    def run(backend):
        return torch.autograd.grad(ops.orthogonal_frame(a, special=special, backend=backend), a, w)[0]

    compiled = torch.compile(lambda x: ops.orthogonal_frame(x, special=special, backend="reference"), dynamic=False)
    variants = {
        "kernel": lambda: run(kernel("orthogonal_frame", device)),
        "reference": lambda: run("reference"),
        "compiled": lambda: torch.autograd.grad(compiled(a), a, w)[0],
    }
    variants = chosen(variants)
    close = [f() for f in variants.values()]
    assert all((x - close[1]).abs().median() < 1e-4 for x in close)
    needs = shapes.orthogonal_frame(2000, special)
    rows = compare(needs.case, variants, device=device, seconds=seconds / 2, **needs.counts)
    record(rows, variants["kernel"])


@pytest.mark.parametrize("mean", [False, True])
def test_act_orthogonal(mean, device, seconds, record):
    B, S, n, d, C = 100, 20, 5, 3, 2
    v = torch.randn(B, n, d, C, device=device, requires_grad=True)
    g = torch.randn(B, S, d, d, device=device, requires_grad=True)
    w = torch.randn((B, n, d, C) if mean else (B, S, n, d, C), device=device)

    def run(backend):
        return torch.autograd.grad(ops.act_orthogonal(v, g, mean=mean, backend=backend), (v, g), w)

    compiled = torch.compile(lambda v, g: ops.act_orthogonal(v, g, mean=mean, backend="reference"), dynamic=False)
    variants = {
        "kernel": lambda: run(kernel("act_orthogonal", device)),
        "reference": lambda: run("reference"),
        "compiled": lambda: torch.autograd.grad(compiled(v, g), (v, g), w),
    }
    variants = chosen(variants)
    results = [f() for f in variants.values()]
    for found in results:
        for x, y in zip(found, results[1], strict=True):
            assert (x - y).abs().max() < 1e-3
    needs = shapes.act_orthogonal(B, S, n, d, C, mean)
    rows = compare(needs.case, variants, device=device, seconds=seconds / 2, **needs.counts)
    record(rows, variants["kernel"])


@pytest.mark.parametrize("C", [2, 21])
def test_vector_edge_convolution(C, device, seconds, record):
    """The two edge convolutions of n-body's Vector Neurons, in training: 100 clouds, 20 samples. steps: the module's own
    steps where there is no kernel, which compute the pairs again too."""
    n, d, M, w = 5, 3, 2000, 21
    conv = EdgeConvolution(C, w, neighbors=4).to(device)
    x = torch.randn(C, d, n, M, device=device, requires_grad=C > 2)
    leaves, d_y = [*([x] if C > 2 else []), *conv.parameters()], torch.randn(w, d, n, M, device=device)

    def run(backend):
        with ops.using_backend(backend):
            return torch.autograd.grad(conv(x), leaves, d_y)

    variants = {"kernel": lambda: run(kernel("vector_edge_convolution", device)), "steps": lambda: run("reference")}
    for found, wanted in zip(*(f() for f in variants.values()), strict=True):
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999
    needs = shapes.vector_edge_convolution(C, d, n, M, w)
    rows = compare(needs.case, variants, device=device, reference="steps", seconds=seconds, **needs.counts)
    record(rows, variants["kernel"])
