"""A differential fuzzer: every op on random inputs against its float64 reference, values and every gradient.

    python -m tests.ops.fuzz --cases 100000            the ops in turn, from seed 0 on
    python -m tests.ops.fuzz --op readout --seed 17    one case again

A case is what its op and seed say: sizes 0 and 1, ties, zeros, extreme magnitudes, any layout in memory, every dtype and
padding, arguments that are refused. Refusals must be alike, too: the same kind of error from both sides.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from probsym_fast.ops import (
    OPS,
    Permutation,
    SoftPermutation,
    act_orthogonal,
    aggregate,
    embed_edges,
    embed_image,
    embed_matrix,
    embed_nodes,
    gin,
    linear_batch_norm_relu,
    message_passing,
    mlp,
    node_identifiers,
    noise,
    orthogonal_frame,
    permutation_entropy,
    permute,
    readout,
    soft_permutation,
    transformer,
    vector_edge_convolution,
)
from probsym_fast.ops._patches import PAD_MODES, patch_size
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.helpers.items import HALF

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = {torch.float64: 200, torch.float32: 30, torch.bfloat16: 30, torch.float16: 0}  # of the units of tensors
WIDE = torch.float64, torch.float32
NEARBY = 8  # inputs with other last digits: where a sign is theirs, one of them has the other sign
LAST_DIGITS = 16  # an error of as many last digits of the input is none of the op's


@dataclass
class Leaf:
    """A floating input: what its entries are multiples of, so that bounds of numbers of order 1 hold for any."""

    tensor: Tensor
    unit: float


@dataclass
class Case:
    """call(backend, leaves) -> results in the given units; the gradients are asked for of `wanted` leaves."""

    call: Callable[[str, SimpleNamespace], tuple[Tensor, ...]]
    leaves: dict[str, Leaf]
    units: tuple[float, ...]
    combined: float  # the unit of a sum of the results that have gradients
    refused: bool
    wanted: list[str]
    amplified: float  # how much larger than a last digit of 1 what rounds within the op may come out


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.leaves: dict[str, Leaf] = {}
        self.refused, self.amplified = False, 1.0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, *options):
        return self.random.choice(options)

    def size(self, least: int = 0, most: int = 9) -> int:
        """Mostly small, often the least."""
        few, any_number = (self.random.randint(least, n) for n in (min(most, least + 4), most))
        return self.random.choice((least, least + 1, few, few, any_number))

    def spoil(self) -> bool:
        """Whether an argument is to be one that is refused."""
        spoilt = not self.refused and self.chance(0.03)
        self.refused |= spoilt
        return spoilt

    def unit(self, most: int | None = None) -> float:
        most = EXPONENTS[self.dtype] if most is None else min(most, EXPONENTS[self.dtype])
        return 2.0 ** self.random.randint(-most, most) if self.chance(0.2) else 1.0

    def integers(self, least: int, below: int, *shape: int) -> Tensor:
        return torch.randint(least, below, shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def numbers(self, *shape: int) -> Tensor:
        """float64 of order 1: any, with ties, with zeros, all alike, of very different magnitudes."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.pick("any", "any", "ties", "zeros", "alike", "alike along an axis", "magnitudes")
        if kind == "ties":
            return self.integers(-2, 3, *shape).double()
        if kind == "zeros":
            return x * (self.uniform(*shape) < self.pick(0.0, 0.5))
        if kind == "alike":
            return torch.full(shape, self.pick(1.0, -0.75), dtype=torch.float64)
        if kind == "alike along an axis" and x.numel() and x.ndim:
            return x.narrow(self.random.randrange(x.ndim), 0, 1).expand(shape).clone()
        return x * 2.0 ** -self.integers(0, 12, *shape) if kind == "magnitudes" else x

    def laid_out(self, x: Tensor) -> Tensor:
        """x in some layout: contiguous, with its axes stored in another order, within a larger tensor, repeated."""
        if not x.ndim or self.chance(0.4):
            return x.contiguous()
        axis = self.random.randrange(x.ndim)
        kind = self.pick("order", "gaps", "repeated")
        if kind == "order":
            order = self.random.sample(range(x.ndim), x.ndim)
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
        if kind == "repeated" and x.shape[axis]:
            first = x.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(x), x):
                return first.contiguous().expand(x.shape)
        if not x.numel():
            return x
        shape = [2 * n + 1 if i == axis else n for i, n in enumerate(x.shape)]
        wide = x.new_full(shape, float("nan") if x.is_floating_point() else -(10**9))
        return wide.narrow(axis, 1, 2 * x.shape[axis]).unflatten(axis, (-1, 2)).select(axis + 1, 0).copy_(x)

    def index(self, x: Tensor) -> Tensor:
        return self.laid_out(x.to(DEVICE))

    def leaf(self, name: str, x: Tensor, unit: float = 1.0, dtype: torch.dtype | None = None) -> None:
        """A floating input, rounded to the dtype, that of the case unless another is given."""
        self.leaves[name] = Leaf(self.laid_out((x * unit).to(DEVICE, dtype or self.dtype)), unit)

    def case(self, call, *units: float) -> Case:
        wanted = [name for name in self.leaves if self.chance(0.8)]
        units = units or (1.0,)
        return Case(call, self.leaves, units, units[0], self.refused, wanted, self.amplified)

    def slots(self) -> int:
        few, many = (self.random.randint(1, n) for n in (12, 70))
        return self.random.choice((1, 2, 3, few, few, few, few, many))


