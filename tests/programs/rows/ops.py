"""Ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probsym_fast import ops
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, transformer_weights
from tests.programs.rows.base import Rows
from tests.programs.rows.inputs import GRID, C, D, N, P, S, frames, graphs, nodes, paired, scores, seed, soft

ROWS = Rows("ops")


def on_graphs(call: Callable) -> Callable:
    """call(batch, p, *others) with a soft permutation from given scores."""
    return lambda batch, given, *others: call(batch, soft(batch, given), *others)


def patches(*shape: int) -> Tensor:
    return torch.randn(D, C, *shape)


both = {"axes": ("batch", "edges")}
ROWS.add(
    "act_orthogonal",
    lambda x, g: ops.act_orthogonal(x, g, inverse=True),
    lambda size: (torch.randn(size.batch, size.nodes, 3, 2), frames(size)),
    axes=("batch", "nodes"),
)
ROWS.add(
    "aggregate",
    lambda batch, h: ops.aggregate(h, batch.edge_index),
    lambda size: (graphs(size), torch.randn(nodes(size), S, D)),
    **both,
)
ROWS.add(
    "aggregate (virtual nodes)",
    lambda batch, h, own: ops.aggregate(h, batch.edge_index, own=own, ptr=batch.ptr),
    lambda size: (graphs(size), torch.randn(nodes(size) + size.batch, S, D), torch.rand(())),
    **both,
)
for mode in ("zeros", "replicate", "reflect", "circular"):
    settings = {"grid": 3, "pad_mode": mode, "centered": True}
    ROWS.add(
        f"embed_edges ({mode})",
        on_graphs(
            lambda batch, p, w, b, settings=settings: ops.embed_edges(
                batch.edge_index, batch.edge_attr, batch.ptr, p, w, b, **settings
            )
        ),
        lambda size: (graphs(size, attributes=True), scores(size), patches(3, 3), torch.randn(D)),
        **both,
    )
ROWS.add(
    "embed_nodes",
    on_graphs(lambda batch, p, w, b: ops.embed_nodes(batch.x, batch.ptr, p, w, b, tokens=GRID)),
    lambda size: (graphs(size), scores(size), patches(P), torch.randn(D)),
)
ROWS.add(
    "embed_matrix",
    on_graphs(lambda batch, p, x, w, b: ops.embed_matrix(x, p, w, b, grid=GRID)),
    lambda size: (graphs(size), scores(size), torch.randn(size.batch, N, N, C), patches(P, P), torch.randn(D)),
)
ROWS.add(
    "embed_image",
    lambda x, g, w, b: ops.embed_image(x, g[..., :2, :2], w, b, pad_mode="replicate"),
    lambda size: (torch.randn(size.batch, C, 6, 6), frames(size), patches(3, 2), torch.randn(D)),
)
ROWS.add(
    "embed_image (turns)",
    lambda x, turns, w, b: ops.embed_image(x, turns, w, b),
    lambda size: (
        torch.randn(size.batch, C, 6, 6),
        torch.arange(8).repeat(size.batch, 1),
        patches(3, 2),
        torch.randn(D),
    ),
)
ROWS.add(
    "linear_batch_norm_relu",
    ops.linear_batch_norm_relu,
    lambda size: (torch.randn(5 * size.batch, C), torch.randn(D, C), torch.rand(D), torch.randn(D)),
)
ROWS.add(
    "node_identifiers",
    on_graphs(lambda batch, p, w: ops.node_identifiers(batch.ptr, p, w, nodes=batch.x.shape[0])),
    lambda size: (graphs(size), scores(size), torch.randn(N, D)),
)
ROWS.add(
    "permute",
    on_graphs(lambda batch, p, x: ops.permute(p, x, inverse=True)),
    lambda size: (graphs(size), scores(size), torch.randn(size.batch, 1, N, C)),
)
ROWS.add(
    "noise",
    lambda seed, x: ops.noise(seed, (x.shape[0], S, 2), "test", normal=True),
    lambda size: (seed(), torch.zeros(size.batch)),
    trains=False,
    differentiable=False,
)
ROWS.add(
    "noise (rows)",
    lambda seed, keys: ops.noise(seed, (keys.shape[0], S), "test", rows=keys, mirrored=True, block=2),
    lambda size: (seed(), torch.arange(size.batch)),
    trains=False,
    differentiable=False,
)
ROWS.add(
    "orthogonal_frame",
    lambda x: ops.orthogonal_frame(x, special=True),
    lambda size: (torch.randn(size.batch, S, 3, 3),),
)
ROWS.add(
    "permutation_entropy",
    on_graphs(lambda batch, p: ops.permutation_entropy(p)),
    lambda size: (graphs(size), scores(size)),
)
ROWS.add(
    "readout (nodes)",
    on_graphs(lambda batch, p, z, w, b: ops.readout(z, batch.ptr, p, w, b, nodes=batch.x.shape[0])),
    lambda size: (
        graphs(size),
        scores(size),
        torch.randn(size.batch, S, GRID, D),
        torch.randn(D, C, P),
        torch.randn(C),
    ),
)
ROWS.add(
    "readout (pairs)",
    on_graphs(lambda batch, p, z, w, b: ops.readout(z, batch.ptr, p, w, b, at=batch.pairs)),
    lambda size: (
        paired(size),
        scores(size),
        torch.randn(size.batch, S, GRID**2, D),
        torch.randn(D, C, P, P),
        torch.randn(C),
    ),
    **both,
)
ROWS.add(
    "soft_permutation",
    lambda batch, given: soft(batch, given).soft(),
    lambda size: (graphs(size), scores(size)),
)
for label, blocks, more in (
    ("transformer", {"in_features": 3, "out_features": 2}, {"read": [0, 2]}),
    ("transformer (recompute)", {"in_features": 0, "out_features": 0}, {"recompute": True}),
):
    blocks = {"width": 4, "layers": 1, "heads": 2, "feedforward": 5, **blocks}
    ROWS.add(
        label,
        lambda x, w, settings=blocks | more: ops.transformer(x, w, **settings),
        lambda size, blocks=blocks: (
            torch.randn(size.batch, 5, blocks["in_features"] or 4),
            transformer_weights(blocks, 5).float(),
        ),
    )
ROWS.add(
    "transformer (lengths)",
    lambda x, w, lengths, settings=blocks: ops.transformer(x, w, lengths=lengths, **settings),
    lambda size, blocks=blocks: (
        torch.randn(size.batch, 5, 4),
        transformer_weights(blocks, 5).float(),
        torch.arange(size.batch) % 5 + 1,
    ),
)
ROWS.add(
    "message_passing",
    lambda x, edges, w: ops.message_passing(x.flatten(0, 1), edges, w, width=4, layers=1, out_features=2),
    lambda size: (
        torch.randn(size.batch, S, size.nodes, 3),
        torch.randn(size.batch, size.nodes, size.nodes, 2),
        message_weights(3, 2, 4, 1, 2).float(),
    ),
    axes=("batch", "nodes"),
)
ROWS.add(
    "mlp",
    lambda x, w: ops.mlp(x.flatten(0, 1), w, widths=[D, 4, 3], activation="gelu", last=True),
    lambda size: (torch.randn(size.batch, S, D), mlp_weights([D, 4, 3]).float()),
)
ROWS.add(
    "gin",
    lambda batch, x, w: ops.gin(x, batch.edge_index, batch.ptr, w, layers=2, out_features=3, activation="tanh"),
    lambda size: (graphs(size), torch.randn(nodes(size), S, D), gin_weights(D, 2, 3).float()),
    **both,
)
for label, given in (("vector_edge_convolution", 0), ("vector_edge_convolution (running)", 2)):
    ROWS.add(
        label,
        lambda x, f, q, p, gain, bias, *running: ops.vector_edge_convolution(
            x, f, q, p, gain, bias, tuple(t.square() for t in running) or None, neighbors=2
        )[0],
        lambda size, given=given: (
            *(torch.randn(2, 3, 4, size.batch), torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 3)),
            *(torch.rand(3) + 0.5 for _ in range(2 + given)),
        ),
    )
