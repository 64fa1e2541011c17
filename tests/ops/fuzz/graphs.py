"""Cases of the ops on graphs: tokens, readout, permutations and what passes along edges."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from probsym_fast.ops import (
    Permutation,
    SoftPermutation,
    aggregate,
    embed_edges,
    embed_matrix,
    embed_nodes,
    gin,
    linear_batch_norm_relu,
    node_identifiers,
    permute,
    readout,
    soft_permutation,
)
from probsym_fast.ops._patches import PAD_MODES, patch_size
from probsym_fast.ops.gin import weights_of as gin_count
from tests.ops.fuzz.draws import Case, Draw


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