# --- what the ops on graphs share ---


class Graphs:
    """B graphs of `sizes` in N slots, S permutations each: hard, by hand, of all slots or the valid ones, or soft."""

    def __init__(self, d: Draw, by_ptr: bool = True):
        self.N, B, self.S = d.slots(), d.size(0, 4), d.size(1, 4)
        kind = d.pick("all slots", "valid slots", "soft")
        least = 0 if kind == "all slots" else 1
        self.sizes = [d.random.randint(least, self.N) if d.chance(0.6) else self.N for _ in range(B)]
        self.nodes, counts = sum(self.sizes), torch.tensor(self.sizes, dtype=torch.int64)
        self.ptr = d.index(torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))
        self.num_nodes = (
            None if kind == "all slots" or (self.sizes == [self.N] * B and d.chance(0.5)) else d.index(counts)
        )
        self.soft, self.tau = kind == "soft", 10 ** d.random.uniform(-1.5, 1)
        keys = d.uniform(B, self.S, self.N)
        if kind != "all slots":
            keys = torch.where(torch.arange(self.N) < counts[:, None, None], keys, 2.0 + torch.arange(self.N))
        order = keys.argsort(-1)
        self.order, self.rank = d.index(order), d.index(order.argsort(-1))
        if self.soft:
            d.amplified = 1 / self.tau
            soft = soft_permutation(d.numbers(B, self.S, self.N), counts, self.tau, d.size(0, 5), backend="reference")
            wide = torch.promote_types(d.dtype, torch.float32)
            for name, x in (("t", soft.scores), ("log_r", soft.log_r), ("log_c", soft.log_c)):
                d.leaf(name, x, dtype=wide)
        if by_ptr and B and d.spoil():
            self.ptr = self.ptr + 1 if d.chance(0.5) else self.ptr[:-1]

    def p(self, x: SimpleNamespace) -> Permutation:
        if self.soft:
            return SoftPermutation(self.order, self.num_nodes, self.rank, x.t, x.log_r, x.log_c, self.tau)
        return Permutation(self.order, self.num_nodes, self.rank)

    def items(self, d: Draw, axes: int, count: int) -> Tensor:
        """(axes, count) global node numbers, each column of one graph; repeated ones, and pairs of a node and itself."""
        full = [b for b, n in enumerate(self.sizes) if n]
        columns = []
        for _ in range(count if full else 0):
            b = d.random.choice(full)
            first = sum(self.sizes[:b])
            columns.append([first + d.random.randrange(self.sizes[b]) for _ in range(axes)])
        items = torch.tensor(columns, dtype=torch.int64).reshape(-1, axes).T
        if items.numel() and d.spoil():
            items = items.clone()
            items[d.random.randrange(axes), -1] = d.pick(-1, self.nodes, self.nodes + 10**9)
        return d.index(items)


def patches(d: Draw, g: Graphs, axes: int) -> SimpleNamespace:
    """Into how many patches the slots are cut, and the leaf "weight" (D, C, P[, P]) with its unit."""
    grid = d.pick(1, d.random.randint(1, 3), d.random.randint(1, min(g.N + 3, 9)))
    D, C = d.size(1, 9), d.size(1, 5)
    unit = d.unit()
    shape = D, C, *[patch_size(g.N, grid)] * axes
    if d.spoil():
        shape = shape[:-1] + (shape[-1] + 1,) if d.chance(0.5) else shape[1:]
    d.leaf("weight", d.numbers(*shape), unit)
    return SimpleNamespace(grid=grid, D=D, C=C, unit=unit)


def tokens_case(d: Draw, g: Graphs, axes: int, shape: tuple[int, ...], call: Callable) -> Case:
    """An op that makes tokens of values (*shape, C): call(x, grid, settings)."""
    cut, unit = patches(d, g, axes), d.unit()
    d.leaf("values", d.numbers(*shape, cut.C), unit)
    if d.chance(0.5):
        d.leaf("bias", d.numbers(cut.D), unit * cut.unit)
    pad_mode = "elsewhere" if d.spoil() else d.pick(*PAD_MODES)
    settings = {"pad_mode": pad_mode, "centered": d.chance(0.5)}
    return d.case(lambda backend, x: (call(x, cut.grid, settings | {"backend": backend}),), unit * cut.unit)


