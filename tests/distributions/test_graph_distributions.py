"""Learned, uniform and predefined orders of graphs: noise, samples in chunks, and what they do not depend on."""

import re
from collections import Counter

import pytest
import torch

from probsym_fast.distributions import (
    GIN,
    Frame,
    Identity,
    Learned,
    Normal,
    Uniform,
    UniformNoise,
    VectorNeurons,
    distribution,
    frames,
)
from probsym_fast.groups import Draws, Graphs, Orthogonal, Symmetric
from tests.conftest import assert_near
from tests.helpers.gin import SIZES, C, N, S, learned
from tests.helpers.graphs import as_permutation, one_graph, random_graphs, relabelled

ASYMMETRIC = 10  # seed of two graphs whose nodes the frame tells apart


def all_distributions(dtype=torch.float64):
    group = Symmetric(N)
    return {
        "learned": learned(dtype=dtype),
        "normal": learned(Normal(0.5), dtype),
        "fixed": learned(UniformNoise(fixed=3), dtype),
        "uniform": Uniform(group),
        "frame": Frame(group),
        "identity": Identity(group),
    }


@pytest.mark.parametrize("name", all_distributions())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_may_come_in_chunks(name, dtype):
    f = all_distributions(dtype)[name]
    batch, draws = random_graphs([7, 3, 7, 1, 5] * 5, dtype=dtype), Draws(seed=5)
    with torch.no_grad():
        whole, _ = f(batch, 10, draws)
        chunks = [f(batch, 4, draws)[0], f(batch, 6, draws.starting(4))[0]]
    for part in ("order", "rank"):
        assert torch.equal(torch.cat([getattr(g, part) for g in chunks], 1), getattr(whole, part))
    if isinstance(f, Learned):
        for part in ("scores", "log_r", "log_c"):
            bound = {torch.float32: 1e-4, torch.float64: 1e-10}
            assert_near(torch.cat([getattr(g, part) for g in chunks], 1), getattr(whole, part), bound)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["learned", "normal", "fixed"])
def test_inference_takes_samples_in_parts(name, given, monkeypatch):
    """The same elements and penalties; not in training, nor where gradients are kept."""
    f, batch = (
        all_distributions()[name].eval(),
        random_graphs([7, 3, 7, 1, 5]),
    )  # 23 nodes, 46 numbers of noise a sample
    noise = torch.rand(23, 10, 2, dtype=torch.float64) if given else None
    draws, counts = Draws(seed=5, first=3), []
    f.network.register_forward_pre_hook(lambda _, x: counts.append(x[1].shape[1]))
    with torch.no_grad():
        whole, penalties = f(batch, 10, draws, noise=noise)
        monkeypatch.setattr(distribution, "AT_ONCE", 46 * 4)
        parts, others = f(batch, 10, draws, noise=noise)
    assert counts == [10, 4, 4, 2]
    for part in ("order", "rank"):
        assert torch.equal(getattr(parts, part), getattr(whole, part))
    for part in ("scores", "log_r", "log_c"):
        assert_near(getattr(parts, part), getattr(whole, part), {torch.float64: 1e-10})
    assert_near(others["entropy"], penalties["entropy"], {torch.float64: 1e-10})
    f(batch, 10, draws, noise=noise)
    with torch.no_grad():
        f.train()(batch, 10, draws, noise=noise)
        monkeypatch.setattr(distribution, "AT_ONCE", 1)  # one by one where a sample has more
        f.eval()(batch, 2, draws)
    assert counts[4:] == [10, 10, 1, 1]


@pytest.mark.parametrize("name", all_distributions())
def test_global_generator_is_left_alone(name):
    f, batch = all_distributions()[name], random_graphs(SIZES)
    state = torch.get_rng_state()
    first = f(batch, S, Draws(torch.Generator().manual_seed(1)))[0]
    again = f(batch, S, Draws(torch.Generator().manual_seed(1)))[0]
    assert torch.equal(first.order, again.order)
    assert torch.equal(torch.get_rng_state(), state)
    if name not in ("identity", "fixed", "frame"):
        assert not torch.equal(f(batch, S, Draws(seed=2))[0].order, first.order)


