"""What all ops share: how an implementation is chosen, and that the ops can be traced."""

import math
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import probsym_fast
from probsym_fast import ops
from probsym_fast.ops import OPS, _extension
from probsym_fast.ops._op import BACKENDS
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from tests.conftest import GRADIENT, VALUE, assert_near, implementations, kernels_of
from tests.helpers.networks import repeated


def on_graphs(call):
    """The op on x (B, S, 3, 3) as graphs of three nodes: call(x, edges, ptr, p, weight (D, C, P, P), backend)."""

    def run(x, backend):
        ptr = torch.arange(0, 3 * len(x) + 1, 3, device=x.device)
        edges = torch.tensor([[0, 1, 1], [1, 2, 1]], device=x.device)
        edges = (edges[:, None] + ptr[:-1, None]).flatten(1)  # (2, 3 B)
        weight = x[0, 0, :, :, None, None].expand(3, 3, 2, 2)
        return call(x, edges, ptr, ops.soft_permutation(x[:, :, 0], tau=0.5), weight, backend)

    return run


GRAPHS = {"layers": 2, "out_features": 2, "activation": "tanh", "final": True}


def edge_weights(x, w=2):
    """Of w channels, from the numbers of x (C, ...)."""
    shapes = (w, 2 * len(x)), (w, 2 * len(x)), (w, w), (w,), (w,)
    return [repeated(x.flatten()[k:], math.prod(shape)).view(shape) for k, shape in enumerate(shapes)]


MESSAGES = {"width": 4, "layers": 1, "out_features": 2}
BLOCKS = {"in_features": 3, "width": 4, "layers": 1, "heads": 2, "feedforward": 5, "out_features": 2}
CALLS = {
    "soft_permutation": lambda x, backend: ops.soft_permutation(x[:, 0], tau=0.1, iterations=3, backend=backend).log_r,
    "permutation_entropy": lambda x, backend: ops.permutation_entropy(ops.soft_permutation(x[:, 0]), backend),
    "orthogonal_frame": lambda x, backend: ops.orthogonal_frame(x, special=True, backend=backend),
    "act_orthogonal": lambda x, backend: ops.act_orthogonal(x[:, :, :, None].mT, x, mean=True, backend=backend),
    "embed": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.embed_edges(
            edges, x[:, 0].flatten(0, 1), ptr, p, weight, x[0, 0, 0], grid=2, pad_mode="circular", backend=backend
        )
    ),
    "readout": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.readout(
            x[..., :1].repeat(1, 1, 2, 3)[:, :, :4], ptr, p, weight, x[0, 0, 0], at=edges, backend=backend
        )
    ),
    "embed_matrix": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.embed_matrix(
            x[:, 0, :, :, None], p, weight[:, :1], x[0, 0, 0], grid=2, pad_mode="reflect", backend=backend
        )
    ),
    "embed_image": lambda x, backend: ops.embed_image(
        x[:, :1].tile(1, 1, 2, 2),
        x[:, :, :2, :2],
        x[0, 0, 0, :, None, None, None].repeat(1, 1, 3, 2),
        x[0, 0, 0],
        backend=backend,
    ),
    "embed_turned": lambda x, backend: ops.embed_image(
        x, torch.arange(8, device=x.device).repeat(len(x), 1), x[:1], backend=backend
    ),
    "node_identifiers": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.node_identifiers(
            ptr, p, x[0, 0], nodes=3 * len(x), backend=backend
        )
    ),
    "permute": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.permute(p, x[:, :1], inverse=True, backend=backend)
    ),
    "aggregate": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.aggregate(
            x.transpose(1, 2).flatten(0, 1), edges, own=x.mean(), backend=backend
        )
    ),
    "linear_batch_norm_relu": lambda x, backend: ops.linear_batch_norm_relu(
        x.flatten(0, 2), x[0, 0, :2], x[0, 0, 0, :2], x[1, 0, 0, :2], backend=backend
    )[0],
    "gin": on_graphs(
        lambda x, edges, ptr, p, weight, backend: ops.gin(
            x.transpose(1, 2).flatten(0, 1), edges, ptr, repeated(x, gin_count(3, 2, 2)), **GRAPHS, backend=backend
        )
    ),
    "mlp": lambda x, backend: ops.mlp(
        x.flatten(0, 2),
        repeated(x, mlp_count([3, 4, 2])),
        widths=[3, 4, 2],
        activation="gelu",
        first=True,
        backend=backend,
    ),
    "message_passing": lambda x, backend: ops.message_passing(
        x.flatten(0, 1), x[:, 0, :, :, None], repeated(x, message_count(3, 1, 4, 1, 2)), **MESSAGES, backend=backend
    ),
    "transformer": lambda x, backend: ops.transformer(
        x[:, 0], repeated(x, transformer_count(list(BLOCKS.values()), 3)), **BLOCKS, backend=backend
    ),
    "vector_edge_convolution": lambda x, backend: ops.vector_edge_convolution(
        x, *edge_weights(x), neighbors=2, backend=backend
    )[0],
}
every_op = pytest.mark.parametrize("name", CALLS)
every_kernel = pytest.mark.parametrize(
    ("name", "device", "backend"),
    [pytest.param(name, *case.values, id=f"{name}-{case.id}") for name in CALLS for case in kernels_of(name)],
)
EVERY = [pytest.param(name, *case.values, id=f"{name}-{case.id}") for name in CALLS for case in implementations(name)]
every_implementation = pytest.mark.parametrize(("name", "device", "backend"), EVERY)


