"""Nothing on a path that runs on a GPU waits for it: tensors without values ("meta") go through every op, and through
models as they are put together, forward and backward, and through the launchers of the Triton kernels."""

import contextlib
import importlib.util

import pytest
import torch
from torch import nn

from probsym_fast import Symmetrized, models, tasks
from probsym_fast.distributions import (
    GIN,
    Energy,
    Frame,
    Identity,
    Learned,
    Normal,
    Orbit,
    RotationEnergy,
    Uniform,
    UniformNoise,
    VectorNeurons,
    WeightedFrame,
)
from probsym_fast.draws import seeded
from probsym_fast.groups import (
    Cyclic,
    Dihedral,
    Draws,
    Euclidean,
    Images,
    Lorentz,
    PointClouds,
    SpecialOrthogonal,
    Symmetric,
    Unitary,
)
from probsym_fast.ops import Permutation, node_identifiers, readout
from probsym_fast.ops.reference.embed_image import moved_image
from probsym_fast.profiling.steps import move
from tests.helpers.graphs import random_graphs
from tests.ops.test_backends import CALLS, matrices

N, GRID, WIDTH = 6, 3, 8


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.sum()),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_is_refused(wait):
    """What the tests below rest on."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.ones(3, device="meta"))


@pytest.fixture(autouse=True)
def autocast_knows_meta(monkeypatch):
    """torch.autocast refuses the device "meta"; there it is off."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def off(device_type, *arguments, **settings):
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **settings)

    monkeypatch.setattr(torch, "autocast", off)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "meta" and enabled(device))


@pytest.mark.parametrize("name", CALLS)
def test_ops(name):
    x = matrices("meta", requires_grad=True)
    out = CALLS[name](x, "auto")
    out.sum().backward()
    assert out.device.type == x.grad.device.type == "meta"


@pytest.mark.parametrize("where", ["nodes", "diagonal"])
def test_the_number_of_nodes_is_given(where):
    order, ptr = torch.arange(N).expand(2, 3, N), torch.tensor([0, 4, 9])
    axes = 1 if where == "nodes" else 2
    tokens, weight = torch.randn(2, 3, GRID**axes, WIDTH), torch.randn(WIDTH, 2, *[2] * axes)
    expected = readout(tokens, ptr, Permutation(order), weight, at=where)
    assert torch.equal(readout(tokens, ptr, Permutation(order), weight, at=where, nodes=9), expected)
    with pytest.raises(ValueError, match=r"^readout: ptr must end with the number of nodes 8, got 9$"):
        readout(tokens, ptr, Permutation(order), weight, at=where, nodes=8)
    with pytest.raises(TypeError, match=r"^readout: nodes must be an int, got float 9\.0$"):
        readout(tokens, ptr, Permutation(order), weight, at=where, nodes=9.0)
    tokens, ptr, order, weight = (x.to("meta") for x in (tokens, ptr, order, weight))
    assert readout(tokens, ptr, Permutation(order), weight, at=where, nodes=9).shape == expected.shape
    for call in (
        lambda: readout(tokens, ptr, Permutation(order), weight, at=where),
        lambda: node_identifiers(ptr, Permutation(order), torch.randn(N, 4, device="meta")),
    ):
        with pytest.raises(RuntimeError, match="meta"):
            call()


class Pooled(nn.Module):
    """Tokens to their mean."""

    def forward(self, tokens):
        return tokens.mean(-2)


def on_graphs():
    """name -> backbone, embedding, readout, of every kind."""
    tokens = {
        f"GraphTokens {nodes}, dense {dense}": models.GraphTokens(N, WIDTH, GRID, 2, 3, nodes=nodes, dense=dense)
        for nodes in ("tokens", "diagonal")
        for dense in (None, True, False)
    }
    kinds = {name: (Pooled(), embed, models.GraphReadout(WIDTH, 2)) for name, embed in tokens.items()}
    embed = models.GraphTokens(N, WIDTH, GRID, 2, 3, pad_mode="circular", centered=True)
    kinds["pairs"] = nn.Tanh(), embed, models.PairReadout(N, WIDTH, GRID)
    kinds["diagonal"] = nn.Tanh(), models.NodeTokens(N, WIDTH, GRID, 2), models.DiagonalReadout(N, WIDTH, GRID, 2)
    kinds["MLP"] = models.MLP([WIDTH, 4]), models.FlatGraph(N, WIDTH, 2, 3), models.MeanReadout()
    kinds["soft MLP"] = models.MLP([WIDTH, 4]), models.FlatGraph(N, WIDTH, 2, 3, soft=True), models.MeanReadout()
    kinds["slots"] = models.MLP([WIDTH, WIDTH]), models.FlatGraph(N, WIDTH, 2, 3), models.SlotReadout(N, WIDTH)
    kinds["GIN"] = models.GINBackbone(WIDTH, 2, 2, "tanh"), models.IdentifiedNodes(N, WIDTH, 2), models.MeanReadout()
    if importlib.util.find_spec("timm"):
        settings = {"pretrained": False, "read": "pooled", "patch_dropout": (0.1, 0.5)}
        kinds["ViT"] = (
            models.timm_backbone("vit_tiny_patch16_224", grid=GRID, **settings),
            models.GraphTokens(N, 192, GRID, 2, 3),
            models.GraphReadout(192, 2),
        )
    return kinds


