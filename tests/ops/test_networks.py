"""transformer, message_passing, gin and mlp: whole networks as one op, against their float64 reference and plain modules."""

import pytest
import torch

from probsym_fast._memory import peak_memory
from probsym_fast.ops import OPS, _extension, gin, message_passing, mlp, transformer
from tests.helpers.graphs import random_graphs
from tests.helpers.items import DTYPES, bit_equal_on_any_threads, check, value_and_gradients
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, networks, sequences

BACKENDS = OPS["transformer"].backends("cpu")
built = pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
# sequences, tokens, further settings: odd sizes, whole vectors, many features, one head, one token, no embedding or head
SHAPES = {
    "small": (5, 4, {}),
    "many": (37, 9, {}),
    "one token": (3, 1, {}),
    "wide": (18, 6, {"in_features": 33, "width": 40, "heads": 5, "feedforward": 70, "out_features": 37}),
    "published": (19, 25, {"in_features": 8, "width": 64, "heads": 4, "feedforward": 64, "out_features": 3}),
    "no embedding": (17, 5, {"in_features": 0}),
    "no head": (17, 5, {"out_features": 0}),
    "neither": (4, 3, {"in_features": 0, "out_features": 0, "heads": 1}),
    "relu": (17, 5, {"activation": "relu"}),
    "read": (17, 7, {"read": [0, 3, 6]}),
    "read in any order": (4, 7, {"read": [5, 0, 5], "layers": 1}),
    "read all, no head": (4, 3, {"read": [2, 1, 0], "out_features": 0}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SHAPES)
def test_transformer(device, name, recompute, dtype):
    settings, leaves = sequences(*SHAPES[name], device)
    check("transformer", lambda b, *t: transformer(*t, **settings, recompute=recompute, backend=b), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("B", "S", "n", "features", "C", "width", "layers", "out"),
    [(2, 3, 4, 3, 2, 5, 2, 2), (3, 13, 5, 6, 2, 60, 4, 3), (2, 1, 1, 5, 3, 9, 1, 33)]
    + [(2, 3, 70, 5, 3, 9, 2, 2), (2, 9, 18, 5, 3, 9, 2, 2)],
)
def test_message_passing(device, B, S, n, features, C, width, layers, out, recompute, dtype):
    """Also of more pairs than are computed at a time."""
    x, edges = torch.randn(B * S, n, features, device=device).double(), torch.randn(B, n, n, C, device=device).double()
    leaves = [x, edges, message_weights(features, C, width, layers, out, device)]
    settings = {"width": width, "layers": layers, "out_features": out, "recompute": recompute}
    check("message_passing", lambda b, *t: message_passing(*t, **settings, backend=b), leaves, dtype)


def test_message_passing_without_edge_features():
    x, edges, weights = (
        torch.randn(10, 4, 6).double(),
        torch.zeros(2, 4, 4, 0).double(),
        message_weights(6, 0, 17, 2, 3),
    )
    settings = {"width": 17, "layers": 2, "out_features": 3}
    check("message_passing", lambda b, x, w: message_passing(x, edges, w, **settings, backend=b), [x, weights], x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("sizes", "S", "width", "layers", "out", "activation", "final"),
    [
        ([9, 5, 0, 1], 3, 64, 3, 7, "tanh", True),
        ([4, 30], 20, 17, 2, 33, "gelu", False),
        ([600], 3, 5, 1, 2, "relu", True),
        ([9, 5], 1, 70, 3, 64, "tanh", False),
    ],
)
def test_gin(device, sizes, S, width, layers, out, activation, final, recompute, dtype):
    """Also of graphs without nodes, and with more rows than a tile has."""
    batch = random_graphs(sizes).to(device)
    leaves = [torch.randn(sum(sizes), S, width, device=device).double(), gin_weights(width, layers, out, device)]
    settings = {"layers": layers, "out_features": out, "activation": activation, "final": final, "recompute": recompute}
    check("gin", lambda b, x, w: gin(x, batch.edge_index, batch.ptr, w, **settings, backend=b), leaves, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("M", "widths", "activation", "first", "last"),
    [
        (1, [7, 5], "tanh", False, True),
        (83, [1, 70, 33, 4], "gelu", True, False),
        (400, [17, 64, 64, 64, 1], "silu", True, True),
        (161, [5, 1, 3], "tanh", False, False),
    ],
)
def test_mlp(device, M, widths, activation, first, last, recompute, dtype):
    """Also of rows that fill no tile."""
    leaves = [torch.randn(M, widths[0], device=device).double(), mlp_weights(widths, device)]
    settings = {"widths": widths, "activation": activation, "first": first, "last": last, "recompute": recompute}
    check("mlp", lambda b, *t: mlp(*t, **settings, backend=b), leaves, dtype)


every_network = pytest.mark.parametrize("name", list(networks()))


@pytest.mark.parametrize("backend", BACKENDS)
@every_network
def test_nothing_gives_nothing(name, backend):
    call, leaves = networks(0)[name]
    leaves = [t.requires_grad_() for t in leaves]
    y = call(*leaves, backend=backend)
    assert y.shape[0] == 0
    for t, d in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert d.shape == t.shape and not d.any()


@pytest.mark.parametrize("backend", BACKENDS)
@every_network
def test_gradcheck(name, backend):
    call, leaves = networks(4)[name]
    assert torch.autograd.gradcheck(lambda *t: call(*t, backend=backend), [t.requires_grad_() for t in leaves])


@every_network
def test_only_the_gradients_asked_for(name):
    call, leaves = networks()[name]
    for wanted in range(len(leaves)):
        made = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        found, expected = (
            torch.autograd.grad(call(*made, backend=b).square().sum(), made[wanted])[0]
            for b in (BACKENDS[0], "reference")
        )
        torch.testing.assert_close(found, expected)


@built
@every_network
def test_what_is_computed_again_is_the_same_to_the_bit(name):
    call, leaves = networks(40)[name]
    found = []
    for recompute in (False, True):
        made = [t.detach().requires_grad_() for t in leaves]
        y = call(*made, recompute=recompute)
        found.append([y, *torch.autograd.grad(y.square().sum(), made)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@built
@pytest.mark.parametrize("dtype", DTYPES)
@every_network
def test_bit_equal_on_any_threads(name, dtype):
    call, leaves = networks(600)[name]
    bit_equal_on_any_threads(call, [t.to(dtype) for t in leaves])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
def test_mlp_of_no_rows(backend, last):
    x, weights = torch.randn(0, 3, requires_grad=True), mlp_weights([3, 4, 2]).float().requires_grad_()
    y = mlp(x, weights, widths=[3, 4, 2], last=last, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 2) and x.grad.shape == (0, 3) and not weights.grad.any()


@built
@every_network
def test_a_sequence_does_not_depend_on_the_others(name):
    call, leaves = networks(40)[name]
    whole = call(*leaves)
    some = [t[:20] if name == "transformer" and i == 0 else t for i, t in enumerate(leaves)]
    if name == "gin":
        some = [leaves[0][:20], leaves[1]]
        assert torch.equal(call(*some), whole[:5])
        return
    if name == "message_passing":
        some = [leaves[0][:20], leaves[1][:10], leaves[2]]
    if name == "mlp":
        some = [leaves[0][:20], leaves[1]]
    assert torch.equal(call(*some), whole[:20])


@built
@every_network
def test_memory(name):
    """Kept: one state a layer. Computed again: nothing that grows with the layers or, but for input and output, the batch."""
    call, leaves = networks(6000)[name]
    leaves = [t.float().requires_grad_() for t in leaves]

    def step(**more):
        torch.autograd.grad(call(*leaves, **more).sum(), leaves)

    step()  # the threads' scratch memory stays
    state = 4 * leaves[0][..., 0].numel() * 6  # rows, width
    ends = 8 * sum(t.numel() for t in leaves)  # inputs' gradients, outputs and theirs
    ends += 4 * 6000 * 4 * 4 * 2 if name == "message_passing" else 0  # the edges' gradient of every sample
    assert 2 * state < peak_memory(step, "cpu") < 4 * state + ends
    assert peak_memory(lambda: step(recompute=True), "cpu") < ends + 200_000


# --- sequences of different lengths ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(device, dtype):
    settings, leaves = sequences(37, 9, {"activation": "relu"}, device)
    lengths = torch.randint(1, 10, (37,), device=device)
    check("transformer", lambda b, *t: transformer(*t, **settings, lengths=lengths, backend=b), leaves, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend):
    settings, (x, weights) = sequences(20, 7, {})
    lengths = torch.randint(1, 8, (20,))
    x.requires_grad_()
    y = transformer(x, weights, **settings, lengths=lengths, backend=backend)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    spoilt = torch.where(torch.arange(7)[:, None] < lengths[:, None, None], x, torch.randn_like(x))
    assert torch.equal(transformer(spoilt, weights, **settings, lengths=lengths, backend=backend), y)
    embed, place = 3 * 6 + 6, 7 * 6
    for m, n in enumerate(lengths.tolist()):
        own = torch.cat([weights[: embed + n * 6], weights[embed + place :]])
        expected = transformer(x[m : m + 1, :n], own, **settings, backend=backend)[0]
        torch.testing.assert_close(y[m, :n], expected)
        assert not y[m, n:].any() and not d_x[m, n:].any()


@built
def test_nan_after_the_end_is_not_read():
    settings, (x, weights) = sequences(20, 7, {})
    lengths = torch.randint(1, 7, (20,))
    x[torch.arange(7) >= lengths[:, None]] = torch.nan
    assert transformer(x, weights, **settings, lengths=lengths).isfinite().all()


# --- numbers at the edge ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_no_eps(backend, ragged):
    """What no sequence fills is not zero, whose norm has no direction."""
    settings, leaves = sequences(5, 4, {"in_features": 0, "eps": 0.0})
    lengths = torch.tensor([4, 1, 2, 4, 3]) if ragged else None
    found = value_and_gradients(lambda *t: transformer(*t, **settings, lengths=lengths, backend=backend), leaves)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loops_are_not_read(backend):
    """Not even where they are infinite, as the distance of a point to itself."""
    x, edges, weights = networks(4)["message_passing"][1]
    edges.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    x.requires_grad_()
    y = message_passing(x, edges, weights, width=6, layers=2, out_features=2, backend=backend)
    (force,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(force.square().sum(), x)
    assert y.isfinite().all() and force.isfinite().all() and second.isfinite().all()


@built
@pytest.mark.parametrize("name", ["transformer", "message_passing", "mlp"])
def test_another_instruction_set_in_the_backward_pass_is_refused(name):
    module = _extension.module()
    sets, best = module.instruction_sets(), module.instruction_set()
    if len(sets) < 2:
        pytest.skip("one instruction set")
    call, leaves = networks()[name]
    y = call(*[t.requires_grad_() for t in leaves])
    module.use_instruction_set(next(x for x in sets if x != best))
    try:
        with pytest.raises(RuntimeError, match="the instruction set has changed"):
            y.sum().backward()
    finally:
        module.use_instruction_set(best)
