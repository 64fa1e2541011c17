"""Graphs as tokens and back: against torch's convolutions of the dense permuted graph."""

import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from probsym_fast import models, ops
from probsym_fast.distributions import GIN, Learned
from probsym_fast.groups import Dihedral, Draws, Graphs, Images, Symmetric
from probsym_fast.models import (
    DiagonalReadout,
    GraphReadout,
    GraphTokens,
    MeanReadout,
    NodeTokens,
    PairReadout,
    Symmetrized,
)
from probsym_fast.models.tokens import _AddedRows
from probsym_fast.ops._patches import pad_axis, patch_size, slots_of_places
from tests.conftest import assert_near
from tests.helpers.graphs import adjacency, features, random_graphs, relabelled
from tests.models.test_graph_models import check, trained

N, S, C, CE, WIDTH = 7, 3, 2, 3, 6
SIZES = [3, 1, 7, 5]
GROUP = Symmetric(N)


def soft(batch, tau=0.1):
    scores = torch.randn(batch.size, S, N, dtype=torch.float64, requires_grad=True)
    return ops.soft_permutation(scores, batch.num_nodes, tau), scores


def padded(x, grid, dims, pad_mode, centered):
    slots = slots_of_places(N, grid, pad_mode, centered, x.device)
    for dim in dims:
        x = pad_axis(x, slots, dim)
    return x


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("grid", [1, 3, 9])
@pytest.mark.parametrize(
    ("nodes", "pad_mode", "centered"),
    [
        ("diagonal", "zeros", False),
        ("tokens", "zeros", False),
        ("tokens", "reflect", True),
        ("tokens", "circular", True),
    ],
)
@pytest.mark.parametrize("edge_features", [0, CE])
def test_tokens_are_convolutions_of_the_permuted_graph(edge_features, nodes, pad_mode, centered, grid, dense):
    batch = random_graphs(SIZES, C, edge_features=edge_features)
    embed = GraphTokens(N, WIDTH, grid, C, edge_features or 1, nodes, pad_mode, centered, dense).double()
    p, scores = soft(batch)
    (found,) = embed(batch, GROUP, p)
    P, patch = p.dense(), patch_size(N, grid)
    A = torch.einsum("bsui,buvc,bsvj->bscij", P, adjacency(batch, N), P).flatten(0, 1)
    X = torch.einsum("bsui,buc->bsci", P, features(batch, N)).flatten(0, 1)
    weight, small = embed.edges(), embed.nodes()
    if nodes == "diagonal":
        A = torch.cat([A, torch.diag_embed(X)], 1)
        weight = torch.cat([weight, torch.diag_embed(small)], 1)
    expected = F.conv2d(padded(A, grid, (2, 3), pad_mode, centered), weight, embed.bias, stride=patch).flatten(2)
    if nodes == "tokens":
        cells = grid * grid
        expected = expected + F.conv1d(padded(X, cells, (2,), pad_mode, centered), small, stride=patch_size(N, cells))
    check(found, expected.mT.unflatten(0, (batch.size, S)), [*embed.parameters(), scores])


def test_density_decides():
    batch = random_graphs([7, 7])  # half of the pairs
    embed = GraphTokens(N, WIDTH, 3, C).double()
    assert embed._is_dense(batch) and not embed._is_dense(batch.replace(edge_index=batch.edge_index[:, :4]))
    p, _ = soft(batch)
    values = []
    for dense in (None, True, False):
        embed.dense = dense
        values.append(embed(batch, GROUP, p)[0])
    assert torch.equal(values[0], values[1])
    assert_near(values[1], values[2])


