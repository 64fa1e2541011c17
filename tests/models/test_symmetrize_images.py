"""`symmetrize` on images: trained classifiers post hoc, fine-tuning, other networks on pixels, and what it refuses."""

import re

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast.distributions import Energy, Orbit, RotationEnergy, Uniform
from tests.conftest import assert_near

timm = pytest.importorskip("timm")
D4, SO2, O2 = psf.groups.Dihedral(4), psf.groups.SpecialOrthogonal(2), psf.groups.Orthogonal(2)


def classifier(**settings) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **{**sizes, **settings})
    nn.init.normal_(model.head.weight)
    return model


def images(size: int = 32) -> psf.Images:
    return psf.Images(torch.randn(3, 3, size, size))


class CNN(nn.Sequential):
    def __init__(self):
        first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        super().__init__(*first, nn.Flatten(), nn.Linear(8, 4))


def test_a_trained_classifier_without_an_example():
    net, batch = classifier().eval(), images()
    model = psf.symmetrize(net, D4).eval()
    assert type(model.distribution) is Orbit and model.reduce == "mean"
    found, _ = model(batch, D4.order)
    turned = [x.rot90(k, (-2, -1)) for x in (batch.pixels, batch.pixels.flip(-2)) for k in range(4)]
    assert_near(found, torch.stack([net(x) for x in turned]).mean(0))
    assert psf.equivariance_error(model, batch, samples=8, moves=4) < 1e-5
    for group in (SO2, O2):
        model = psf.symmetrize(net, group).eval()
        assert type(model.distribution) is Uniform and model(batch, 4)[0].shape == (3, 5)
    assert psf.symmetrize(classifier(in_chans=1, img_size=48), D4).embed.weight.shape[1] == 1


def test_all_elements_where_no_samples_are_given():
    """Of a finite group's orbit, in eager, chunked and recorded calls; other numbers keep their meaning."""
    batch = images()
    model = psf.symmetrize(classifier(), D4).eval()
    whole = model(batch, 8)[0]
    assert torch.equal(model(batch)[0], whole) and torch.equal(model.train()(batch)[0], whole)
    model.eval()
    assert psf.equivariance_error(model, batch, moves=4) < 1e-5
    assert model(batch, reduce="none")[0].shape[0] == 8 and model(batch, 1, reduce="none")[0].shape[0] == 1
    assert torch.equal(model(batch, 1, seed=1)[0], model(batch, samples=1, seed=1)[0])
    assert (model(batch, 1, seed=1)[0] - whole).abs().max() > 1e-3
    model.chunk = 3
    assert_near(model(batch)[0], whole)
    model.chunk = None
    found = model.estimate(batch, 64, seed=0)
    assert_near(found.prediction, whole)
    assert found.samples == 8 and not found.standard_error.any()
    program = psf.export(model, batch, samples=8).module()
    assert_near(program(batch.pixels, torch.tensor(0)), whole)
    torch._dynamo.reset()
    recorded = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(recorded(batch)[0], whole)
    model.distribution = psf.distributions.Orbit(psf.groups.Cyclic(2))  # another one is asked again
    assert model(batch, reduce="none")[0].shape[0] == 2


@pytest.mark.parametrize(
    ("distribution", "samples", "exact"),
    [
        (None, 8, True),
        ("learned", 8, True),
        ("learned", 4, False),
        ("canonical", 1, True),
        ("none", 1, True),
        ("uniform", 8, False),
    ],
)
def test_estimates_run_exact_means_once(distribution, samples, exact):
    torch.manual_seed(0)
    calls: list[int] = []
    net = classifier().eval()
    net.norm.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))
    model = psf.symmetrize(net, D4, distribution=distribution).eval()
    batch, step = images(), samples
    calls.clear()
    found = model.estimate(batch, 512, seed=0, tolerance=0.0, step=step)
    assert (found.samples == samples) == exact and (sum(calls) == 3 * samples) == exact
    assert (found.standard_error == 0).all() == exact
    alone = model.estimate(batch, samples, seed=1, step=step)
    assert (alone.standard_error == 0).all() == exact
    assert torch.equal(alone.prediction, found.prediction) == exact


