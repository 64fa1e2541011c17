"""Every derivative of networks with torch's fused attention."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from probsym_fast.models import Transformer, fuse, hf_backbone, timm_backbone
from probsym_fast.models.backbones import attention, vision

for package in ("timm", "transformers"):
    pytest.importorskip(package)
WIDTH, TOKENS = 8, 4
FUSED = "ScaledDotProductFlashAttentionForCpuBackward0"


def vit(name: str = "vit_tiny_patch16_224", **settings) -> nn.Module:
    sizes = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2, "mlp_ratio": 2} | settings
    return timm_backbone(name, grid=2, **sizes)


def beit() -> nn.Module:
    """With a bias that needs no gradient: else torch's own choice is the formula."""
    net = vit("beit_base_patch16_224", read="tokens").requires_grad_(False)
    for name, p in net.named_parameters():
        nn.init.normal_(p, std=0.3)
        p.requires_grad_("mlp" in name)
    return net


def bert() -> nn.Module:
    from transformers import BertConfig

    sizes = {"vocab_size": 5, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf_backbone(BertConfig(**sizes, intermediate_size=8, max_position_embeddings=TOKENS), False, tokens=TOKENS)


def long_transformer() -> nn.Module:
    net = Transformer(width=WIDTH, layers=1, heads=2, feedforward=8, tokens=42, read=[0, 41])
    net.one_pass = False
    return net


def long_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True)
    return fuse(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


NETWORKS = {
    "vit": (vit, TOKENS),
    "vit, all tokens": (lambda: vit(all_tokens=True, read="diagonal"), TOKENS),
    "vit, checkpointing": (lambda: vit(checkpointing=True), TOKENS),
    "pooled by attention": (lambda: vit(depth=1, global_pool="map"), TOKENS),
    "pooled by attention to itself": (lambda: vit(depth=1, global_pool="prr"), TOKENS),
    "beit": (beit, TOKENS),
    "bert": (bert, TOKENS),
    "transformer": (long_transformer, 42),
    "encoder": (long_encoder, 65),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, tokens = NETWORKS[name]
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)


def fused(y: Tensor) -> list:
    return attention._fused(y.grad_fn, set())


def second(net, x: Tensor, function=None) -> list[Tensor]:
    """First derivatives by x, and derivatives of their square."""
    y = net(x) if function is None else function(net, x)
    (d,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    found = torch.autograd.grad(d.square().sum(), wanted, allow_unused=True)
    return [d.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True))]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives(name):
    """Those of the plain formula."""
    net, x = built(name)
    assert {node.name() for node in fused(net(x))} == {FUSED}
    found = second(net, x)
    with sdpa_kernel(SDPBackend.MATH):
        expected = second(net, x)
    assert found[1].any()
    close(found, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_transforms(name):
    """Forward mode over reverse mode over vmap: of torch.func, and forward mode only."""
    net, x = built(name)
    x, v = x.detach(), torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        plain = x.clone().requires_grad_()
        (d,) = torch.autograd.grad(net(plain).sin().sum(), plain, create_graph=True)
        product = torch.autograd.grad((d * v).sum(), plain)[0]
    slope = torch.func.grad(lambda x: torch.vmap(net)(x[:, None]).sin().sum())
    found, tangent = torch.func.jvp(slope, (x,), (v,))
    close([found, tangent], [d.detach(), product])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v)).sin().sum()).tangent
    close([tangent], [(d * v).sum().detach()])


@pytest.mark.parametrize("name", ["vit", "vit, checkpointing", "bert"])
def test_within_a_checkpoint(name):
    net, x = built(name)
    again = lambda net, x: checkpoint(net, x, use_reentrant=False)  # noqa: E731
    close(second(net, x, again), second(net, x))


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_against_finite_differences(name):
    net, x = built(name)
    assert gradgradcheck(lambda x: net(x).sum(), x[:1], atol=1e-6)