def distributions():
    group = Symmetric(N)
    kinds = {"uniform": Uniform(group), "identity": Identity(group), "frame": Frame(group)}
    kinds["learned"] = Learned(group, GIN(2, WIDTH), UniformNoise())
    kinds["learned, fixed noise"] = Learned(group, GIN(2, WIDTH), UniformNoise(fixed=3))
    return kinds


def trained(model, batch):
    prediction, penalties = model(batch, 2)
    loss = prediction.square().sum() + sum(penalties.values())
    assert loss.device.type == "meta"
    loss.backward()
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", on_graphs())
def test_models_of_graphs(kind):
    batch = random_graphs([5, 6, 3], dtype=torch.float32, edge_features=3)
    batch = batch.replace(pairs=batch.edge_index[:, ::2], frame=torch.zeros(14, dtype=torch.int64)).to("meta")
    for name, distribution in distributions().items():
        if kind == "soft MLP" and not name.startswith("learned"):
            continue
        model = Symmetrized(*on_graphs()[kind], distribution).to("meta")
        trained(model.train(), batch)
        with torch.no_grad():
            model.eval()(batch, 2)


class Flat(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, batch.positions, "np", inverse=True).flatten(2)


@pytest.mark.parametrize("kind", ["independent", "stratified"])
def test_distributions_of_the_plane(kind):
    """Whose elements also act; eigenvectors of a `Frame` do wait, in torch's own code."""
    x = torch.randn(3, 5, 2)
    clouds = PointClouds(x, x, torch.randn(3, 5, 5, 2)).to("meta")
    group, draws = Dihedral(5, "npv"), Draws(seed=1, kind=kind)
    energy = Energy(group, nn.Linear(10, 1), Flat(), prior=torch.full((10,), 0.1)).to("meta")
    kinds = [Uniform(group), Orbit(group), energy, WeightedFrame(Euclidean(2)), Uniform(Symmetric(5) * Dihedral(4))]
    for p in kinds:
        for samples in (4, 10):
            g, _ = p(clouds, samples, draws)
            assert p.group.act(g, clouds.positions, "np", inverse=True).shape == (3, samples, 5, 2)
    for p in (energy, WeightedFrame(Euclidean(2))):
        for samples in (4, 10):
            _, weights, penalties = p.elements_and_weights(clouds, samples, draws)
            assert weights.shape == (3, samples) and weights.device.type == "meta"
    penalties = energy(clouds, 2, draws)[1]
    sum(penalties.values()).backward()
    for other in (Unitary(2), Lorentz(2)):
        g = other.anywhere(clouds, 2, draws)
        other.frames(other.compose(other.inverse(g), g))


