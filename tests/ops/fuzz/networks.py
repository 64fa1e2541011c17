"""Cases of whole networks as one op."""

import torch
from torch import Tensor

from probsym_fast.ops import message_passing, mlp, transformer, vector_edge_convolution
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from tests.ops.fuzz.draws import Case, Draw


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
