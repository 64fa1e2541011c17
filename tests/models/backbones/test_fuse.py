"""fuse: an nn.TransformerEncoder, and an nn.Sequential, in one pass."""

import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from probsym_fast import ops
from probsym_fast.models import fuse

BUILT = ops.OPS["transformer"].has_kernel("cpu")


def encoder(width=12, heads=3, layers=2, norm=False, **settings):
    settings = {"activation": "gelu", "norm_first": True, "batch_first": True, "dropout": 0.0} | settings
    layer = nn.TransformerEncoderLayer(width, heads, 20, **settings)
    made = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width) if norm else None, enable_nested_tensor=False)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize("settings", [{}, {"norm": True}, {"activation": "relu"}, {"activation": nn.GELU()}], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_numbers_of_the_encoder(settings, ragged):
    plain = encoder(**settings).double()
    fused = fuse(plain)
    assert ("one pass" in str(fused)) == BUILT
    x = torch.randn(2, 9, 7, 12, dtype=torch.float64, requires_grad=True)
    lengths = torch.randint(1, 8, (2, 9)) if ragged else None
    after = torch.arange(7) >= lengths[..., None] if ragged else torch.zeros(2, 9, 7, dtype=torch.bool)
    y = fused(x, lengths)
    expected = plain(x.flatten(0, 1), src_key_padding_mask=after.flatten(0, 1)).view_as(x)
    expected = expected.masked_fill(after[..., None], 0)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights, wanted = torch.randn_like(y), [x, *plain.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, wanted, weights) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_long_sequences_and_reasons_go_to_the_encoder():
    plain = encoder()
    fused, x = fuse(plain), torch.randn(3, 70, 12)
    assert torch.equal(fused(x), plain(x))
    plain.layers[1].norm2.register_forward_hook(lambda *_: None)
    assert fused.why_not(x.device, x.dtype) == ("encoder.layers.1.norm2 has a hook")
    assert torch.equal(fused(x[:, :7]), plain(x[:, :7]))


def test_under_transforms_what_was_changed_counts():
    plain = encoder()
    fused, x = fuse(plain), torch.randn(3, 2, 7, 12)
    torch.testing.assert_close(torch.vmap(fused)(x), plain(x.flatten(0, 1)).view_as(x), rtol=1e-4, atol=1e-5)
    plain.layers[0].linear1.register_forward_hook(lambda module, given, y: 2 * y)
    assert "linear1 has a hook" in fused.why_not_as_built()
    with sdpa_kernel(SDPBackend.MATH):
        y = torch.vmap(fused)(x)
    torch.testing.assert_close(y, plain(x.flatten(0, 1)).view_as(x), rtol=1e-4, atol=1e-5)


def test_state_dict_of_the_encoder():
    plain = encoder()
    assert list(fuse(plain).state_dict()) == [f"encoder.{name}" for name in plain.state_dict()]


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "module must be an nn.TransformerEncoder or nn.Sequential, got Linear"),
        (lambda: encoder(norm_first=False), ValueError, "norm_first must be True, got False"),
        (lambda: encoder(batch_first=False), ValueError, "batch_first must be True, got False"),
        (lambda: encoder(dropout=0.1), ValueError, "dropout must be 0 in training, got 0.1"),
        (lambda: encoder(activation=torch.tanh), ValueError, "activation must be F.gelu or F.relu, got <built-in"),
        (lambda: encoder(activation=nn.GELU("tanh")), ValueError, "activation must be F.gelu or F.relu, got GELU"),
        (lambda: encoder(bias=False), ValueError, "bias must be True, got False"),
        (lambda: encoder(layers=0), ValueError, "module must have layers, got none"),
    ],
)
def test_what_is_refused(module, error, message):
    with pytest.raises(error, match=f"^fuse: {re.escape(message)}"):
        fuse(module())


