"""Models of graphs: embeddings, backbone and readout against dense definitions, and what whole models do not depend on."""

import re

import pytest
import torch
from torch import nn

from probsym_fast import ops
from probsym_fast.distributions import GIN, Frame, Identity, Learned, Uniform, UniformNoise
from probsym_fast.groups import Draws, Graphs, Symmetric
from probsym_fast.models import (
    MLP,
    FlatGraph,
    GINBackbone,
    IdentifiedNodes,
    MeanReadout,
    PatchWeight,
    SlotReadout,
    Symmetrized,
)
from probsym_fast.models.backbones.mlp import ACTIVATIONS
from tests.conftest import GRADIENT, assert_near
from tests.helpers.graphs import adjacency, as_permutation, features, random_graphs, relabelled

N, S, C, WIDTH = 7, 3, 2, 6
SIZES = [3, 1, 7, 5]
GROUP = Symmetric(N)
ASYMMETRIC = 10  # seed of two graphs whose nodes the frame tells apart


def permutations(batch: Graphs, soft: bool = True, tau: float = 0.1):
    """Random, and the scores that the soft ones depend on."""
    scores = torch.randn(batch.size, S, N, dtype=torch.float64, requires_grad=True)
    if soft:
        return ops.soft_permutation(scores, batch.num_nodes, tau), scores
    return GROUP.uniform(batch, S, Draws(seed=1)), scores


def check(found, expected, tensors):
    """Value, and gradients of a weighted sum."""
    assert_near(found, expected)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((x * weight).sum(), tensors, allow_unused=True, retain_graph=True)
        for x in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, GRADIENT)


def trained(model: nn.Module, loss: torch.Tensor):
    """Every parameter gets a gradient."""
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad.abs() > 1e-9).any(), name


# --- embeddings, backbone, readout ---


