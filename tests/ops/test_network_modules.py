"""Modules that run as one op: the same results either way, and which way they take."""

import copy
import pickle

import pytest
import torch
from torch import nn

from probsym_fast import ops
from probsym_fast.models import MLP, GINBackbone, MessagePassing, Transformer, fuse
from probsym_fast.models.backbones import fused
from probsym_fast.models.backbones.fused import by_modules
from probsym_fast.ops import OPS, gin
from tests.helpers.graphs import random_graphs
from tests.helpers.networks import gin_weights, ring

BACKENDS = OPS["transformer"].backends("cpu")
built = pytest.mark.skipif(BACKENDS == ("reference",), reason="the kernels are not built")


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


@pytest.mark.parametrize(("layers", "out"), [(1, 4097), (1025, 2)])
def test_gin_of_any_size(layers, out):
    x, graphs, weights = torch.randn(8, 3, 2), ring(2), 0.1 * torch.randn(gin_weights(2, layers, out).numel())
    y, expected = (gin(x, *graphs, weights, layers=layers, out_features=out, backend=b) for b in ("auto", "reference"))
    assert torch.equal(y, expected)
    assert "its kernels take at most" in GINBackbone(2, layers, out, "relu").why_not(x.device, x.dtype)
