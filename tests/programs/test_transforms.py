"""torch.func on every op and every public module: the eager numbers, in one batched call under vmap."""

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from probsym_fast import equivariance_error, ops
from probsym_fast.groups import Euclidean, Graphs, Orthogonal, Symmetric
from tests.conftest import assert_near
from tests.helpers.modules import (
    EDGES,
    MODULES,
    PTR,
    N,
    S,
    built,
    clouds,
    graphs,
    motions,
    permutations,
    public_modules,
    random,
    tensor,
)

OWN = [  # of torch itself
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:Attempted to insert a get_attr",
    "ignore:torch.searchsorted",  # it copies batched node numbers
]
pytestmark = pytest.mark.filterwarnings("error", *OWN)
NEAR = {torch.float64: 1e-9}
# name -> an input, and what is computed of it
OPS = {
    "soft_permutation": (random(2, S, N), lambda x: tensor([(p := permutations(x)).scores, p.log_r, p.log_c])),
    "permutation_entropy": (random(2, S, N), lambda x: ops.permutation_entropy(permutations(x))),
    "SoftPermutation.soft": (random(2, S, N), lambda x: permutations(x).soft()),
    "SoftPermutation.dense": (random(2, S, N), lambda x: permutations(x).dense()),
    "orthogonal_frame": (random(2, 3, 3), ops.orthogonal_frame),
    "orthogonal_frame, special": (random(2, 4, 4), lambda x: ops.orthogonal_frame(x, special=True)),
    "act_orthogonal, vectors": (random(2, 3, 3, 1), lambda x: ops.act_orthogonal(x, random(2, S, 3, 3))),
    "act_orthogonal, frames": (
        random(2, S, 3, 3),
        lambda x: ops.act_orthogonal(random(2, 3, 3, 1), x, inverse=True, mean=True),
    ),
    "aggregate": (random(9, 2), lambda x: ops.aggregate(x, EDGES, own=x.mean(), ptr=PTR)),
    "linear_batch_norm_relu": (
        random(5, 2),
        lambda x: ops.linear_batch_norm_relu(x, x[:3], x[0, :1].expand(3), x[:3, 1])[0],
    ),
    "embed_edges": (
        random(7, 1),
        lambda x: ops.embed_edges(EDGES, x, PTR, permutations(), random(2, 1, 2, 2), grid=2, pad_mode="reflect"),
    ),
    "embed_nodes": (random(7, 1), lambda x: ops.embed_nodes(x, PTR, permutations(), random(2, 1, 2), tokens=2)),
    "embed_matrix": (
        random(2, 4, 4, 1),
        lambda x: ops.embed_matrix(x, permutations(), random(2, 1, 2, 2), x[0, 0, :2, 0], grid=2),
    ),
    "embed_edges, permutation": (
        random(2, S, N),
        lambda x: ops.embed_edges(EDGES, random(7, 1), PTR, permutations(x), random(2, 1, 2, 2), grid=2),
    ),
    "embed_edges, weight": (
        random(2, 1, 2, 2),
        lambda x: ops.embed_edges(EDGES, random(7, 1), PTR, permutations(), x, x[:, 0, 0, 0], grid=2),
    ),
    "readout": (random(2, S, 4, 2), lambda x: ops.readout(x, PTR, permutations(), random(2, 1, 2, 2), at=EDGES)),
    "readout, nodes": (
        random(2, S, 2, 2),
        lambda x: ops.readout(x, PTR, permutations(), random(2, 1, 2), x[0, 0, 0, :1]),
    ),
    "readout, permutation": (
        random(2, S, N),
        lambda x: ops.readout(random(2, S, 4, 2), PTR, permutations(x), random(2, 1, 2, 2), at="diagonal"),
    ),
    "node_identifiers": (random(N, 2), lambda x: ops.node_identifiers(PTR, permutations(), x)),
    "node_identifiers, permutation": (
        random(2, S, N),
        lambda x: ops.node_identifiers(PTR, permutations(x), random(N, 2), nodes=7),
    ),
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


@pytest.fixture(autouse=True)
def no_loop_over_examples(capfd):
    """torch warns of one, of ops called from Python on the standard error."""
    yield
    assert "performance drop" not in capfd.readouterr().err


def test_every_op_and_module_is_here():
    public = {name for name, x in vars(ops).items() if inspect.isfunction(x)} - {
        "debug",
        "fill_table",
        "info",
        "using_backend",
        "noise",
    }
    assert public <= {name.split(",")[0] for name in OPS}
    assert public_modules() == {name.split(",")[0] for name in MODULES}


def case(name: str):
    """(input, function) of an op or of a module in eval mode."""
    if name in OPS:
        return OPS[name]
    net, (_, x, run) = built(name), MODULES[name]
    return x, lambda x: tensor(run(net, x))


def scalar(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()


def gradient(f, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(scalar(f(leaf)), leaf)[0]


every_case = pytest.mark.parametrize("name", [*OPS, *MODULES])


@every_case
def test_first_derivatives(name):
    x, f = case(name)
    v, value = random(*x.shape, seed=7), f(x)
    jacobian = torch.autograd.functional.jacobian(f, x)
    assert_near(torch.func.grad(lambda x: scalar(f(x)))(x), gradient(f, x), NEAR)
    found, pull = torch.func.vjp(f, x)
    assert_near(found, value)
    w = random(*value.shape, seed=8)
    assert_near(pull(w)[0], (w.flatten() @ jacobian.reshape(value.numel(), -1)).view(x.shape), NEAR)
    found, tangent = torch.func.jvp(f, (x,), (v,))
    assert_near(found, value)
    assert_near(tangent, (jacobian.reshape(*value.shape, -1) @ v.flatten()), NEAR)
    assert_near(torch.func.jacrev(f)(x), jacobian, NEAR)
    assert_near(torch.func.jacfwd(f, randomness="same")(x), jacobian, NEAR)


@every_case
def test_hessian(name):
    x, f = case(name)
    expected = torch.autograd.functional.hessian(lambda x: scalar(f(x)), x)
    assert_near(torch.func.hessian(lambda x: scalar(f(x)))(x), expected, NEAR)
    assert_near(torch.func.jacrev(torch.func.grad(lambda x: scalar(f(x))))(x), expected, NEAR)


@every_case
def test_many_inputs_at_once(name):
    x, f = case(name)
    many = torch.stack([x, -x, x + random(*x.shape, seed=9)])
    assert_near(torch.vmap(f, randomness="same")(many), torch.stack([f(x) for x in many]), NEAR)
    expected = torch.stack([gradient(f, x) for x in many])
    found = torch.vmap(torch.func.grad(lambda x: scalar(f(x))), randomness="same")(many)
    assert_near(found, expected, NEAR)
    found = torch.func.grad(lambda many: torch.vmap(lambda x: scalar(f(x)), randomness="same")(many).sum())(many)
    assert_near(found, expected, NEAR)


SOME = ["aggregate", "embed_nodes", "readout", "readout, nodes", "node_identifiers", "GIN", "GraphTokens", "Frame"]


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(x, marks=pytest.mark.slow) for x in (*OPS, *MODULES) if x not in SOME)]
)
def test_linearized(name):
    """A program of the derivative only, traced without reading values."""
    x, f = case(name)
    v = random(*x.shape, seed=7)
    value, expected = torch.func.jvp(f, (x,), (v,))
    if name in ("readout, nodes", "readout, permutation", "node_identifiers"):  # which do not give it
        message = "(readout|node_identifiers): nodes must be the number of nodes .*in tracing, got None"
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            torch.func.linearize(f, x)
        return
    found, program = torch.func.linearize(f, x)
    assert_near(found, value)
    assert_near(program(v), expected, NEAR)