def matrices(device="cpu", **kwargs):
    return torch.randn(2, 4, 3, 3, device=device, **kwargs)


def test_every_op_is_tested_here():
    assert set(CALLS) == {name for name, op in OPS.items() if op.backward is not None}  # noise: test_noise.py


@every_op
def test_what_is_there_is_what_is_listed(name):
    op = OPS[name]
    for device in ("cpu", "cuda"):
        listed = op.backends(device)
        assert listed[-1] == "reference"
        kernels = op.from_python[device][0] if device in op.from_python else device
        assert listed == ((kernels, "reference") if op.has_kernel(device) else ("reference",))
        assert BACKENDS[name, device] == listed
        assert probsym_fast.info()["ops"][name][device] == list(listed)
    assert not op.has_kernel("meta")
    if _extension.module():
        assert op.has_kernel("cpu")


@every_op
def test_auto_takes_the_first(name, device):
    first = OPS[name].backends(device.type)[0]
    x = matrices(
        device, dtype=torch.float64 if torch.float64 in OPS[name].kernel_dtypes(device.type) else torch.float32
    )
    assert_near(CALLS[name](x, "auto"), CALLS[name](x, first))
    op, expected = OPS[name], OPS[name].reference if first == "reference" else OPS[name].kernel
    assert op.select("auto", device, torch.float32) is op.select(first, device, torch.float32) is expected
    assert op.select("reference", device, torch.float32) is op.reference
    half = first != "reference" and torch.bfloat16 in op.kernel_dtypes(device.type)
    assert op.select("auto", device, torch.bfloat16) is (op.kernel if half else op.reference)
    assert op.compute_dtype("auto", device, torch.bfloat16) == (torch.bfloat16 if half else torch.float32)
    assert op.compute_dtype("reference", device, torch.bfloat16) == torch.float32
    assert op.compute_dtype("auto", device, torch.float64) == torch.float64


