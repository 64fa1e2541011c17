"""Autocast, checkpoints, and copies of modules: the numbers of the plain program in float32."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.checkpoint import checkpoint

from probsym_fast.groups import Draws, Euclidean, Graphs, PointClouds, Symmetric
from probsym_fast.models import DiagonalReadout, FusedEncoder
from probsym_fast.ops import Permutation, soft_permutation, using_backend
from tests.conftest import assert_near
from tests.ops.test_backends import CALLS
from tests.programs.cases import cases
from tests.programs.rows import Row
from tests.programs.rows.base import Program
from tests.programs.runs import SIZE, backward, floats, leaves
from tests.programs.test_half import check_gradients

S = 2
BOUND = {torch.float32: 5e-2}  # of bfloat16 inside the backbone
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
every_row = pytest.mark.parametrize("row", cases(traced=False))
every_module = pytest.mark.parametrize("row", cases(lambda row: row.part, traced=False))


def gradients(program: nn.Module, inputs: tuple) -> list[Tensor]:
    return [p.grad for p in (*program.parameters(), *floats(inputs)) if p.grad is not None]


@modes
@every_row
def test_autocast(row, training):
    """Ops, elements, penalties and running statistics of a distribution are exactly those of float32."""
    program, inputs = row.program(training), leaves(row.sample(SIZE, False))
    before = copy.deepcopy(program.state_dict())
    with torch.no_grad():
        expected = tree_leaves(program(inputs))
    state = copy.deepcopy(program.state_dict())
    program.load_state_dict(before)
    with torch.autocast("cpu", torch.bfloat16):
        found = tree_leaves(program(inputs))
    for k, (x, y) in enumerate(zip(found, expected, strict=True)):
        if row.kind in ("ops", "distributions") or (row.whole and k):
            assert torch.equal(x, y)
        else:
            assert_near(x.float(), y, BOUND)
    if row.trains or row.differentiable:
        backward(found)
        check_gradients(program, inputs)
    exact = "part." if row.kind == "distributions" else "part.distribution"
    assert all(torch.equal(x, state[key]) for key, x in program.state_dict().items() if key.startswith(exact))
    program.load_state_dict(before)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for x, y in zip(tree_leaves(program(inputs)), found, strict=True):
            if isinstance(program.part, FusedEncoder):  # torch's encoder has a path of its own without gradients
                assert_near(x.float(), y.float(), BOUND)
            else:
                assert torch.equal(x, y)


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
    x = torch.randn(2, 3, 3)
    batch, group = PointClouds(x, x, torch.randn(2, 3, 3, 2)).to(dtype), Symmetric(3) * Euclidean(3)
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
    readout = DiagonalReadout(4, 3, 2, 2).to("meta")
    order = torch.arange(4, device="meta").expand(2, S, 4)
    p = Permutation(order, torch.tensor([4, 3], device="meta"), order, checked=True)
    batch = Graphs(torch.randn(7, 2), torch.zeros(2, 3).long(), torch.tensor([0, 4, 7])).to("meta")
    assert readout(torch.empty(2, S, 2, 3, device="meta"), batch, Symmetric(4), p).shape == (7, 2)


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("row", cases(lambda row: row.trains or row.differentiable, traced=False))
def test_a_checkpoint(row, reentrant, autocast):
    """Around a module in training: its own gradients. Whoever writes it keeps running statistics from moving twice."""
    found = []
    for wrapped in (False, True):
        program, inputs = row.program(True), leaves(row.sample(SIZE, False))
        tensors, spec = tree_flatten(inputs)
        plain = lambda *tensors: tuple(tree_leaves(program(spec.unflatten(tensors))))  # noqa: B023, E731
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(plain, *tensors, use_reentrant=reentrant) if wrapped else plain(*tensors)
        backward(y)
        found.append((y, gradients(program, inputs)))
    (y, expected), (again, d) = found
    assert all(torch.equal(a, b) for a, b in zip(y, again, strict=True))
    for a, b in zip(d, expected, strict=True):
        assert_near(a, b, {torch.float32: 1e-6})


def ran(row: Row, part: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(Program(row.call, part)(row.sample(SIZE, False)))


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
def test_copies(row, copied):
    """Of a module that has run and been trained."""
    program = row.program(True)
    found = program(leaves(row.sample(SIZE, False)))
    if row.trains:
        backward(found)
    net = program.part.eval()
    other = copied(net)
    assert repr(other) == repr(net)
    expected = ran(row, net)
    assert_same(ran(row, other), expected)
    if copied is not copy.copy:
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        assert_same(ran(row, net), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("on_meta", [False, True])
@every_module
def test_states(row, on_meta, assign):
    """Into a module with other weights, or without any: the state says everything that the module needs."""
    net = row.program(False).part
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.device("meta" if on_meta else "cpu"):
        other = row.part().eval()
    if on_meta and not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(state, strict=True, assign=assign)
    assert_same(ran(row, other), ran(row, net))


@pytest.mark.parametrize("row", cases(lambda row: row.learns, traced=False))
def test_a_module_on_meta_can_be_trained_after_it_is_loaded(row):
    net, found = row.program(True), []
    with torch.device("meta"):
        other = row.part()
    other = other.to_empty(device="cpu")
    other.load_state_dict(net.part.state_dict())
    for program in (net, Program(row.call, other).train()):
        inputs = leaves(row.sample(SIZE, False))
        backward(program(inputs))
        found.append(gradients(program, inputs))
    assert_same(*found)


@pytest.mark.parametrize("row", cases(lambda row: row.whole, traced=False))
def test_batches_are_copied(row):
    model, (batch, seed) = row.program(False).part, row.sample(SIZE, False)
    with torch.no_grad():
        expected, _ = model(batch, S, seed=seed)
        for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
            assert torch.equal(model(copied, S, seed=seed)[0], expected)