# --- a generator an op ---


def embed_edges_case(d: Draw) -> Case:
    g = Graphs(d)
    edges = g.items(d, 2, d.size(0, 30))

    def call(x, grid, settings):
        return embed_edges(edges, x.values, g.ptr, g.p(x), x.weight, x.bias, grid=grid, **settings)

    return tokens_case(d, g, 2, edges.shape[1:], call)


def embed_nodes_case(d: Draw) -> Case:
    g = Graphs(d)

    def call(x, grid, settings):
        return embed_nodes(x.values, g.ptr, g.p(x), x.weight, x.bias, tokens=grid, **settings)

    return tokens_case(d, g, 1, (g.nodes,), call)


def embed_matrix_case(d: Draw) -> Case:
    g = Graphs(d, by_ptr=False)

    def call(x, grid, settings):
        return embed_matrix(x.values, g.p(x), x.weight, x.bias, grid=grid, **settings)

    return tokens_case(d, g, 2, (len(g.sizes), g.N, g.N), call)


def embed_image_case(d: Draw, turned: bool = False) -> Case:
    B, S, C, D, P, Q = d.size(0, 4), d.size(1, 4), d.size(1, 6), d.size(1, 40), d.size(1, 9), d.size(1, 9)
    H, W, unit, scale = P * d.size(1, 4), Q * d.size(1, 4), d.unit(), d.unit()
    d.amplified = float(max(H, W))  # of coordinates
    d.leaf("pixels", d.numbers(B, C + d.spoil(), H, W), unit)
    d.leaf("weight", d.numbers(*(D, C, P, Q)[d.spoil() :]), scale)
    if d.chance(0.5):
        d.leaf("bias", d.numbers(D), unit * scale)
    settings = {"pad_mode": "elsewhere" if d.spoil() else d.pick("zeros", "replicate")}
    turns = None
    if turned:
        turns = d.integers(0, 8, B, S) if H == W else 2 * d.integers(0, 4, B, S)
        if B and d.spoil():
            turns[-1, -1] = d.pick(-1, 8, 2**40)
        turns = d.index(turns)
    else:
        d.leaf("plane", torch.randn(B, S, 2, 2, generator=d.generator, dtype=torch.float64))

    def call(backend, x):
        plane = x.plane if turns is None else turns
        return (embed_image(x.pixels, plane, x.weight, x.bias, **settings, backend=backend),)

    return d.case(call, unit * scale)


def embed_turned_case(d: Draw) -> Case:
    return embed_image_case(d, turned=True)


def readout_case(d: Draw) -> Case:
    g, where = Graphs(d), d.pick("nodes", "diagonal", "some nodes", "pairs")
    axes = 1 if "nodes" in where else 2
    at = where if where in ("nodes", "diagonal") else g.items(d, axes, d.size(0, 30))
    cut, unit, centered = patches(d, g, axes), d.unit(), d.chance(0.5)
    d.leaf("tokens", d.numbers(len(g.sizes), g.S, cut.grid**axes, cut.D), unit)
    if d.chance(0.5):
        d.leaf("bias", d.numbers(cut.C), unit * cut.unit)

    def call(backend, x):
        return (readout(x.tokens, g.ptr, g.p(x), x.weight, x.bias, at=at, centered=centered, backend=backend),)

    return d.case(call, unit * cut.unit)


def node_identifiers_case(d: Draw) -> Case:
    g, unit = Graphs(d), d.unit()
    d.leaf("weight", d.numbers(g.N + d.spoil(), d.size(0, 20)), unit)
    return d.case(lambda backend, x: (node_identifiers(g.ptr, g.p(x), x.weight, backend=backend),), unit)


def permute_case(d: Draw) -> Case:
    g, unit = Graphs(d, by_ptr=False), d.unit()
    samples, features = 1 if d.chance(0.3) else g.S, [d.size(0, 20) for _ in range(d.size(0, 2))]
    d.leaf("x", d.numbers(len(g.sizes), samples, g.N + d.spoil(), *features), unit)
    inverse = d.chance(0.5)
    return d.case(lambda backend, x: (permute(g.p(x), x.x, inverse=inverse, backend=backend),), unit)


