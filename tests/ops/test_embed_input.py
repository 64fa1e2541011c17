"""Input that embed_edges and embed_nodes refuse."""

import re

import pytest
import torch

from probsym_fast.ops import OPS, Permutation, embed_edges, embed_nodes, soft_permutation
from tests.helpers.items import (
    batch,
    weights,
)

BACKENDS = OPS["embed"].backends("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    data = batch([4, 2], 5, C=2, S=1)
    edges, attr, ptr, w = data.edges, data.attr, data.ptr, weights(3, 2, 3, 3)
    E = edges.shape[1]
    p, hard = data.soft(data.scores), Permutation(data.order)

    def edge(u, v, column=1):
        changed = edges.clone()
        changed[:, column] = torch.tensor([u, v])
        return changed

    def run(edges=edges, attr=attr, ptr=ptr, p=p, weight=w, bias=None, grid=2, **settings):
        embed_edges(edges, attr, ptr, p, weight, bias, grid=grid, backend=backend, **settings)

    shifted, falling = torch.tensor([1, 5, 7]), torch.tensor([0, 4, 2])
    for arguments, error, message in (
        ({"edges": edge(6, 0)}, ValueError, "edge_index must hold node numbers 0 to 5, got 6 in column 1"),
        ({"edges": edge(0, -1, 0)}, ValueError, "edge_index must hold node numbers 0 to 5, got -1 in column 0"),
        ({"edges": edge(0, 2**40)}, ValueError, f"edge_index must hold node numbers 0 to 5, got {2**40} in column 1"),
        (
            {"edges": edge(3, 4)},
            ValueError,
            "edge_index must join nodes of one graph, got column 1 from graph 0 to graph 1",
        ),
        ({"edges": edges.int()}, TypeError, "edge_index must be an int64 Tensor, got torch.int32"),
        ({"edges": None}, TypeError, "edge_index must be an int64 Tensor, got NoneType"),
        ({"edges": edges.T}, ValueError, f"edge_index must be (2, E), got ({E}, 2)"),
        ({"edges": edges.to("meta")}, RuntimeError, "edge_index must be on cpu, got meta"),
        ({"attr": attr[1:]}, ValueError, f"edge_attr must be ({E}, 2), got ({E - 1}, 2)"),
        ({"attr": attr[:, :1]}, ValueError, f"edge_attr must be ({E}, 2), got ({E}, 1)"),
        ({"attr": attr[:, 0]}, ValueError, f"edge_attr must be ({E}, 2), got ({E},)"),
        ({"attr": attr.float()}, TypeError, "edge_attr must be torch.float64 as weight is, got torch.float32"),
        ({"attr": attr.long()}, TypeError, "edge_attr must be floating point, got torch.int64"),
        ({"attr": attr.to("meta")}, RuntimeError, "edge_attr must be on cpu as weight is, got meta"),
        ({"bias": torch.ones(3)}, TypeError, "bias must be torch.float64 as weight is, got torch.float32"),
        ({"bias": torch.ones(2).double()}, ValueError, "bias must be (3,), got (2,)"),
        ({"ptr": shifted, "p": hard}, ValueError, "ptr must rise from 0 by at most N = 5 a graph, got [1, 5, 7]"),
        ({"ptr": falling, "p": hard}, ValueError, "ptr must rise from 0 by at most N = 5 a graph, got [0, 4, 2]"),
        (
            {"ptr": torch.tensor([0, 6, 6]), "p": hard},
            ValueError,
            "ptr must rise from 0 by at most N = 5 a graph, got [0, 6, 6]",
        ),
        (
            {"ptr": torch.tensor([0, 4, 7])},
            ValueError,
            "ptr must give graph 1 the 2 valid nodes of the permutation, got 3",
        ),
        ({"ptr": ptr[1:]}, ValueError, "ptr must be (B + 1,) = (3,) for a permutation of 2 graphs, got (2,)"),
        ({"ptr": ptr.int()}, TypeError, "ptr must be an int64 Tensor, got torch.int32"),
        ({"ptr": [0, 4, 6]}, TypeError, "ptr must be an int64 Tensor, got list"),
        ({"ptr": ptr.to("meta")}, RuntimeError, "ptr must be on cpu, got meta"),
        ({"p": data.order}, TypeError, "p must be a Permutation, got Tensor"),
        (
            {"p": Permutation(data.order[:, :0])},
            ValueError,
            "p must have at least one sample, got (B, S, N) = (2, 0, 5)",
        ),
        ({"grid": 0}, ValueError, "grid must be at least 1, got 0"),
        (
            {"grid": 3},
            ValueError,
            "weight must be (D, C, 2, 2) with patches of ceil(N / grid) = ceil(5 / 3), got (3, 2, 3, 3)",
        ),
        (
            {"weight": w[0]},
            ValueError,
            "weight must be (D, C, 3, 3) with patches of ceil(N / grid) = ceil(5 / 2), got (2, 3, 3)",
        ),
        (
            {"weight": w[:, :0]},
            ValueError,
            "weight must be (D, C, 3, 3) with patches of ceil(N / grid) = ceil(5 / 2), got (3, 0, 3, 3)",
        ),
        (
            {"weight": w.new_ones(())},
            ValueError,
            "weight must be (D, C, 3, 3) with patches of ceil(N / grid) = ceil(5 / 2), got ()",
        ),
        (
            {"pad_mode": "zero"},
            ValueError,
            "pad_mode must be one of ('zeros', 'replicate', 'reflect', 'circular'), got 'zero'",
        ),
    ):
        with pytest.raises(error, match=f"^embed_edges: {re.escape(message)}$"):
            run(**arguments)

    w1 = weights(3, 2, 3)
    for arguments, error, message in (
        ((data.x[1:], ptr), ValueError, "x must be (nodes, C) with as many nodes as ptr ends with, got (5, 2)"),
        ((data.x[0], ptr), ValueError, "x must be (nodes, C) with as many nodes as ptr ends with, got (2,)"),
        ((data.x[:, :1], ptr), ValueError, "x must be (6, 2), got (6, 1)"),
        ((data.x.tolist(), ptr), TypeError, "x must be a Tensor, got list"),
        ((data.x.float(), ptr), TypeError, "x must be torch.float64 as weight is, got torch.float32"),
        ((data.x, ptr[1:]), ValueError, "ptr must be (B + 1,) = (3,) for a permutation of 2 graphs, got (2,)"),
    ):
        with pytest.raises(error, match=f"^embed_nodes: {re.escape(message)}$"):
            embed_nodes(*arguments, p, w1, tokens=2, backend=backend)
    empty = Permutation(data.order[:, :, :0])
    with pytest.raises(ValueError, match=re.escape("p must have at least one slot, got (B, S, N) with N = 0")):
        embed_nodes(data.x[:0], ptr * 0, empty, weights(3, 2, 1), tokens=2, pad_mode="reflect", backend=backend)
    with pytest.raises(
        ValueError, match=re.escape("Permutation: order[1, 0] must hold each of 0..2 once, got [0, 2, 2]")
    ):
        Permutation(torch.tensor([[[2, 1, 0]], [[0, 2, 2]]]))


@pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
def test_the_kernel_looks_at_what_tracing_does_not():
    """Compiled, where no check before the kernel sees the values: an error, never memory that is not ours."""
    data = batch([4, 2], 5, C=2, S=1)
    w = weights(3, 2, 3, 3).requires_grad_()
    scores = data.scores.clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(edges, ptr, order, rank, soft):
        p = soft_permutation(scores, torch.tensor([4, 2]), tau=0.1) if soft else Permutation(order, None, rank)
        return embed_edges(edges, data.attr, ptr, p, w, grid=2)

    good = Permutation(data.order)
    run(data.edges, data.ptr, good.order, good.rank, False)
    for change, message in (
        ({"edges": data.edges + 2**40}, "edge_index must hold node numbers 0 to 5"),
        ({"edges": data.edges + 1}, "edge_index must"),
        ({"ptr": data.ptr + 1}, "ptr must begin with 0, got 1"),
        ({"ptr": torch.tensor([0, 6, 6])}, "ptr must give every graph 0 to N = 5 nodes, got 6 for graph 0"),
        ({"rank": good.rank + 5}, "rank must hold 0 to 4"),
        ({"rank": good.rank - 5}, "rank must hold 0 to 4"),
    ):
        arguments = {
            "edges": data.edges,
            "ptr": data.ptr,
            "order": good.order,
            "rank": good.rank,
            "soft": False,
        } | change
        with pytest.raises(ValueError, match=f"^embed_edges: {re.escape(message)}"):
            run(**arguments)
    out = run(data.edges % 2, torch.tensor([0, 2, 6]), good.order, good.rank, True)
    with pytest.raises(ValueError, match=re.escape("embed_edges: order must hold 0 to 1")):
        out.sum().backward()


@pytest.mark.parametrize("backend", OPS["embed"].backends("cpu"))
def test_a_hand_made_permutation_with_other_counts_is_refused(backend):
    order = torch.arange(8).expand(2, 1, 8)
    p, ptr = Permutation(order, torch.tensor([8, 3])), torch.tensor([0, 3, 8])
    with pytest.raises(ValueError, match="ptr must give graph 0 the 8 valid nodes of the permutation, got 3"):
        embed_nodes(torch.randn(8, 2), ptr, p, torch.randn(5, 2, 4), tokens=2, backend=backend)