@pytest.mark.parametrize(("by_scores", "soft"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("node_features", "edge_features"), [(0, 0), (C, 0), (C, 3)])
def test_flat_graph_is_a_linear_map_of_the_permuted_graph(by_scores, soft, node_features, edge_features):
    batch = random_graphs(SIZES, edge_features=edge_features)
    embed = FlatGraph(N, WIDTH, node_features, edge_features or 1, soft=soft).double()
    p, scores = permutations(batch, by_scores)
    tensors = [*embed.parameters(), *([scores] if by_scores else [])]
    if not soft:
        tensors += [x.requires_grad_() for x in (batch.x if node_features else None, batch.edge_attr) if x is not None]
    linear = nn.Linear(N * N * (edge_features or 1) + N * node_features, WIDTH).double()
    weights = [embed.edges().permute(0, 2, 3, 1).flatten(1)]
    if node_features:
        weights.append(embed.nodes().permute(0, 2, 1).flatten(1))
    P = p.soft() if soft else p.dense().double()
    rows = [torch.einsum("bsui,buvc,bsvj->bsijc", P, adjacency(batch, N), P).flatten(2)]
    if node_features:
        rows.append(torch.einsum("bsui,buc->bsic", P, features(batch, N)).flatten(2))
    state = {"weight": torch.cat(weights, 1), "bias": embed.bias}
    expected = torch.func.functional_call(linear, state, torch.cat(rows, 2))
    (found,) = embed(batch, GROUP, p)
    check(found, expected, tensors)


def test_flat_graph_permutes_by_hand():
    """A'[rank[u], rank[v]] = A[u, v] and X'[rank[u]] = x[u], entry by entry."""
    batch = random_graphs(SIZES)
    embed = FlatGraph(N, WIDTH, C).double()
    p, _ = permutations(batch, soft=False)
    (found,) = embed(batch, GROUP, p)
    for b in range(batch.size):
        for s in range(S):
            value = embed.bias.clone()
            for u, v in batch.edge_index.T[batch.graph[batch.edge_index[0]] == b].tolist():
                i, j = p.rank[b, s, batch.local[u]], p.rank[b, s, batch.local[v]]
                value = value + embed.edges()[:, 0, i, j]
            for u in range(int(batch.ptr[b]), int(batch.ptr[b + 1])):
                value = value + embed.nodes()[:, :, p.rank[b, s, batch.local[u]]] @ batch.x[u]
            assert_near(found[b, s], value)


def test_flat_graph_takes_float32_graphs_and_soft_permutations():
    batch = random_graphs(SIZES, dtype=torch.float32)
    f = Learned(GROUP, GIN(C, 8), tau=0.1).eval()
    g, _ = f(batch, S, Draws(seed=1))
    for soft in (False, True):
        embed = FlatGraph(N, WIDTH, C, soft=soft)
        (found,) = embed(batch, GROUP, g)
        exact = embed.double()(batch.replace(x=batch.x.double()), GROUP, g)[0]
        assert found.dtype == torch.float32
        assert_near(found, exact)


def test_flat_graph_is_drawn_as_one_linear_map():
    embed, inputs = FlatGraph(20, 200, 3, 2), 20 * (20 * 2 + 3)
    for weight in (embed.edges(), embed.nodes()):
        assert weight.abs().max() <= inputs**-0.5
        assert abs(weight.std() * (3 * inputs) ** 0.5 - 1) < 0.05
    assert embed.bias.abs().max() <= inputs**-0.5 and embed.bias.std() > 0.4 * inputs**-0.5


@pytest.mark.parametrize("patch", [(3,), (3, 3)])
def test_patch_weight_is_drawn_as_a_convolution(patch):
    module = PatchWeight(500, 2, *patch)
    weight = module()
    conv = (nn.Conv1d if len(patch) == 1 else nn.Conv2d)(2, 500, 3)
    assert weight.shape == conv.weight.shape
    assert weight.stride(0) == 1 and weight.stride(1) == 500
    weight.sum().backward()
    assert module.rows.is_contiguous() and module.rows.grad.shape == module.rows.shape
    assert abs(weight.std() / conv.weight.std() - 1) < 0.05
    assert weight.abs().max() <= conv.weight.abs().max() * 1.01


def test_soft_takes_soft_permutations_only():
    batch = random_graphs(SIZES)
    with pytest.raises(TypeError, match=r"FlatGraph: g must be a SoftPermutation with soft=True .*, got Permutation"):
        FlatGraph(N, WIDTH, soft=True).double()(batch, GROUP, permutations(batch, soft=False)[0])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_gin_with_identifiers_equals_the_dense_form(activation, final, layers):
    """GINConv of one linear map on [x, one-hot slot], dense adjacency, sum over the valid nodes."""
    batch = random_graphs(SIZES)
    embed, net = IdentifiedNodes(N, WIDTH, C).double(), GINBackbone(WIDTH, layers, 4, activation, final).double()
    nn.init.normal_(net.eps, 0, 0.3)
    p, scores = permutations(batch)
    A = adjacency(batch, N)[..., 0]
    valid = torch.arange(N) < batch.num_nodes[:, None]
    h = torch.cat([features(batch, N)[:, None].expand(-1, S, -1, -1), p.dense()], -1)
    weights = [torch.cat([embed.features, embed.identifiers.T], 1), *(layer.weight for layer in net.layers)]
    biases = [net.bias, *(layer.bias for layer in net.layers)]
    for eps, weight, bias in zip(net.eps, weights, biases, strict=True):
        h = ACTIVATIONS[activation]()(((1 + eps) * h + A.mT[:, None] @ h) @ weight.T + bias)
    expected = net.out((h * valid[:, None, :, None]).sum(2))
    expected = ACTIVATIONS[activation]()(expected) if final else expected
    found = net(*embed(batch, GROUP, p))
    assert found.shape == (4, S, 4)
    check(found, expected, [*embed.parameters(), *net.parameters(), scores])


def test_gin_with_identifiers_begins_with_eps_between_0_and_1_and_trains_it():
    eps = torch.cat([GINBackbone(4, 3, 1, "relu").eps.detach() for _ in range(100)])
    assert eps.min() >= 0 and eps.max() < 1
    assert eps.mean() == pytest.approx(0.5, abs=0.1) and eps.var() == pytest.approx(1 / 12, abs=0.03)
    net, batch = GINBackbone(4, 3, 1, "tanh"), random_graphs(SIZES, dtype=torch.float32)
    net(torch.randn(len(batch.x), S, 4), batch).sum().backward()
    assert (net.eps.grad != 0).all()


@pytest.mark.parametrize("out", [1, 3])
def test_slot_readout_is_a_linear_map_carried_back(out):
    batch = random_graphs(SIZES)
    readout = SlotReadout(N, WIDTH, out).double()
    p, scores = permutations(batch)
    outputs = torch.randn(4, S, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = readout.weight().permute(2, 1, 0).flatten(0, 1)  # (N out, WIDTH)
    Z = (outputs @ weight.T).unflatten(-1, (N, out))
    expected = (p.dense() @ Z).mean(1)[batch.graph, batch.local] + readout.bias
    found = readout(outputs, batch, GROUP, p)
    assert found.shape == (16, out)
    check(found, expected, [*readout.parameters(), outputs, scores])


def test_mlp():
    net = MLP([4, 5, 3], "tanh", last=True)
    x = torch.randn(2, S, 4)
    _, first, _, second, _ = net.layers
    torch.testing.assert_close(net(x), second(first(x.tanh()).tanh()).tanh())
    plain = MLP([4, 5, 3])
    torch.testing.assert_close(plain(x), plain.layers[3](plain.layers[1](x.relu()).relu()))
    assert MLP([4])(x) is x
    with pytest.raises(ValueError, match=re.escape("MLP: widths must be at least 1 each, got [4, 0]")):
        MLP([4, 0])
    with pytest.raises(ValueError, match=re.escape("MLP: widths must be at least 1 each, got []")):
        MLP([])
    with pytest.raises(ValueError, match=r"MLP: activation must be one of .*, got 'sine'"):
        MLP([4], "sine")
    with pytest.raises(ValueError, match="GINBackbone: layers must be at least 1, got 0"):
        GINBackbone(4, 0, 1, "relu")


# --- whole models ---

METHODS = ["ps", "canonical", "ga", "fa", "none"]


def distribution(method: str):
    if method in ("ps", "canonical"):
        return Learned(GROUP, GIN(C, 8), UniformNoise(0.0 if method == "canonical" else 1.0), tau=0.1)
    return {"ga": Uniform, "fa": Frame, "none": Identity}[method](GROUP)


def model(kind: str, method: str, dtype=torch.float64) -> Symmetrized:
    p = distribution(method)
    if kind == "gin":
        f = Symmetrized(GINBackbone(8, 3, 4, "tanh"), IdentifiedNodes(N, 8, C), MeanReadout(), p)
    else:
        readout = SlotReadout(N, 8) if kind == "slots" else MeanReadout()
        f = Symmetrized(MLP([8, 8], last=kind == "slots"), FlatGraph(N, 8, C), readout, p)
    return f.to(dtype)


KINDS = ["mlp", "gin", "slots"]


def carried(values, new, per_node):
    return torch.empty_like(values).index_put((new,), values) if per_node else values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_models_are_invariant_for_shared_noise(kind, dtype, method):
    """Numbered anew, the elements moved along: the same prediction (slots: at the moved nodes)."""
    f = model(kind, method, dtype).eval()
    batch = random_graphs(SIZES, dtype=dtype)
    moved, new = relabelled(batch, 4)
    if method in ("ps", "canonical"):
        noise = f.distribution.noise((16, S, C), batch, Draws(seed=2))
        g, _ = f.distribution(batch, S, Draws(seed=3), noise=noise)
        h, _ = f.distribution(moved, S, Draws(seed=4), noise=carried(noise, new, True))
    else:
        g, _ = f.distribution(batch, S, Draws(seed=3))
        h = GROUP.compose(as_permutation(batch, new, S, N), g)
    with torch.no_grad():
        here, there = f.apply_elements(batch, g), f.apply_elements(moved, h)
    assert_near(there, carried(here, new, kind == "slots"), {torch.float64: 1e-10, torch.float32: 1e-5})


@pytest.mark.parametrize("kind", ["mlp", "gin"])
@pytest.mark.parametrize("method", ["canonical", "fa"])
def test_orders_without_ties_make_models_exactly_invariant(kind, method):
    """Nothing moved along by hand: graphs without symmetry have one order."""
    f, batch = model(kind, method).eval(), random_graphs([7, 6], seed=ASYMMETRIC)
    moved, _ = relabelled(batch, 4)
    here, there = f(batch, 1)[0], f(moved, 1)[0]
    assert_near(there, here, {torch.float64: 1e-10})


@pytest.mark.parametrize("method", ["ps", "ga", "fa"])
def test_error_of_invariance_falls_with_the_samples(method):
    """Independent noise on both sides, where nodes are tied but not all orders look alike: a triangle beside a square."""
    torch.manual_seed(1)
    f = model("mlp", method).eval()
    batch = random_graphs([7] * 20)
    cycles = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 4], [4, 5], [5, 6], [6, 3]]).T
    edges = torch.cat([torch.cat([cycles, cycles.flip(0)], 1) + 7 * b for b in range(20)], 1)
    batch = batch.replace(edge_index=edges, x=torch.ones(140, C, dtype=torch.float64))
    moved, _ = relabelled(batch, 4)
    errors = []
    with torch.no_grad():
        for samples in (2, 128):
            here = f(batch, samples, torch.Generator().manual_seed(1))[0]
            there = f(moved, samples, torch.Generator().manual_seed(2))[0]
            errors.append((there - here).square().mean().sqrt().item())
    assert 4 < errors[0] / errors[1] < 16  # sqrt(128 / 2) = 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_models_train_every_parameter(kind, method):
    f = model(kind, method, torch.float32).train()
    batch = random_graphs([5, 6, 7, 7], dtype=torch.float32)
    state = torch.get_rng_state()
    prediction, penalties = f(batch, S, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert prediction.shape == {"mlp": (4, 8), "gin": (4, 4), "slots": (25, 1)}[kind]
    assert prediction.dtype == torch.float32
    assert set(penalties) == ({"entropy"} if method in ("ps", "canonical") else set())
    trained(f, prediction.square().sum() + 0 * sum(penalties.values()))  # entropy weight 0


def test_soft_models_train_every_parameter():
    p = distribution("ps")
    f = Symmetrized(MLP([8, 4]), FlatGraph(N, 8, C, soft=True), MeanReadout(), p).train()
    trained(f, f(random_graphs([5, 6, 7, 7], dtype=torch.float32), S)[0].square().sum())


def test_two_gin_models_are_trained_together():
    """Each with its own distribution, and two that share one."""
    shared = distribution("ps")
    backbone = lambda: (GINBackbone(8, 2, 1, "relu"), IdentifiedNodes(N, 8, C), MeanReadout())  # noqa: E731
    models = nn.ModuleList([model("gin", "ps", torch.float32), *(Symmetrized(*backbone(), shared) for _ in range(2))])
    batch, target = random_graphs([5, 6, 7, 7], dtype=torch.float32), torch.tensor([0.0, 1.0, -1.0, 2.0])
    optimizer = torch.optim.Adam(models.parameters(), 1e-2)
    before = {name: value.detach().clone() for name, value in models.named_parameters()}
    losses = []
    for _ in range(15):
        loss = 0
        for f in models:
            prediction, penalties = f(batch, 4)
            loss = loss + (prediction[:, 0] - target).square().mean() + 0.1 * penalties["entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(not torch.equal(value, before[name]) for name, value in models.named_parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_small_graphs(kind, method):
    """No edges, single nodes: finite, and equal whether alone or among others."""
    f = model(kind, method).eval()
    batch = Graphs(torch.randn(8, C).double(), torch.tensor([[4, 5], [5, 4]]), torch.tensor([0, 1, 4, 7, 8]))
    prediction, _ = f(batch, S, torch.Generator().manual_seed(1))
    prediction.sum().backward()
    assert prediction.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in f.parameters())
    one = Graphs(batch.x[:1], torch.zeros(2, 0).long(), torch.tensor([0, 1]))
    g = GROUP.identity(one, 1)  # the only permutation of one node
    rows = prediction[:1]
    assert_near(f.apply_elements(one, g), rows, {torch.float64: 1e-10})
    f.train()
    assert f(one, 1)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_graphs_that_do_not_fit(kind, method):
    f = model(kind, method).eval()
    with pytest.raises(ValueError, match=r"must (have at most|be between 1 and|rise from 0 by at most) N = 7.*"):
        f(random_graphs([3, 8]), S)
    empty = Graphs(torch.randn(3, C).double(), torch.zeros(2, 0).long(), torch.tensor([0, 3, 3]))
    with pytest.raises(ValueError, match=r"num_nodes must be between 1 and N = 7, got 0 for graph 1|ptr must increase"):
        f(empty, S)


def test_edges_between_graphs_are_refused_by_gin_with_identifiers():
    batch = Graphs(torch.randn(5, C), torch.tensor([[0, 3], [3, 0]]), torch.tensor([0, 2, 5]))
    p = Symmetric(N).uniform(batch, 2)
    with pytest.raises(
        ValueError, match="edge_index must join nodes of one graph, got column 0 from graph 0 to graph 1"
    ):
        IdentifiedNodes(N, 8, C)(batch, Symmetric(N), p)
    with pytest.raises(ValueError, match=rf"x must be \(nodes, {C + 1}\), got \(5, {C}\)"):
        IdentifiedNodes(N, 8, C + 1)(batch.replace(edge_index=batch.edge_index[:, :0]), Symmetric(N), p)


@pytest.mark.parametrize("method", ["ps", "ga"])
@pytest.mark.parametrize("kind", ["mlp", "gin"])
def test_the_whole_model_is_one_graph(kind, method):
    """torch.compile records distribution, embedding, backbone and readout without a break; every run draws its own noise."""
    f, batch = model(kind, method, torch.float32).train(), random_graphs([5, 6, 7, 7], dtype=torch.float32)
    recorded = torch.compile(f, backend="aot_eager", fullgraph=True)
    found = []
    for run in (f, recorded, recorded):
        f.zero_grad()
        torch.manual_seed(3)
        again = run(batch, S)
        (again[0].square().sum() + sum(again[1].values())).backward()
        found.append([again[0], *(p.grad for p in f.parameters() if p.grad is not None)])
    for value, expected in zip(found[1], found[0], strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
    assert torch.equal(found[2][0], found[1][0])
    assert not torch.equal(recorded(batch, S)[0], found[1][0])
