"""Numbers: NumPy's are taken wherever Python's are, and go on as Python's; anything else is refused by name."""

import json
import re

import numpy as np
import pytest
import torch

import probsym_fast as psf
from probsym_fast import models, ops
from probsym_fast._checks import as_int, as_number, check_counts
from probsym_fast.distributions import GIN, Learned, Normal, Uniform, UniformNoise, VectorNeurons
from probsym_fast.groups import Euclidean, Orthogonal, Symmetric, Translation
from probsym_fast.models.chunks import Chunks
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs

INTS = [np.int64, np.int32, np.uint8, np.int16]


@pytest.mark.parametrize("kind", INTS)
def test_ints(kind):
    value = as_int(kind(3))
    assert value == 3 and type(value) is int
    assert type(as_number(kind(3))) is int
    assert [type(x) for x in check_counts("op", a=kind(1), b=2)] == [int, int]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numbers(kind):
    assert as_int(kind(3)) is None
    assert as_number(kind(0.5)) == 0.5 and isinstance(as_number(kind(0.5)), float)


OTHERS = [True, np.True_, "3", None, torch.tensor(3), np.array(3), np.array([3]), 3j, [3]]


@pytest.mark.parametrize("value", OTHERS, ids=repr)
def test_what_is_no_number(value):
    assert as_int(value) is None and as_number(value) is None


SCORES = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))


def small_model() -> psf.Symmetrized:
    torch.manual_seed(0)
    learned = Learned(Symmetric(5), GIN(2, 8), UniformNoise(), tau=0.1)
    return psf.Symmetrized(models.MLP([8, 4]), models.FlatGraph(5, 8, 2), models.MeanReadout(), learned).eval()


def chunked(size) -> torch.Tensor:
    model = small_model()
    model.chunks = Chunks(size)
    assert type(model.chunk) is int
    return model(BATCH, 5, torch.Generator().manual_seed(1))[0].detach()


def chunked_later(size) -> torch.Tensor:
    model = small_model()
    model.chunk = size
    return model(BATCH, 5, torch.Generator().manual_seed(1))[0].detach()