def test_drawn_as_convolutions_are():
    tokens, conv = GraphTokens(20, 500, 4, C, CE, "diagonal"), nn.Conv2d(CE + C, 500, 5)
    for name in ("edges", "nodes"):
        rows = getattr(tokens, name).rows
        assert abs(rows.std() / conv.weight.std() - 1) < 0.05 and rows.abs().max() <= conv.weight.abs().max() * 1.01
    assert tokens.nodes.rows.shape == (5, C, 500)
    assert abs(GraphTokens(20, 500, 2, C).nodes.rows.std() / nn.Conv1d(C, 500, 5).weight.std() - 1) < 0.05
    nodes, line = NodeTokens(20, 500, 3, C), nn.Conv1d(C, 500, 7)
    for drawn, conv in ((nodes.nodes.rows, line.weight), (nodes.bias, line.bias)):
        assert abs(drawn.std() / conv.std() - 1) < 0.1 and drawn.abs().max() <= conv.abs().max() * 1.05
    back = nn.ConvTranspose2d(500, 3, 5)
    for readout in (DiagonalReadout(20, 500, 4, 3), PairReadout(20, 500, 4, 3)):
        assert abs(readout.weight.rows.std() / back.weight.std() - 1) < 0.1
        assert readout.bias.abs().max() <= back.weight.abs().max() * 1.01


@pytest.mark.parametrize("grid", [1, 3, 7, 9])
def test_readouts_are_transposed_convolutions_carried_back(grid):
    batch = random_graphs(SIZES, C)
    pairs = torch.stack([batch.edge_index[0], batch.edge_index[1]])
    p, scores = soft(batch)
    tokens = torch.randn(batch.size, S, grid * grid, WIDTH, dtype=torch.float64, requires_grad=True)
    square = tokens.unflatten(2, (grid, grid))
    diagonal = square.diagonal(dim1=2, dim2=3).mT  # (B, S, grid, WIDTH)
    P = p.dense()

    def expected(weight, bias):
        image = F.conv_transpose2d(square.flatten(0, 1).permute(0, 3, 1, 2), weight, None, stride=patch_size(N, grid))
        image = image[:, :, :N, :N].unflatten(0, (batch.size, S))
        return torch.einsum("bsui,bscij,bsvj->buvc", P, image, P) / S + bias

    nodes = DiagonalReadout(N, WIDTH, grid, 2).double()
    b, u = batch.graph, batch.local
    square_weight = torch.diag_embed(nodes.weight())
    image = F.conv_transpose2d(
        square.flatten(0, 1).permute(0, 3, 1, 2), square_weight, None, stride=patch_size(N, grid)
    )
    line = image[:, :, :N, :N].diagonal(dim1=2, dim2=3).unflatten(0, (batch.size, S))  # (B, S, 2, N)
    wanted = (torch.einsum("bsui,bsci->buc", P, line) / S + nodes.bias)[b, u]
    check(nodes(diagonal, batch, GROUP, p), wanted, [*nodes.parameters(), tokens, scores])

    readout = PairReadout(N, WIDTH, grid).double()
    wanted = expected(readout.weight(), readout.bias)[b[pairs[0]], u[pairs[0]], u[pairs[1]]]
    check(readout(tokens, batch.replace(pairs=pairs), GROUP, p), wanted, [*readout.parameters(), tokens, scores])


def small_vit(read, grid=4):
    arguments = {"depth": 2, "embed_dim": 32, "num_heads": 2, "class_token": True}
    return models.timm_backbone("vit_tiny_patch16_224", grid=grid, read=read, **arguments)