MODELS = [name for name in MODULES if name.startswith("Symmetrized")]


def predicted(name: str):
    """x and settings -> the prediction of a model."""
    net, of = built(name), clouds if name != "Symmetrized, graphs" else graphs
    return lambda x, **settings: net(of(x), S, **settings)[0]


@pytest.mark.parametrize("name", MODELS)
def test_many_seeds_at_once(name):
    f, x, seeds = predicted(name), MODULES[name][1], torch.tensor([1, 2, 2**62 + 3])
    found = torch.vmap(lambda seed: f(x, seed=seed))(seeds)
    assert_near(found, torch.stack([f(x, seed=seed) for seed in seeds]), NEAR)
    for shape, settings in (((3, 2), {}), ((2, 3, 4), {"normal": True, "mirrored": True, "block": 2, "forks": [1]})):
        some = lambda seed, shape=shape, settings=settings: ops.noise(seed, shape, "test", **settings)  # noqa: E731
        assert_near(torch.vmap(some)(seeds), torch.stack([some(seed) for seed in seeds]))
    rows = torch.arange(6).view(2, 3)
    found = torch.vmap(lambda rows: ops.noise(seeds[0], (3, 2), "test", rows=rows))(rows)
    assert torch.equal(found, torch.stack([ops.noise(seeds[0], (3, 2), "test", rows=some) for some in rows]))