def some_edges(d: Draw) -> tuple[list[int], Tensor, Tensor]:
    """Sizes of graphs, edges within them, one perhaps of no node, and the offsets."""
    sizes = [d.size(0, 12) for _ in range(d.size(0, 4))]
    starts, edges = torch.tensor([0, *sizes]).cumsum(0), []
    for _ in range(d.size(0, 60)):
        full = [b for b, n in enumerate(sizes) if n]
        if full:
            b = d.random.choice(full)
            edges.append([int(starts[b]) + d.random.randrange(sizes[b]) for _ in range(2)])
    edges = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T.clone()
    if edges.numel() and d.spoil():
        edges[d.pick(0, 1), 0] = d.pick(-1, sum(sizes))
    return sizes, d.index(edges), d.index(starts)


def aggregate_case(d: Draw) -> Case:
    sizes, edges, offsets = some_edges(d)
    nodes, unit = sum(sizes), d.unit()
    ptr = offsets if d.chance(0.5) else None
    if ptr is not None and d.spoil():
        ptr = ptr + 1
    rows = nodes + (len(sizes) if ptr is not None else 0)
    d.leaf("x", d.numbers(rows, *[d.size(0, 9) for _ in range(d.pick(0, 1, 2))]), unit)
    if d.chance(0.5):
        d.leaf("own", d.numbers())
    return d.case(lambda backend, x: (aggregate(x.x, edges, own=x.own, ptr=ptr, backend=backend),), unit)


def gin_case(d: Draw) -> Case:
    sizes, edges, ptr = some_edges(d)
    width, layers, out = d.size(1, 40), d.size(1, 3), d.size(1, 20)
    if d.spoil():
        ptr = ptr + 1
    d.leaf("x", d.numbers(sum(sizes), d.size(0, 9), width))
    d.leaf("weights", d.numbers(gin_count(width, layers, out) + d.spoil()) * 0.25)
    activation = "elu" if d.spoil() else d.pick("tanh", "gelu", "silu")
    settings = {"layers": layers, "out_features": out, "activation": activation, "final": d.chance(0.5)}
    settings["recompute"] = d.chance(0.5)
    d.amplified = 16.0**layers  # sums over neighbours

    def call(backend, x):
        return (gin(x.x, edges, ptr, x.weights, **settings, backend=backend),)

    return d.case(call)


def linear_batch_norm_relu_case(d: Draw) -> Case:
    M, K, C = d.size(1, 70), d.size(0, 9), d.size(0, 40)
    units = [d.unit(8) for _ in range(3)]
    d.leaf("x", d.numbers(M, K) + d.pick(0, 0, 10) * d.numbers(K), units[0])
    d.leaf("linear", d.numbers(C, K + d.spoil()), units[1])
    d.leaf("weight", d.numbers(C), units[2])
    bias = 0.1 + d.uniform(C)  # not 0: what is 0 before the ReLU has no one gradient
    d.leaf("bias", bias * d.pick(1.0, -1.0), units[2])
    eps = -1.0 if d.spoil() else d.pick(1e-5, 1e-3, 0.1) * (units[0] * units[1]) ** 2

    def call(backend, x):
        return linear_batch_norm_relu(x.x, x.linear, x.weight, x.bias, eps, backend=backend)

    unit = units[0] * units[1]
    if not d.refused and C:  # the mean is rounded in z's digits, the deviation divides, sums over rows cancel
        x, linear = (d.leaves[name].tensor.double() for name in ("x", "linear"))
        z = x @ linear.T
        deviation = (z.var(0, correction=0) + eps).sqrt()
        rows = M * max(1.0, float(x.abs().max()) / units[0] if x.numel() else 0.0) * unit
        d.amplified += float((z / deviation).square().max() + rows / deviation.min())
    return d.case(call, units[2], unit, unit * unit)


def orthogonal_frame_case(d: Draw) -> Case:
    size, lead, special = d.pick(1, 2, 3, 3, 3, 4, 5), [d.size(0, 20) for _ in range(d.pick(0, 1, 2))], d.chance(0.5)
    a = d.numbers(*lead, size, size)
    if d.chance(0.5):  # independent, but for what follows
        a = a + 4 * torch.eye(size).flip(0)
    for _ in range(d.pick(0, 0, 1, 2)):
        column, other = d.random.randrange(size), d.random.randrange(size)
        a[..., column] = d.pick(0.0, 1.0, -1.0, 2.0, -0.25) * a[..., other]
    shares = independent_shares(a, d.dtype)
    narrow = torch.finfo(d.dtype).bits < 64
    if (
        (shares > 1e-15) & (shares < (1e-5 if narrow else 1e-12))
    ).any():  # the definition replaces such a column by dtype
        a, shares = a + 16 * torch.eye(size).flip(0), torch.ones(())
    kept = torch.where(shares > 1e-15, shares, 1.0).prod(
        -1
    )  # gradients are divided by the one column's and the next one's
    d.amplified = (
        1 / float(kept.min()) ** 2 if kept.numel() else 1.0
    )  # what rounds in q = u / |u| is divided by |u| again
    if a.numel() and d.spoil():
        a[..., -1, -1] = d.pick(float("nan"), float("inf"))
    most = {torch.float64: 900, torch.float16: 0}.get(d.dtype, 110)
    unit = 2.0 ** d.random.randint(-most, most) if d.chance(0.3) else 1.0
    d.leaf("matrices", a, unit)

    def call(backend, x):
        backend = backend if size <= 3 or backend == "reference" else "auto"  # beyond 3 there is the reference only
        return (orthogonal_frame(x.matrices, special=special, backend=backend),)

    return d.case(call)


