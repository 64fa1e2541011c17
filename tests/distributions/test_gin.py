"""The network of the learned distribution on graphs: against its definition, and what it does not depend on."""

import pytest
import torch
from torch import nn

from probsym_fast.distributions import GIN, Frame, Uniform
from probsym_fast.groups import Draws, Graphs, Symmetric
from tests.conftest import assert_near
from tests.helpers.gin import SIZES, C, N, S, learned, network
from tests.helpers.graphs import features, one_graph, random_graphs, relabelled


def dense(net: GIN, batch: Graphs, noise: torch.Tensor) -> torch.Tensor:
    """The definition on explicit graphs with one node more, joined to itself and both ways to every other."""
    start, h, matrices, real = 0, [], [], []
    for b in range(batch.size):
        alone = one_graph(batch, b)
        n = alone.x.shape[0]
        A = torch.zeros(n + 1, n + 1, dtype=noise.dtype)
        for u, v in alone.edge_index.T.tolist():
            A[v, u] += 1
        A[n, :] = A[:, n] = 1
        for s in range(noise.shape[1]):
            h.append(torch.cat([alone.x + noise[start : start + n, s], net.virtual[None]]))
            matrices.append(A)
            real.append([start + u for u in range(n)])
        start += n
    sizes = [x.shape[0] for x in h]
    h, A = torch.cat(h), torch.block_diag(*matrices)
    for eps, layer in zip(net.eps, net.layers, strict=True):
        h = (1 + eps) * h + A @ h
        for place, norm in enumerate(layer):
            h = h if place == 0 else net.dropout(h)
            z = h @ norm.linear.weight.T
            if norm.training:  # over every row, virtual nodes too
                mean, variance = z.mean(0), z.var(0, unbiased=False)
            else:
                mean, variance = norm.running_mean, norm.running_var
            h = ((z - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).clamp(min=0)
    values = (h @ net.score.weight.T + net.score.bias)[:, 0].split(sizes)
    out = torch.zeros(noise.shape[:2], dtype=noise.dtype)
    for k, (nodes, value) in enumerate(zip(real, values, strict=True)):
        out[nodes, k % noise.shape[1]] = value[:-1]
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_equals_the_definition_with_virtual_edges(training, layers):
    net = network(layers=layers).train(training)
    batch = random_graphs(SIZES)
    doubled = torch.cat([batch.edge_index, batch.edge_index[:, :3]], 1)
    batch = batch.replace(edge_index=doubled)  # an edge twice counts twice
    noise = torch.rand(net.noise_shape(batch, S), dtype=torch.float64)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    expected = dense(net, batch, noise)
    gradients = torch.autograd.grad(expected.sin().sum(), list(net.parameters()))
    net.load_state_dict(state)
    found = net(batch, noise)["scores"]
    assert_near(found, expected)
    for (name, _), a, b in zip(
        net.named_parameters(), torch.autograd.grad(found.sin().sum(), list(net.parameters())), gradients, strict=True
    ):
        assert (a - b).abs().max() < 1e-10 * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("training", [False, True])
def test_scores_follow_the_nodes(training):
    """Numbered anew, with the noise moved along: the same scores."""
    net, batch = network().train(training), random_graphs(SIZES)
    noise = torch.rand(net.noise_shape(batch, S), dtype=torch.float64)
    moved, new = relabelled(batch)
    assert_near(
        net(moved, torch.empty_like(noise).index_put((new,), noise))["scores"][new], net(batch, noise)["scores"]
    )


def test_a_graphs_scores_do_not_depend_on_its_batch():
    net, batch = network().eval(), random_graphs(SIZES)
    noise = torch.rand(net.noise_shape(batch, S), dtype=torch.float64)
    together = net(batch, noise)["scores"].split(SIZES)
    for b, part in enumerate(noise.split(SIZES)):
        assert_near(net(one_graph(batch, b), part)["scores"], together[b])


def test_training_statistics_count_no_padding():
    """The running mean of the first layer is that of the rows there are."""
    net, batch = GIN(C, 8).double(), random_graphs([2, 40])
    noise = torch.rand(net.noise_shape(batch, S), dtype=torch.float64)
    rows = []
    first = net.layers[0][0]
    first.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0] @ first.linear.weight.T))
    net(batch, noise)
    assert rows[0].shape == ((42 + 2) * S, 8)  # nodes and virtual nodes
    assert_near(first.running_mean, 0.1 * rows[0].mean(0))