def test_groups_that_move_no_axis_of_images_are_refused():
    groups = psf.groups
    for group, wrong in (
        (groups.Euclidean(2), "Euclidean(2), which moves the axes 'vp'"),
        (groups.Symmetric(3), "Symmetric(3), which moves the axes 'n'"),
        (groups.Cyclic(2) * groups.Symmetric(3), "Symmetric(3), which moves the axes 'n'"),
    ):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            psf.symmetrize(CNN(), group, images())


@pytest.mark.parametrize("distribution", ["learned", "canonical", "uniform", "none"])
def test_one_sample_where_none_are_given(distribution):
    batch = images()
    model = psf.symmetrize(classifier(), D4, distribution=distribution).eval()
    assert model(batch, seed=0, reduce="none")[0].shape[0] == 1


@pytest.mark.parametrize("distribution", ["learned", "canonical"])
@pytest.mark.parametrize("group", [D4, SO2, O2], ids=str)
def test_fine_tuning(group, distribution):
    net, batch = classifier(), images()
    model = psf.symmetrize(net, group, distribution=distribution)
    assert type(model.distribution) is (Energy if group is D4 else RotationEnergy)
    assert (model.reduce == "weighted") == (distribution == "learned")
    model.eval()
    prediction, penalties = model(batch, 4, seed=0)
    loss = prediction.square().sum()
    if distribution == "canonical":
        loss = loss + penalties["prior"]
    loss.backward()
    trained = [
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.distribution.named_parameters()
        if "bias" not in n
    ]
    assert all(trained) and all(p.grad is not None for p in net.parameters())


def test_a_frozen_classifier():
    """Only p(g|x) is trained: by its prior on upright images, or by the loss."""
    net, batch = classifier().requires_grad_(False), images()
    model = psf.symmetrize(net, D4, distribution="canonical").eval()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    pose = model.distribution
    optimizer, found = torch.optim.Adam(pose.parameters(), lr=0.01), []
    for _ in range(60):
        _, penalties = pose(batch, samples=1)
        optimizer.zero_grad()
        penalties["prior"].backward()
        optimizer.step()
        found.append(penalties["prior"].item())
    assert found[-1] < 0.1 < 2 < found[0]
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    turned = psf.Images(batch.pixels.rot90(1, (-2, -1)))
    assert_near(model(batch)[0], net.eval()(batch.pixels))  # at the identity
    assert_near(model(turned)[0], model(batch)[0])
    learned = psf.symmetrize(net, D4, distribution="learned").eval()
    learned(batch, 4, seed=0)[0].square().sum().backward()
    trained = {name.split(".")[0] for name, p in learned.named_parameters() if p.grad is not None}
    assert trained == {"distribution"}


def test_weights_go_both_ways():
    """Training the model trains the classifier; the state dict loads into a model of another classifier."""
    net, batch = classifier(), images()
    model = psf.symmetrize(net, D4, distribution="learned")
    before = {name: x.clone() for name, x in net.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch, 4, seed=0)[0].square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(x, before[name]) for name, x in net.state_dict().items())
    other = classifier()
    again = psf.symmetrize(other, D4, distribution="learned")
    again.load_state_dict(model.state_dict())
    assert_near(other.eval()(batch.pixels), net.eval()(batch.pixels))
    assert torch.equal(again.eval()(batch, 8)[0], model.eval()(batch, 8)[0])


class One(nn.Module):
    """One tensor of what a network of another library returns."""

    def __init__(self, net: nn.Module, name: str):
        super().__init__()
        self.net, self.name = net, name

    def forward(self, x):
        return self.net(x)[self.name]


def segmentation() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return One(models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=6), "out")


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 5,
    }
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    return One(transformers.ViTForImageClassification(config), "logits")


