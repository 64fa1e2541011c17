"""Gradients of gradients: of every op, with its kernels and its reference, against finite differences and plain torch."""

import pytest
import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast.ops import OPS
from probsym_fast.ops.gin import weights_of as gin_count
from probsym_fast.ops.message_passing import weights_of as message_count
from probsym_fast.ops.mlp import weights_of as mlp_count
from probsym_fast.ops.transformer import weights_of as transformer_count
from tests.conftest import GRADIENT, assert_near
from tests.ops.test_backends import CALLS, every_kernel, every_op

PTR, EDGES = torch.tensor([0, 3, 5]), torch.tensor([[0, 1, 2, 3, 4, 4], [1, 0, 2, 4, 3, 4]])


def soft(*x: Tensor, backend: str = "auto"):
    """A soft permutation (2, 2, 3) of its parts."""
    return ops.soft_permutation(x[0], PTR.diff(), tau=0.5, iterations=3, backend=backend)


def shuffled() -> ops.Permutation:
    return soft(torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(2))).detach()


POOL = torch.tensor([[1.0, -0.5], [0.3, 0.8]]).double()
RUNNING = torch.tensor([1.2, 0.7]).double(), torch.tensor([0.5, 2.0]).double()
MESSAGES = {"width": 2, "layers": 1, "out_features": 1}
BLOCKS = {"in_features": 2, "width": 4, "layers": 1, "heads": 2, "feedforward": 3}
# op -> sizes of its inputs, and the op on them; permutations are given where their gradient is the straight-through one,
# which finite differences do not see
SMOOTH = {
    "orthogonal_frame": ([(2, 3, 3)], lambda a, **b: ops.orthogonal_frame(a, special=True, **b)),
    "orthogonal_frame, O(2)": ([(2, 2, 2)], lambda a, **b: ops.orthogonal_frame(a, **b)),
    "act_orthogonal": ([(2, 2, 3, 1), (2, 2, 3, 3)], lambda v, g, **b: ops.act_orthogonal(v, g, inverse=True, **b)),
    "act_orthogonal, mean": (
        [(2, 2, 2, 3, 1), (2, 2, 3, 3)],
        lambda v, g, **b: ops.act_orthogonal(v, g, mean=True, **b),
    ),
    "aggregate": ([(7, 2), ()], lambda x, own, **b: ops.aggregate(x, EDGES, own=own, ptr=PTR, **b)),
    "linear_batch_norm_relu": ([(4, 2), (3, 2), (3,), (3,)], lambda *x, **b: ops.linear_batch_norm_relu(*x, **b)[0]),
    "soft_permutation": ([(2, 2, 3)], lambda x, **b: [(p := soft(x, **b)).scores, p.log_r, p.log_c]),
    "soft_permutation, presorted": (
        [(2, 2, 3)],
        lambda x, backend: ops.OPS["soft_permutation"].select(backend, x.device, x.dtype)(
            -x.exp().cumsum(-1), PTR.diff(), 0.5, 3, True, True
        )[:3],
    ),
    "permutation_entropy": ([(2, 2, 3)], lambda x, **b: ops.permutation_entropy(soft(x, **b), **b)),
    "embed_edges": (
        [(6, 1), (2, 1, 2, 2), (2,)],
        lambda a, w, c, **b: ops.embed_edges(EDGES, a, PTR, shuffled(), w, c, grid=2, pad_mode="circular", **b),
    ),
    "embed_nodes": ([(5, 1), (2, 1, 2)], lambda x, w, **b: ops.embed_nodes(x, PTR, shuffled(), w, tokens=2, **b)),
    "embed_matrix": (
        [(2, 3, 3, 1), (2, 1, 2, 2), (2,)],
        lambda a, w, c, **b: ops.embed_matrix(a, shuffled(), w, c, grid=2, **b),
    ),
    "embed_image": (
        [(2, 1, 4, 4), (2, 2, 2, 2), (2, 1, 2, 4), (2,)],
        lambda x, g, w, c, **b: ops.embed_image(x, g, w, c, **b),
    ),
    "embed_turned": (
        [(2, 1, 4, 4), (2, 1, 2, 4), (2,)],
        lambda x, w, c, **b: ops.embed_image(x, torch.tensor([[0, 5], [3, 6]]), w, c, **b),
    ),
    "readout": (
        [(2, 2, 4, 2), (2, 1, 2, 2), (1,)],
        lambda x, w, c, **b: ops.readout(x, PTR, shuffled(), w, c, at=EDGES, **b),
    ),
    "gin": (
        [(5, 2, 3), (gin_count(3, 2, 2),)],
        lambda x, w, **b: ops.gin(x, EDGES, PTR, w, layers=2, out_features=2, activation="tanh", **b),
    ),
    "mlp": (
        [(4, 2), (mlp_count([2, 3, 1]),)],
        lambda *x, **b: ops.mlp(*x, widths=[2, 3, 1], activation="tanh", last=True, **b),
    ),
    "message_passing": (
        [(4, 3, 2), (2, 3, 3, 1), (message_count(2, 1, 2, 1, 1),)],
        lambda *x, **b: ops.message_passing(*x, **MESSAGES, **b),
    ),
    "transformer": (
        [(2, 3, 2), (transformer_count([*BLOCKS.values(), 0], 3),)],
        lambda *x, **b: ops.transformer(*x, **BLOCKS, **b),
    ),
    "vector_edge_convolution": (
        [(2, 2, 3, 2), (2, 4), (2, 4), (2,), (2,)],
        lambda x, f, q, g, c, **b: ops.vector_edge_convolution(x, f, q, POOL, g, c, neighbors=2, **b)[0],
    ),
    "vector_edge_convolution, running": (
        [(1, 3, 3, 2), (2, 2), (2, 2), (2,), (2,)],
        lambda x, f, q, g, c, **b: ops.vector_edge_convolution(x, f, q, POOL, g, c, RUNNING, neighbors=3, **b)[0],
    ),
    "vector_edge_convolution, num_nodes": (
        [(2, 2, 3, 3), (2, 4), (2, 4), (2,), (2,)],
        lambda x, f, q, g, c, **b: ops.vector_edge_convolution(
            x, f, q, POOL, g, c, neighbors=2, num_nodes=torch.tensor([3, 1, 2]), **b
        )[0],
    ),
    "permute": ([(2, 2, 3, 2)], lambda x, **b: ops.permute(shuffled(), x, **b)),
    "node_identifiers": ([(3, 2)], lambda w, **b: ops.node_identifiers(PTR, shuffled(), w, **b)),
}


