"""The parts of a model: what an embedding returns, other people's groups, padded clouds, types, and what may be set later."""

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from probsym_fast import Symmetrized
from probsym_fast.distributions import GIN, Frame, Identity, Learned, Normal, Uniform, UniformNoise, VectorNeurons
from probsym_fast.groups import Euclidean, Orthogonal, PointClouds, Symmetric, Translation
from probsym_fast.models import (
    FlatGraph,
    IdentifiedNodes,
    MeanReadout,
    NodeReadout,
    NodeVectors,
    PairTokens,
)
from probsym_fast.models.chunks import Chunks
from probsym_fast.profiling.steps import bare_backbone, inference_steps, training_steps
from tests.conftest import assert_near
from tests.helpers.strangers import Molecules, Shifts
from tests.models.test_symmetrized import clouds

N, S = 5, 4


class Net(nn.Module):
    """A backbone of points (B, S, n, 3) and, perhaps, a number for each of them."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.map(x) if scale is None else self.map(x) * scale
        return y.mean(-2)


class Points(nn.Module):
    """An embedding that returns what `form` makes of the points and numbers."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, batch, group, g):
        x = group.act(g, batch.positions, "np", inverse=True)
        return self.form(x, x.new_full(x.shape[:-1], 2.0)[..., None])


class Named(NamedTuple):
    x: Tensor
    scale: Tensor


FORMS = {
    "tensor": lambda x, scale: 2 * x,
    "one in a tuple": lambda x, scale: (2 * x,),
    "tuple": lambda x, scale: (x, scale),
    "named tuple": Named,
    "dict": lambda x, scale: {"scale": scale, "x": x},
}


FRAME_OF = "Frame: group must be Symmetric(n), Orthogonal, SpecialOrthogonal, Euclidean or SpecialEuclidean, got "


def parts_of(form) -> Symmetrized:
    torch.manual_seed(0)
    net = Net().double()
    net.map.bias.data.zero_()  # linear: twice the points or twice the output is the same
    return Symmetrized(net, Points(form), MeanReadout(), Uniform(Euclidean(3)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_an_embedding_returns_a_tensor_a_tuple_or_a_dict(form, chunk):
    batch, expected = clouds(3), parts_of(FORMS["tuple"])
    model = parts_of(FORMS[form])
    model.chunk = chunk
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    y, expected_y = model(batch, 6, seeded())[0], expected(batch, 6, seeded())[0]
    assert y.shape == (3, 2)
    assert_near(y, expected_y)
    assert_near(model(batch, 6, seeded(), reduce="max")[0], expected(batch, 6, seeded(), reduce="max")[0])
    for one in (model, expected):
        one(batch, 6, seeded())[0].sum().backward()
    assert_near(model.backbone.map.weight.grad, expected.backbone.map.weight.grad)


def test_one_cloud_and_one_sample_are_not_taken_apart():
    """A bare tensor is one input also where its first axis could be counted off as several."""
    for count, samples in ((1, 6), (2, 6), (2, 1)):
        assert parts_of(FORMS["tensor"])(clouds(count), samples)[0].shape == (count, 2)


@pytest.mark.parametrize("form", FORMS)
def test_steps_take_what_an_embedding_returns(form):
    """The bare backbone has random inputs of the same shapes; the step of the distribution has a backward pass."""
    model, batch = parts_of(FORMS[form]), clouds(3)
    _, [((arguments, keywords), count)] = bare_backbone(model, batch, S)
    shapes = [tuple(x.shape) for x in (*arguments, *keywords.values())]
    with_scale = form in ("tuple", "named tuple", "dict")
    assert count == S and sorted(shapes) == sorted([(3, S, N, 3), *[(3, S, N, 1)] * with_scale])
    assert sorted(keywords) == (["scale", "x"] if form == "dict" else [])
    steps = training_steps(model, batch, S, lambda y, _: y.float().square().mean())
    model.embed.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    form_of, model.embed.form = model.embed.form, lambda x, scale: form_of(x * model.embed.weight, scale)
    steps.distribution()
    assert model.embed.weight.grad is not None
    steps.bare()
    steps.step()
    for step in (inference_steps(model, batch, S).bare, inference_steps(model, batch, S).distribution):
        step()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda x, scale: [x, scale],
            "Points: an embedding must return a Tensor, a tuple (positional inputs) or a dict (keyword inputs), got list",
        ),
        (
            lambda x, scale: None,
            "Points: an embedding must return a Tensor, a tuple (positional inputs) or a dict (keyword inputs), got NoneType",
        ),
        (lambda x, scale: {0: x}, "Points: the keys of the backbone's inputs must be str, got 0"),
    ],
)
def test_other_things_that_an_embedding_returns(form, message):
    model, batch = parts_of(form), clouds(2)
    g, _ = model.distribution(batch, S)
    runs = [lambda: model(batch, S), lambda: model.apply_elements(batch, g), lambda: bare_backbone(model, batch, S)]
    for run in runs:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            run()