@pytest.mark.parametrize("read", ["pooled", "diagonal", "tokens"])
def test_a_vision_transformer_becomes_equivariant(read):
    """Averaged over all it could draw it is: here over many samples, relabelled together with the permutations."""
    torch.manual_seed(0)
    batch = random_graphs(SIZES, C)
    batch = batch.replace(pairs=batch.edge_index)
    readout = {
        "pooled": GraphReadout(32, 2),
        "diagonal": DiagonalReadout(N, 32, 4, 2),
        "tokens": PairReadout(N, 32, 4),
    }[read]
    backbone, embed = small_vit(read), GraphTokens(N, 32, 4, C, nodes="diagonal")
    model = Symmetrized(backbone, embed, readout, Learned(GROUP, GIN(C, 8), tau=0.1)).double()
    prediction, penalties = model(batch, S, torch.Generator().manual_seed(1))
    trained(model, prediction.square().sum() + penalties["entropy"])
    other, new = relabelled(batch)
    other = other.replace(pairs=other.edge_index)
    p, _ = soft(batch)
    order = torch.arange(N).repeat(batch.size, S, 1)
    rank = order.clone()  # the slot of each new number: that of the node it was
    rank[other.graph[new], :, other.local[new]] = p.rank.mT[batch.graph, batch.local]
    q = ops.Permutation(rank.argsort(-1), batch.num_nodes)
    found, moved = model.apply_elements(batch, p), model.apply_elements(other, q)
    assert_near(moved[new] if read == "diagonal" else moved, found)


@pytest.mark.parametrize("cells", [1, 3, 11])
@pytest.mark.parametrize(("pad_mode", "centered"), [("zeros", False), ("reflect", True), ("circular", False)])
def test_node_tokens_are_convolutions_of_the_permuted_features(pad_mode, centered, cells):
    batch = random_graphs(SIZES, C)
    embed = NodeTokens(N, WIDTH, cells, C, pad_mode, centered).double()
    p, scores = soft(batch)
    X = torch.einsum("bsui,buc->bsci", p.dense(), features(batch, N)).flatten(0, 1)
    X = padded(X, cells, (2,), pad_mode, centered)
    expected = F.conv1d(X, embed.nodes(), embed.bias, stride=patch_size(N, cells))
    (found,) = embed(batch, GROUP, p)
    check(found, expected.mT.unflatten(0, (batch.size, S)), [*embed.parameters(), scores])


@pytest.mark.parametrize("averaged", [True, False])
def test_a_vision_transformer_of_a_sequence_of_nodes(averaged):
    """From drawn permutations to the prediction, 11 tokens; against a dense convolution and one sample at a time."""
    torch.manual_seed(0)
    batch = random_graphs([12, 5, 9], C)
    backbone = models.timm_backbone("vit_tiny_patch16_224", tokens=11, depth=2, embed_dim=32, num_heads=2)
    readout = MeanReadout() if averaged else GraphReadout(32, 2)
    embed, group = NodeTokens(12, 32, 11, C), Symmetric(12)
    model = Symmetrized(backbone, embed, readout, Learned(group, GIN(C, 8), tau=0.1)).double()
    prediction, penalties = model(batch, S, torch.Generator().manual_seed(1))
    trained(model, prediction.square().sum() + penalties["entropy"])
    g, _ = model.distribution(batch, S, Draws(torch.Generator().manual_seed(1)))
    X = torch.einsum("bsui,buc->bsci", g.hard().double(), features(batch, 12))
    outputs = []
    for s in range(S):
        line = F.conv1d(F.pad(X[:, s], (0, 10)), embed.nodes(), embed.bias, stride=2)
        outputs.append(backbone(line.mT))
    mean = torch.stack(outputs).mean(0)
    assert_near(prediction, mean if averaged else readout.head(mean))


@pytest.mark.parametrize("kind", ["graphs", "nodes", "pairs"])
def test_readouts_return_the_dtype_of_the_weights_under_autocast(kind):
    batch = random_graphs(SIZES, C, torch.float32)
    batch, p = batch.replace(pairs=batch.edge_index), GROUP.uniform(batch, S)
    readout = {
        "graphs": GraphReadout(WIDTH, 2),
        "nodes": DiagonalReadout(N, WIDTH, 3, 2),
        "pairs": PairReadout(N, WIDTH, 3),
    }[kind]
    lead = {"graphs": (4, S), "nodes": (4, S, 3), "pairs": (4, S, 9)}[kind]
    outputs = torch.randn(*lead, WIDTH).bfloat16()
    expected = readout(outputs, batch, GROUP, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = readout(outputs, batch, GROUP, p)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dense", [True, False, None])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0, 3], "must join nodes of one graph, got column 2 from graph 0 to graph 1"),
        ([-1, 0], "must hold node numbers 0 to 15, got -1 in column 2"),
        ([1, 99], "must hold node numbers 0 to 15, got 99 in column 2"),
    ],
)
def test_edges_that_leave_their_graph(column, message, dense):
    batch = random_graphs(SIZES, C)
    edges = batch.edge_index.clone()
    edges[:, 2] = torch.tensor(column)
    with pytest.raises(ValueError, match=f"edge_index {message}$"):
        GraphTokens(N, WIDTH, 3, C, dense=dense).double()(batch.replace(edge_index=edges), GROUP, soft(batch)[0])