class Turned(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, batch.pixels, "chw", inverse=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("group", [Dihedral(4), Cyclic(8), SpecialOrthogonal(2)], ids=repr)
def test_images(group, deterministic, monkeypatch):
    """Torch has no deterministic gradient of `grid_sample` on a GPU; there the plain formula takes its place."""
    plain = []
    monkeypatch.setattr("probsym_fast.groups._bilinear.moved_image", lambda *x: plain.append(1) or moved_image(*x))
    batch = Images(torch.randn(3, 2, 6, 6), torch.zeros(3, 6, 6).long()).to("meta")
    model = Symmetrized(nn.Linear(6, 6), Turned(), models.LayoutReadout("chw"), Uniform(group)).to("meta")
    torch.use_deterministic_algorithms(deterministic)
    try:
        trained(model, batch)
        group.act(group.uniform(batch, 2), batch.mask, "hw")
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(plain) is (deterministic and not isinstance(group, Dihedral))


@pytest.mark.parametrize("best", [False, True])
def test_energies_of_images(best):
    batch, draws = Images(torch.randn(3, 1, 8, 8)).to("meta"), Draws(seed=1)
    parts, settings = (models.ImageScores(1, 4, 2), models.MovedImages(6)), {"best": best}
    finite = Energy(Dihedral(4), *parts, prior=torch.eye(8)[0], **settings)
    turns = RotationEnergy(SpecialOrthogonal(2), *parts, n=8, prior=1.0, **settings)
    for p in (finite.to("meta"), turns.to("meta")):
        g, penalties = p(batch, 3, draws)
        assert g.shape[:2] == (3, 3) and g.device.type == "meta"
        for samples in (2, 8):
            g, weights, _ = p.elements_and_weights(batch, samples, draws)
            (weights.sum() + sum(penalties.values()) + g.sum()).backward(retain_graph=True)


@pytest.mark.parametrize("kind", ["nodes", "pairs"])
def test_models_of_point_clouds(kind):
    clouds = PointClouds(torch.randn(3, 5, 3), torch.randn(3, 5, 3), torch.randn(3, 5, 5, 2))
    clouds = clouds.to("meta")
    group = Symmetric(5) * Euclidean(3)
    if kind == "nodes":
        pieces = models.MessagePassing(), models.NodeVectors(), models.NodeReadout(displacement=True)
    else:
        backbone = models.Transformer(layers=2, read=[6 * i for i in range(5)])
        pieces = backbone, models.PairTokens(), models.NodeReadout(displacement=False)
    for distribution in (Uniform(group), Identity(group), Learned(group, VectorNeurons(), Normal())):
        trained(Symmetrized(*pieces, distribution).to("meta").train(), clouds)


VIT = ["--backbone.pretrained=false", "--backbone.name=vit_tiny_patch16_224", "--graphs.train=4"]
DIGITS = ["--dataset=digits", "--backbone.patch=2"]
TASKS = {
    "nbody/gnn_O3_ps": [],
    "nbody/transformer_S5xO3_ps": [],
    "exp_classify/mlp_fa": [],
    "exp_classify/gin_ps": [],
    "pattern/small_ps": VIT,
    "pattern/small_canonical": VIT,
    "peptides_func/scratch_ps": [*VIT, "--dataset=random_peptides_func"],
    "peptides_struct/scratch_ps": [*VIT, "--dataset=random_peptides_struct"],
    "pcqm_contact/scratch_ps": [*VIT, "--dataset=random_pcqm_contact"],
    "rotated_mnist/ps": DIGITS,
    "rotated_mnist/best": DIGITS,
    "digits/vit_tiny": [],
}


@pytest.mark.parametrize("name", TASKS)
def test_training_steps_of_the_experiments(name):
    """Also the loss and what a step logs."""
    task = tasks.load(name, ["--training.batch=4", *TASKS[name]])
    model = task.model().to("meta").train()
    batch, target = task.inputs(move(next(iter(task.loader("train"))), "meta"))
    prediction, penalties = model(batch, task.config.samples.train, seeded(1, "train", 0))
    loss = task.total(task.loss(prediction, target), penalties)
    assert loss.device.type == "meta"
    loss.backward()
    if not task.whole_set_measures:
        task.measures(prediction.detach(), target)


def test_a_step_draws_its_seed_on_the_host():
    """Of a generator on a GPU a seed is read, for which the host waits."""
    assert seeded(1, "train", 0).device.type == "cpu"


@pytest.mark.parametrize("kind", ["MLP", "GIN", "pairs of points"])
def test_what_is_recorded_stays_on_the_device(kind):
    """A CUDA graph takes in nothing of the CPU, noise and its seed neither: torch.compile would go on without one."""
    if kind == "pairs of points":
        clouds = PointClouds(torch.randn(3, 5, 3), torch.randn(3, 5, 3), torch.randn(3, 5, 5, 2))
        batch, group = clouds.to("meta"), Symmetric(5) * Euclidean(3)
        backbone = models.Transformer(layers=1, read=[6 * i for i in range(5)])
        pieces = backbone, models.PairTokens(), models.NodeReadout(displacement=False)
        distribution = Learned(group, VectorNeurons(), Normal())
    else:
        batch = random_graphs([5, 6, 3], dtype=torch.float32, edge_features=3).to("meta")
        pieces, distribution = on_graphs()[kind], Learned(Symmetric(N), GIN(2, WIDTH), UniformNoise())
    places = set()

    def look(graph, inputs):
        for node in graph.graph.nodes:
            found = node.meta.get("example_value")
            found = found if isinstance(found, (tuple, list)) else [found]
            places.update(x.device.type for x in found if isinstance(x, torch.Tensor))
        return graph

    torch.compiler.reset()  # after models of other numbers (tau) these would be inputs, on the CPU
    model = Symmetrized(*pieces, distribution).to("meta").train()
    prediction, _ = torch.compile(model, backend=look, fullgraph=True)(batch, 2)
    assert prediction.device.type == "meta"
    assert places == {"meta"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("deterministic", [False, True])
def test_launchers_of_the_triton_kernels(deterministic, monkeypatch):
    """With nothing launched."""
    from probsym_fast.ops.triton import KERNELS, _launch
    from tests.ops.triton.cases import CASES

    launched = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *_: launched.append(kernel.name))
    torch.use_deterministic_algorithms(deterministic)
    try:
        for name in KERNELS:
            launched.clear()
            with torch.device("meta"):
                CASES[name](torch.float32)
            assert launched, name
    finally:
        torch.use_deterministic_algorithms(False)