# --- a group of someone else's ---


class All(nn.Module):
    """A backbone without any symmetry on what `NodeVectors` gives."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(N * 6 + 2 * N * N, 32), nn.Tanh(), nn.Linear(32, 3 * N))

    def forward(self, x, edges):
        edges = edges.expand(*x.shape[:2], *edges.shape[2:])
        return self.net(torch.cat([x.flatten(2), edges.flatten(2)], -1)).unflatten(-1, (N, 3))


@pytest.mark.parametrize("moves", ["n", None])
def test_a_group_of_someone_elses_moves_the_features_of_pairs(moves):
    """Averaged over every shift the model is equivariant, whether or not the group says what it moves."""
    group = Shifts(N)
    group.moves = moves
    model = Symmetrized(All(), NodeVectors(), NodeReadout(displacement=True), Uniform(group)).double()
    batch = clouds(2)
    moved = PointClouds(batch.positions.roll(1, 1), batch.velocities.roll(1, 1), batch.edges.roll((1, 1), (1, 2)))
    assert_near(model(moved, N)[0], model(batch, N)[0].roll(1, 1))


@pytest.mark.parametrize("group", [Euclidean(3), Translation(3), Symmetric(N), Symmetric(N) * Euclidean(3)], ids=repr)
def test_pairs_that_are_kept_have_one_sample(group):
    batch = clouds(2)
    g = group.uniform(batch, S)
    x, edges = NodeVectors()(batch, group, g)
    assert x.shape == (2, S, N, 6)
    expected = group.act(g, batch.edges, "nnc", inverse=True)
    assert edges.shape == ((2, 1, N, N, 2) if group.keeps("nnc") else (2, S, N, N, 2))
    assert torch.equal(edges.expand_as(expected), expected)


# --- counts of valid nodes ---


def molecules(n: int = 9) -> Molecules:
    return Molecules(torch.randn(2, n, 3), torch.tensor([3, 7]))


def test_who_takes_every_node_as_valid_says_so():
    batch, group = molecules(), Euclidean(3)
    learned = Learned(group, VectorNeurons(channels=1, scores=False)).eval()
    g = group.uniform(batch, S)
    for embed, way_out in ((NodeVectors(), "; for a backbone that takes lengths set lengths=True"), (PairTokens(), "")):
        message = f"{type(embed).__name__}: num_nodes must be None (every node counts as valid), got (2,){way_out}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            embed(batch, group, g)
    assert learned(batch, S)[0].frame.isfinite().all()
    whole = Molecules(batch.positions)
    assert learned(whole, S)[0].frame.shape == (2, S, 3, 3)
    assert NodeVectors()(whole, group, g)[0].shape == (2, S, 9, 6) and PairTokens()(whole, group, g)[0].shape[2] == 81


@pytest.mark.parametrize("displacement", [True, False])
@pytest.mark.parametrize("group", [Euclidean(3), Symmetric(9) * Euclidean(3)], ids=repr)
def test_node_readout_reads_the_valid_nodes(displacement, group):
    """What is in the padding, NaN too, does not come out; valid nodes have what they have without padding."""
    batch = molecules()
    g = group.uniform(batch, S)
    outputs = torch.randn(2, S, 9, 3)
    readout = NodeReadout(displacement)
    y = readout(outputs, batch, group, g)
    assert (y[~batch.valid] == 0).all() and (y[batch.valid] != 0).all()
    outputs[:, :, 7:], batch.positions[:, 7:] = torch.nan, torch.nan
    assert torch.equal(readout(outputs, batch, group, g), y)
    whole = readout(outputs, Molecules(batch.positions), group, g)
    assert torch.equal(whole[batch.valid], y[batch.valid])


# --- types and values of parts ---


def test_parts_of_other_types():
    group = Euclidean(3)
    good = {"backbone": Net(), "embed": PairTokens(), "readout": MeanReadout(), "distribution": Uniform(group)}
    module, distribution = "an nn.Module", "a Distribution, or a module with a group"
    for name, bad, wanted, got in (
        ("backbone", lambda x: x, module, "function"),
        ("embed", PairTokens, module, "the class PairTokens"),
        ("readout", None, module, "NoneType"),
        ("distribution", group, distribution, "Euclidean"),
        ("distribution", Net(), distribution, "Net"),
    ):
        with pytest.raises(TypeError, match=f"^Symmetrized: {name} must be {wanted}, got {got}$"):
            Symmetrized(**good | {name: bad})
    net = VectorNeurons(scores=False)
    for make, message in (
        (lambda: Uniform(3), "Uniform: group must be a Group, got int"),
        (lambda: Identity(Symmetric), "Identity: group must be a Group, got the class Symmetric"),
        (lambda: Uniform(Uniform(group)), "Uniform: group must be a Group, got Uniform"),
        (lambda: Frame(3), FRAME_OF + "3"),
        (lambda: Learned(net, net), "Learned: group must be a Group, got VectorNeurons"),
        (lambda: Learned(group, group), "Learned: network must be an nn.Module, got Euclidean"),
        (lambda: Learned(group, net, 1.0), "Learned: noise must be a Noise or None, got float"),
        (lambda: Learned(group, net, Normal), "Learned: noise must be a Noise or None, got the class Normal"),
        (lambda: Normal("1"), "Normal: scale must be a number, got str '1'"),
        (lambda: UniformNoise(True), "UniformNoise: scale must be a number, got bool True"),
        (lambda: UniformNoise(fixed=1.5), "UniformNoise: fixed must be an int, got float 1.5"),
        (lambda: GIN(2, 8.0), "GIN: width must be an int, got float 8.0"),
        (lambda: GIN(2, dropout="0"), "GIN: dropout must be a number, got str '0'"),
        (lambda: VectorNeurons(dropout=None), "VectorNeurons: dropout must be a number, got NoneType None"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            make()
    with pytest.raises(ValueError, match=r"^GIN: dropout must be in 0\.\.1, got 1\.5$"):
        GIN(2, dropout=1.5)


def test_chunk_memory_and_draws_may_be_set():
    model, batch = parts_of(FORMS["tensor"]), clouds(2)
    assert model.chunk is None and model.memory is None and model.draws == "independent"
    model.chunk = 4
    assert model.chunk == 4 and model.chunks.size == 4 and model.chunks.size_for(10) == 4
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(batch, 10)
    assert seen == [4, 4, 2]
    model.chunk = "auto"
    model.memory = 10**9
    assert (model.chunk, model.memory) == ("auto", 10**9) and isinstance(model.chunks, Chunks)
    model.chunk = "auto"
    assert model.memory == 10**9
    model.chunk = 3
    assert (model.chunk, model.memory) == (3, None)
    model.draws = "stratified"
    assert model.draws == "stratified"
    kept = model.chunks = Chunks(2)
    assert model.chunk == 2 and model.chunks is kept


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("chunk", 2.5, TypeError, "chunk must be an int >= 1, None or 'auto', got 2.5"),
        ("chunk", 0, ValueError, "chunk must be an int >= 1, None or 'auto', got 0"),
        ("chunk", "all", TypeError, "chunk must be an int >= 1, None or 'auto', got 'all'"),
        ("memory", 10**9, ValueError, "memory must be None unless chunk is 'auto', got 1000000000 and 3"),
        ("draws", "mirrored", ValueError, "draws must be one of ('independent', 'antithetic', 'stratified'), got 'mirrored'"),
        ("chunks", 4, TypeError, "chunks must be a Chunks (for a number of samples or 'auto' set chunk), got int"),
        ("chunks", "auto", TypeError, "chunks must be a Chunks (for a number of samples or 'auto' set chunk), got str"),
    ],
)  # fmt: skip
def test_what_is_set_is_checked(name, value, error, message):
    model = parts_of(FORMS["tensor"])
    model.chunk = 3
    kept = model.chunks
    with pytest.raises(error, match=f"^{re.escape(f'Symmetrized: {message}')}$"):
        setattr(model, name, value)
    assert model.chunks is kept and model.draws == "independent"  # nothing is half set
    assert model(clouds(2), S)[0].shape == (2, 2)


def test_chunks_check_what_is_set():
    chunks = Chunks("auto", memory=10**9)
    for name, value, error, message in (
        ("size", 2.5, TypeError, "size must be an int >= 1, None or 'auto', got 2.5"),
        ("size", 4, ValueError, "memory must be None unless size is 'auto', got 1000000000 and 4"),
        ("memory", "1", TypeError, "memory must be an int >= 1 or None, got '1'"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'Chunks: {message}')}$"):
            setattr(chunks, name, value)
    assert (chunks.size, chunks.memory) == ("auto", 10**9)
    chunks.memory = None
    chunks.size = 4
    assert (chunks.size, chunks.memory) == (4, None)


def test_a_frame_is_no_distribution_of_a_product():
    with pytest.raises(TypeError, match=re.escape(FRAME_OF + "Symmetric(5) * Orthogonal(3)")):
        Frame(Symmetric(5) * Orthogonal(3))


PRINTED = {
    "FlatGraph": (FlatGraph(8, 16, 2), "N=8, width=16, soft=False"),
    "IdentifiedNodes": (IdentifiedNodes(8, 16, 2), "N=8, width=16, node_features=2"),
    "GIN": (GIN(2, width=16, layers=4), "in_features=2, width=16, layers=4"),
    "VectorNeurons": (VectorNeurons(1, 8, scores=False), "channels=1, width=8, dim=3, outputs=('matrices',)"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_printed_part_shows_its_sizes(name):
    module, expected = PRINTED[name]
    shown = repr(module)
    assert shown == f"{name}({expected})" or shown.startswith(f"{name}(\n  {expected}\n")
