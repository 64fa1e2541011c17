"""transformer, message_passing, gin and mlp: whole networks as one op, against their float64 reference and plain modules."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from probsym_fast import ops
from probsym_fast._memory import peak_memory
from probsym_fast.models import MLP, GINBackbone, MessagePassing, Transformer, fuse
from probsym_fast.models.backbones import fused
from probsym_fast.models.backbones.fused import by_modules
from probsym_fast.ops import OPS, _extension, gin, message_passing, mlp, transformer
from tests.helpers.graphs import random_graphs
from tests.helpers.items import DTYPES, bit_equal_on_any_threads, check, value_and_gradients
from tests.helpers.networks import gin_weights, message_weights, mlp_weights, transformer_weights

BACKENDS = OPS["transformer"].backends("cpu")
built = pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")
SMALL = {"in_features": 3, "width": 6, "layers": 2, "heads": 2, "feedforward": 5, "out_features": 2}
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


def sequences(M, L, settings, device="cpu"):
    settings = SMALL | settings
    x = torch.randn(M, L, settings["in_features"] or settings["width"], device=device).double()
    return settings, [x, transformer_weights(settings, L, device)]


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


def networks(M=20):
    """name -> the op as a function of its leaves, and the leaves."""
    settings, leaves = sequences(M, 5, {})
    graphs = [torch.randn(M, 4, 3).double(), torch.randn(M // 2, 4, 4, 2).double(), message_weights(3, 2, 6, 2, 2)]
    return {
        "transformer": (lambda *t, **more: transformer(*t, **settings, **more), leaves),
        "message_passing": (
            lambda *t, **more: message_passing(*t, width=6, layers=2, out_features=2, **more),
            graphs,
        ),
        "gin": (
            lambda x, w, **more: gin(x, *ring(len(x) // 4), w, layers=2, out_features=2, activation="tanh", **more),
            [torch.randn(4 * (M // 4), 3, 6).double(), gin_weights(6, 2, 2)],
        ),
        "mlp": (
            lambda *t, **more: mlp(*t, widths=[6, 6, 6, 2], activation="gelu", first=True, **more),
            [torch.randn(5 * M, 6).double(), mlp_weights([6, 6, 6, 2])],
        ),
    }


def ring(graphs: int):
    """Edges and offsets of graphs of four nodes in a ring."""
    one = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return (one[:, None] + 4 * torch.arange(graphs)[:, None]).flatten(1), 4 * torch.arange(graphs + 1)


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


# --- modules ---


def modules():
    batch = torch.randn(3, 4, 5, 6), torch.randn(3, 1, 5, 5, 2)
    graphs = torch.randn(14, 2, 6), random_graphs([9, 5])
    return {
        "transformer": (Transformer(6, 8, 2, 2, 12, 5), batch[:1]),
        "transformer, read": (Transformer(6, 8, 2, 2, 12, 5, read=[-1, 0]), batch[:1]),
        "message passing": (MessagePassing(width=8), batch),
        **{
            f"gin, {name}": (GINBackbone(6, 2, 3, name, final=name == "tanh"), graphs)
            for name in ("tanh", "relu", "gelu")
        },
        **{
            f"mlp, {name}": (MLP([6, 8, 8, 3], name, last=name == "tanh"), batch[:1])
            for name in ("tanh", "relu", "gelu")
        },
        "message passing, edges of each sample": (MessagePassing(width=8), (batch[0], torch.randn(3, 4, 5, 5, 2))),
    }


every_module = pytest.mark.parametrize("name", list(modules()))


@built
@every_module
def test_modules_give_the_same_either_way(name):
    module, inputs = modules()[name]
    module.double().one_pass = True
    leaves = [x.double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    where = {GINBackbone: "out", MLP: "layers.1"}.get(type(module), "embed")
    first = module.get_submodule(where)
    assert module.why_not(leaves[0].device, torch.float64) is None and "one pass" in str(module)
    found = module(*leaves)
    handle = first.register_forward_hook(lambda *_: None)  # what a hook would see is computed by modules
    assert module.why_not(leaves[0].device, torch.float64) == f"{where} has a hook"
    assert f"by modules: {where} has a hook" in str(module)
    expected = module(*leaves)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [*(x for x in leaves if isinstance(x, torch.Tensor)), *module.parameters()]
    weights = torch.randn_like(found)
    for a, b in zip(
        *(torch.autograd.grad(y, wanted, weights, allow_unused=True) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@built
@pytest.mark.parametrize(
    ("make", "inputs", "fewest"),
    [
        (lambda: Transformer(6, 8, 2, 2, 12, 5), lambda M: (torch.randn(M, 5, 6),), 4),
        (lambda: Transformer(6, 66, 1, 2, 12, 5), lambda M: (torch.randn(M, 5, 6),), 16),
        (lambda: MessagePassing(width=8), lambda M: (torch.randn(M, 2, 5, 6), torch.randn(M, 1, 5, 5, 2)), 2),
        (lambda: MLP([6, 8, 3]), lambda M: (torch.randn(M, 50, 6),), 20),
    ],
)
def test_few_sequences_go_by_modules(make, inputs, fewest, monkeypatch):
    module = make()
    takes_the_op = watched(module, monkeypatch)
    assert not takes_the_op(*inputs(fewest - 1)) and takes_the_op(*inputs(fewest))
    module.one_pass = True
    assert takes_the_op(*inputs(1))


@built
def test_a_large_graph_goes_by_modules(monkeypatch):
    backbone, x = GINBackbone(6, 2, 3, "relu"), torch.randn(1100, 2, 6)
    takes_the_op = watched(backbone, monkeypatch)
    assert not takes_the_op(x, random_graphs([600, 500])) and takes_the_op(x, random_graphs([500, 500, 100]))
    backbone.one_pass = True
    assert takes_the_op(x, random_graphs([600, 500]))


class Taken(Exception):
    pass


def watched(module, monkeypatch):
    """A function of inputs: whether the module takes its op for them."""

    def op(*_, **__):
        raise Taken

    monkeypatch.setattr(ops, module.op, op)

    def takes_the_op(*inputs) -> bool:
        try:
            module(*inputs)
        except Taken:
            return True
        return False

    return takes_the_op


@built
def test_parts_in_another_order_go_by_modules():
    module, x = MLP([4, 4, 4], last=True), torch.randn(2, 4)
    module.one_pass = True
    parts = module.layers._modules
    parts["0"] = parts.pop("0")  # the activation now comes last
    assert module.why_not(x.device, x.dtype) == "the parts have another order"
    assert torch.equal(module(x), module.layers(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@built
def test_what_a_pass_would_miss_goes_by_modules(monkeypatch):
    device, x = torch.device("cpu"), torch.randn(2, 5, 6)

    def why(change=lambda module: None, dtype=torch.float32, **settings):
        module = Transformer(6, 8, 2, 2, 12, 5, **settings)
        change(module)
        return module.why_not(device, dtype)

    assert why() is None and why(dropout=0.1) == "dropout drops 0.1"
    assert why(lambda m: m.eval(), dropout=0.1) is None
    assert why(lambda m: m.eval().head[4].train(), dropout=0.1) == "head.4 drops 0.1"  # dropout in inference
    assert why(lambda m: setattr(m.blocks[1], "dropout", 0.1)) == "blocks.1 drops 0.1"
    assert why(dtype=torch.float64) == "a weight is float32"
    assert why(lambda m: m.norm.double()) == "a weight is float64"
    assert why(dtype=torch.bfloat16) == "a weight is float32" and why(nn.Module.bfloat16, torch.bfloat16) is None
    assert why(lambda m: setattr(m.blocks[1], "up", Doubled(8, 12))) == "blocks.1.up is Doubled, not Linear"
    assert why(lambda m: setattr(m.blocks[1], "up", nn.Linear(8, 13))) == "blocks.1.up has other weights or settings"
    assert why(lambda m: setattr(m.blocks[1], "heads", 1)) == "blocks.1 has other weights or settings"
    assert why(lambda m: setattr(m.blocks[1].norm2, "eps", 0.1)) == "blocks.1.norm2 has other weights or settings"
    assert why(lambda m: setattr(m, "head", nn.Linear(8, 5))).endswith("is gone")
    assert why(lambda m: setattr(m, "extra", nn.Identity())) == "extra is new"
    assert why(lambda m: setattr(m.head, "1", nn.Identity())) == "head.1 is Identity, not Dropout"
    assert why(lambda m: setattr(m.blocks[0].up, "forward", lambda x: x)) == "blocks.0.up has another forward"
    assert why(lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].up)).endswith("is new")
    assert why(lambda m: setattr(m, "one_pass", False)) == "one_pass is False"
    module = Transformer(6, 8, 2, 2, 12, 5)
    with torch.autocast("cpu", torch.float16):
        assert module.why_not(device, torch.float32) is None  # in float32
        module.one_pass = True
        y = module(x)
    assert torch.equal(y, module(x).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert MLP([6, 8, 3]).why_not(device, torch.float32) == "autocast is on"
    assert MLP([6, 8, 3]).bfloat16().why_not(device, torch.bfloat16) == "in bfloat16 the modules are faster"
    for wide in (
        Transformer(6, 132, 1, 2, 12, 5),
        Transformer(6, 128, 1, 2, 129, 5),
        MessagePassing(width=129),
        GINBackbone(129, 1, 3, "relu"),
    ):
        assert wide.why_not(device, torch.float32) is None
        for multiplies, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)):
            monkeypatch.setattr(fused, "multiplies_bf16", lambda multiplies=multiplies: multiplies)
            takes = multiplies and dtype == torch.bfloat16 and isinstance(wide, Transformer)
            with torch.autocast("cpu", dtype):
                assert wide.why_not(device, torch.float32) == (None if takes else "autocast is on")
    assert Transformer(6, 512, 2, 2, 12, 5).why_not(device, torch.float32) == (
        "5 tokens, width 512, feedforward 12, 2 layers"
    )
    backbone = GINBackbone(6, 2, 3, "relu")
    backbone.activation = nn.SiLU()
    assert backbone.why_not(device, torch.float32) == "activation is SiLU, not ReLU"
    assert MLP([6, 129, 3]).why_not(device, torch.float32) == "width 129"
    assert MLP([6, 3]).why_not(device, torch.float32) == "fewer than two linear maps"
    assert MessagePassing(layers=0).why_not(device, torch.float32) == "width 60, 0 layers"


@pytest.mark.skipif("triton" not in OPS["transformer"].backends("cuda"), reason="no triton")
def test_a_gpu_takes_the_pass_where_it_is_asked_for():
    """But for sizes that its kernels do not take; the modules run there."""
    gpu = torch.device("cuda")

    def fused(width, heads):
        layer = nn.TransformerEncoderLayer(width, heads, 8, dropout=0.0, batch_first=True, norm_first=True)
        return fuse(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))

    heads = "its kernels take at most {} features of a head, got {}"
    for module, expected in (
        *((module, None) for module, _ in modules().values()),
        (GINBackbone(6, 1025, 3, "relu"), "its kernels take at most 1024 layers, got 1025"),
        (Transformer(6, 64, 1, 1, 12, 32), None),
        (Transformer(6, 64, 1, 1, 12, 33), heads.format(32, 64)),
        (fused(32, 1), None),
        (fused(64, 1), heads.format(32, 64)),
        (MessagePassing(out_features=257), "its kernels take at most 256 features of the width or output, got 257"),
    ):
        assert module.why_not(gpu, torch.float32) == (expected or "one_pass is not True on cuda")
        module.one_pass = True
        assert module.why_not(gpu, torch.float32) == expected
    assert modules()["transformer"][0].why_not(gpu, torch.float64) == "no kernel for cuda, float64"


@built
@every_module
def test_a_hook_on_any_part_is_called(name):
    """But on `pair`, whose weight the modules split too."""
    module, inputs = modules()[name]
    silent = nn.ModuleList, type(module)
    parts = [
        part for name, part in module.named_modules() if not isinstance(part, silent) and not name.endswith("pair")
    ]
    for part in parts:
        calls = []
        handle = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        module(*inputs)
        handle.remove()
        assert calls, part
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    module(*inputs)
    handle.remove()
    assert len(calls) > len(parts) / 2
    assert module.why_not(inputs[0].device, torch.float32) is None


@built
def test_weights_registered_again_keep_their_places():
    """As pruning and parametrizations leave them: the bias before the weight."""
    module, (x,) = modules()["transformer"]
    linear = module.blocks[0].up
    expected, weight = module(x), linear.weight
    del linear.weight
    linear.register_parameter("weight", weight)
    assert list(linear._parameters) == ["bias", "weight"] and module.why_not(x.device, x.dtype) is None
    torch.testing.assert_close(module(x), expected)
    again = copy.deepcopy(module)
    assert again.why_not(x.device, x.dtype) is None
    assert pickle.loads(pickle.dumps(module)).why_not(x.device, x.dtype) is None


@pytest.mark.parametrize(("graphs", "samples"), [(1, 4), (1, 1), (3, 1), (3, 4)])
def test_edges_shared_by_graphs_or_samples(graphs, samples):
    module, (x, _) = modules()["message passing"]
    edges = torch.randn(graphs, samples, 5, 5, 2)
    torch.testing.assert_close(module(x, edges), by_modules(module)(x, edges))
    torch.testing.assert_close(module(x, edges), module(x, edges.expand(3, 4, 5, 5, 2)))
    for lead in ((2, 4), (3, 2), (12, 1)):
        with pytest.raises(ValueError, match=r"^MessagePassing: edges must be of 1 or x's"):
            module(x, torch.randn(*lead, 5, 5, 2))


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


# --- bad input ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_transformer(backend):
    settings, (x, weights) = sequences(4, 5, {})
    lengths, P = torch.full((4,), 5), weights.numel()
    for x_, weights_, more, error, message in (
        (x[0], weights, {}, ValueError, "x must be (M, L, 3) with L >= 1, got (5, 3)"),
        (x[..., :2], weights, {}, ValueError, "x must be (M, L, 3) with L >= 1, got (4, 5, 2)"),
        (x, weights[1:], {}, ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        (x, weights.float(), {}, TypeError, "weights must be torch.float64 as x is, got torch.float32"),
        (x.long(), weights, {}, TypeError, "x must be floating point, got torch.int64"),
        (x, weights.to("meta"), {}, RuntimeError, "weights must be on cpu, got meta"),
        (x, weights, {"heads": 4}, ValueError, "width must be a multiple of heads = 4, got 6"),
        (x, weights, {"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        (x, weights, {"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        (x, weights, {"activation": "tanh"}, ValueError, "activation must be one of ('gelu', 'relu'), got 'tanh'"),
        (x, weights, {"read": [5]}, ValueError, "read must hold one token or more, each in 0..4, got [5]"),
        (x, weights, {"read": []}, ValueError, "read must hold one token or more, each in 0..4, got []"),
        (x, weights, {"recompute": 1}, TypeError, "recompute must be a bool, got int 1"),
        (x, weights, {"lengths": lengths[1:]}, ValueError, "lengths must be (M,) = (4,), got (3,)"),
        (x, weights, {"lengths": lengths.int()}, TypeError, "lengths must be int64, got torch.int32"),
        (
            x,
            weights,
            {"lengths": lengths, "read": [0]},
            ValueError,
            "read must be None where lengths are given, got both",
        ),
        (x, weights, {"lengths": lengths + 1}, ValueError, "each of lengths must be in 1..5, got 6"),
        (x, weights, {"lengths": lengths - 5}, ValueError, "each of lengths must be in 1..5, got 0"),
    ):
        with pytest.raises(error, match=f"^transformer: {re.escape(message)}$"):
            transformer(x_, weights_, **(settings | more), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_message_passing(backend):
    x, edges, weights = torch.randn(4, 5, 3), torch.randn(2, 5, 5, 2), message_weights(3, 2, 6, 2, 2).float()
    P = weights.numel()
    for x_, edges_, weights_, error, message in (
        (x[0], edges, weights, ValueError, "x must be (M, n, E) with n, E >= 1, got (5, 3)"),
        (x, edges[:, 1:], weights, ValueError, "edges must be (B, n, n, C) = (*, 5, 5, *), got (2, 4, 5, 2)"),
        (x[1:], edges, weights, ValueError, "M must be a multiple of edges' B = 2, got 3"),
        (x, edges[:0], weights, ValueError, "M must be a multiple of edges' B = 0, got 4"),
        (x, edges, weights[1:], ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        (x, edges.double(), weights, TypeError, "edges must be torch.float32 as x is, got torch.float64"),
        (x, edges, weights.to("meta"), RuntimeError, "weights must be on cpu, got meta"),
    ):
        with pytest.raises(error, match=f"^message_passing: {re.escape(message)}$"):
            message_passing(x_, edges_, weights_, width=6, layers=2, out_features=2, backend=backend)
    with pytest.raises(ValueError, match="message_passing: width must be at least 1, got 0"):
        message_passing(x, edges, weights, width=0, layers=2, out_features=2, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_gin(backend):
    x, (edges, ptr), weights = torch.randn(8, 3, 6), ring(2), gin_weights(6, 2, 2).float()
    P = weights.numel()
    far, apart = edges.clone(), edges.clone()
    far[1, 2], apart[1, 2] = 8, 7
    for given, error, message in (
        ((x[0], edges, ptr, weights), ValueError, "x must be (nodes, S, width) with width >= 1, got (3, 6)"),
        ((x, edges[0], ptr, weights), ValueError, "edge_index must be (2, E), got (8,)"),
        ((x, edges.int(), ptr, weights), TypeError, "edge_index must be int64, got torch.int32"),
        ((x, edges, ptr[None], weights), ValueError, "ptr must be (B + 1,), got (1, 3)"),
        ((x, edges, ptr.to("meta"), weights), RuntimeError, "ptr must be on cpu, got meta"),
        ((x, edges, ptr, weights[1:]), ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        ((x, edges, ptr + 1, weights), ValueError, "ptr must rise from 0 to the 8 nodes, got 1 to 9"),
        ((x, edges, torch.tensor([0, 4, 3, 8]), weights), ValueError, "ptr must rise, got 3 after 4"),
        ((x, far, ptr, weights), ValueError, "edge_index must hold node numbers 0 to 7, got 2 and 8 in column 2"),
        (
            (x, apart, ptr, weights),
            ValueError,
            "edge_index must join nodes of one graph, got column 2 from graph 0 to graph 1",
        ),
    ):
        with pytest.raises(error, match=f"^gin: {re.escape(message)}$"):
            gin(*given, layers=2, out_features=2, backend=backend)
    with pytest.raises(
        ValueError, match=r"^gin: activation must be one of \('tanh', 'relu', 'gelu', 'silu'\), got 'elu'$"
    ):
        gin(x, edges, ptr, weights, layers=2, out_features=2, activation="elu", backend=backend)


@pytest.mark.parametrize(("layers", "out"), [(1, 4097), (1025, 2)])
def test_gin_of_any_size(layers, out):
    x, graphs, weights = torch.randn(8, 3, 2), ring(2), 0.1 * torch.randn(gin_weights(2, layers, out).numel())
    y, expected = (gin(x, *graphs, weights, layers=layers, out_features=out, backend=b) for b in ("auto", "reference"))
    assert torch.equal(y, expected)
    assert "its kernels take at most" in GINBackbone(2, layers, out, "relu").why_not(x.device, x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_mlp(backend):
    x, widths = torch.randn(8, 6), [6, 4, 2]
    weights = mlp_weights(widths).float()
    P = weights.numel()
    for given, more, error, message in (
        ((x[0], weights), {}, ValueError, "x must be (M, widths[0]) = (*, 6), got (6,)"),
        ((x[:, :5], weights), {}, ValueError, "x must be (M, widths[0]) = (*, 6), got (8, 5)"),
        ((x, weights[1:]), {}, ValueError, f"weights must be (P,) = ({P},), got ({P - 1},)"),
        ((x, weights.double()), {}, TypeError, "weights must be torch.float32 as x is, got torch.float64"),
        ((x, weights), {"widths": [6]}, ValueError, "widths must be two or more, each at least 1, got [6]"),
        ((x, weights), {"widths": [6, 0]}, ValueError, "widths must be two or more, each at least 1, got [6, 0]"),
        ((x, weights), {"widths": 6}, TypeError, "widths must be a sequence of ints, got int"),
        ((x, weights), {"first": 1}, TypeError, "first must be a bool, got int 1"),
        (
            (x, weights),
            {"activation": "elu"},
            ValueError,
            "activation must be one of ('tanh', 'relu', 'gelu', 'silu'), got 'elu'",
        ),
    ):
        with pytest.raises(error, match=f"^mlp: {re.escape(message)}$"):
            mlp(*given, **{"widths": widths} | more, backend=backend)