# name -> (network, settings), shape of the prediction
CASES = {
    "CNN": (CNN, {}, (3, 4)),
    "dense": (lambda: nn.Conv2d(3, 6, 3, padding=1), {"output": "masks"}, (3, 6, 32, 32)),
    "torchvision's segmentation": (segmentation, {"output": "masks"}, (3, 6, 32, 32)),
    "Hugging Face's ViT": (hugging_face, {}, (3, 5)),
    "ViT on pixels": (classifier, {"tokens": "pixels"}, (3, 5)),
    "ViT, other classes": (classifier, {"out_features": 2}, (3, 2)),
    "ViT, tokens": (classifier, {"output": "tokens"}, (3, 24, 2, 2)),
    "ViT, masks": (classifier, {"output": "masks", "out_features": 6}, (3, 6, 32, 32)),
    "ViT by name": (
        lambda: psf.models.timm_backbone("vit_tiny_patch16_224", grid=4, depth=1, embed_dim=24, num_heads=2),
        {"out_features": 2},
        (3, 2),
    ),
    "overlapping patches": (
        lambda: timm.create_model(
            "xcit_nano_12_p16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=4
        ),
        {},
        (3, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_networks(name):
    torch.manual_seed(0)
    make, settings, shape = CASES[name]
    net, batch = make(), images()
    model = psf.symmetrize(net, D4, batch, **settings)
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    assert model(batch, 8)[0].shape == shape
    assert psf.equivariance_error(model, batch, samples=8, moves=3) < 1e-5


def test_tokens_or_pixels_is_the_same():
    net, batch = classifier(), images()
    for group in (D4, SO2):
        found = [
            psf.symmetrize(net, group, tokens=tokens, distribution="uniform").eval()(batch, 3, seed=1)[0]
            for tokens in ("patches", "pixels")
        ]
        assert_near(*found)


def test_images_of_another_size():
    model = psf.symmetrize(classifier(), D4, images(64)).eval()
    assert model(images(64), 8)[0].shape == (3, 5) and model.backbone.tokens == 16


ERRORS = [
    (
        lambda: psf.symmetrize(CNN(), D4),
        "symmetrize: example must be given for networks other than image models of timm, got None for CNN",
    ),
    (
        lambda: psf.symmetrize(classifier(), psf.groups.Symmetric(4)),
        "got Symmetric(4), which moves the axes 'n'",
    ),
    (
        lambda: psf.symmetrize(classifier(), D4, distribution="frame"),
        "symmetrize: distribution must be given where nothing is 'frame' for the group, got Dihedral(4) on Images",
    ),
    (
        lambda: psf.symmetrize(classifier(), D4, images(40)),
        "symmetrize: example must have whole patches of 16 x 16 pixels, got images of (40, 40)",
    ),
    (
        lambda: psf.symmetrize(CNN(), D4, images(), output="tokens"),
        "symmetrize: tokens must be 'patches' for output 'tokens', got 'pixels'",
    ),
    (
        lambda: psf.symmetrize(CNN(), D4, images(), output="masks"),
        "symmetrize: net must return (B, S, classes, H, W) for output 'masks', got (3, 2, 4)",
    ),
    (
        lambda: psf.symmetrize(CNN(), D4, images(), out_features=3),
        "symmetrize: out_features must be None for a network with outputs of its own, got 3 for CNN",
    ),
    (
        lambda: psf.symmetrize(classifier(), D4, output="masks"),
        "symmetrize: out_features must be given for output 'masks' of tokens, got None",
    ),
    (
        lambda: psf.symmetrize(classifier(), D4, output="nodes"),
        "symmetrize: output must be one of ('invariant', 'tokens', 'masks') for Images, got 'nodes'",
    ),
    (
        lambda: psf.symmetrize(CNN(), D4, images(), tokens="patches"),
        "ImageTokens: model must have a patch embedding of timm, got CNN without patch_embed or stem",
    ),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_plain_pixels():
    model = psf.symmetrize(classifier(), D4)
    for call in (lambda x: psf.symmetrize(classifier(), D4, x), model):
        with pytest.raises(TypeError, match=re.escape("got Tensor; give psf.Images(pixels)")):
            call(images().pixels)


@pytest.mark.parametrize("sizes", [(64, 64), (16, 64), (33, 33)], ids=str)
@pytest.mark.parametrize("name", ["ViT", "by name"])
def test_images_of_another_size_than_the_example(name, sizes):
    """Also where they have as many patches, at other places."""
    net = classifier() if name == "ViT" else CASES["ViT by name"][0]()
    model = psf.symmetrize(net, psf.groups.Cyclic(2), images(), out_features=2).eval()
    message = (
        f"ImageTokens: pixels must be images of 32 x 32, got {sizes[0]} x {sizes[1]}; for images of another size make the"
        " model with an example, psf.symmetrize(net, group, example)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(psf.Images(torch.randn(2, 3, *sizes)))


@pytest.mark.parametrize("group", [D4, SO2], ids=str)
@pytest.mark.parametrize("distribution", [None, "learned", "canonical"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224", "resnet18"])
def test_a_network_without_memory(name, distribution, group):
    """On the meta device: shapes only."""
    with torch.device("meta"):
        net = timm.create_model(name, **(SMALL if name != "resnet18" else {"num_classes": 5}))
    model = psf.symmetrize(net, group, images().to("meta"), distribution=distribution).eval()
    found, _ = model(images().to("meta"), 2)
    assert found.is_meta and found.shape == (3, 5) and all(p.is_meta for p in model.parameters())
    if distribution == "canonical" and group is D4:
        assert model.distribution.prior.is_meta


@pytest.mark.parametrize("distribution", ["none", "uniform", "orbit", "learned"])
def test_images_that_are_not_square(distribution):
    """Refused whatever elements are drawn; half turns and reflections take them."""
    net = classifier(img_size=(16, 32))
    with pytest.raises(
        ValueError, match=re.escape("Dihedral(4): images must be square for turns by 90 degrees, got 16 x 32")
    ):
        psf.symmetrize(net, D4, distribution=distribution)
    model = psf.symmetrize(net, psf.groups.Dihedral(2), distribution=distribution).eval()
    x = psf.Images(torch.randn(2, 3, 16, 32))
    found, flipped = (model(y, 4)[0] for y in (x, psf.Images(x.pixels.flip(-1))))
    assert found.shape == (2, 5)
    if distribution == "orbit":
        assert_near(found, flipped)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_heads_have_the_models_dtype(dtype):
    for output in ("invariant", "masks"):
        model = psf.symmetrize(classifier().to(dtype), D4, output=output, out_features=3)
        assert model(psf.Images(images().pixels.to(dtype)), 2)[0].dtype == dtype


SMALL = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}


# what would fix the number of sequences, of timm's models: attention with a bias, outputs that are not contiguous, linear
# maps of expanded inputs, convolutions
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "beit_base_patch16_224",
        "vit_relpos_small_patch16_224",
        "cait_xxs24_224",
        "convit_tiny",
        "vit_base_patch16_siglip_224",
        "samvit_base_patch16",
        "xcit_nano_12_p16_224",
    ],
)
def test_a_program_of_one_sample(name):
    """For any number of images, though one sample of one image is one sequence."""
    torch.manual_seed(0)
    local = {"local_up_to_layer": 1, "depth": 2} if name == "convit_tiny" else {}  # a block with attention by place
    net = timm.create_model(name, **{**SMALL, **local})
    model = psf.symmetrize(net, SO2, images(), distribution="canonical").eval()
    program = psf.export(model, images(), samples=1).module()
    for count in (1, 2, 3):
        some = images().pixels[:count]
        seed = torch.tensor(3)
        torch.testing.assert_close(program(some, seed), model(psf.Images(some), seed=seed)[0])


def test_an_empty_batch():
    model = psf.symmetrize(classifier(), psf.groups.Orthogonal(2), distribution="learned")
    assert model(psf.Images(images().pixels[:0]), 2)[0].shape[0] == 0


@pytest.mark.parametrize("group", [D4, O2], ids=str)
@pytest.mark.parametrize("distribution", [None, "learned", "canonical"])
def test_an_empty_example(group, distribution):
    empty = psf.Images(images().pixels[:0])
    model = psf.symmetrize(CNN(), group, empty, distribution=distribution).eval()
    assert model(empty, 1)[0].shape == (0, 4) and model(images(), 1)[0].shape == (3, 4)