def inputs(sizes) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def test_every_op_is_here():
    given = {"embed" if name in ("embed_edges", "embed_nodes") else name.split(",")[0] for name in SMOOTH}
    assert given == {name for name, op in OPS.items() if op.backward is not None}
    assert all(op.second is None or op.second.defined for op in OPS.values())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SMOOTH)
def test_finite_differences(name, backend):
    sizes, op = SMOOTH[name]
    f = lambda *x: op(*x, backend=backend)  # noqa: E731
    leaves = inputs(sizes)
    assert torch.autograd.gradgradcheck(f, leaves)
    for k, x in enumerate(leaves):  # where only one needs a gradient
        some = [y.detach() for y in leaves]
        assert torch.autograd.gradgradcheck(lambda x, k=k, some=some: total(f(*some[:k], x, *some[k + 1 :])), x)


def total(y) -> Tensor:
    """A scalar that is linear in no input."""
    return sum(x.sin().sum() for x in ([y] if isinstance(y, Tensor) else y))


def hessian(f, x: Tensor, **settings) -> Tensor:
    return torch.autograd.functional.hessian(f, x, **settings)


def weighted(name: str, backend: str):
    def f(x):
        with ops.using_backend(backend):
            y = CALLS[name](x, backend)
        return (
            y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        ).sum() + y.square().sum()

    return f