def test_third_derivatives():
    net, x = built("vit")

    def third() -> Tensor:
        (d,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
        (d,) = torch.autograd.grad(d.square().sum(), x, create_graph=True)
        return torch.autograd.grad(d.square().sum(), x)[0]

    found = third()
    with sdpa_kernel(SDPBackend.MATH):
        close([found], [third()])


@pytest.mark.parametrize("name", ["vit", "vit, checkpointing", "beit", "bert"])
def test_first_derivatives_are_those_of_torch(monkeypatch, name):
    """To the last bit, also after a pass of the other kind over the same graph."""
    net, x = built(name)
    y = net(x)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    gradients = lambda y, **settings: torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True, **settings)  # noqa: E731
    first = gradients(y, retain_graph=True)
    other = gradients(y, create_graph=True)
    again = gradients(y)
    monkeypatch.setattr(vision, "every_derivative", lambda run, x: run(x))
    monkeypatch.setattr("probsym_fast.models.backbones.language.every_derivative", lambda run, x: run(x))
    expected = gradients(net(x))
    for a, b, c, d in zip(first, other, again, expected, strict=True):
        assert (a is None) == (b is None) == (d is None)
        if d is not None:
            assert torch.equal(a, d) and torch.equal(c, d)
            torch.testing.assert_close(b, d, rtol=1e-9, atol=1e-11)


def test_a_pass_that_ends_before_attention_leaves_the_next_one_as_it_is():
    net, x = built("vit")
    y = net(x)
    last = net.blocks[1].mlp.fc2.weight
    torch.autograd.grad(y.sin().sum(), last, create_graph=True)
    found = torch.autograd.grad(y.sin().sum(), x)[0]
    assert torch.equal(found, torch.autograd.grad(net(x).sin().sum(), x)[0])


def test_an_output_changed_in_place():
    net, x = built("vit, all tokens")
    net.norm = nn.Identity()  # so that the output is a view of the last block's
    assert net(x)._base is not None

    def changed(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).mul_(2)

    close(second(net, x, changed), second(net, x, lambda net, x: 2 * net(x)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_graphs_end(create_graph):
    """No node keeps itself alive."""
    net, x = built("vit")
    y = net(x)
    token = nn.Identity()  # any object
    fused(y)[0].metadata["token"] = token
    alive = weakref.ref(token)
    gc.disable()
    try:
        d = torch.autograd.grad(y.sin().sum(), x, create_graph=create_graph)
        del token, y, d
        assert alive() is None
    finally:
        gc.enable()


def test_fused_attention_with_dropout_is_refused():
    """A GPU has it. Its first derivatives stay torch's."""
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    y = nn.functional.scaled_dot_product_attention(q, q, q)
    expected = torch.autograd.grad(y.sin().sum(), q, retain_graph=True)[0]
    attention._Replaced(y.grad_fn, attention._saved(y.grad_fn) | {"dropout": 0.1})
    (d,) = torch.autograd.grad(y.sin().sum(), q, create_graph=True)
    assert torch.equal(d, expected)
    with pytest.raises(RuntimeError, match=r"^attention: dropout must be 0 .* inside torch.nn.attention.sdpa_kernel"):
        d.sum().backward()


def test_one_tensor_as_query_key_and_value():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    f = lambda q: nn.functional.scaled_dot_product_attention(q, q, q.clone())  # noqa: E731
    assert gradgradcheck(lambda q: attention.every_derivative(lambda q: f(q) + 0, q), q)


OTHERS = {  # of a GPU, and of other devices
    "flash_attention": lambda q, k, v, bias: (q, k, v, 0.1, True, False),
    "efficient_attention": lambda q, k, v, bias: (q, k, v, bias, True, 0.1, True),
    "cudnn_attention": lambda q, k, v, bias: (q, k, v, bias.detach(), True, 0.1, True, False),
    "fused_attention_overrideable": lambda q, k, v, bias: (q, k, v, bias, 0.1, True, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nodes_of_other_devices(name):
    """They are found, and what they hold has the names of the CPU's."""
    q, k, v, bias = (torch.randn(2, 3, 8, 8, device="meta", requires_grad=True) for _ in range(4))
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    y = op(*OTHERS[name](q, k, v, bias), scale=0.5)[0]
    (node,) = fused(y)
    saved = attention._saved(node)
    assert [x is y for x, y in zip(saved.pop("inputs"), (q, k, v), strict=True)] == [True] * 3
    assert (saved.pop("bias") is None) == (name == "flash_attention")
    assert saved == {"dropout": 0.1, "causal": True, "scale": 0.5}