@pytest.mark.parametrize("dense", [True, False])
def test_a_permutation_of_other_graphs_or_slots(dense):
    batch = random_graphs(SIZES, C)
    p, q = GROUP.uniform(batch, S), Symmetric(N + 1).uniform(batch, S)
    pairs, outputs = batch.replace(pairs=batch.edge_index), torch.zeros(4, S, 16, WIDTH, dtype=torch.float64)
    modules = {  # patches of two slots, whether of 7 or of 8
        "GraphTokens": lambda g: GraphTokens(N, WIDTH, 4, C, dense=dense).double()(batch, GROUP, g),
        "NodeTokens": lambda g: NodeTokens(N, WIDTH, 4, C).double()(batch, GROUP, g),
        "DiagonalReadout": lambda g: DiagonalReadout(N, WIDTH, 4, 1).double()(outputs[:, :, :4], batch, GROUP, g),
        "PairReadout": lambda g: PairReadout(N, WIDTH, 4).double()(outputs, pairs, GROUP, g),
    }
    for name, run in modules.items():
        run(p)
        wanted = re.escape(f"{name}: g must be permutations of N = 7 slots, got (B, S, N) = (4, {S}, 8)")
        with pytest.raises(ValueError, match=f"^{wanted}$"):
            run(q)
        with pytest.raises(TypeError, match=f"^{name}: g must be a Permutation, got Tensor$"):
            run(p.order)
    other = random_graphs([3, 1, 5, 7], C)
    with pytest.raises(ValueError, match="ptr must give graph 2 the 7 valid nodes of the permutation, got 5"):
        GraphTokens(N, WIDTH, 4, C, dense=dense).double()(other, GROUP, p)


@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_counts_that_are_none(value):
    makers = {
        GraphTokens: {"N": N, "width": WIDTH, "grid": 3, "node_features": C, "edge_features": 1},
        NodeTokens: {"N": N, "width": WIDTH, "tokens": 3, "node_features": C},
        DiagonalReadout: {"N": N, "width": WIDTH, "grid": 3, "out_features": 1},
        PairReadout: {"N": N, "width": WIDTH, "grid": 3, "out_features": 1},
    }
    error = ValueError if isinstance(value, int) and value is not True else TypeError
    for maker, arguments in makers.items():
        for name in arguments:
            if (maker, name, value) == (GraphTokens, "node_features", 0):
                continue  # there need be none
            wanted = "an int" if error is TypeError else "at least"
            with pytest.raises(error, match=f"^{maker.__name__}: {name} must be {wanted}.* got .*{value}$"):
                maker(**{**arguments, name: value})