@pytest.mark.parametrize("name", MODELS)
def test_noise_that_nobody_asked_for_is_refused(name):
    f, x = predicted(name), torch.stack([MODULES[name][1]] * 2)
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
    f, x = predicted(name), torch.stack([MODULES[name][1], random(*MODULES[name][1].shape, seed=6)])
    settings = {"seed": 1, "reduce": reduce}
    if reduce == "weighted":
        settings["weights"] = random(2, S).square()
    expected = torch.stack([f(one, **settings) for one in x])
    assert_near(torch.vmap(lambda x: f(x, **settings))(x), expected, NEAR)


@pytest.mark.parametrize("name", MODELS)
def test_what_needs_one_number_is_refused(name):
    net, x = built(name), torch.stack([MODULES[name][1]] * 2)
    of = clouds if name != "Symmetrized, graphs" else graphs
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
    net, x, tokens = built("Symmetrized, graphs"), random(7, 2), random(2, S, 2, 2)
    edges, ptr, p, weight = torch.stack([EDGES, EDGES.flip(0)]), torch.stack([PTR] * 2), permutations(), random(2, 1, 2)
    f = lambda edges, ptr: net(Graphs(x=x, edge_index=edges, ptr=ptr), S, seed=1)[0]  # noqa: E731
    assert_near(torch.vmap(f)(edges, ptr), torch.stack([f(*some) for some in zip(edges, ptr, strict=True)]), NEAR)
    f = lambda ptr, **nodes: ops.readout(tokens, ptr, p, weight, **nodes)  # noqa: E731
    assert_near(torch.vmap(lambda ptr: f(ptr, nodes=7))(ptr)[0], f(PTR), NEAR)
    message = "readout: nodes must be the number of nodes under vmap over ptr and in tracing, got None"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        torch.vmap(f)(ptr)


@pytest.mark.parametrize("name", [name for name in MODULES if list(built(name).parameters())])
def test_many_models_at_once(name):
    """An ensemble: values, and gradients to the weights."""
    _, x, run = MODULES[name]
    nets = []
    for seed in range(3):
        nets.append(built(name))
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in nets[-1].parameters():
                p.copy_(torch.randn_like(p))
    values, buffers = torch.func.stack_module_state(nets)
    base = built(name)

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = base

        def forward(self):
            return tensor(run(self.net, x))

    holder = Run()

    def f(values, buffers):
        return functional_call(holder, {f"net.{key}": v for key, v in (values | buffers).items()}, ())

    assert_near(torch.vmap(f, randomness="same")(values, buffers), torch.stack([tensor(run(n, x)) for n in nets]), NEAR)
    found = torch.vmap(torch.func.grad(lambda *state: scalar(f(*state))), randomness="same")(values, buffers)
    for k, net in enumerate(nets):
        scalar(tensor(run(net, x))).backward()
        for key, p in net.named_parameters():
            assert_near(found[key][k], torch.zeros_like(p) if p.grad is None else p.grad, NEAR)
