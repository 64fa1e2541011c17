"""torch.func on whole models: what autograd gives, or an error that says what to do."""

import pytest
import torch
from torch.func import functional_call

from probsym_fast import Symmetrized
from probsym_fast.distributions import GIN, Learned, UniformNoise, VectorNeurons
from probsym_fast.groups import Euclidean, Graphs, PointClouds, Symmetric
from probsym_fast.models import MLP, FlatGraph, MeanReadout, NodeReadout, PairTokens, Transformer
from probsym_fast.ops import using_backend
from tests.conftest import assert_near

NEAR = {torch.float64: 1e-9}
S = 2


def of_graphs(**settings) -> tuple[Symmetrized, Graphs]:
    edges = torch.tensor([[0, 1, 4, 5, 6, 6], [1, 0, 5, 4, 7, 4]])
    batch = Graphs(torch.randn(9, 2, dtype=torch.float64), edges, torch.tensor([0, 4, 9]))
    learned = Learned(Symmetric(8), GIN(2, width=8), UniformNoise(), tau=0.1)
    model = Symmetrized(MLP([16, 3]), FlatGraph(N=8, width=16, node_features=2), MeanReadout(), learned, **settings)
    return model.double().eval(), batch


def of_clouds(**settings) -> tuple[Symmetrized, PointClouds]:
    shapes = (2, 5, 3), (2, 5, 3), (2, 5, 5, 2)
    batch = PointClouds(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    learned = Learned(Symmetric(5) * Euclidean(3), VectorNeurons(width=5), tau=0.1)
    backbone = Transformer(width=16, layers=1, heads=2, feedforward=16, read=range(0, 25, 6))
    model = Symmetrized(backbone, PairTokens(), NodeReadout(displacement=True), learned, **settings)
    return model.double().eval(), batch


MODELS = {"graphs": of_graphs, "clouds": of_clouds}
every_model = pytest.mark.parametrize("name", MODELS)


def parameters(model: Symmetrized) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def scalar(model: Symmetrized, batch, values: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Of the prediction and the penalties, with these parameters and the same noise every time."""
    prediction, penalties = functional_call(model, values or {}, (batch, S, torch.Generator().manual_seed(1)))
    return prediction.square().sum() + sum(penalties.values())


def at(batch, x: torch.Tensor):
    """The batch with other features, or other positions."""
    return batch.replace(**{"x" if isinstance(batch, Graphs) else "positions": x})


def features(batch) -> torch.Tensor:
    return batch.x if isinstance(batch, Graphs) else batch.positions


def gradients(model: Symmetrized, batch) -> dict[str, torch.Tensor]:
    """By autograd."""
    values = dict(model.named_parameters())
    found = torch.autograd.grad(scalar(model, batch), list(values.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(values, found, strict=True))


def assert_all_near(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, NEAR)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_model
def test_gradients(name, backend):
    model, batch = MODELS[name]()
    expected = gradients(model, batch)
    assert any(value.any() for key, value in expected.items() if key.startswith("distribution"))
    with using_backend(backend):
        assert_all_near(torch.func.grad(lambda values: scalar(model, batch, values))(parameters(model)), expected)


@every_model
def test_derivatives_in_forward_mode(name):
    model, batch = MODELS[name]()
    values, expected = parameters(model), gradients(model, batch)
    direction = {key: torch.randn_like(x) for key, x in values.items()}
    _, found = torch.func.jvp(lambda values: scalar(model, batch, values), (values,), (direction,))
    assert_near(found, sum((expected[key] * direction[key]).sum() for key in values), NEAR)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_model
def test_second_derivatives_through_a_learned_frame(name, backend):
    """The gradient to the parameters of a gradient to the input, as force matching has it."""
    model, batch = MODELS[name]()
    x, values = features(batch), parameters(model)
    weight = torch.randn_like(x)
    force = torch.func.grad(lambda x, values: scalar(model, at(batch, x), values))
    found = torch.func.grad(lambda values: (force(x, values) * weight).sum())(values)
    with using_backend(backend):
        leaf = x.clone().requires_grad_()
        y = scalar(model, at(batch, leaf))
        (d_x,) = torch.autograd.grad(y, leaf, create_graph=True)
        model.zero_grad()
        (d_x * weight).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.distribution.parameters())
    expected = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    assert_all_near(found, expected)


@every_model
def test_an_ensemble(name):
    """Many models on one batch: torch.func.stack_module_state, vmap and grad within it."""
    made = [MODELS[name]() for _ in range(3)]
    models, batch = [model for model, _ in made], made[0][1]
    values, buffers = torch.func.stack_module_state(models)

    def f(values, buffers):
        return scalar(models[0], batch, values | buffers)

    found = torch.vmap(torch.func.grad(f), randomness="same")(values, buffers)
    expected = [gradients(model, batch) for model in models]
    assert_all_near(found, {key: torch.stack([x[key] for x in expected]) for key in values})
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(values, buffers)


@every_model
def test_many_draws_of_the_noise(name):
    """vmap over noise that is given."""
    model, batch = MODELS[name]()
    learned = model.distribution
    noise = torch.rand(3, *learned.network.noise_shape(batch, S), dtype=torch.float64)

    def f(noise):
        g, penalties = learned(batch, S, noise=noise)
        return model.apply_elements(batch, g).square().sum() + sum(penalties.values())

    found = torch.vmap(torch.func.grad(f), randomness="same")(noise)
    for one, d_one in zip(noise, found, strict=True):
        leaf = one.clone().requires_grad_()
        assert_near(d_one, torch.autograd.grad(f(leaf), leaf)[0], {torch.float64: 1e-4})  # ties are broken otherwise


@pytest.mark.parametrize("chunk", [{"chunk": 1}, {"chunk": "auto", "memory": 1}])
@every_model
def test_chunks(name, chunk):
    """Nothing is computed again or measured: checkpoints do not work there."""
    torch.manual_seed(3)
    model, batch = MODELS[name](**chunk)
    found = torch.func.grad(lambda values: scalar(model, batch, values))(parameters(model))
    assert_all_near(found, gradients(model, batch))


@every_model
def test_training_needs_the_buffers(name):
    """Running statistics are written in place: of buffers that the transform holds alone."""
    model, batch = MODELS[name]()
    model.train()
    before = {key: x.clone() for key, x in model.named_buffers()}
    with pytest.raises(
        RuntimeError, match=r"running statistics cannot change under .*; call eval\(\), or make the buffers"
    ):
        torch.func.grad(lambda values: scalar(model, batch, values))(parameters(model))
    assert all(torch.equal(x, before[key]) for key, x in model.named_buffers())


@every_model
def test_training_an_ensemble(name):
    """vmap over parameters and buffers: every model's running statistics move as they would by themselves."""
    made = [MODELS[name]() for _ in range(2)]
    models, batch = [model.train() for model, _ in made], made[0][1]
    for model in models:
        if name == "clouds":
            model.distribution.network.dropout = 0.0
    values, buffers = torch.func.stack_module_state(models)
    found = torch.vmap(lambda *state: scalar(models[0], batch, state[0] | state[1]), randomness="same")(values, buffers)
    assert_near(found, torch.stack([scalar(model, batch) for model in models]), NEAR)
    means = [key for key in buffers if key.endswith("running_mean")]
    assert means and all(buffers[key].any() for key in means)
    for key in means:
        assert_near(buffers[key], torch.stack([model.get_buffer(key) for model in models]), NEAR)


@every_model
def test_gradients_in_training(name):
    """With the buffers as inputs of the transform."""
    model, batch = MODELS[name]()
    model.train()
    buffers = {key: x.clone() for key, x in model.named_buffers() if x.is_floating_point()}
    torch.manual_seed(5)
    found, _ = torch.func.grad(lambda p, b: scalar(model, batch, p | b), argnums=(0, 1))(parameters(model), buffers)
    torch.manual_seed(5)
    assert_all_near(found, gradients(model, batch))
