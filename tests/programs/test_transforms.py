"""torch.func on every row: the eager numbers, in one batched call under vmap; and the second derivative of the kernels."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves

from probsym_fast import equivariance_error, ops
from probsym_fast.groups import Euclidean, Graphs, Orthogonal, Symmetric
from tests.conftest import assert_near
from tests.helpers.modules import EDGES, MODELS, PTR, N, S, batches, built, motions, permutations, random
from tests.programs.cases import cases
from tests.programs.rows import ROWS
from tests.programs.runs import SIZE, flat, floats, function, is_seed, scalar, seeded

OWN = [  # of torch itself
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:Attempted to insert a get_attr",
    "ignore:torch.searchsorted",  # it copies batched node numbers
]
pytestmark = pytest.mark.filterwarnings("error", *OWN)
NEAR = {torch.float64: 1e-9}

# of groups: an input, and what is computed of it
OTHERS = {
    "SoftPermutation.dense": (random(2, S, N), lambda x: permutations(x).dense()),
    "Symmetric.act": (
        random(2, S, N),
        lambda x: Symmetric(N).act(permutations(x), random(2, N, N, 1), "nnc", mean=True),
    ),
    "Euclidean.act": (random(2, S, 3, 3), lambda x: Euclidean(3).act(motions(x), random(2, 3, 3), "np", inverse=True)),
    "Orthogonal.compose": (
        random(2, S, 3, 3),
        lambda x: Orthogonal(3).compose(q := ops.orthogonal_frame(x), Orthogonal(3).inverse(q) @ q),
    ),
}


def vector(name: str):
    """As `function` gives it for a row."""
    x, f = OTHERS[name]
    return x.flatten(), lambda y: f(y.view(x.shape)).flatten()


CASES = {name: partial(function, row) for name, row in ROWS.items() if row.differentiable}
CASES |= {name: partial(vector, name) for name in OTHERS}


@pytest.fixture(autouse=True)
def no_loop_over_examples(capfd):
    """torch warns of one, of ops called from Python on the standard error."""
    yield
    assert "performance drop" not in capfd.readouterr().err


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize("row", cases(traced=False))
def test_what_has_derivatives(row):
    x, f = function(row)
    assert f(x.requires_grad_()).requires_grad == row.differentiable


@every_case
def test_first_derivatives(case):
    x, f = case()
    v, value = random(*x.shape, seed=7), f(x)
    jacobian = torch.autograd.functional.jacobian(f, x)
    found, pull = torch.func.vjp(f, x)
    assert_near(found, value)
    w = random(*value.shape, seed=8)
    assert_near(pull(w)[0], w @ jacobian, NEAR)
    assert_near(torch.func.grad(lambda x: scalar(f(x)))(x), gradient(f, x), NEAR)
    found, tangent = torch.func.jvp(f, (x,), (v,))
    assert_near(found, value)
    assert_near(tangent, jacobian @ v, NEAR)
    assert_near(torch.func.jacrev(f)(x), jacobian, NEAR)


def gradient(f, x: Tensor, create_graph: bool = False) -> Tensor:
    leaf = x if create_graph else x.clone().requires_grad_()
    return torch.autograd.grad(scalar(f(leaf)), leaf, create_graph=create_graph)[0]


@every_case
def test_double_backward(case):
    """The Hessian times a vector: of the kernels, and of the references under torch.func."""
    x, f = case()
    v, leaf = random(*x.shape, seed=7), x.clone().requires_grad_()
    found = torch.autograd.grad(gradient(f, leaf, create_graph=True) @ v, leaf)[0]
    slope = torch.func.grad(lambda x: scalar(f(x)))
    assert_near(found, torch.func.jvp(slope, (x,), (v,))[1], NEAR)
    assert_near(found, torch.func.grad(lambda x: slope(x) @ v)(x), NEAR)


@every_case
def test_many_inputs_at_once(case):
    x, f = case()
    many = torch.stack([x, -x, x + random(*x.shape, seed=9)])
    assert_near(torch.vmap(f)(many), torch.stack([f(x) for x in many]), NEAR)
    expected = torch.stack([gradient(f, x) for x in many])
    assert_near(torch.vmap(torch.func.grad(lambda x: scalar(f(x))))(many), expected, NEAR)
    found = torch.func.grad(lambda many: torch.vmap(lambda x: scalar(f(x)))(many).sum())(many)
    assert_near(found, expected, NEAR)


LINEARIZED = [name for name in CASES if name not in ROWS or ROWS[name].kind == "ops"]


@pytest.mark.parametrize("name", [*LINEARIZED, "GIN", "GraphTokens", "MessagePassing", "flat mlp"])
def test_linearized(name):
    """A program of the derivative only, traced without reading values."""
    x, f = CASES[name]()
    v = random(*x.shape, seed=7)
    value, expected = torch.func.jvp(f, (x,), (v,))
    found, program = torch.func.linearize(f, x)
    assert_near(found, value)
    assert_near(program(v), expected, NEAR)


REFUSED = {
    "readout": lambda x: ops.readout(random(2, S, 2, 2), PTR, permutations(x), random(2, 1, 2)),
    "node_identifiers": lambda x: ops.node_identifiers(PTR, permutations(x), random(N, 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_derivative_that_does_not_know_the_number_of_nodes_is_refused(name):
    message = f"{name}: nodes must be the number of nodes .*in tracing, got None"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        torch.func.linearize(REFUSED[name], random(2, S, N))


@pytest.mark.parametrize("row", cases(seeded, traced=False))
def test_many_seeds_at_once(row):
    seeds = torch.tensor([1, 2, 2**62 + 3])
    program = row.program(False).double()
    inputs, spec = tree_flatten(row.sample(SIZE, False, torch.float64))
    place = next(i for i, x in enumerate(inputs) if is_seed(x))

    def f(seed: Tensor) -> Tensor:
        return flat(tree_leaves(program(spec.unflatten([*inputs[:place], seed, *inputs[place + 1 :]]))))

    assert_near(torch.vmap(f)(seeds), torch.stack([f(seed) for seed in seeds]), NEAR)


@pytest.mark.parametrize("row", cases(lambda row: row.learns, traced=False))
def test_many_models_at_once(row):
    """An ensemble: values, and gradients to the weights."""
    nets, inputs = [], row.sample(SIZE, False, torch.float64)
    for seed in range(3):
        nets.append(row.program(False).double())
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in nets[-1].parameters():
                p.copy_(torch.randn_like(p))
    values, buffers = torch.func.stack_module_state(nets)

    def f(values, buffers):
        return flat(floats(functional_call(nets[0], values | buffers, (inputs,))))

    expected = torch.stack([flat(floats(net(inputs))) for net in nets])
    assert_near(torch.vmap(f)(values, buffers), expected, NEAR)
    found = torch.vmap(torch.func.grad(lambda *state: scalar(f(*state))))(values, buffers)
    for k, net in enumerate(nets):
        scalar(flat(floats(net(inputs)))).backward()
        for key, p in net.named_parameters():
            assert_near(found[key][k], torch.zeros_like(p) if p.grad is None else p.grad, NEAR)


def predicted(name: str):
    """x and settings -> the prediction of a model."""
    net = built(name)
    return lambda x, **settings: net(batches(name, x), S, **settings)[0]


@pytest.mark.parametrize("name", MODELS)
def test_noise_that_nobody_asked_for_is_refused(name):
    f, x = predicted(name), torch.stack([MODELS[name][1]] * 2)
    message = 'Draws: vmap must have randomness "same" or "different", or a seed, got neither'
    for settings in ({}, {"generator": torch.Generator()}):
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            torch.vmap(lambda x, settings=settings: f(x, **settings))(x)
    same, different = (torch.vmap(f, randomness=kind)(x) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    given = torch.vmap(lambda x: f(x, generator=torch.Generator().manual_seed(3)), randomness="same")(x)
    assert_near(given[0], f(x[0], generator=torch.Generator().manual_seed(3)), NEAR)


@pytest.mark.parametrize("reduce", ["none", "max", "weighted"])
@pytest.mark.parametrize("name", MODELS)
def test_reductions(name, reduce):
    f, x = predicted(name), torch.stack([MODELS[name][1], random(*MODELS[name][1].shape, seed=6)])
    settings = {"seed": 1, "reduce": reduce}
    if reduce == "weighted":
        settings["weights"] = random(2, S).square()
    expected = torch.stack([f(one, **settings) for one in x])
    assert_near(torch.vmap(lambda x: f(x, **settings))(x), expected, NEAR)


@pytest.mark.parametrize("name", MODELS)
def test_what_needs_one_number_is_refused(name):
    net, x = built(name), torch.stack([MODELS[name][1]] * 2)
    of = partial(batches, name)
    found = torch.vmap(lambda x: net.estimate(of(x), S, seed=1).prediction)(x)
    assert_near(found[0], net.estimate(of(x[0]), S, seed=1).prediction, NEAR)
    message = "estimate: tolerance must be None under vmap, where no single error ends it, got 0.1"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        torch.vmap(lambda x: net.estimate(of(x), S, seed=1, tolerance=0.1).prediction)(x)
    message = "equivariance_error: must be called outside torch.vmap, since it returns one float, got a call under it"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        torch.vmap(lambda x: equivariance_error(net, of(x)))(x)


def test_many_structures_at_once():
    """Other edges and other sizes of the graphs; the number of nodes must then be given."""
    net, x, tokens = built("graphs"), random(7, 2), random(2, S, 2, 2)
    edges, ptr, p, weight = torch.stack([EDGES, EDGES.flip(0)]), torch.stack([PTR] * 2), permutations(), random(2, 1, 2)
    f = lambda edges, ptr: net(Graphs(x=x, edge_index=edges, ptr=ptr), S, seed=1)[0]  # noqa: E731
    assert_near(torch.vmap(f)(edges, ptr), torch.stack([f(*some) for some in zip(edges, ptr, strict=True)]), NEAR)
    f = lambda ptr, **nodes: ops.readout(tokens, ptr, p, weight, **nodes)  # noqa: E731
    assert_near(torch.vmap(lambda ptr: f(ptr, nodes=7))(ptr)[0], f(PTR), NEAR)
    message = "readout: nodes must be the number of nodes under vmap over ptr and in tracing, got None"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        torch.vmap(f)(ptr)
