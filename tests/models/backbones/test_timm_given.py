"""Models of timm as they are: tokens, features and logits are timm's, and the parameters are shared."""

import re

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.models import ClassReadout, ImageTokens, VisionBackbone, WholeVisionBackbone, timm_backbone
from tests.conftest import assert_near

timm = pytest.importorskip("timm")
SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
# a model of each family: its name, what differs, and the image
MODELS = {
    "ViT": ("vit_tiny_patch16_224", {}, (32, 32)),
    "CLIP, a rectangle": ("vit_base_patch16_clip_224", {}, (32, 48)),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, (32, 32)),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {}, (28, 28)),
    "one channel": ("vit_tiny_patch16_224", {"in_chans": 1}, (32, 32)),
    "a norm of tokens": ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm"}, (32, 32)),
    "DeiT": ("deit_tiny_distilled_patch16_224", {}, (32, 32)),
    "BEiT": ("beit_base_patch16_224", {}, (32, 32)),
    "EVA-02": ("eva02_tiny_patch14_224", {}, (28, 28)),
    "DINOv3": ("vit_small_patch16_dinov3", {}, (32, 32)),
    "relative": ("vit_relpos_small_patch16_224", {}, (32, 32)),
    "CaiT": ("cait_xxs24_224", {}, (32, 32)),
    "Mixer": ("mixer_s32_224", dict.fromkeys(["depth", "embed_dim", "num_heads"]), (64, 64)),
    "SAM": ("samvit_base_patch16", {"global_attn_indexes": (1,)}, (32, 32)),
}


def model_of(name: str, size: tuple[int, int] | None = None, **more) -> tuple[nn.Module, psf.Images]:
    """In eval mode, with weights at random where timm has zeros."""
    torch.manual_seed(0)
    architecture, settings, own = MODELS[name]
    size = size or own
    settings = {key: value for key, value in {**SIZES, **settings, **more}.items() if value is not None}
    model = timm.create_model(architecture, img_size=size, **settings).eval()
    for parameter in filter(lambda x: x.numel() < 50_000, model.parameters()):
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return model, images(model, size)


def images(model: nn.Module, size: tuple[int, int]) -> psf.Images:
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    return psf.Images(torch.randn(2, channels, *size))


def parts(model: nn.Module, **settings) -> psf.Symmetrized:
    backbone = timm_backbone(model, read="features", **settings)
    group = psf.groups.Cyclic(2)
    return psf.Symmetrized(backbone, ImageTokens.of(model), ClassReadout.of(model), psf.distributions.Identity(group))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_timm(name):
    model, batch = model_of(name)
    names = list(model.state_dict())
    mine = parts(model)
    assert not mine.backbone.training and not mine.embed.training
    with torch.no_grad():
        expected = model(batch.pixels)
        assert expected.std() > 0.05
        assert_near(mine(batch, 2)[0], expected)
        stem = getattr(model, "patch_embed", None) or model.stem
        tokens = stem(batch.pixels)
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        group = mine.distribution.group
        assert_near(mine.embed(batch, group, group.identity(batch, 1))[0][:, 0], tokens)
    assert {id(p) for p in mine.parameters()} == {id(p) for p in model.parameters()}
    assert list(model.state_dict()) == names, "the model itself is left as it is"


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "BEiT", "EVA-02", "DINOv3", "relative"])
def test_other_image_sizes(name):
    """Positions are resampled as timm does, in copies; all other parameters are shared."""
    model, _ = model_of(name)
    P = model.patch_embed.patch_size[0]
    batch = images(model, (3 * P, 4 * P))
    mine = parts(model, grid=(3, 4))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    other, _ = model_of(name)
    other.set_input_size(img_size=(3 * P, 4 * P))
    with torch.no_grad():
        assert_near(mine(batch, 1)[0], other(batch.pixels))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    own = {id(p) for p in model.parameters()}
    assert all("pos" in name or "bias_table" in name for name, p in mine.named_parameters() if id(p) not in own)


def test_dynamic_image_sizes():
    torch.manual_seed(0)
    for architecture in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3"):
        model = timm.create_model(architecture, img_size=32, dynamic_img_size=True, **SIZES).eval()
        batch = images(model, (48, 32))
        assert_near(parts(model, grid=(3, 2))(batch, 1)[0], model(batch.pixels))


def test_reads_and_modes():
    model, batch = model_of("ViT")
    tokens = ImageTokens.of(model)(batch, psf.groups.Cyclic(1), torch.zeros(2, 1, dtype=torch.int64))[0][:, 0]
    backbone = timm_backbone(model.train(), read="tokens")
    assert backbone.training and isinstance(backbone, VisionBackbone)
    assert_near(backbone.eval()(tokens), model.eval().forward_features(batch.pixels)[:, 1:])
    whole = timm_backbone(model_of("CaiT")[0], checkpointing=True)
    assert isinstance(whole, WholeVisionBackbone) and whole(torch.randn(3, 4, 24)).shape == (3, 24)
    none = timm.create_model("vit_tiny_patch16_224", img_size=32, **{**SIZES, "num_classes": 0})
    assert isinstance(ClassReadout.of(none).head, nn.Identity)