class Calls(TorchDispatchMode):
    """Records the kernels that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "probsym_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@every_implementation
def test_the_named_backend_runs_forward_and_backward(name, device, backend):
    x = matrices(device, requires_grad=True)
    with Calls() as record:
        CALLS[name](x, backend).sum().backward()
    ran = {func.name().removeprefix("probsym_fast::") for func, _ in record.calls}
    if backend == "reference":
        assert not {name, f"{name}_backward"} & ran
    else:
        assert {name, f"{name}_backward"} <= ran


@pytest.mark.parametrize("wrong", ["", "gpu", "cuda", "CPU"])
@every_op
def test_unknown_backend(name, wrong):
    message = f"{name}: backend must be one of {('auto', *OPS[name].backends('cpu'))} on cpu, got {wrong!r}"
    if _extension.problem():
        message += f" ({_extension.problem()})"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        CALLS[name](matrices(), wrong)


@every_kernel
def test_dtype_that_a_kernel_lacks(name, device, backend):
    takes = OPS[name].kernel_dtypes(device.type)
    lacking = torch.float64 if torch.bfloat16 in takes else torch.bfloat16
    message = f"{name}: backend {backend!r} takes {takes}, got {lacking}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OPS[name].select(backend, device, lacking)


@every_kernel
def test_tracing_knows_shapes_dtypes_and_strides(name, device, backend):
    """Fake results are laid out like the kernel's, also for inputs and gradients that are not contiguous."""
    x = matrices(device).permute(1, 0, 3, 2).requires_grad_()
    with Calls() as record:
        out = CALLS[name](x, backend)
        out.backward(torch.ones_like(out).mT.contiguous().mT if out.ndim > 1 else None)
    assert len(record.calls) >= 2
    for func, arguments in record.calls:
        real = func(*arguments)
        with FakeTensorMode() as mode:
            fake = func(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for a, b in zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]:
            assert (a is None) == (b is None)
            assert a is None or (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@every_kernel
def test_opcheck(name, device, backend):
    """Schema, shapes, and tracing with symbolic sizes, of the op and of its gradient."""
    with Calls() as record:
        CALLS[name](matrices(device, requires_grad=True), backend).sum().backward()
    checked = [(func, arguments) for func, arguments in record.calls if func.name().split("::")[1].startswith(name)]
    assert len(checked) == 2
    for func, arguments in checked:
        leaves = [
            a.detach().requires_grad_("backward" not in func.name() and a.is_floating_point())
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
        torch.library.opcheck(func, tuple(leaves))


@pytest.mark.parametrize(
    ("name", "device", "backend"),
    [case for case in EVERY if case.values[1].type != "cpu" or case.values[2] == "reference"],
)
def test_compiles_in_one_graph(name, device, backend):
    """Those of the CPU's kernels are compiled by tests/programs/test_compilations.py, in training."""
    x = matrices(device)

    def loss(x):
        return CALLS[name](x * 2, backend).pow(3).sum()

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    (value, gradient), (compiled, compiled_gradient) = results
    assert_near(compiled, value, VALUE)
    assert_near(compiled_gradient, gradient, GRADIENT)


def test_compiles_through_inductor(device):
    def loss(scores, matrices, num_nodes):
        p = ops.soft_permutation(scores * 2, num_nodes, tau=0.1)
        x = ops.act_orthogonal(p.scores[..., :3, None, None] * matrices, ops.orthogonal_frame(matrices[..., 0, :, :]))
        return ops.permutation_entropy(p) + (p.soft() * p.hard()).sum() + x.square().sum()

    inputs = torch.randn(2, 3, 6, device=device), torch.randn(2, 3, 3, 3, 3, device=device)
    compiled_equals_eager(loss, inputs, torch.tensor([6, 4], device=device))


def test_graphs_to_tokens_and_back_through_inductor(device):
    def loss(scores, attr, x, matrix, w2, w1, identifiers, ptr, edges):
        p = ops.soft_permutation(scores * 2, ptr.diff(), tau=0.5)
        settings = {"pad_mode": "circular", "centered": True}
        tokens = ops.embed_edges(edges, attr * 2, ptr, p, w2, grid=3, **settings)
        tokens = (
            tokens + ops.embed_nodes(x, ptr, p, w1, w1[:, 0, 0], tokens=9) + ops.embed_matrix(matrix, p, w2, grid=3)
        )
        h = ops.node_identifiers(ptr, p, identifiers, nodes=x.shape[0]).tanh()
        y = ops.readout(tokens.tanh(), ptr, p, w2, at=edges, centered=True)
        z = ops.readout(tokens[:, :, :3].tanh(), ptr, p, w2[..., 0], at=edges[:1])
        return ops.aggregate(h, edges).square().sum() + y.square().sum() + z.sum()

    ptr, edges = torch.tensor([0, 5, 9], device=device), torch.randint(5, (2, 7), device=device)
    sizes = (2, 3, 5), (7, 2), (9, 2), (2, 5, 5, 2), (6, 2, 2, 2), (6, 2, 1), (5, 4)
    compiled_equals_eager(loss, [torch.randn(size, device=device) for size in sizes], ptr, edges)


def compiled_equals_eager(loss, inputs, *others):
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves, *others)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, GRADIENT)