def independent_shares(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Of every column in this dtype: its length without what depends on the frame's columns before, by its length."""
    a = a.to(dtype).double()
    along = (orthogonal_frame(a, backend="reference") * a).sum(-2).abs()
    return along / a.norm(dim=-2).clamp(min=1e-300)


def noise_case(d: Draw) -> Case:
    shape = [d.size(0, 20), d.size(0, 9), *[d.size(0, 40) for _ in range(d.pick(0, 1, 1, 2))]]
    seed = torch.tensor(d.pick(0, -1, 2**63 - 1, d.random.randrange(2**62)), device=DEVICE)
    rows = d.pick(None, d.index(d.integers(-(2**62), 2**62, shape[0])))
    settings = {
        "normal": d.chance(0.5),
        "first": d.pick(0, 1, 2**40),
        "mirrored": d.chance(0.5),
        "block": d.pick(1, 2, 5),
    }
    forks = d.pick((), (0,), (3, 1))
    if d.spoil():
        settings |= d.pick({"block": 0}, {"first": -1}, {"rows": torch.zeros(shape[0] + 1, dtype=torch.int64)})
    settings = {"rows": rows} | settings
    return d.case(lambda backend, x: (noise(seed, shape, "x", forks=forks, **settings, backend=backend),))


def act_orthogonal_case(d: Draw) -> Case:
    B, S, n, size, C = d.size(0, 4), d.size(1, 5), d.size(0, 20), d.size(1, 5), d.size(0, 9)
    flags, unit = {"inverse": d.chance(0.5), "mean": d.chance(0.5)}, d.unit()
    lead = (B,) if d.chance(0.5) else (B, S)
    d.leaf("vectors", d.numbers(*lead, n, size + d.spoil(), C), unit)
    wide = torch.promote_types(d.dtype, torch.float32) if d.chance(0.5) else None
    d.leaf("frames", d.numbers(B, S, size, size), dtype=wide)
    return d.case(lambda backend, x: (act_orthogonal(x.vectors, x.frames, **flags, backend=backend),), unit)


def soft_permutation_case(d: Draw) -> Case:
    B, S, N, normalize = d.size(0, 4), d.size(0, 4), 0 if d.chance(0.01) else d.slots(), d.chance(0.7)
    d.refused |= N == 0
    scores = (d.numbers(B, S, N) * 64).round() / 64  # equal, or so far apart that rounding does not change their order
    counts = d.integers(1, N + 1, B) if N and d.chance(0.5) else None
    if counts is not None and B and d.spoil():
        counts[-1] = d.pick(0, N + 1)
    elif scores.numel() and d.spoil():
        scores[-1, -1, 0] = d.pick(float("nan"), float("inf"), -float("inf"))
    unit = d.unit(20)
    tau, iterations = 10 ** d.random.uniform(-1.5, 1), d.pick(0, 1, 5, 20)
    d.leaf("scores", scores, unit)
    counts = None if counts is None else d.index(counts)
    settings = {"tau": tau if normalize else tau * unit, "iterations": iterations, "normalize": normalize}
    settings["dtype"] = torch.float64 if d.chance(0.3) else None  # the reference's is float64 in any case

    def call(backend, x):
        p = soft_permutation(x.scores, counts, **settings, backend=backend)
        return p.scores, p.log_r, p.log_c, p.order, p.rank

    d.amplified = 2 / tau * (1 + iterations)  # the kernels keep no iteration: backward runs them again
    if normalize and scores.numel():  # the gradient is divided by the norm, also where it should vanish
        d.amplified /= min(1.0, float(scores.nan_to_num().norm(dim=-1).min().clamp(min=1e-6)))
    case = d.case(call, 1.0 if normalize else unit, 1.0, 1.0, 1.0, 1.0)
    case.combined = max(case.units)
    return case


def permutation_entropy_case(d: Draw) -> Case:
    B, S, N = d.size(1, 4), d.size(1, 4), d.slots()
    counts = d.integers(1, N + 1, B) if d.chance(0.5) else None
    tau = 10 ** d.random.uniform(-1.5, 1)
    d.amplified = 1 / tau
    soft = soft_permutation(d.numbers(B, S, N), counts, tau, d.pick(0, 1, 20), backend="reference")
    wide = torch.promote_types(d.dtype, torch.float32)
    for name, x in (("t", soft.scores), ("log_r", soft.log_r), ("log_c", soft.log_c)):
        d.leaf(name, x, dtype=wide)
    order, rank = d.index(soft.order), d.index(soft.rank)
    counts = None if counts is None else d.index(counts)
    short = d.spoil()

    def call(backend, x):
        p = SoftPermutation(order, counts, rank, x.t, x.log_r, x.log_c[..., 1:] if short else x.log_c, tau)
        return (permutation_entropy(p, backend),)

    return d.case(call)


def permutation_case(d: Draw) -> Case:
    """A permutation by hand against what it should be, by sorting."""
    B, S, N = d.size(0, 4), d.size(0, 4), d.size(0, 12)
    counts = d.integers(1, N + 1, B) if N and d.chance(0.5) else None
    keys = d.uniform(B, S, N)
    if counts is not None:
        keys = torch.where(torch.arange(N) < counts[:, None, None], keys, 2.0 + torch.arange(N))
    order = keys.argsort(-1)
    rank = order.argsort(-1) if d.chance(0.5) else None
    if N > 1 and B * S and d.chance(0.2):
        spoilt = order if rank is None else rank
        spoilt[-1, -1, 0] = d.pick(int(spoilt[-1, -1, 1]), -1, N)
        d.refused = True
    order, rank = d.index(order), None if rank is None else d.index(rank)

    def call(backend, x):
        if backend != "reference":
            p = Permutation(order, None if counts is None else counts.to(DEVICE), rank)
            return p.order, p.rank, p.hard(torch.float64), p.inverse().order
        slots = torch.arange(N, device=DEVICE).expand(order.shape)
        inverse = order.argsort(-1)
        if not torch.equal(order.sort(-1).values, slots) or (rank is not None and not torch.equal(rank, inverse)):
            raise ValueError
        hard = torch.zeros(B, S, N, N, dtype=torch.float64, device=DEVICE).scatter_(2, order[..., None, :], 1.0)
        return order, inverse, hard, inverse

    return d.case(call, 1.0, 1.0, 1.0, 1.0)


def message_passing_case(d: Draw) -> Case:
    B, S, n, features, C = d.size(0, 4), d.size(1, 12), d.size(1, 12), d.size(1, 20), d.size(0, 5)
    width, layers, out = d.size(1, 20), d.size(1, 3), d.size(1, 20)
    M = B * S + (1 if B != 1 and d.spoil() else 0)
    d.leaf("x", d.numbers(M, n, features))
    d.leaf("edges", d.numbers(B, n, n, C))
    d.leaf("weights", d.numbers(message_count(features, C, width, layers, out) + d.spoil()) * 0.5)
    settings = {"width": width, "layers": layers, "out_features": out, "recompute": d.chance(0.5)}
    d.amplified = 4.0**layers

    def call(backend, x):
        return (message_passing(x.x, x.edges, x.weights, **settings, backend=backend),)

    return d.case(call)


def mlp_case(d: Draw) -> Case:
    widths = [d.size(1, 70) for _ in range(d.size(2, 4))]
    d.leaf("x", d.numbers(d.size(0, 200), widths[0] + d.spoil()))
    d.leaf("weights", d.numbers(mlp_count(widths) + d.spoil()) * 0.25)
    settings = {"widths": widths, "activation": "elu" if d.spoil() else d.pick("tanh", "gelu", "silu")}
    settings |= {"first": d.chance(0.5), "last": d.chance(0.5), "recompute": d.chance(0.5)}
    d.amplified = 4.0 ** len(widths)

    def call(backend, x):
        return (mlp(x.x, x.weights, **settings, backend=backend),)

    return d.case(call)


def transformer_case(d: Draw) -> Case:
    M, L, heads = d.size(0, 40), d.size(1, 20), d.size(1, 3)
    width, layers, out = heads * d.size(1, 8), d.size(1, 3), d.pick(0, d.size(1, 20))
    features = d.pick(0, d.size(1, 20))
    settings = {"width": width, "layers": layers, "heads": heads, "feedforward": d.size(1, 30)}
    settings |= {"in_features": features, "out_features": out}
    count = transformer_count([features, width, layers, heads, settings["feedforward"], out], L)
    d.leaf("x", d.numbers(M, L, features or width))
    d.leaf("weights", d.numbers(count + d.spoil()) * 0.5)
    settings |= {"activation": "tanh" if d.spoil() else d.pick("gelu", "relu"), "recompute": d.chance(0.5)}
    settings["eps"] = d.pick(1.0, 1.0, 0.1)  # a norm of few features that differ little has a slope of 1 / sqrt(eps)
    which = d.pick("all", "read", "lengths")
    if which == "read":
        settings["read"] = [L] if d.spoil() else [d.random.randrange(L) for _ in range(d.random.randint(1, L))]
    lengths = d.index(d.integers(1, L + 1, M)) if which == "lengths" else None
    d.amplified = settings["eps"] ** (-0.5 - layers) * 4.0**layers

    def call(backend, x):
        return (transformer(x.x, x.weights, **settings, lengths=lengths, backend=backend),)

    return d.case(call)


def vector_edge_convolution_case(d: Draw) -> Case:
    """In general position: which neighbours are nearest, and which is pooled, does not hang on rounding."""
    C, dim, n, M, w = d.size(1, 5), d.size(1, 5), d.size(2, 12), d.size(1, 40), d.size(2, 9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=d.generator, dtype=torch.float64)

    d.leaf("x", normal(C, dim, n, M))
    for name, spoilt in (("feature", d.spoil()), ("direction", False)):
        map_ = normal(w, 2 * C + spoilt)
        d.leaf(name, map_ + 0.3 * map_.sign())  # no vector is almost 0
    d.leaf("gain", d.uniform(w + d.spoil()) + 0.5)
    d.leaf("shift", d.numbers(w))
    pool, *running = (d.index(t.to(d.dtype)) for t in (normal(w, w), d.uniform(w), d.uniform(w) + 0.5))
    given, neighbors = d.chance(0.5), 0 if d.spoil() else d.size(1, 14)
    num_nodes = d.index(torch.randint(2, n + 1, (M,), generator=d.generator)) if d.chance(0.4) else None
    d.amplified = 1e5  # 1 / <q, q> and 1 / |p|, which may be small: the reference in float32 differs as much

    def call(backend, x):
        weights = x.feature, x.direction, pool.to(x.x), x.gain, x.shift
        seen = tuple(t.to(x.x) for t in running) if given else None
        settings = {"neighbors": neighbors, "num_nodes": num_nodes, "backend": backend}
        y, mean, variance, count = vector_edge_convolution(x.x, *weights, seen, **settings)
        return y, mean, variance, count

    return d.case(call, 1.0, 1.0, 1.0, 1.0)


CASES: dict[str, tuple[str | None, Callable[[Draw], Case]]] = {  # public name: the op, its generator
    "Permutation": (None, permutation_case),
    "act_orthogonal": ("act_orthogonal", act_orthogonal_case),
    "aggregate": ("aggregate", aggregate_case),
    "embed_edges": ("embed", embed_edges_case),
    "embed_image": ("embed_image", embed_image_case),
    "embed_image (turns)": ("embed_turned", embed_turned_case),
    "embed_matrix": ("embed_matrix", embed_matrix_case),
    "embed_nodes": ("embed", embed_nodes_case),
    "gin": ("gin", gin_case),
    "linear_batch_norm_relu": ("linear_batch_norm_relu", linear_batch_norm_relu_case),
    "message_passing": ("message_passing", message_passing_case),
    "mlp": ("mlp", mlp_case),
    "node_identifiers": ("node_identifiers", node_identifiers_case),
    "noise": ("noise", noise_case),
    "orthogonal_frame": ("orthogonal_frame", orthogonal_frame_case),
    "permutation_entropy": ("permutation_entropy", permutation_entropy_case),
    "permute": ("permute", permute_case),
    "readout": ("readout", readout_case),
    "soft_permutation": ("soft_permutation", soft_permutation_case),
    "transformer": ("transformer", transformer_case),
    "vector_edge_convolution": ("vector_edge_convolution", vector_edge_convolution_case),
}


# --- the comparison ---


def outcome(case: Case, backend: str, leaves: dict[str, Tensor], combination: Callable[[Tensor, int], Tensor]):
    """The results, and the gradients of a combination of them to the wanted leaves; or the type of the refusal.

    combination: the gradient that comes in to the i-th result that has one.
    """
    made = {name: x.detach().requires_grad_(name in case.wanted) for name, x in leaves.items()}
    try:
        results = case.call(backend, SimpleNamespace(**{"bias": None, "own": None} | made))
    except (TypeError, ValueError) as error:
        return type(error)
    smooth = [x for x in results if x.requires_grad]
    gradients = {}
    if smooth:
        wanted = [made[name] for name in case.wanted]
        given = [combination(x, i) for i, x in enumerate(smooth)]
        found = torch.autograd.grad(smooth, wanted, given, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(case.wanted, found, strict=True))
    return [x.detach() for x in results], gradients


def last_digits_changed(x: Tensor, eps: float, way: int) -> Tensor:
    """x with its last digit one up or down, as the digits say: equal numbers, and twice or minus one, change alike."""
    digits = torch.frexp(x.abs()).mantissa
    return x * (1 + eps * (digits * 1e6 + way).sin().sign())


def check(name: str, seed: int) -> None:
    """Raises AssertionError where a case of an op differs from the float64 reference, by value, gradient or refusal."""
    op, make = CASES[name]
    d = Draw(seed)
    case = make(d)
    kernels = OPS[op].backends(DEVICE.type) if op else ("made",)
    lacking = op is not None and d.dtype == torch.float64 and d.dtype not in OPS[op].kernel_dtypes(DEVICE.type)
    backend = kernels[-1] if lacking or d.chance(0.2) else kernels[0]

    def combination(x: Tensor, i: int) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
        return drawn.to(DEVICE, d.dtype).to(x.dtype)

    before = {name: x.tensor.clone() for name, x in case.leaves.items()}
    found = outcome(
        case,
        backend,
        {name: x.tensor for name, x in case.leaves.items()},
        lambda x, i: d.laid_out(combination(x, i)),
    )
    for name, x in case.leaves.items():
        assert torch.equal(x.tensor.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"
    exact = {name: x.tensor.double().contiguous() for name, x in case.leaves.items()}
    expected = outcome(case, "reference", exact, combination)
    if isinstance(found, type) or isinstance(expected, type):
        assert found is expected, f"{backend} gives {named(found)}, the reference {named(expected)}"
        assert case.refused, f"refused: {named(found)}"
        return
    assert not case.refused, "what must be refused was not"

    eps = torch.finfo(torch.promote_types(d.dtype, torch.float32)).eps
    nearby, floor = [], eps * case.amplified

    def sensitivity(part: int, key) -> float:
        """How much a result moves with the last digits of the input."""
        while len(nearby) < NEARBY:
            changed = {name: last_digits_changed(x, eps, len(nearby)) for name, x in exact.items()}
            nearby.append(outcome(case, "reference", changed, combination))
        return max(float((other[part][key] - expected[part][key]).abs().max()) for other in nearby)

    for i, (x, y) in enumerate(zip(found[0], expected[0], strict=True)):
        if x.is_floating_point():
            near(
                f"result {i}",
                x,
                y,
                VALUE if x.dtype in WIDE else HALF,
                case.units[i],
                lambda i=i: sensitivity(0, i) + floor * case.units[i],
            )
        else:
            assert torch.equal(x, y), f"result {i} differs"
    assert found[1].keys() == expected[1].keys(), f"gradients to {sorted(found[1])}, not {sorted(expected[1])}"
    for name, x in found[1].items():
        leaf = case.leaves[name]
        assert x.dtype == leaf.tensor.dtype, f"the gradient to {name} is {x.dtype}"
        unit = case.combined / leaf.unit
        near(
            f"the gradient to {name}",
            x,
            expected[1][name],
            GRADIENT,
            unit,
            lambda name=name, unit=unit: sensitivity(1, name) + floor * unit,
        )


def near(
    what: str, found: Tensor, expected: Tensor, table: dict, unit: float, sensitivity: Callable[[], float]
) -> None:
    """By the table; where that fails, by it and what rounding the inputs alone would do."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, not {tuple(expected.shape)}"
    if not found.numel():
        return
    assert not found.isnan().any(), f"{what} is not a number"
    dtype, most = found.dtype, torch.finfo(found.dtype).max  # what is beyond it is infinite, or the largest number
    found, expected = (x.double().clamp(-most, most) / unit for x in (found, expected))
    try:
        assert_near(found, expected, table, dtype)
    except AssertionError:
        bound = (
            table[dtype] * expected.abs().max().clamp(min=1.0 if table is VALUE else 1e-3)
            + LAST_DIGITS * sensitivity() / unit
        )
        error = (found - expected).abs().max()
        assert error <= bound, f"{what}: off by {error:.2g}, at most {bound:.2g} allowed"


def named(outcome) -> str:
    return outcome.__name__ if isinstance(outcome, type) else "results"


def failure(name: str, seed: int) -> str | None:
    """What is wrong in a case, in one line that repeats it."""
    try:
        check(name, seed)
    except Exception as error:  # a crash in an op is a finding, too
        text = " ".join(str(error).split())[:200]
        return f"python -m tests.ops.fuzz --op {name} --seed {seed}  # {type(error).__name__}: {text}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=CASES, help="one op (default: all in turn)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, help="how many (default: 1 of an op, 2000 of all)")
    asked = parser.parse_args(arguments)
    names = [asked.op] if asked.op else list(CASES)
    cases = asked.cases or (1 if asked.op else 2000)
    from rich.progress import Progress

    failures = 0
    with Progress() as progress:
        task = progress.add_task("cases", total=cases)
        for i in range(cases):
            line = failure(names[i % len(names)], asked.seed + i // len(names))
            if line:
                failures += 1
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    print(f"{cases} cases, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