def test_scores_of_many_nodes_stay_distinct_under_autocast():
    u = torch.arange(443)  # a path
    edges = torch.stack([torch.cat([u, u + 1]), torch.cat([u + 1, u])])
    batch = Graphs(torch.ones(444, C), edges, torch.tensor([0, 444]))
    f = learned(dtype=torch.float32, slots=444).train()
    plain = f(batch, 1, Draws(seed=1))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noise = f.noise(f.network.noise_shape(batch, 1), batch, Draws(seed=1))
        scores = f.network(batch, noise)["scores"]
        mixed, penalties = f(batch, 1, Draws(seed=1))
    assert scores.dtype == noise.dtype == penalties["entropy"].dtype == torch.float32
    assert mixed.scores.dtype == torch.float32  # sorted in float64
    assert len(scores.unique()) == 444
    assert len(scores.bfloat16().unique()) < 300  # the test would notice
    assert torch.equal(mixed.order, plain.order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(dtype):
    f = learned(dtype=torch.float32)
    batch = random_graphs(SIZES, dtype=torch.float32)
    g, _ = f(batch.replace(x=batch.x.to(dtype)), S, Draws(seed=1))
    h, _ = f(batch.replace(x=batch.x.to(dtype).float()), S, Draws(seed=1))
    assert torch.equal(g.order, h.order)


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("layers", [1, 3])
def test_every_parameter_is_trained(weight, layers):
    """Also with entropy weight 0: through the permutation alone."""
    f = learned(layers=layers, dropout=0.2).train()
    batch = random_graphs([5, 6, 7, 7])
    g, penalties = f(batch, S, Draws(seed=1))
    value = (f.group.act(g, features(batch, N), "nc", inverse=True) * torch.randn(N, C, dtype=torch.float64)).sum()
    (value + weight * penalties["entropy"]).backward()
    for name, parameter in f.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad.abs() > 1e-9).any(), name  # rounding aside


def test_the_entropy_alone_trains():
    f, batch = learned().train(), random_graphs([5, 6, 7, 7])
    f(batch, S, Draws(seed=1))[1]["entropy"].backward()
    assert all((p.grad.abs() > 1e-12).any() for p in f.parameters())


def test_dropout_in_training_only():
    net, batch = network(dropout=0.5), random_graphs(SIZES)
    noise = torch.rand(net.noise_shape(batch, S), dtype=torch.float64)
    assert not torch.equal(net(batch, noise)["scores"], net(batch, noise)["scores"])
    net.eval()
    assert torch.equal(net(batch, noise)["scores"], net(batch, noise)["scores"])


class Dropped(nn.Module):
    """Leaves out numbers by their value, so that the same ones are dropped wherever they are stored."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.where((1e4 * h).sin() > 0, 2 * h, 0)


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_is_between_the_two_maps_of_a_layer(layers):
    net, batch = network(layers=layers), random_graphs(SIZES)
    noise = torch.rand(net.noise_shape(batch, S), dtype=torch.float64)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    without = net(batch, noise)["scores"]
    net.dropout = Dropped()
    net.load_state_dict(state)
    expected = dense(net, batch, noise)
    net.load_state_dict(state)
    assert_near(net(batch, noise)["scores"], expected)
    assert not torch.allclose(expected, without)


def test_small_and_empty_graphs():
    for sizes in ([1], [1, 1], [4]):
        batch = random_graphs(sizes).replace(edge_index=torch.zeros(2, 0).long())
        f = learned().train()
        g, penalties = f(batch, 2, Draws(seed=1))
        (g.soft().sum() + penalties["entropy"]).backward()
        assert all(p.grad.isfinite().all() for p in f.parameters())
        assert torch.equal(g.order[..., sizes[0] :], torch.arange(sizes[0], N).expand(len(sizes), 2, -1))
    empty = Graphs(torch.randn(2, C).double(), torch.zeros(2, 0).long(), torch.tensor([0, 2, 2]))
    for make in (learned, lambda: Uniform(Symmetric(N))):
        with pytest.raises(ValueError, match=f"num_nodes must be between 1 and N = {N}, got 0 for graph 1"):
            make()(empty, 1)
    with pytest.raises(ValueError, match="ptr must increase"):
        Frame(Symmetric(N))(empty, 1)