@pytest.mark.parametrize("kind", [UniformNoise, Normal])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_noise(kind, dtype):
    batch = Graphs(torch.zeros(4000, 2).to(dtype), torch.zeros(2, 0).long(), torch.tensor([0, 1000, 4000]))
    z = kind(0.5)((4000, 5, 2), batch, Draws(seed=1))
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mean, std = (0.25, 0.5 / 12**0.5) if kind is UniformNoise else (0.0, 0.5)
    assert abs(z.mean() - mean) < 5 * std / z.numel() ** 0.5
    assert abs(z.std() - std) < 5 * std / z.numel() ** 0.5
    if kind is UniformNoise:
        assert z.min() >= 0 and z.max() <= 0.5
    state = torch.get_rng_state()
    assert (kind(0)((4000, 5, 2), batch) == 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    for scale in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{kind.__name__}: scale must be finite and >= 0, got {scale}"):
            kind(scale)
    assert repr(kind(0.5)) == f"{kind.__name__}(0.5)"


@pytest.mark.parametrize("kind", [UniformNoise, Normal])
def test_fixed_noise_belongs_to_the_graph(kind):
    sizes = [3, 1, 7, 5]
    batch = random_graphs(sizes).replace(key=torch.tensor([8, 0, 10**6, 3]))
    noise = kind(fixed=4)
    draw = lambda batch, **more: noise((batch.x.shape[0], S, C), batch, **more)  # noqa: E731
    state = torch.get_rng_state()
    z = draw(batch)
    assert torch.equal(draw(batch, draws=Draws(seed=1)), z) and torch.equal(draw(batch, draws=Draws(seed=2)), z)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(z.unique()) == z.numel()
    parts = z.split(sizes)
    for b in range(4):  # alone, among others, or among its like: the same
        alone = one_graph(batch, b)
        assert torch.equal(draw(alone), parts[b])
    single = one_graph(batch, 1)
    two = Graphs(single.x.repeat(2, 1), single.edge_index, torch.tensor([0, 1, 2]), key=torch.tensor([5, 0]))
    assert torch.equal(draw(two)[1:], parts[1])
    backwards = torch.cat([one_graph(batch, b).x for b in (3, 2, 1, 0)])
    ptr = torch.tensor([0, *sizes[::-1]]).cumsum(0)
    other = Graphs(backwards, torch.zeros(2, 0).long(), ptr, key=batch.key.flip(0))
    assert torch.equal(draw(other), torch.cat(parts[::-1]))
    assert not torch.equal(kind(fixed=5)((16, S, C), batch), z)
    assert torch.equal(draw(batch, draws=Draws(seed=1, first=1))[:, :2], z[:, 1:])  # chunks
    per_graph = noise((4, S, C), batch)  # a network may want noise a graph
    assert torch.equal(noise((4, S, C), batch.replace(key=batch.key.flip(0))), per_graph.flip(0))


def test_fixed_noise_without_keys_belongs_to_the_place():
    noise, sizes = UniformNoise(fixed=4), [3, 2, 4]
    z = noise((9, S, C), random_graphs(sizes)).split(sizes)
    other = noise((10, S, C), random_graphs([4, 2, 4])).split([4, 2, 4])
    assert torch.equal(other[0][:3], z[0]) and torch.equal(other[1], z[1]) and torch.equal(other[2], z[2])


def test_fixed_noise_gives_the_same_orders_in_every_epoch():
    batch = random_graphs(SIZES).replace(key=torch.arange(4))
    f = learned(UniformNoise(fixed=1))
    first = f(batch, S, Draws(seed=1))[0]
    assert torch.equal(f(batch, S, Draws(seed=2))[0].order, first.order)
    assert (first.order != first.order[:, :1]).any()  # samples differ
    alone = f(one_graph(batch, 2), S, Draws(seed=3))[0]
    assert torch.equal(alone.order[0], first.order[2])


@pytest.mark.parametrize("kind", [UniformNoise, Normal])
def test_canonical_draws_nothing_but_ties(kind):
    batch = random_graphs(SIZES)
    f = learned(kind(0.0))
    g, _ = f(batch, 1, Draws(seed=1))
    h, _ = f(batch, 4, Draws(seed=2))
    assert torch.equal(h.order, g.order.expand(-1, 4, -1))
    scores = f.network(batch, torch.zeros(16, 1, C, dtype=torch.float64))["scores"]
    assert torch.equal(g.order, f.group.project({"scores": scores}, batch)[0].order)
    moved, new = relabelled(batch)
    expected = f.group.compose(as_permutation(batch, new, 1, N), g.detach())
    assert torch.equal(f(moved, 1, Draws(seed=3))[0].order, expected.order)


# --- learned, uniform, predefined ---


def test_learned_elements_follow_the_graph():
    """p(hg | hx) = p(g | x): with the noise moved along the elements are h g."""
    f, batch = learned(), random_graphs(SIZES)
    noise = torch.rand(f.network.noise_shape(batch, S), dtype=torch.float64)
    g, penalties = f(batch, S, Draws(seed=1), noise=noise)
    moved, new = relabelled(batch)
    there, same = f(moved, S, Draws(seed=2), noise=torch.empty_like(noise).index_put((new,), noise))
    expected = f.group.compose(as_permutation(batch, new, S, N), g.detach())
    assert torch.equal(there.order, expected.order)
    assert_near(same["entropy"], penalties["entropy"], {torch.float64: 1e-3})  # ties are drawn again


@pytest.mark.parametrize("samples", [1, 2, 3, 10])
def test_uniform_orders_keep_nodes_out_of_the_padding(samples):
    sizes = [1, 2, 3, 4, 6, 3] * 4
    batch = random_graphs(sizes)
    p, penalties = Uniform(Symmetric(6))(batch, samples, Draws(seed=samples))
    assert p.shape == (24, samples, 6) and penalties == {}
    for b, n in enumerate(sizes):
        assert torch.equal(p.order[b, :, :n].sort().values, torch.arange(n).expand(samples, n))
        assert torch.equal(p.order[b, :, n:], torch.arange(n, 6).expand(samples, -1))
    with pytest.raises(ValueError, match="num_nodes must be between 1 and N = 5, got 6 for graph 4"):
        Uniform(Symmetric(5))(batch, samples)


@pytest.mark.parametrize("samples", [1, 5])
def test_uniform_orders_are_uniform_in_every_graph(samples):
    sizes = [2, 4, 3] * (7200 // samples)
    batch = Graphs(torch.zeros(sum(sizes), 1), torch.zeros(2, 0).long(), torch.tensor([0, *sizes]).cumsum(0))
    p, _ = Uniform(Symmetric(5))(batch, samples, Draws(seed=4))
    for place, n in enumerate((2, 4, 3)):
        counts = Counter(map(tuple, p.order[place::3, :, :n].flatten(0, 1).tolist()))
        cells = {2: 2, 3: 6, 4: 24}[n]
        expected = 7200 / cells
        assert len(counts) == cells
        chi2 = sum((c - expected) ** 2 / expected for c in counts.values())
        assert chi2 < (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5


def path_and_star() -> Graphs:
    """0 - 1 - 2 - 3 (ends alike, middles alike), a star of four leaves, one node."""
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [4, 5], [4, 6], [4, 7], [4, 8]]).T
    return Graphs(torch.zeros(10, 1), torch.cat([edges, edges.flip(0)], 1), torch.tensor([0, 4, 9, 10]))


def test_frame_sorts_by_class_with_ties_at_random():
    batch, samples = path_and_star(), 4800
    classes = frames.laplacian_keys(batch.edge_index, batch.ptr)
    p, penalties = Frame(Symmetric(6))(batch, samples, Draws(seed=1))
    assert penalties == {}
    for b, (start, end) in enumerate(zip(batch.ptr[:-1].tolist(), batch.ptr[1:].tolist(), strict=True)):
        mine = classes[start:end]
        order = p.order[b, :, : end - start]
        assert (mine[order].diff() >= 0).all()
        counts = Counter(map(tuple, order.tolist()))
        cells = 1
        for size in mine.bincount().tolist():
            cells *= torch.arange(1, size + 1).prod().item()
        assert len(counts) == cells
        expected = samples / cells
        chi2 = sum((c - expected) ** 2 / expected for c in counts.values())
        assert chi2 <= (cells - 1) + 5 * (2 * max(cells - 1, 1)) ** 0.5


def test_frame_follows_the_graph():
    """Nodes with other numbers: the same set of orders, in these numbers."""
    batch, samples = path_and_star(), 600
    moved, new = relabelled(batch, 1)
    f = Frame(Symmetric(6))
    here = f.group.compose(as_permutation(batch, new, samples, 6), f(batch, samples, Draws(seed=1))[0])
    there = f(moved, samples, Draws(seed=2))[0]
    for b in range(3):
        assert set(map(tuple, here.order[b].tolist())) == set(map(tuple, there.order[b].tolist()))
    asymmetric = random_graphs([7, 6], seed=ASYMMETRIC)
    classes = frames.laplacian_keys(asymmetric.edge_index, asymmetric.ptr)
    assert [len(c.unique()) for c in classes.split([7, 6])] == [7, 6]  # no ties: one order, exactly
    moved, new = relabelled(asymmetric, 2)
    f = Frame(Symmetric(8))
    here = f.group.compose(as_permutation(asymmetric, new, 2, 8), f(asymmetric, 2)[0])
    assert torch.equal(f(moved, 2)[0].order, here.order)


def test_frame_takes_the_classes_of_the_batch(monkeypatch):
    batch = path_and_star()
    cached = batch.replace(frame=frames.laplacian_keys(batch.edge_index, batch.ptr))
    f = Frame(Symmetric(6))
    plain = f(batch, 3, Draws(seed=1))[0]
    monkeypatch.setattr(frames, "laplacian_keys", None)  # not called
    assert torch.equal(f(cached, 3, Draws(seed=1))[0].order, plain.order)
    other = torch.tensor([3, 2, 1, 0, 0, 1, 2, 3, 4, 0])
    p = f(batch.replace(frame=other), 3)[0]
    assert torch.equal(p.order[:, 0], torch.tensor([[3, 2, 1, 0, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]))
    with pytest.raises(ValueError, match="Graphs: a graph must have at most N = 4 nodes, got 5 in graph 1"):
        Frame(Symmetric(4))(cached, 1)


def test_bad_input():
    batch = random_graphs(SIZES)
    for name, settings in (("in_features", (0,)), ("width", (2, 0)), ("layers", (2, 4, 0))):
        with pytest.raises(ValueError, match=f"GIN: {name} must be at least 1, got 0"):
            GIN(*settings)
    with pytest.raises(ValueError, match=re.escape("GIN: x must be (nodes, 3), got (16, 2)")):
        GIN(3)(batch, torch.zeros(16, 1, 3))
    with pytest.raises(ValueError, match=re.escape("GIN: noise must be (nodes, S, C) = (16, *, 2), got (16, 2)")):
        GIN(2)(batch, torch.zeros(16, 2))
    with pytest.raises(ValueError, match=re.escape("Learned: noise must be (16, 2, 2), got (16, 2)")):
        learned()(batch, 2, noise=torch.zeros(16, 2))
    with pytest.raises(ValueError, match="Graphs: a graph must have at most N = 6 nodes, got 7 in graph 2"):
        learned(slots=6)(batch, 1)
    lacks = "Learned: network must give ('matrices',) for Orthogonal(3), got GIN, which gives ('scores',)"
    with pytest.raises(ValueError, match=re.escape(lacks)):
        Learned(Orthogonal(3), GIN(2))
    lacks = "must give ('scores', 'matrices') for Symmetric(5) * Orthogonal(3), got VectorNeurons, which gives ('matrices',)"
    with pytest.raises(ValueError, match=re.escape(lacks)):
        Learned(Symmetric(5) * Orthogonal(3), VectorNeurons(scores=False))


@pytest.mark.parametrize("name", all_distributions())
def test_samples_must_be_a_count(name):
    f, batch = all_distributions()[name], random_graphs(SIZES)
    for samples, error, got in ((1.0, TypeError, "an int, got float 1.0"), (0, ValueError, "at least 1, got 0")):
        with pytest.raises(error, match=f"^{type(f).__name__}: samples must be {re.escape(got)}$"):
            f(batch, samples)


def test_a_frame_of_another_length():
    batch = random_graphs(SIZES)
    with pytest.raises(ValueError, match=re.escape("Graphs: frame must be (nodes,) = (16,), got (15,)")):
        Frame(Symmetric(N))(batch.replace(frame=torch.zeros(15).long()), S)


def test_what_would_lose_digits_is_refused_except_under_autocast():
    net, batch = GIN(C, 8).eval(), random_graphs(SIZES, dtype=torch.float32)
    noise = torch.rand(net.noise_shape(batch, S))
    for name, inputs in (("x", (batch.replace(x=batch.x.double()), noise)), ("noise", (batch, noise.double()))):
        message = f"GIN: {name} must be torch.float32 as the scores are, or below, got torch.float64"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            net(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net(*inputs)["scores"], net(batch, noise)["scores"])
    whole = batch.replace(x=batch.x.long().float())
    assert torch.equal(net(batch.replace(x=batch.x.long()), noise)["scores"], net(whole, noise)["scores"])


def test_edge_attr_is_not_read():
    f, batch = learned(), random_graphs(SIZES, edge_features=3)
    here, there = (f(x, S, Draws(seed=1))[0] for x in (batch, batch.replace(edge_attr=None)))
    assert torch.equal(here.scores, there.scores)