# every place that takes an int, with (the argument's name in messages, its place, a good value)
BATCH = random_graphs([4, 5], dtype=torch.float32)
COUNTS = {
    "soft_permutation iterations": lambda x: ops.soft_permutation(SCORES, tau=0.1, iterations=x).log_r,
    "embed_nodes tokens": lambda x: ops.embed_nodes(
        BATCH.x, BATCH.ptr, Symmetric(6).identity(BATCH, 1), torch.ones(2, 2, 2), tokens=x
    ),
    "readout nodes": lambda x: ops.node_identifiers(
        torch.tensor([0, 3]), ops.Permutation(torch.arange(3).expand(1, 1, 3)), torch.ones(3, 2), nodes=x
    ),
    "samples": lambda x: small_model()(BATCH, x, torch.Generator().manual_seed(1))[0],
    "samples of a distribution": lambda x: Uniform(Symmetric(5))(BATCH, x, psf.groups.Draws(seed=1))[0].order,
    "samples of estimate": lambda x: small_model().estimate(BATCH, x, torch.Generator().manual_seed(1), step=x).prediction,
    "chunk": chunked,
    "chunk that is set": chunked_later,
    "memory": lambda x: torch.tensor(Chunks("auto", x).memory),
    "fixed": lambda x: UniformNoise(fixed=x)((2, 3), BATCH),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_numpy_at_use(name):
    expected = COUNTS[name](3)
    for kind in INTS:
        assert torch.equal(COUNTS[name](kind(3)), expected)
    for bad in (3.0, np.float64(3), True, np.True_, "3", torch.tensor(3), np.array([3])):
        with pytest.raises(TypeError, match=r"^\w+: .* must be an int"):
            COUNTS[name](bad)


NUMBERS = {
    "tau": lambda x: ops.soft_permutation(SCORES, tau=x).log_r,
    "tau of a distribution": lambda x: ops.soft_permutation(SCORES, tau=Learned(Symmetric(5), GIN(2), tau=x).tau).log_r,
    "eps": lambda x: ops.linear_batch_norm_relu(SCORES[0], torch.ones(2, 5), torch.ones(2), torch.ones(2), x)[0],
    "scale": lambda x: Normal(x)((2, 3), BATCH, psf.groups.Draws(seed=1)),
    "tolerance": lambda x: small_model().estimate(BATCH, 40, torch.Generator().manual_seed(1), tolerance=x).standard_error,
    "dropout": lambda x: torch.tensor(VectorNeurons(dropout=x).dropout),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_at_use(name):
    expected = NUMBERS[name](0.25)
    for kind in (np.float32, np.float64, np.float16):
        assert torch.equal(NUMBERS[name](kind(0.25)), expected)
    assert torch.equal(NUMBERS[name](np.int64(1)), NUMBERS[name](1))
    for bad in (True, np.True_, "0.25", torch.tensor(0.25), np.array([0.25]), 1j):
        with pytest.raises(TypeError, match=rf"^\w+: {name.split()[0]} must be a number, got {type(bad).__name__}"):
            NUMBERS[name](bad)


# every setting of every module that is a count: built of NumPy's ints a module is that of Python's
MODULES = {
    "GIN": (GIN, {"in_features": 2, "width": 4, "layers": 2}),
    "VectorNeurons": (VectorNeurons, {"channels": 2, "width": 4, "neighbors": 3, "dim": 3}),
    "MLP": (lambda **widths: models.MLP(list(widths.values())), {"each of widths": 4, "second": 3}),
    "Transformer": (
        models.Transformer,
        {"in_features": 4, "width": 8, "layers": 1, "heads": 2, "feedforward": 8, "tokens": 6, "out_features": 2},
    ),
    "MessagePassing": (
        models.MessagePassing,
        {"in_features": 4, "edge_features": 2, "width": 8, "layers": 1, "out_features": 2},
    ),
    "FlatGraph": (models.FlatGraph, {"N": 5, "width": 4, "node_features": 2, "edge_features": 1}),
    "IdentifiedNodes": (models.IdentifiedNodes, {"N": 5, "width": 4, "node_features": 2}),
    "GINBackbone": (
        lambda **counts: models.GINBackbone(**counts, activation="tanh"),
        {"width": 4, "layers": 2, "out_features": 1},
    ),
    "GraphTokens": (
        models.GraphTokens,
        {"N": 5, "width": 4, "grid": 2, "node_features": 2, "edge_features": 1},
    ),
    "NodeTokens": (models.NodeTokens, {"N": 5, "width": 4, "tokens": 2, "node_features": 2}),
    "GraphReadout": (models.GraphReadout, {"width": 4, "out_features": 2}),
    "DiagonalReadout": (models.DiagonalReadout, {"N": 5, "width": 4, "grid": 2, "out_features": 2}),
    "PairReadout": (models.PairReadout, {"N": 5, "width": 4, "grid": 2, "out_features": 2}),
    "SlotReadout": (models.SlotReadout, {"N": 5, "width": 4, "out_features": 2}),
}


@pytest.mark.parametrize("name", MODULES)
def test_settings_of_modules(name):
    make, counts = MODULES[name]
    states = []
    for kind in (int, np.int64, np.uint8):
        torch.manual_seed(0)
        states.append(make(**{key: kind(value) for key, value in counts.items()}).state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    for key, value in counts.items():
        for bad in (float(value), np.float32(value), True, np.True_, str(value), torch.tensor(value), None):
            if bad is None and (name, key) == ("Transformer", "tokens"):  # any number of them
                continue
            message = f"{name}: {key} must be an int, got {type(bad).__name__} {bad!r}".replace(
                "second", "each of widths"
            )
            with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
                make(**counts | {key: bad})


def test_read_takes_any_ints():
    x = torch.randn(2, 7, 4)

    def net(read):
        torch.manual_seed(0)
        return models.Transformer(4, 8, 1, 2, 8, 7, 2, read=read)

    whole = net(None)(x)
    for read in (
        [0],
        [0, 3, 6],
        [6, 3, 0],
        [2, 2, 5],
        [0, 1, 5, 6],
        [0, 5, 6],
        [-1, -7],
        [3, 1, 4, 1, 5],
        range(1, 7, 2),
    ):
        assert_near(net(read)(x), whole[:, list(read)], {torch.float32: 1e-6})
    for read in (np.array([0, 3]), torch.tensor([0, 3]), [np.int32(0), np.int32(3)], (0, 3)):
        assert_near(net(read)(x), whole[:, [0, 3]], {torch.float32: 1e-6})
    for read, error, message in (
        ([0, 7], ValueError, "Transformer: read must be in -7..6, got 7"),
        ([], ValueError, "Transformer: read must hold one token or more, or be None, got none"),
        ([0.0], TypeError, "Transformer: each of read must be an int, got float 0.0"),
        (3, TypeError, "Transformer: read must be a sequence of token numbers or None, got int"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            net(read)


def test_groups_and_profiles():
    for kind in INTS:
        for group in (Symmetric(kind(5)), Orthogonal(kind(3)), Translation(kind(2)), Euclidean(kind(3))):
            assert type(getattr(group, "n", getattr(group, "d", None))) is int
    settings = {"seconds": np.float32(1e-3), "repeats": np.int64(2), "modes": ["variance"]}
    found = psf.profile(small_model(), BATCH, samples=list(np.arange(1, 3)), chunks=[np.int64(2)], **settings)
    assert [(row["samples"], row["chunk"]) for row in json.loads(found.json())["rows"]] == [(1, 2), (2, 2)]


def test_sizes_that_vary_under_compile():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x):
        return x * check_counts("run", count=x.shape[0])[0]

    for n in (3, 4, 5):
        assert torch.equal(run(torch.ones(n)), torch.full((n,), float(n)))
