"""timm's models that run whole on tokens: equal to timm on images, gradients, weights, what is refused."""

import pytest
import torch

from probsym_fast.models import timm_backbone
from probsym_fast.models.backbones.whole import STEMS
from tests.conftest import GRADIENT, assert_near
from tests.models.backbones.test_vision import gradients, scatter

timm = pytest.importorskip("timm")

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2}
MODELS = {  # name, sizes, patch
    "cait": ("cait_xxs24_224", SMALL | {"depth_token_only": 1}, 16),
    "convit": ("convit_tiny", {"depth": 2, "embed_dim": 8, "num_heads": 2, "local_up_to_layer": 1}, 16),
    "gmlp": ("gmlp_ti16_224", {}, 16),
    "xcit": ("xcit_nano_12_p16_224", SMALL | {"cls_attn_layers": 1}, 16),
    "sam": ("samvit_base_patch16_224", SMALL, 16),
}


def net_and_model(key, grid=(3, 3), **settings):
    """A backbone, and timm's model with its weights."""
    name, sizes, patch = MODELS[key]
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    net = scatter(timm_backbone(name, grid=grid, **sizes, **settings)).double().eval()
    size = {"img_size": tuple(side * patch for side in grid)}
    model = scatter(timm.create_model(name, **size, **sizes), 1)
    found = model.load_state_dict(net.model.state_dict(), strict=False)
    assert not found.unexpected_keys and all(key.startswith((*STEMS, "head")) for key in found.missing_keys)
    return net, model.double().eval(), torch.randn(2, 3, *(side * patch for side in grid), dtype=torch.float64)


def tokens_of(model, image):
    made = next(getattr(model, name) for name in STEMS if hasattr(model, name))(image)
    made = made[0] if isinstance(made, tuple) else made
    if made.ndim == 3:
        return made
    return made.flatten(1, 2) if made.shape[1] == 3 else made.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("key", MODELS)
def test_equals_timm_on_images(key):
    net, model, image = net_and_model(key)
    x = tokens_of(model, image)
    assert net.width == x.shape[2] and net.tokens == 9 and net.grid == (3, 3)
    expected = model.forward_features(image)
    pooled = model.forward_head(expected, pre_logits=True)
    assert_near(net(x[:, None])[:, 0], pooled)
    assert net.out_width == pooled.shape[1]
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    net.read = "tokens"
    assert_near(net(x), expected[:, net.prefix_tokens :])
    net.read = "diagonal"
    assert_near(net(x), expected[:, net.prefix_tokens :: 4])


@pytest.mark.parametrize("key", ["cait", "convit"])
def test_every_parameter_gets_a_gradient(key):
    net, _, _ = net_and_model(key)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, found = gradients(net, x)
    for name, gradient in found.items():
        assert gradient is not None and (gradient.abs().max() > 0 or name.endswith("k_bias")), name
    if key == "convit":
        with pytest.raises(ValueError, match=r"^timm_backbone: checkpointing must be False for ConVit, got True$"):
            net_and_model(key, checkpointing=True)
        return
    net, _, _ = net_and_model(key, checkpointing=True)
    y_again, same = gradients(net, x)
    assert torch.equal(y, y_again)
    for name, gradient in found.items():
        assert_near(same[name], gradient, GRADIENT)


def test_positions_outside_the_buffers_are_forgotten():
    """As an older timm has them, which would stay on the device of the first pass."""
    model = timm.create_model("convit_tiny", img_size=48, **MODELS["convit"][1])
    for module in model.modules():
        if "rel_indices" in module._buffers:
            del module._buffers["rel_indices"]
            module.rel_indices = torch.zeros(1, 1, 1, 3)
    net = timm_backbone(model)

    def kept():
        return {tuple(x.rel_indices.shape) for x in net.modules() if hasattr(x, "rel_indices")}

    assert kept() == {(1, 1, 1, 3)}
    assert net(torch.randn(2, net.tokens, net.width)).isfinite().all()
    assert kept() == {(1, net.tokens, net.tokens, 3)}


def test_weights(tmp_path):
    """Of timm's model, with its patch embedding and head, and of a run."""
    net, model, _ = net_and_model("cait")
    name, sizes, _ = MODELS["cait"]
    run = {f"model.backbone.{key}": value for key, value in net.state_dict().items()}
    for state in (model.state_dict(), net.state_dict(), {"state_dict": run}):
        torch.save(state, tmp_path / "a.pt")
        again = timm_backbone(name, grid=3, weights=tmp_path / "a.pt", **sizes).double()
        assert again.state_dict().keys() == net.state_dict().keys()
        for key, value in again.state_dict().items():
            assert_near(value, net.state_dict()[key].float().double())
    resampled = timm_backbone(name, grid=(2, 5), weights=tmp_path / "a.pt", **sizes)
    wanted = timm.layers.resample_abs_pos_embed(net.model.pos_embed.float(), [2, 5], [3, 3], num_prefix_tokens=0)
    assert_near(resampled.model.pos_embed, wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tokens": 8},
            "tokens must be a square for cait_xxs24_224, whose positions lie on a grid, got 8; for a line .*",
        ),
        ({"patch_dropout": 0.5}, "patch_dropout must be 0 for cait_xxs24_224, which runs whole, got 0.5"),
        ({"global_pool": ""}, "global_pool must be given for read 'pooled', got ''"),
        ({"grid": (2, 3), "read": "diagonal"}, r"grid must be square for read 'diagonal', got \(2, 3\)"),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^timm_backbone: {message}$"):
        timm_backbone("cait_xxs24_224", **SMALL, **arguments)
