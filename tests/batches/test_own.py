"""Batches through everything: `psf.Images`, and of one's own images, padded sequences, and dense graphs that know nothing of
`psf.Batch`."""

import copy
import pickle
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import probsym_fast as psf
from probsym_fast.distributions import Learned, Uniform, UniformNoise
from probsym_fast.groups import Group, Symmetric
from probsym_fast.models import MeanReadout
from tests.conftest import assert_near

SIDE, N, S = 4, 5, 3


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- images, and the symmetries of a square ---


@dataclass(eq=False)
class Images(psf.Batch):
    """pixels: (B, C, side, side). weights: (B, side, side), or None."""

    pixels: torch.Tensor
    weights: torch.Tensor | None = None

    layouts = {"pixels": "chw", "weights": "hw"}  # noqa: RUF012


class Square(Group):
    """k in 0..7, (B, S): k % 4 turns, after a flip where k > 3."""

    moves = "hw"

    def identity(self, batch, samples):
        return torch.zeros(batch.size, samples, dtype=torch.int64, device=batch.device)

    def uniform(self, batch, samples, draws=None):
        return (8 * (draws or psf.Draws()).uniform((batch.size, samples), "square", device=batch.device)).long()

    def compose(self, g, h):
        return (g + torch.where(g > 3, -h, h)) % 4 + 4 * ((g > 3) ^ (h > 3))

    def inverse(self, g):
        return torch.where(g > 3, g, -g % 4)

    def act(self, g, x, layout, *, inverse=False, mean=False):
        x = (x if x.ndim == len(layout) + 2 else x[:, None]).expand(*g.shape, *x.shape[x.ndim - len(layout) :])
        if layout.endswith("hw"):
            g = self.inverse(g) if inverse else g
            moved = [torch.rot90(x.flip(-1) if k > 3 else x, k % 4, (-2, -1)) for k in range(8)]
            index = g.view(1, *g.shape, *[1] * (x.ndim - 2)).expand(1, *x.shape)
            x = torch.stack(moved).gather(0, index)[0]
        return x.mean(1) if mean else x


class Pixels(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, batch.pixels, "chw", inverse=True).flatten(2)


class Painted(nn.Module):
    """Another image, and three numbers."""

    layout = {"image": "hw", "numbers": "c"}  # noqa: RUF012

    def forward(self, outputs, batch, group, g):
        image = group.act(g, outputs.unflatten(-1, (SIDE, SIDE)), "hw", mean=True)
        return {"image": image, "numbers": outputs[..., :3].mean(1)}


def of_images(B: int):
    parts = nn.Sequential(nn.Linear(2 * SIDE**2, SIDE**2), nn.Tanh()), Pixels(), Painted()
    return psf.Symmetrized(*parts, Uniform(Square())), Images(random(B, 2, SIDE, SIDE))


def of_public_images(B: int):
    """With a mask and keys."""
    batch = psf.Images(random(B, 2, SIDE, SIDE), random(B, SIDE, SIDE), torch.arange(B) + 7)
    return psf.Symmetrized(*list(of_images(B)[0].children())[:3], Uniform(psf.groups.Dihedral(4))), batch


# --- sequences, padded, in a learned order ---


@dataclass(eq=False)
class Sequences(psf.Batch):
    """x: (B, N, C), of which num_nodes (B,) count. key: (B,), or None."""

    x: torch.Tensor
    num_nodes: torch.Tensor
    key: torch.Tensor | None = None

    layouts = {"x": "nc"}  # noqa: RUF012

    @property
    def valid(self) -> torch.Tensor:
        return (torch.arange(N) < self.num_nodes[:, None])[..., None]


class Scores(nn.Module):
    """One layer for the scores of each element."""

    outputs = ("scores",)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def noise_shape(self, batch, samples):
        return batch.size, samples, N, 2

    def forward(self, batch, noise):
        return {"scores": self.layer((batch.x[:, None] + noise).tanh())[..., 0]}


class Listed(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, torch.where(batch.valid, batch.x, 0), "nc", inverse=True).flatten(2)