def test_bad_settings_and_batches():
    for maker in (GraphTokens, NodeTokens):
        with pytest.raises(ValueError, match=rf"^{maker.__name__}: pad_mode must be one of .*, got 'mirror'$"):
            maker(N, WIDTH, 3, C, pad_mode="mirror")
    for arguments, text in (
        ({"nodes": "edges"}, "nodes must be diagonal or tokens, got 'edges'"),
        (
            {"nodes": "diagonal", "pad_mode": "reflect"},
            "padding must be zeros at the end for nodes on the diagonal, got ref",
        ),
        ({"nodes": "diagonal", "centered": True}, "got zeros, centered True"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            GraphTokens(N, WIDTH, 3, C, **arguments)
    batch = random_graphs(SIZES, C)
    p, _ = soft(batch)
    with pytest.raises(TypeError, match=r"GraphTokens: x must be torch.float32 as the weights are, got torch.float64"):
        GraphTokens(N, WIDTH, 3, C)(batch, GROUP, p)
    with pytest.raises(TypeError, match=r"NodeTokens: x must be torch.float32 as the weights are, got torch.float64"):
        NodeTokens(N, WIDTH, 3, C)(batch, GROUP, p)
    with pytest.raises(ValueError, match=r"^NodeTokens: x must be \(nodes, 3\), got \(16, 2\)$"):
        NodeTokens(N, WIDTH, 3, 3).double()(batch, GROUP, p)
    with pytest.raises(ValueError, match=r"PairReadout: batch.pairs must be \(2, M\) node numbers, got None"):
        PairReadout(N, WIDTH, 3)(torch.zeros(4, S, 9, WIDTH), batch, GROUP, p)


def test_the_matrix_of_a_batch_is_that_of_its_edges():
    batch = random_graphs(SIZES, C, edge_features=CE)
    assert torch.equal(batch.matrix(batch.attributes, N), adjacency(batch, N))


@pytest.mark.parametrize("step", [1, 3])
def test_rows_are_added_in_place_and_gradients_are_not_copied(step):
    x, y = (torch.randn(2, 2, rows, 4, dtype=torch.float64, requires_grad=True) for rows in (9, -(-9 // step)))
    expected = x.clone()
    expected[:, :, ::step] += y
    kept = x * 1
    found = _AddedRows.apply(kept, y, step)
    assert torch.equal(found, expected) and found.data_ptr() == kept.data_ptr()
    seen = []
    kept = x * 1
    kept.register_hook(lambda d: seen.append(d.data_ptr()))
    out = _AddedRows.apply(kept, y, step)
    d = torch.randn_like(out)
    out.backward(d)
    assert seen == [d.data_ptr()] and torch.equal(x.grad, d) and torch.equal(y.grad, d[:, :, ::step])
    torch.autograd.gradgradcheck(lambda x, y: _AddedRows.apply(x.sin(), y, step).square(), (x, y))


EMBEDDINGS = {
    "GraphTokens (dense)": lambda: GraphTokens(N, WIDTH, 3, C, CE, nodes="diagonal", dense=True),
    "GraphTokens": lambda: GraphTokens(N, WIDTH, 3, C, CE, dense=False),
    "NodeTokens": lambda: NodeTokens(N, WIDTH, 3, C),
    "FlatGraph": lambda: models.FlatGraph(N, WIDTH, C, CE),
    "ImageTokens": lambda: models.ImageTokens(WIDTH, 2, 1),
}


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_tokens_on_a_gpu_have_the_dtype_of_autocast(name, autocast, weights):
    """As torch's convolutions: weights in float32 are converted, others are not. On tensors without data."""
    if {autocast, weights} == {torch.float16, torch.bfloat16}:
        pytest.skip("torch's own operations refuse both together")
    turns = Dihedral(4)
    torch.set_autocast_enabled("cuda", autocast is not None)
    if autocast is not None:
        torch.set_autocast_dtype("cuda", autocast)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            torch.set_default_dtype(weights)
            embed = EMBEDDINGS[name]()
            if name == "ImageTokens":
                batch, group = Images(torch.zeros(4, 1, 8, 8, dtype=weights)), turns
                g = torch.zeros(4, S, dtype=torch.int64)
            else:
                x, attributes = torch.zeros(16, C, dtype=weights), torch.zeros(20, CE, dtype=weights)
                edges, ptr = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
                batch, group = Graphs(x, edges, ptr, attributes), GROUP
                g = ops.Permutation(torch.zeros(4, S, N, dtype=torch.int64))
            (tokens,) = embed(batch, group, g)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert tokens.dtype == (weights if autocast is None or weights != torch.float32 else autocast)
