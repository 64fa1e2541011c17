"""Vision backbones with rotary or relative positions or other blocks: equal to timm, on any grid, with few tokens read."""

import pytest
import torch
from torch import nn

from probsym_fast.models import timm_backbone
from tests.conftest import GRADIENT, assert_near
from tests.models.backbones.test_vision import gradients, scatter

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2}
GRID = (2, 3)
DINO, PE, MIXED = "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384", "vit_base_patch16_rope_mixed_224"
MODELS = {
    "eva": ("eva_giant_patch14_224", {}),
    "eva, norms after": ("eva02_enormous_patch14_clip_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {"scale_mlp": True}),
    "dinov3": (DINO, {}),
    "pe": (PE, {}),
    "rotary by block": (MIXED, {}),
    "sapiens": ("vit_base_patch16_sapiens2", {"num_kv_heads": 1}),
    "relative": ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias"}),
    "relative, shared": ("vit_srelpos_small_patch16_224", {}),
    "relative, norms after": ("vit_relpos_base_patch16_rpn_224", {}),
    "parallel": ("vit_base_patch16_xp_224", {}),
    "parallel branches": ("vit_small_patch16_18x2_224", {}),
    "norms after": ("vit_base_patch16_rpn_224", {}),
    "differential": ("vit_dwee_patch16_reg1_gap_256", {}),
}


class Given(nn.Module):
    """In place of a patch embedding: the tokens as they are."""

    def forward(self, x):
        return x


def net_and_model(key, grid=GRID, **arguments):
    """A backbone, and timm's model with its weights."""
    name, own = MODELS[key]
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    net = scatter(timm_backbone(name, grid=grid, **SMALL, **own, **arguments)).double().eval()
    with torch.device("meta"):
        patch = timm.create_model(name, **SMALL, **own).patch_embed.patch_size
    size = {"img_size": tuple(side * p for side, p in zip(grid, patch, strict=True))}
    size |= {"dynamic_img_size": False} if net.rope is not None else {}
    model = timm.create_model(name, **size, **SMALL, **own).double().eval()
    found = model.load_state_dict(net.state_dict(), strict=False)
    unread = ("patch_embed", "head", *(() if net.read == "pooled" else ("fc_norm", "attn_pool")))
    assert not found.unexpected_keys and all(name.startswith(unread) for name in found.missing_keys)
    grid_size, model.patch_embed = model.patch_embed.grid_size, Given()
    model.patch_embed.grid_size = grid_size
    return net, model


def tokens(*lead, L=6):
    return torch.randn(*lead, L, 16, dtype=torch.float64)


@pytest.mark.parametrize("key", MODELS)
def test_equals_timm(key):
    x = tokens(2)
    for read in ("pooled", "tokens"):
        net, model = net_and_model(key, read=read)
        features = model.forward_features(x)
        pooled = read == "pooled"
        expected = model.forward_head(features, pre_logits=True) if pooled else features[:, model.num_prefix_tokens :]
        assert net.grid == GRID and net.tokens == 6
        assert_near(net(x), expected, {torch.float64: 1e-10})


@pytest.mark.parametrize("key", ["eva02", "dinov3", "pe", "rotary by block", "relative", "differential"])
def test_tokens_not_read_change_nothing(key):
    net, model = net_and_model(key, (3, 3), read="diagonal")
    x = tokens(2, L=9)
    y, found = gradients(net, x)
    assert_near(y, model.forward_features(x)[:, model.num_prefix_tokens :][:, ::4], {torch.float64: 1e-10})
    seen = []
    net.blocks[-1].norm2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    net.checkpointing = True  # computes again in the backward pass
    y_again, same = gradients(net, x)
    assert seen == [3, 3] and torch.equal(y, y_again)
    net.all_tokens = True
    y_all, expected = gradients(net, x)
    assert_near(y, y_all)
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name  # no parameter is dead
        assert_near(found[name], gradient, GRADIENT)
        assert_near(same[name], gradient, GRADIENT)


@pytest.mark.parametrize("key", ["dinov3", "rotary by block"])
def test_dropped_patches_take_their_rotary_positions_along(key):
    net, model = net_and_model(key, patch_dropout=0.5, patch_dropout_always=True)
    x = tokens(4)
    torch.manual_seed(0)
    kept = torch.rand(4, 6).topk(3, sorted=False).indices
    torch.manual_seed(0)
    y = net(x)
    P = net.prefix_tokens

    class Drop(nn.Module):
        def forward(self, h):
            return torch.cat([h[:, :P], h[:, P:].gather(1, kept[..., None].expand(-1, -1, 16))], 1), kept

    model.patch_drop = Drop()
    assert_near(y, model.forward_head(model.forward_features(x), pre_logits=True), {torch.float64: 1e-10})


def test_compiles_as_one_graph_with_rotary_positions():
    net, x = net_and_model("rotary by block")[0], tokens(2, 2)
    y, expected = gradients(net, x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y_again, found = gradients(compiled, x)
    assert_near(y_again, y)
    for name, gradient in expected.items():
        assert_near(found[name if name == "x" else f"_orig_mod.{name}"], gradient, GRADIENT)


def published(key, folder):
    """timm's model on a grid of 4 x 4, and a file of its weights under the names of their authors."""
    name, own = MODELS[key]
    model = scatter(timm.create_model(name, img_size=64, **SMALL, **own))
    state, q = model.state_dict(), {}
    if key == "eva02":
        q = {f"visual.trunk.{k}": v for k, v in state.items()} | {"logit_scale": torch.ones(())}
    if key == "dinov3":
        new = [("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
        for k, v in state.items():
            for ours, theirs in new:
                k = k.replace(ours, theirs)
            q[k] = v
        q |= {"mask_token": torch.ones(1, 16), "rope_embed.periods": torch.ones(2)}
    if key == "pe":
        new = [("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("pos_embed", "positional_embedding")]
        new += [("gamma_1", "ls_1.gamma"), ("gamma_2", "ls_2.gamma"), ("attn.qkv.", "attn.in_proj_")]
        new += [("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("norm", "ln_")]
        for k, v in state.items():
            if k.startswith(("attn_pool", "head", "fc_norm")):
                continue
            v = v[0] if k == "pos_embed" else v[0, 0] if k == "cls_token" else v
            k = "class_embedding" if k == "cls_token" else "ln_post." + k[5:] if k.startswith("norm.") else k
            for ours, theirs in new:
                k = k.replace(ours, theirs)
            q["visual." + k.replace("blocks.", "transformer.resblocks.")] = v
    path = folder / "a.safetensors"
    safetensors.save_file({k: v.contiguous() for k, v in q.items()}, path)
    return model, path


@pytest.mark.parametrize("key", ["eva02", "dinov3", "pe"])
@pytest.mark.parametrize("grid", [4, (2, 6)])
def test_weights_under_the_names_of_their_authors(key, grid, tmp_path):
    model, path = published(key, tmp_path)
    name, own = MODELS[key]
    net = timm_backbone(name, grid=grid, read="tokens", weights=path, **SMALL, **own)
    if grid != 4:
        patch = model.patch_embed.patch_size[0]
        model.set_input_size((2 * patch, 6 * patch))
    expected = model.state_dict()
    for k, v in net.state_dict().items():
        assert_near(v, expected[k])


def test_positions_of_as_many_tokens_on_another_grid(tmp_path):
    """As many positions: those of timm's own grid are resampled, those of a backbone stay as they are."""
    vit, small = "vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12, "num_heads": 2}
    model = scatter(timm.create_model(vit, **small))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    model.set_input_size((7 * 16, 28 * 16))
    net = timm_backbone(vit, grid=(7, 28), weights=tmp_path / "a.pt", **small)
    assert_near(net.pos_embed, model.pos_embed)
    torch.save(net.state_dict(), tmp_path / "b.pt")
    again = timm_backbone(vit, grid=(7, 28), weights=tmp_path / "b.pt", **small)
    assert torch.equal(again.pos_embed, net.pos_embed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 8}, "tokens must be a square for vit_small_patch16_dinov3, .* got 8; for a line give grid=.1, 8.$"),
        ({"grid": (2, 3, 4)}, r"grid must be a number or two, got 3: \(2, 3, 4\)$"),
        ({"grid": (2, 0)}, "grid must be at least 1, got 0$"),
        ({"grid": (2, 3), "read": "diagonal"}, r"grid must be square for read 'diagonal', got \(2, 3\)$"),
    ],
)
def test_grids_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^timm_backbone: {message}"):
        timm_backbone(DINO, **SMALL, **arguments)


def test_a_line_of_tokens():
    net = timm_backbone(DINO, grid=(1, 5), read="tokens", **SMALL)
    assert net.grid == (1, 5) and net(torch.randn(2, 3, 5, 16)).shape == (2, 3, 5, 16)
    assert timm_backbone(DINO, tokens=9, **SMALL).grid == (3, 3)
