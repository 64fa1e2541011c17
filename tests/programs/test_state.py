"""Autocast, checkpoints around a model, and copies of modules: the numbers of the plain model in float32."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probsym_fast.groups import Draws, Euclidean, Graphs, Symmetric
from probsym_fast.ops import Permutation, soft_permutation, using_backend
from tests.conftest import assert_near
from tests.helpers.modules import MODULES, S, built, clouds, graphs, tensor
from tests.ops.test_backends import CALLS
from tests.programs.test_half import ALL, backward, check_gradients, tensors

BOUND = {torch.float32: 5e-2}  # of bfloat16 inside the backbone
every_model = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
every_module = pytest.mark.parametrize("name", MODULES)
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def quiet(model: nn.Module) -> nn.Module:
    """Without dropout, whose numbers a checkpoint draws again in another order."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@modes
@every_model
def test_autocast(make, training):
    """Elements and penalties are exactly those of float32: nothing of a distribution runs in bfloat16."""
    model, batch = make()
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected, wanted = model(batch, S, seed=3)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    with torch.autocast("cpu", torch.bfloat16):
        found, penalties = model(batch, S, seed=3)
    backward((found, penalties))
    assert found.isfinite().all()
    assert_near(found.float(), expected, BOUND)
    assert penalties.keys() == wanted.keys() and all(torch.equal(penalties[key], wanted[key]) for key in wanted)
    check_gradients(model)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items() if key.startswith("distribution"))
    model.load_state_dict(before)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(batch, S, seed=3)[0], found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_leaves_ops_alone(name, backend):
    """Kernels and references, first and second derivatives: the same bits."""
    x, found = torch.randn(2, 2, 3, 3), []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), using_backend(backend):
            y = CALLS[name](leaf, backend)
        (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        found.append((y, first, torch.autograd.grad(first.square().sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_elements_alone(dtype):
    """Composed and inverted frames stay orthogonal, and permuted values are those that a hard permutation moves."""
    batch, group = clouds(torch.randn(2, 3, 3)).to(dtype), Symmetric(3) * Euclidean(3)
    with torch.autocast("cpu", torch.bfloat16):
        g, h = (group.anywhere(batch, S, Draws(seed=seed)) for seed in (1, 2))
        motion = group.factors[1].inverse(group.factors[1].compose(g[1], h[1]))
        p = soft_permutation(torch.randn(2, S, 3, requires_grad=True))
        moved, hard = (Symmetric(3).act(some, batch.positions, "nc") for some in (p, p.detach()))
    assert motion.frame.dtype == torch.float32 and motion.shift.dtype == dtype
    assert torch.allclose(motion.frame.mT @ motion.frame, torch.eye(3).expand_as(motion.frame), atol=1e-5)
    assert moved.requires_grad and torch.equal(moved, hard)


def test_a_meta_device_has_no_autocast():
    """Where only shapes are computed."""
    readout = built("DiagonalReadout").to("meta")
    order = torch.arange(4, device="meta").expand(2, S, 4)
    p = Permutation(order, torch.tensor([4, 3], device="meta"), order, checked=True)
    batch = Graphs(x=graphs().x, edge_index=graphs().edge_index, ptr=graphs().ptr).to("meta")
    tokens = torch.empty(2, S, 2, 3, device="meta", dtype=torch.float64)
    assert readout(tokens, batch, Symmetric(4), p).shape == (7, 2)


@modes
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@every_model
def test_a_checkpoint_around_the_model(make, reentrant, autocast, training):
    """The gradients of the model itself. Whoever writes the checkpoint keeps running statistics from moving twice."""
    model, batch = make()
    quiet(model.train(training))
    x = (batch.x if isinstance(batch, Graphs) else batch.positions).requires_grad_()
    before, found, plain = copy.deepcopy(model.state_dict()), [], lambda x: model(batch, S, seed=3)[0]
    for run in (plain, lambda x: checkpoint(plain, x, use_reentrant=reentrant)):
        model.load_state_dict(before)
        model.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        backward(y)
        found.append((y.detach(), x.grad, gradients(model)))

    (y, d_x, d_p), (y2, d_x2, d_p2) = found
    assert torch.equal(y, y2)
    assert d_p.keys() == d_p2.keys()
    assert_near(d_x2, d_x, {torch.float32: 1e-6})
    for key, value in d_p.items():
        assert_near(d_p2[key], value, {torch.float32: 1e-6})


def ran(net: nn.Module, name: str) -> list[Tensor]:
    _, x, run = MODULES[name]
    with torch.no_grad():
        return tensors(run(net, x))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert expected and len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, saved])
@every_module
def test_copies(name, copied):
    """Of a module that has run and been trained, and their own gradients."""
    net = built(name)
    _, x, run = MODULES[name]
    net.train()
    backward(run(net, x.clone().requires_grad_()))
    net.eval()
    other = copied(net)
    assert repr(other) == repr(net)
    assert_same(ran(other, name), ran(net, name))
    if copied is not copy.copy:
        expected = ran(net, name)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        assert_same(ran(net, name), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("on_meta", [False, True])
@every_module
def test_states(name, on_meta, assign):
    """Into a module with other weights, or without any: the state says everything that the module needs."""
    net = built(name)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.device("meta" if on_meta else "cpu"):
        other = MODULES[name][0]().double().eval()
    if on_meta and not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(state, strict=True, assign=assign)
    assert_same(ran(other, name), ran(net, name))


@every_module
def test_a_module_on_meta_can_be_trained_after_it_is_loaded(name):
    with torch.device("meta"):
        other = MODULES[name][0]().double()
    other = other.to_empty(device="cpu")
    other.load_state_dict(built(name).state_dict())
    net, found = built(name).train(), []
    for module in (net, other.train()):
        torch.manual_seed(1)  # of dropout
        _, x, run = MODULES[name]
        backward(run(module, x.clone().requires_grad_()))
        found.append([tensor(list(gradients(module).values()))] if gradients(module) else [])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@every_model
def test_batches_are_copied(make):
    model, batch = make()
    model.eval()
    with torch.no_grad():
        expected, _ = model(batch, S, seed=3)
        for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
            assert torch.equal(model(copied, S, seed=3)[0], expected)
        assert torch.equal(copy.deepcopy(model)(batch, S, seed=3)[0], expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(batch, S, seed=3)[0], expected)