def test_layers_that_differ_are_refused():
    plain = encoder()
    plain.layers[1].norm1.eps = 0.1
    with pytest.raises(ValueError, match=re.escape("fuse: norm1 and norm2 must have the same eps, got 0.1 and 1e-05")):
        fuse(plain)
    plain.layers[1].norm2.eps = 0.1
    with pytest.raises(ValueError, match=re.escape("fuse: eps must be that of the first layer, 1e-05, got 0.1")):
        fuse(plain)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("linear1", Doubled(12, 20), "linear1 must be an nn.Linear, got Doubled"),
        ("norm1", nn.RMSNorm(12), "norm1 must be an nn.LayerNorm, got RMSNorm"),
        ("dropout2", nn.AlphaDropout(0.1), "dropout2 must be an nn.Dropout, got AlphaDropout"),
        ("linear2", nn.Linear(20, 12, bias=False), "every part must have a weight and a bias, got Linear("),
        (
            "norm2",
            nn.LayerNorm(12, elementwise_affine=False),
            "every part must have a weight and a bias, got LayerNorm(",
        ),
    ],
)
def test_parts_that_compute_something_else_are_refused(name, part, message):
    plain = encoder()
    setattr(plain.layers[1], name, part)
    with pytest.raises(ValueError, match=f"^fuse: {re.escape(message)}"):
        fuse(plain)


@pytest.mark.skipif(not BUILT, reason="nothing runs in one pass")
def test_settings_changed_after_it_was_fused_count():
    def of_layer(name, value):
        return lambda plain: setattr(plain.layers[1], name, value)

    def of_attention(name, value):
        return lambda plain: setattr(plain.layers[1].self_attn, name, value)

    for change in (of_layer("activation", torch.tanh), of_attention("add_zero_attn", True), of_attention("dropout", 1)):
        plain, x = encoder(), torch.randn(2, 5, 12)
        fused = fuse(plain)
        assert fused.why_not(x.device, x.dtype) is None
        change(plain)
        assert "encoder.layers.1" in fused.why_not(x.device, x.dtype)


def test_bad_input():
    fused, x = fuse(encoder()), torch.randn(2, 3, 12)
    with pytest.raises(ValueError, match=re.escape("FusedEncoder: x must be (..., L, 12) with L >= 1, got (2, 3, 11)")):
        fused(x[..., :11])
    with pytest.raises(ValueError, match=re.escape("FusedEncoder: lengths must be (2,) int64, got (3,) torch.int64")):
        fused(x, torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=re.escape("FusedEncoder: lengths must be a Tensor or None, got list")):
        fused(x, [1, 2])


def layers(*widths, act=nn.Tanh, before=False, after=False):
    parts = [part for into, out in pairwise(widths) for part in (nn.Linear(into, out), act())]
    return nn.Sequential(*[act()] * before, *(parts if after else parts[:-1]))


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize(("before", "after"), [(False, False), (True, True)])
def test_the_numbers_of_a_sequential(act, before, after):
    plain = layers(6, 20, 9, 3, act=act, before=before, after=after).double()
    plain.insert(2, nn.Dropout(0.5)).eval()
    fused = fuse(plain)
    fused.one_pass = True
    assert ("one pass" in str(fused)) == BUILT
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    y, expected = fused(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights, wanted = torch.randn_like(y), [x, *plain.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, wanted, weights) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    fused.train()
    assert fused.why_not(x.device, x.dtype) == "layers.2 drops 0.5"
    torch.manual_seed(0)
    y = fused(x)
    torch.manual_seed(0)
    assert torch.equal(y, plain(x))


def test_dropout_of_a_whole_number_drops():
    plain = layers(6, 20, 3).append(nn.Dropout(1)).eval()
    fused, x = fuse(plain).train(), torch.randn(4, 6)
    assert fused.why_not(x.device, x.dtype) == "layers.3 drops 1"
    assert not fused(x).any()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(), "module must have linear maps, got none"),
        (layers(6, 3), "fewer than two linear maps"),
        (layers(6, 200, 3), "width 200"),
        (
            layers(6, 4, 3, act=nn.ELU),
            "must hold linear maps and Tanh, ReLU, GELU (with erf) or SiLU between them, got ELU",
        ),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "linear maps and activations must alternate, got Linear"),
        (nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)), "must have a bias"),
        (
            nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh()),
            "all activations must be the same, got relu and tanh",
        ),
    ],
)
def test_a_sequential_that_computes_something_else_is_refused(module, message):
    with pytest.raises(ValueError, match=f"^fuse: .*{re.escape(message)}"):
        fuse(module)