class PerElement(nn.Module):
    layout = "nc"

    def forward(self, outputs, batch, group, g):
        return torch.where(batch.valid, group.act(g, outputs.unflatten(-1, (N, 1)), "nc", mean=True), 0)


def of_sequences(B: int, noise=None):
    learned = Learned(Symmetric(N), Scores(), noise or UniformNoise(), tau=0.1)
    parts = nn.Sequential(nn.Linear(2 * N, N), nn.Tanh()), Listed(), PerElement()
    return psf.Symmetrized(*parts, learned), Sequences(random(B, N, 2), torch.arange(B) % N + 1)


# --- dense graphs, without the base class ---


@dataclass(eq=False)
class Dense:
    """matrix: (B, N, N), of which the first num_nodes (B,) rows and columns are nodes."""

    matrix: torch.Tensor
    num_nodes: torch.Tensor

    axes = {"matrix": {0: "graphs"}, "num_nodes": {0: "graphs"}}  # noqa: RUF012
    center = None

    def check(self) -> None: ...

    def names(self, rows: int) -> None: ...

    def moved(self, group, g):
        return Dense(group.act(g, self.matrix, "nn")[:, 0], self.num_nodes)

    def carried(self, group, g, values, layout):
        return group.act(g, values, layout)[:, 0]

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device


class Matrices(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, batch.matrix, "nn", inverse=True).flatten(2)


def of_dense(B: int):
    num_nodes = torch.arange(B) % N + 1
    valid = torch.arange(N) < num_nodes[:, None]
    matrix = random(B, N, N) * valid[:, None] * valid[..., None]
    parts = nn.Sequential(nn.Linear(N * N, 8), nn.Tanh()), Matrices(), MeanReadout()
    return psf.Symmetrized(*parts, Uniform(Symmetric(N))), Dense(matrix, num_nodes)


MAKERS = {"images": of_images, "psf.Images": of_public_images, "sequences": of_sequences, "dense graphs": of_dense}


@pytest.fixture(params=MAKERS)
def make(request):
    torch.manual_seed(0)
    return MAKERS[request.param]


def flat(prediction) -> torch.Tensor:
    return torch.cat([x.flatten() for x in pytree.tree_leaves(prediction)])


def test_chunks_and_estimates(make):
    f, batch = make(6)
    found = []
    for chunk in (None, 2, "auto"):
        f.chunk = chunk
        f.memory = 10**8 if chunk == "auto" else None
        f.zero_grad()
        y, penalties = f.train()(batch, S, seed=3)
        (flat(y).square().sum() + sum(penalties.values())).backward()
        found.append((flat(y), next(f.backbone.parameters()).grad))
    for y, gradient in found[1:]:
        assert_near(y, found[0][0], {torch.float32: 1e-5})
        assert_near(gradient, found[0][1], {torch.float32: 1e-5})
    estimate = f.eval().estimate(batch, 32, seed=3)
    assert_near(flat(estimate.prediction), flat(f(batch, 32, seed=3)[0]), {torch.float32: 1e-5})
    assert flat(estimate.standard_error).max() > 0


def test_profiles(make):
    f, batch = make(3)
    rows = psf.profile(f, batch, samples=[2], seconds=0.001, modes=["training", "inference"], repeats=3).rows
    assert all(row.latency > 0 and row.tax > 0 for row in rows) and rows[1].variance > 0


@torch.no_grad()
def test_one_graph_and_a_program_for_other_sizes(make):
    f, batch = make(3)
    if isinstance(f.readout, Painted):
        f.reduce, f.score = "weighted", lambda y: y["numbers"].sum(-1)
    f.eval()
    seed = torch.tensor(3)
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert_near(flat(compiled(batch, S, seed=seed)[0]), flat(f(batch, S, seed=seed)[0]))
    program = psf.export(f, batch, S)
    names = program.graph_signature.user_inputs[:-1]
    for B in (1, 5):
        other = make(B)[1]
        found = program.module()(*(getattr(other, name) for name in names), seed)
        assert_near(flat(found), flat(f(other, S, seed=seed)[0]))


