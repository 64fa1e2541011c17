"""Vision backbones: equal to timm on its own tokens, tokens not read, patch dropout, checkpointing, precision."""

import pytest
import torch
from torch import nn

from probsym_fast.models import timm_backbone
from tests.conftest import GRADIENT, assert_near

timm = pytest.importorskip("timm")

SMALL = {"depth": 2, "embed_dim": 12, "num_heads": 2}
GRID = 3
VIT, BEIT = "vit_tiny_patch16_224", "beit_base_patch16_224"
MODELS = {
    "vit": (VIT, {}),
    "average": (VIT, {"global_pool": "avg"}),
    "average of all": (VIT, {"global_pool": "avg", "pool_include_prefix": True}),
    "maximum": (VIT, {"global_pool": "max"}),
    "average and maximum": (VIT, {"global_pool": "avgmax", "reg_tokens": 2}),
    "class token, fc_norm": (VIT, {"fc_norm": True}),
    "attention": (VIT, {"global_pool": "prr"}),
    "norms": (VIT, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.5}),
    "no biases": (VIT, {"qkv_bias": False, "proj_bias": False}),
    "no positions": (VIT, {"pos_embed": "none"}),
    "no norm": (VIT, {"final_norm": False}),
    "deit3": ("deit3_small_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dino": ("vit_small_patch8_224.dino", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "gated feed-forward": ("vit_giant_patch14_reg4_dinov2", {}),
    "clip": ("vit_base_patch32_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "hybrid": ("vit_small_r26_s32_224", {}),
    "beit": (BEIT, {}),
    "beitv2": ("beitv2_base_patch16_224", {"global_pool": "token"}),
    "beit, one table": (BEIT, {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "init_values": None}),
    "beit, both positions": (BEIT, {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True, "qkv_bias": False}),
}
SOME = ["vit", "average", "norms", "distilled", "dinov2", "siglip", "beit", "beit, both positions"]


def scatter(module, seed=0):
    """All parameters away from 0 and 1, where timm draws them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return module


def backbone(key, grid=GRID, **arguments):
    name, own = MODELS[key]
    return scatter(timm_backbone(name, grid=grid, **SMALL, **own, **arguments)).double()


def reference(key, net):
    """timm's model with the weights of net and an identity in place of the patch embedding, in eval mode."""
    name, own = MODELS[key]
    stride = {"dinov2": 14, "gated feed-forward": 14, "clip": 32, "hybrid": 32, "dino": 8}.get(key, 16)
    model = timm.create_model(name, img_size=stride * GRID, **SMALL, **own).double().eval()
    found = model.load_state_dict(net.state_dict(), strict=False)
    unread = ("patch_embed", "head", *(() if net.read == "pooled" else ("fc_norm", "attn_pool")))
    assert not found.unexpected_keys and all(name.startswith(unread) for name in found.missing_keys)
    model.patch_embed = nn.Identity()
    return model


def tokens(*lead, L=GRID**2, D=12, dtype=torch.float64):
    return torch.randn(*lead, L, D, dtype=dtype)


def gradients(net, x, seed=3):
    """Output, and gradients to x and all parameters, of a random linear function of the output."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = net(x)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weight).sum(), [x, *parameters], allow_unused=True)
    return y, dict(zip(["x", *names], grads, strict=True))


@pytest.mark.parametrize("key", MODELS)
def test_equals_timm(key):
    for read in ("pooled", "tokens", "diagonal"):
        net = backbone(key, read=read).eval()
        model, x = reference(key, net), tokens(2)
        features = model.forward_features(x)
        if read == "pooled":
            expected = model.forward_head(features, pre_logits=True)
        else:
            expected = features[:, model.num_prefix_tokens :]
            expected = expected if read == "tokens" else expected[:, :: GRID + 1]
        assert_near(net(x), expected)
        assert net(x).shape == {"pooled": (2, 12), "tokens": (2, 9, 12), "diagonal": (2, 3, 12)}[read]


@pytest.mark.parametrize("read", ["pooled", "tokens", "diagonal"])
@pytest.mark.parametrize("key", SOME)
def test_tokens_not_read_change_nothing(key, read):
    net, x = backbone(key, read=read, drop_path_rate=0.5), tokens(4)
    y, found = gradients(net, x)
    net.all_tokens = True
    y_all, expected = gradients(net, x)
    assert_near(y, y_all)
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name  # no parameter is dead
        assert_near(found[name], gradient, GRADIENT)


@pytest.mark.parametrize(
    ("key", "read", "count"),
    [
        ("vit", "pooled", 1),
        ("distilled", "pooled", 2),
        ("beit", "pooled", 9),
        ("dinov2", "diagonal", 3),
        ("dinov2", "tokens", 9),
        ("average of all", "pooled", 10),
    ],
)
def test_tokens_not_read_are_not_computed(key, read, count):
    net, seen = backbone(key, read=read), []
    for block in net.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        block.attn.proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    net(tokens(1))
    every = GRID**2 + net.prefix_tokens
    assert seen == [every, every, count, count]
    seen.clear()
    net.all_tokens = True
    net(tokens(1))
    assert seen == [every] * 4


@pytest.mark.parametrize("key", ["vit", "beit, both positions", "siglip"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)])
def test_any_leading_axes(key, lead):
    net, x = backbone(key).eval(), tokens(*lead)
    y = net(x)
    assert y.shape == (*lead, 12)
    if y.numel():
        assert_near(y, net(x.reshape(-1, 9, 12)).reshape(y.shape))
    else:
        y.sum().backward()
    strided = tokens(*lead, L=18)[..., ::2, :]
    assert_near(net(strided), net(strided.contiguous())) if y.numel() else None


@pytest.mark.parametrize(("key", "read"), [("norms", "pooled"), ("beit", "diagonal")])
def test_compiles_as_one_graph(key, read):
    net, x = backbone(key, read=read), tokens(2, 2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y, expected = gradients(net, x)
    assert_near(compiled(x), y)
    _, found = gradients(compiled, x)
    for name, gradient in expected.items():
        assert_near(found[name if name == "x" else f"_orig_mod.{name}"], gradient, GRADIENT)


@pytest.mark.parametrize("key", ["vit", "beit, both positions"])
def test_checkpointing_computes_again_with_equal_gradients(key):
    net, x = backbone(key, drop_path_rate=0.5, proj_drop_rate=0.3), tokens(4)
    calls = []
    net.blocks[0].norm2.register_forward_hook(lambda *arguments: calls.append(0))
    net.blocks[1].norm2.register_forward_hook(lambda *arguments: calls.append(1))
    y, expected = gradients(net, x)
    assert calls == [0, 1]
    calls.clear()
    net.checkpointing = True
    y_again, found = gradients(net, x)
    assert calls == [0, 1, 1, 0]
    assert torch.equal(y_again, y)
    for name, gradient in expected.items():
        assert_near(found[name], gradient, GRADIENT)
    calls.clear()
    with torch.no_grad():
        net(x)
    assert calls == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["vit", "beit, both positions", "distilled"])
def test_autocast(key, dtype):
    net, x = backbone(key).eval().float(), tokens(4, dtype=torch.float32)
    expected, expected_gradients = gradients(net, x)
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype):
            y, found = gradients(net, given)
        assert y.isfinite().all()
        assert (y - expected).abs().max() <= 0.1 * expected.abs().max()
        cosine = torch.cosine_similarity(found["x"].flatten().float(), expected_gradients["x"].flatten(), dim=0)
        assert cosine > 0.98
    net.to(dtype)
    assert net(x.to(dtype)).dtype == dtype


def test_autocast_leaves_float64_as_it_is():
    net, x = backbone("vit").eval(), tokens(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).isfinite().all()
        net.float()
        with pytest.raises(
            TypeError, match=r"^VisionBackbone: x must be torch\.float32 as the weights are, got torch\.float64$"
        ):
            net(x)
        assert net(x.float()).isfinite().all()


def entered(net, x):
    """What the first block takes, (M, tokens, D)."""
    seen = []
    handle = net.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    net(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("key", ["vit", "dinov2", "siglip", "average"])
def test_patch_dropout(key):
    net, x = backbone(key, patch_dropout=0.4), tokens(6)
    whole, P = entered(net.eval(), x), net.prefix_tokens
    assert whole.shape[1] == P + 9
    assert torch.equal(net(x), net(x))
    part = entered(net.train(), x)
    assert part.shape[1] == P + 5  # int(9 * 0.6)
    assert torch.equal(part[:, :P], whole[:, :P])
    places = (part[:, P:, None] == whole[:, None, P:]).all(-1).int()  # (M, kept, 9)
    assert (places.sum(-1) == 1).all() and (places.sum(1) <= 1).all()  # each is a patch, none twice
    assert len({tuple(row.tolist()) for row in places.sum(1)}) > 1
    y, found = gradients(net, x)
    assert y.isfinite().all() and found["x"].ne(0).any(-1).sum().item() == 6 * 5


def test_patch_dropout_of_a_drawn_rate():
    net, x = backbone("vit", patch_dropout=(0.2, 0.7)), tokens(2)
    counts = [entered(net, x).shape[1] - 1 for _ in range(60)]
    assert min(counts) >= 2 and max(counts) <= 7 and len(set(counts)) >= 4
    assert entered(net.eval(), x).shape[1] == 10


def test_patch_dropout_in_evaluation_where_asked_for():
    net, x = backbone("vit", patch_dropout=0.4, patch_dropout_always=True).eval(), tokens(2)
    assert entered(net, x).shape[1] == 1 + 5
    torch.manual_seed(0)
    y = net(x)
    assert not torch.equal(net(x), y)
    torch.manual_seed(0)
    assert torch.equal(net(x), y)


def test_high_patch_dropout_keeps_one():
    assert entered(backbone("vit", patch_dropout=0.99), tokens(2)).shape[1] == 2


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 8, 12), ValueError, r"x must be \(..., 9, 12\), got \(2, 8, 12\)"),
        (torch.zeros(2, 9, 11), ValueError, r"x must be \(..., 9, 12\), got \(2, 9, 11\)"),
        (torch.zeros(12), ValueError, r"x must be \(..., 9, 12\), got \(12,\)"),
        (
            torch.zeros(9, 12, dtype=torch.long),
            TypeError,
            "x must be torch.float32 as the weights are, got torch.int64",
        ),
        (
            torch.zeros(9, 12, dtype=torch.float64),
            TypeError,
            "x must be torch.float32 as the weights are, got torch.float64",
        ),
    ],
)
def test_wrong_inputs(x, error, message):
    with pytest.raises(error, match=f"^VisionBackbone: {message}"):
        timm_backbone(VIT, grid=3, **SMALL)(x)
