"""Networks whose linear maps multiply bfloat16 values: allowed by an argument, and under autocast to bfloat16."""

import pytest
import torch

from probsym_fast import ops
from probsym_fast.models import MessagePassing, Transformer, fuse
from probsym_fast.models.backbones.fused import by_modules
from probsym_fast.ops import _extension, message_passing, mlp, transformer
from tests.conftest import assert_near
from tests.helpers.items import value_and_gradients
from tests.helpers.networks import message_weights, mlp_weights, transformer_weights

MODULE = _extension.module()
pytestmark = pytest.mark.skipif(MODULE is None, reason="the extension is not built")
HAVE = MODULE is not None and MODULE.bf16_products()
NEAR = {torch.float32: 3e-2}  # relative to the largest entry
SIZES = {"in_features": 7, "width": 36, "layers": 2, "heads": 3, "feedforward": 65, "out_features": 5}


def networks():
    """name -> the op as a function of its leaves, and the leaves: sizes and sequences that fill no register."""
    sequences = torch.randn(19, 11, 7), transformer_weights(SIZES, 11).float()
    smooth = SIZES | {"out_features": 0}  # without the head's ReLU, at whose edge a gradient jumps
    headless = sequences[0], transformer_weights(smooth, 11).float()
    graphs = torch.randn(20, 6, 7), torch.randn(10, 6, 6, 2), message_weights(7, 2, 33, 2, 5).float()
    message = {"width": 33, "layers": 2, "out_features": 5}
    lengths = torch.randint(1, 12, (19,))
    widths = [7, 70, 18, 5]
    return {
        "transformer": (lambda *t, **more: transformer(*t, **smooth, **more), headless),
        "recomputed": (lambda *t, **more: transformer(*t, **SIZES, recompute=True, read=[2], **more), sequences),
        "lengths": (lambda *t, **more: transformer(*t, **smooth, lengths=lengths, **more), headless),
        "message_passing": (lambda *t, **more: message_passing(*t, **message, **more), graphs),
        "mlp": (
            lambda *t, **more: mlp(*t, widths=widths, activation="silu", **more),
            (torch.randn(103, 7), mlp_weights(widths).float()),
        ),
    }


@pytest.mark.parametrize("name", networks())
def test_near_float64_and_rounded_only_where_it_is_allowed(name):
    """Rounded: other numbers than in float32. No other instruction set has these products."""
    call, leaves = networks()[name]
    exact = value_and_gradients(lambda *t: call(*t, backend="reference"), [x.double() for x in leaves])
    plain, allowed = (value_and_gradients(lambda *t, a=a: call(*t, allow_bf16=a), leaves) for a in (False, True))
    for wanted, single, found in zip(exact, plain, allowed, strict=True):
        assert_near(found, wanted.float(), NEAR)
        assert torch.equal(found, single) != HAVE
    other = next((x for x in MODULE.instruction_sets() if x != "avx512"), None)
    best = MODULE.instruction_set()
    MODULE.use_instruction_set(other or best)
    try:
        plain, allowed = (value_and_gradients(lambda *t, a=a: call(*t, allow_bf16=a), leaves) for a in (False, True))
    finally:
        MODULE.use_instruction_set(best)
    assert other is None or all(map(torch.equal, plain, allowed))
    wide = [x.double() for x in leaves]
    assert torch.equal(call(*wide, allow_bf16=True), call(*wide))


@pytest.mark.parametrize("widths", [[7, 70, 18, 5], [64, 32, 96, 1], [1, 33, 16, 48]], ids=str)
def test_values_that_bfloat16_holds(widths):
    """Whole numbers to 256: the same to the bit, in every place of a register and in none after it."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(len(mlp_weights(widths)), generator=generator)
    weights = (weights < 0.05).float() - (weights > 0.95).float()
    x = torch.randint(-2, 3, (103, widths[0]), generator=generator).float()
    found = []
    for allowed in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        y = mlp(*leaves, widths=widths, allow_bf16=allowed)
        y.backward(torch.arange(y.numel()).remainder(3).view(y.shape) - 1.0)
        found.append((y, *(t.grad for t in leaves)))
    assert all(t.abs().max() > 0 for t in found[0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Transformer", "MessagePassing", "fuse"])
def test_backbones_allow_it_under_autocast_to_bfloat16(name, dtype, monkeypatch):
    """In the dtype that their modules give, also of inputs in bfloat16."""
    layer = torch.nn.TransformerEncoderLayer(32, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    backbone, inputs = {
        "Transformer": lambda: (Transformer(7, 32, 2, 2, 32, tokens=5), (torch.randn(4, 5, 5, 7),)),
        "MessagePassing": lambda: (
            MessagePassing(width=32, layers=2),
            (torch.randn(4, 5, 5, 6), torch.randn(4, 1, 5, 5, 2)),
        ),
        "fuse": lambda: (
            fuse(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)),
            (torch.randn(20, 5, 32),),
        ),
    }[name]()
    asked, op = [], getattr(ops, backbone.op)
    monkeypatch.setattr(ops, backbone.op, lambda *t, **more: asked.append(more["allow_bf16"]) or op(*t, **more))
    exact, found = backbone(*inputs), []
    given = [x.to(dtype) for x in inputs]
    for run in (backbone, by_modules(backbone)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(*given))
        found[-1].float().square().sum().backward()
    with torch.autocast("cpu", torch.float16):
        backbone(*inputs)
    assert asked == [False, True, False]
    assert found[0].dtype == found[1].dtype
    assert_near(found[0].float(), exact, NEAR)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