def test_equivariance(make):
    f, batch = make(6)
    few, many = (psf.equivariance_error(f.eval(), batch, count, moves=2, scale=1) for count in (1, 128))
    assert few / many > 4  # 1 / sqrt(S): 11
    if isinstance(f.readout, Painted):  # all elements once
        whole = torch.arange(8).expand(6, 8)
        for how in ({"reduce": "mean"}, {"reduce": "best", "score": lambda y: y["numbers"].sum(-1)}):
            exact = lambda x, how=how: f.apply_elements(x, whole, **how)  # noqa: E731
            assert psf.equivariance_error(exact, batch, group=f.distribution.group, output=Painted.layout) < 1e-5


def test_a_sequence_has_the_noise_of_its_key():
    f, batch = of_sequences(4, UniformNoise(fixed=5))
    batch, order = batch.replace(key=torch.tensor([7, 0, 3, 9])), torch.tensor([2, 0, 3, 1])
    other = pytree.tree_map(lambda x: x[order], batch)
    plain, moved = (f.eval()(x, S)[0] for x in (batch, other))
    assert_near(moved, plain[order])
    without = f(other.replace(key=None), S)[0]
    assert (without - plain[order]).abs().max() > 1e-3


# --- what the base class gives ---


@pytest.mark.parametrize("batch", [of_images(2)[1], of_sequences(2)[1]], ids=["images", "sequences"])
def test_torchs_tools(batch, tmp_path):
    torch.save(batch, tmp_path / "batch.pt")
    wide = batch.to(torch.float64)
    first = next(iter(vars(batch)))
    assert wide.dtype == torch.float64 and wide.size == 2 and wide.device == torch.device("cpu")
    for found in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), torch.load(tmp_path / "batch.pt")):
        assert type(found) is type(batch) and torch.equal(getattr(found, first), getattr(batch, first))
    leaves, spec = pytree.tree_flatten(batch)
    assert len(leaves) == 2 - isinstance(batch, Images) and pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert batch.names(2) is None and batch.center is None and (batch.num_nodes is None) == isinstance(batch, Images)


@dataclass(eq=False)
class Spectra(psf.Batch):
    """values: (B, frequencies), complex. offsets: (B + 1,)."""

    values: torch.Tensor
    offsets: torch.Tensor | None = None
    grid: torch.Tensor | None = None

    axes = {"values": {0: "batch", 1: "frequencies"}, "offsets": {0: "batch + 1"}, "grid": {0: "frequencies"}}  # noqa: RUF012


def test_sizes_by_their_names():
    values = torch.zeros(3, 7, dtype=torch.complex64)
    batch = Spectra(values, torch.arange(4), torch.zeros(7))
    batch.check()
    assert batch.size == 3 and batch.dtype == torch.float32
    assert batch.to(torch.float64).values.dtype == torch.complex128
    assert Sequences(torch.zeros(2, 3), torch.ones(2)).replace(x=torch.zeros(2, 3).int()).dtype == torch.float32
    for changes, error, message in (
        ({"grid": torch.zeros(6)}, ValueError, "axis 0 of grid must be frequencies = 7, got (6,)"),
        ({"offsets": torch.arange(3)}, ValueError, "axis 0 of offsets must be batch + 1 = 4, got (3,)"),
        ({"values": torch.zeros(3)}, ValueError, "values must have 2 axes or more, got (3,)"),
        ({"grid": [0]}, TypeError, "grid must be a Tensor or None, got list"),
        ({"values": None}, TypeError, "values must be a Tensor, got NoneType"),
        ({"grid": torch.zeros(7, device="meta")}, RuntimeError, "grid must be on cpu as values is, got meta"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'Spectra: {message}')}$"):
            batch.replace(**changes).check()
    with pytest.raises(NotImplementedError, match=r"^Spectra: layouts must name the layouts of the fields that move$"):
        batch.moved(Square(), None)
    with pytest.raises(TypeError, match=r"^Spectra.replace: fields must be of values, offsets, grid, got x$"):
        batch.replace(x=values)