@every_kernel
def test_hessian_of_the_reference(name, device, backend):
    """With the gradient of a soft permutation too; one vector at a time and all at once."""
    dtype = torch.float64 if torch.float64 in OPS[name].kernel_dtypes(device.type) else torch.float32
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64).to(device)  # the same on every device
    expected = hessian(weighted(name, "reference"), x)
    assert expected.any()
    near = {torch.float64: 1e-9, torch.float32: 1e-3}
    assert_near(hessian(weighted(name, "auto"), x.to(dtype)), expected, near)
    assert_near(hessian(weighted(name, "auto"), x.to(dtype), vectorize=True), expected, near)


@every_op
def test_half_precision_is_computed_in_float32(name):
    x = torch.randn(2, 2, 3, 3).bfloat16()
    found, expected = hessian(weighted(name, "auto"), x), hessian(weighted(name, "reference"), x)
    assert found.dtype == torch.bfloat16
    assert_near(found, expected, GRADIENT)


def plain_frame(a: Tensor) -> Tensor:
    """Q of a QR factorisation with a positive diagonal of R, the first column mirrored to be a rotation."""
    q, r = torch.linalg.qr(a)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return torch.cat([q[..., :1] * torch.linalg.det(q).sign().detach()[..., None, None], q[..., 1:]], -1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_force_through_a_frame_against_plain_torch(backend):
    """Of vectors that define the frame that acts on them: both gradients of both ops."""
    v = torch.randn(2, 3, 4, 3, 1, dtype=torch.float64, requires_grad=True)

    def force(frame, act):
        y = act(v, frame(v[..., :3, :, 0].mT))
        energy = (y.sin() * torch.arange(y.numel(), dtype=y.dtype).view(y.shape)).sum()
        (first,) = torch.autograd.grad(energy, v, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), v)[0]

    found = force(
        lambda a: ops.orthogonal_frame(a, special=True, backend=backend),
        lambda v, g: ops.act_orthogonal(v, g, inverse=True, backend=backend),
    )
    expected = force(plain_frame, lambda v, g: torch.einsum("bsij,bsnic->bsnjc", g, v))
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, {torch.float64: 1e-9})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("special", [False, True])
def test_frames_of_dependent_columns(special, backend):
    """A replaced column is a constant in second derivatives too, and all of them are finite."""
    a = torch.randn(4, 3, 3, dtype=torch.float64)
    a[0] = 0
    a[1, :, 1] = 2 * a[1, :, 0]
    a[2, :, 2] = a[2, :, 0] - a[2, :, 1]
    a.requires_grad_()
    q = ops.orthogonal_frame(a, special=special, backend=backend)
    (first,) = torch.autograd.grad((q * torch.randn_like(q)).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.randn_like(a)).sum(), a)
    assert second.isfinite().all()
    assert not second[0].any() and not second[1, :, 1].any() and not second[2, :, 2].any()
    assert second[1, :, 0].any() and second[3].any()


def test_only_where_it_is_asked_for(monkeypatch):
    """A first backward pass does not come near Python; with create_graph nothing is computed before the second."""
    calls = []
    for op in OPS.values():
        if op.second is not None:
            monkeypatch.setattr(op.second, "shapes", lambda *x, own=op.second.shapes: calls.append(own) or own(*x))
    v, g = inputs([(2, 2, 3, 1), (2, 2, 3, 3)])
    y = ops.act_orthogonal(v, ops.orthogonal_frame(g)).square().sum()
    torch.autograd.grad(y, (v, g), retain_graph=True)
    first, _ = torch.autograd.grad(y, (v, g), create_graph=True)
    assert not calls
    first.sum().backward()
    assert (len(calls) > 0) == (OPS["act_orthogonal"].backends("cpu")[0] != "reference")
