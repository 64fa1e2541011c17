"""Force matching: an energy's gradient by the positions in the loss, trained through the second derivative."""

import pytest
import torch
from torch import Tensor

from probsym_fast import Symmetrized
from probsym_fast.distributions import Learned, Uniform, VectorNeurons
from probsym_fast.groups import Euclidean, Group, Orthogonal, PointClouds, Symmetric
from probsym_fast.models import MessagePassing, NodeReadout, NodeVectors, PairTokens, PooledReadout, Transformer
from probsym_fast.ops import using_backend
from tests.conftest import assert_near

STEP = 1e-6  # of the finite differences
NEAR = {torch.float64: 1e-5}


def distribution(group: Group, learned: bool):
    return (
        Learned(group, VectorNeurons(width=4, scores="scores" in group.outputs), tau=0.1) if learned else Uniform(group)
    )


def points(group: Group, learned: bool) -> Symmetrized:
    pieces = MessagePassing(width=6, layers=1), NodeVectors(), NodeReadout(displacement=False)
    return Symmetrized(*pieces, distribution(group, learned)).double()


def tokens(group: Group, learned: bool) -> Symmetrized:
    backbone = Transformer(width=8, layers=1, heads=2, feedforward=8, read=range(0, 25, 6))
    return Symmetrized(backbone, PairTokens(), NodeReadout(displacement=True), distribution(group, learned)).double()


class Forces:
    """The loss of a model's forces on random clouds, always with the same noise."""

    def __init__(self, model: Symmetrized):
        self.model = model
        self.positions, self.velocities, self.wanted = torch.randn(3, 2, 5, 3, dtype=torch.float64)
        self.edges = torch.randn(2, 5, 5, 2, dtype=torch.float64)

    def __call__(self) -> Tensor:
        x = self.positions.clone().requires_grad_()
        y, _ = self.model(PointClouds(positions=x, velocities=self.velocities, edges=self.edges), 2, seed=5)
        (force,) = torch.autograd.grad(-y.square().sum(), x, create_graph=True)
        return (force - self.wanted).square().mean()

    def gradients(self) -> dict[str, Tensor]:
        self.model.zero_grad()
        torch.manual_seed(1)  # of dropout
        self().backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.model.named_parameters()}

    def along(self, p: Tensor, direction: Tensor) -> Tensor:
        """The derivative by a parameter along a direction, by central differences."""
        values = []
        for step in (STEP, -2 * STEP):
            with torch.no_grad():
                p.add_(direction, alpha=step)
            torch.manual_seed(1)
            values.append(self().detach())
        with torch.no_grad():
            p.add_(direction, alpha=STEP)
        return (values[0] - values[1]) / (2 * STEP)


def check(forces: Forces, names: list[str]) -> None:
    found = forces.gradients()
    assert all(found[name].any() for name in names if not name.endswith("decoder.2.bias"))
    for name in names:
        p = forces.model.get_parameter(name)
        direction = torch.randn_like(p)
        assert_near((found[name] * direction).sum(), forces.along(p, direction), NEAR)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("learned", [False, True], ids=["uniform", "learned"])
@pytest.mark.parametrize("group", [Euclidean(3), Orthogonal(3)], ids=repr)
def test_of_rotations(group, learned, training, backend):
    """All weights against finite differences."""
    model = points(group, learned).train(training)
    with using_backend(backend):
        check(Forces(model), [name for name, _ in model.named_parameters()])


@pytest.mark.parametrize("learned", [False, True], ids=["uniform", "learned"])
def test_of_permutations_and_motions(learned):
    """The backbone's weights against finite differences. These do not see the straight-through gradient of the distribution,
    whose weights get the same numbers from kernels and reference."""
    torch.manual_seed(2)
    model = tokens(Symmetric(5) * Euclidean(3), learned).eval()
    forces = Forces(model)
    check(forces, [name for name, _ in model.named_parameters() if name.startswith("backbone")])
    found = forces.gradients()
    found = {name: x.clone() for name, x in found.items()}
    with using_backend("reference"):
        expected = forces.gradients()
    for name, x in expected.items():
        assert_near(found[name], x, {torch.float64: 1e-9})
    assert any(x.any() for name, x in found.items() if name.startswith("distribution")) == learned


class Energies(Forces):
    """The loss of energies' gradients, of padded molecules."""

    def __init__(self, model: Symmetrized):
        super().__init__(model)
        self.batch = PointClouds(
            torch.randn(7, 3, dtype=torch.float64),
            features=torch.randn(7, 2, dtype=torch.float64),
            ptr=torch.tensor([0, 2, 7]),
        )

    def __call__(self) -> Tensor:
        x = self.batch.positions.clone().requires_grad_()
        y, _ = self.model(self.batch.replace(positions=x), 2, seed=5)
        (force,) = torch.autograd.grad(-y.sum(), x, create_graph=True)
        return (force - self.wanted).square().mean()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_of_molecules(training):
    """All weights against finite differences, those of the learned frames too."""
    backbone = Transformer(5, width=8, layers=1, heads=2, feedforward=8, tokens=None, out_features=1)
    network = VectorNeurons(channels=1, width=4, dropout=0.0, scores=False, features=2)
    learned = Learned(Euclidean(3), network)
    model = Symmetrized(backbone, NodeVectors(lengths=True), PooledReadout(), learned).double().train(training)
    flat = "norm.bias", "head.2.bias", "head.5.bias"  # between and after ReLUs: forces do not change with them
    names = [name for name, _ in model.named_parameters() if name.removeprefix("backbone.") not in flat]
    check(Energies(model), names)


@pytest.mark.parametrize("settings", [{"chunk": 1}, {"chunk": "auto", "memory": 1}], ids=str)
def test_chunks(settings):
    """Samples that the backward pass computes again."""
    model = points(Euclidean(3), learned=True).eval()
    forces = Forces(model)
    expected = {name: x.clone() for name, x in forces.gradients().items()}
    for name, value in settings.items():
        setattr(model, name, value)
    found = forces.gradients()
    for name, x in expected.items():
        assert_near(found[name], x, {torch.float64: 1e-9})


def test_a_step_lowers_the_loss():
    """In float32, with the kernels, as one trains."""
    forces = Forces(points(Euclidean(3), learned=True))
    for name in ("positions", "velocities", "wanted", "edges"):
        setattr(forces, name, getattr(forces, name).float())
    forces.model.float()
    optimiser, losses = torch.optim.Adam(forces.model.parameters(), 1e-2), []
    for _ in range(20):
        optimiser.zero_grad()
        loss = forces()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