REFUSED = {
    "xcit_nano_12_p16_224": "got Xcit: a ConvPatchEmbed, which is no PatchEmbed of timm",
    "vit_tiny_r_s16_p8_224": "got VisionTransformer: a HybridEmbed, which is no PatchEmbed of timm",
    "convmixer_768_32": "got ConvMixer: a Sequential, which is no PatchEmbed of timm",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_patch_embeddings_are_named(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    message = f"ImageTokens: the patch embedding must be one convolution that tiles the image, {REFUSED[name]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageTokens.of(model)


def overlapping(**settings) -> nn.Module:
    model = model_of("ViT")[0]
    model.patch_embed.proj = nn.Conv2d(3, 24, **settings)
    return model


def seen_by_blocks(run, block: nn.Module) -> int:
    """The number of tokens that the block takes."""
    seen = []
    handle = block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "side"), [("ViT", 64), ("DINOv2", 56), ("EVA-02", 56), ("DINOv3", 64)])
def test_patches_dropped_by_the_model_itself(name, side):
    """In training as many as in timm, at random; none in eval mode, or where another share is asked for."""
    model, batch = model_of(name, (side, side), patch_drop_rate=0.5)
    mine, none = parts(model), parts(model, patch_dropout=0.0)
    prefix = model.num_prefix_tokens
    for training, patches in ((True, 8), (False, 16)):
        for each in (model, mine, none):
            each.train(training)
        assert seen_by_blocks(lambda: model(batch.pixels), model.blocks[0]) == prefix + patches
        assert seen_by_blocks(lambda: mine(batch), mine.backbone.blocks[0]) == prefix + patches
        assert seen_by_blocks(lambda: none(batch), none.backbone.blocks[0]) == prefix + 16
        assert torch.equal(mine(batch)[0], mine(batch)[0]) is not training
    assert_near(mine(batch)[0], model(batch.pixels))


def test_dropped_patches_are_not_read():
    model, _ = model_of("ViT", patch_drop_rate=0.5)
    message = (
        "timm_backbone: patch_dropout must be 0 with read 'tokens', which returns every token, got 0.5 of the given"
        " VisionTransformer; set its patch_drop.prob = 0"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        timm_backbone(model, read="tokens")
    model.patch_drop.prob = 0
    assert timm_backbone(model, read="tokens").patch_dropout == (0, 0)


@pytest.mark.parametrize("name", ["ViT", "CaiT"])
def test_checkpointing_of_the_model_itself(name):
    model, batch = model_of(name)
    for on in (False, True):
        model.set_grad_checkpointing(on)
        mine = parts(model)
        assert (mine.backbone.checkpointing if name == "ViT" else mine.backbone.model.grad_checkpointing) is on
        assert_near(mine(batch)[0], model(batch.pixels))


def batch_normed() -> nn.Module:
    model = model_of("ViT")[0]
    model.patch_embed.norm = nn.BatchNorm1d(4)
    return model


ERRORS = [
    (
        lambda: ImageTokens.of(overlapping(kernel_size=16, stride=8)),
        "got VisionTransformer: kernels of 16 x 16 pixels at every 8 x 8",
    ),
    (
        lambda: ImageTokens.of(overlapping(kernel_size=16, stride=16, padding=2)),
        "got VisionTransformer: a convolution with padding (2, 2), dilation (1, 1) and 1 groups",
    ),
    (
        lambda: ImageTokens.of(batch_normed()),
        "got VisionTransformer: a convolution and a BatchNorm1d, which is no norm of each token",
    ),
    (
        lambda: ImageTokens.of(nn.Linear(3, 2)),
        "ImageTokens: model must have a patch embedding of timm, got Linear without patch_embed or stem",
    ),
    (
        lambda: timm_backbone(timm.create_model("resnet18")),
        "timm_backbone: name must be a model of timm that runs on tokens, got ResNet: ResNet has no patch embedding",
    ),
    (
        lambda: timm_backbone(model_of("ViT")[0], pretrained=True),
        "timm_backbone: pretrained must not be given with a model, got it with VisionTransformer",
    ),
    (
        lambda: timm_backbone(model_of("ViT")[0], depth=2),
        "timm_backbone: depth must not be given with a model, got it with VisionTransformer",
    ),
    (
        lambda: timm_backbone(model_of("BEiT")[0], patch_dropout=0.5),
        "timm_backbone: patch_dropout must be 0 for Beit, whose positions are relative, got 0.5",
    ),
    (
        lambda: timm_backbone(model_of("Mixer")[0], grid=3),
        "timm_backbone: grid must be the model's own, (2, 2), for MlpMixer, got (3, 3)",
    ),
    (
        lambda: ClassReadout.of(
            timm.create_model(
                "deepseek_vit_412m_enc", img_size=28, **dict.fromkeys(["depth", "num_heads"], 1), embed_dim=24
            )
        ),
        "ClassReadout: model must have a classifier on its pooled features, got DeepseekVitEncoder",
    ),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
