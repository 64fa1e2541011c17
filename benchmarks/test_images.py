"""Patch tokens of rotated images, beside torch's: grid_sample or copies, then a convolution."""

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample

from benchmarks import shapes
from benchmarks.harness import compare
from benchmarks.inputs import images_like
from benchmarks.steps import steps_of
from probsym_fast import Images, symmetrize
from probsym_fast._memory import peak_memory
from probsym_fast.groups import SpecialOrthogonal
from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import embed_image
from probsym_fast.tasks import load
from probsym_fast.training.allocator import keep_freed_memory


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    """As ours are: by default cuDNN uses tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Inputs:
    def __init__(self, device: str):
        torch.manual_seed(0)
        self.B, self.S, self.side, self.P, self.D = images_like(device)
        self.pixels = torch.randn(self.B, 3, self.side, self.side, device=device)
        self.weight = PatchWeight(self.D, 3, self.P, self.P).to(device)().detach()
        self.bias = torch.randn(self.D, device=device)
        self.angles = (6.3 * torch.rand(self.B, self.S)).to(device)
        self.contiguous = self.weight.contiguous()

    def frames(self, angles: Tensor) -> Tensor:
        rows = angles.cos(), -angles.sin(), angles.sin(), angles.cos()
        return torch.stack(rows, -1).unflatten(-1, (2, 2))

    def ours(self, angles: Tensor) -> Tensor:
        return embed_image(self.pixels, self.frames(angles), self.weight, self.bias)

    def theirs(self, angles: Tensor) -> Tensor:
        flip = angles.new_tensor([[1.0, -1.0], [-1.0, 1.0]])  # the grid's rows go down; the images are square
        theta = torch.nn.functional.pad(self.frames(angles) * flip, (0, 1)).flatten(0, 1)
        grid = affine_grid(theta, [len(theta), 3, self.side, self.side], align_corners=False)
        return self.convolved(grid_sample(self.pixels.repeat_interleave(self.S, 0), grid, align_corners=False))

    def convolved(self, images: Tensor) -> Tensor:
        tokens = conv2d(images, self.contiguous, self.bias, stride=self.P).flatten(2).mT
        return tokens.unflatten(0, (self.B, -1))

    def copies(self, turns: int) -> Tensor:
        images = [torch.rot90(self.pixels, -(k % 4), (-2, -1)) for k in range(turns)]
        images = [x.flip(-2) if k > 3 else x for k, x in enumerate(images)]
        return self.convolved(torch.stack(images, 1).flatten(0, 1))


@pytest.mark.parametrize("gradients", ["", "plane", "weight"])
def test_any_angle(gradients, device, seconds, record):
    """weight: also that of the angles, as a training step with a learned p(g|x) needs both."""
    x = Inputs(device)
    d_tokens = torch.randn_like(x.ours(x.angles))
    own = x.angles.requires_grad_(bool(gradients))
    wanted = [own] + [w.requires_grad_() for w in (x.weight, x.contiguous) if gradients == "weight"]

    def run(call):
        if not gradients:
            with torch.no_grad():
                return call(own)
        return torch.autograd.grad(call(own), wanted, d_tokens, allow_unused=True)[0]

    torch.testing.assert_close(run(x.ours), run(x.theirs), rtol=1e-2, atol=5e-2 * run(x.theirs).abs().max().item())
    needs = shapes.embed_image("embed_image", x.B, x.S, 3, x.side, x.P, x.D, torch.float32, gradients)
    patches, maps = (
        torch.randn(d_tokens[..., 0].numel(), 3 * x.P**2, device=device),
        torch.randn(3 * x.P**2, x.D, device=device),
    )
    gradient = d_tokens.flatten(0, -2)

    def products():
        """What is left of either side where moving and cutting images are free."""
        patches @ maps
        if gradients:
            gradient @ maps.mT
        if gradients == "weight":
            gradient.mT @ patches

    variants = {
        "grid_sample + conv2d": lambda: run(x.theirs),
        "embed_image": lambda: run(x.ours),
        "only the products": products,
    }
    rows = compare(
        needs.case,
        variants,
        device=device,
        reference="grid_sample + conv2d",
        seconds=seconds,
        **needs.counts,
    )
    record(rows, variants["embed_image"])


@pytest.mark.parametrize("group", ["C4", "D4"])
def test_whole_orbit(group, device, seconds, record):
    x = Inputs(device)
    turns = torch.arange(4 if group == "C4" else 8, device=device)
    ours = lambda: embed_image(x.pixels, turns.expand(x.B, -1), x.weight, x.bias)  # noqa: E731
    torch.testing.assert_close(ours(), x.copies(len(turns)), rtol=1e-4, atol=1e-4)
    needs = shapes.embed_image("embed_turned", x.B, len(turns), 3, x.side, x.P, x.D, torch.float32)
    variants = {"copies + conv2d": lambda: x.copies(len(turns)), "embed_image": ours}
    with torch.no_grad():
        rows = compare(
            needs.case,
            variants,
            device=device,
            reference="copies + conv2d",
            seconds=seconds,
            **needs.counts,
        )
        tokens = ours().nbytes
        for row in rows:  # beside the tokens
            row.extra = {"extra MB": round((peak_memory(variants[row.variant], device) - tokens) / 1e6, 1)}
    record(rows, ours)


METHODS = ("none", "ga", "orbit", "canonical", "ps", "best")


@pytest.mark.parametrize("symmetry", ["SO2", "C4", "D4"])
def test_methods(symmetry, device, seconds, record):
    """Training steps of the task `rotated_mnist`: its methods with the elements they train with, in turn."""
    flags = [] if symmetry == "SO2" else [f"--symmetry={symmetry}", "--train_poses=C4", "--test_poses=C4"]
    steps = {}
    for method in METHODS:
        some = [] if method == "none" else flags
        samples = load(f"rotated_mnist/{method}", some).config.samples.train
        steps[f"{method}, S = {samples}"] = steps_of(f"rotated_mnist/{method}", some, device, samples)[1]
    rows = compare(
        f"training step, rotated digits, 50 images, {'SO(2), orbits of C8' if not flags else symmetry}",
        steps,
        device=device,
        reference="none, S = 1",
        seconds=seconds,
        whole=True,
    )
    record(rows, next(iter(steps.values())))


def classifier():
    return timm.create_model("vit_small_patch16_224", num_classes=10)


@pytest.mark.parametrize("kind", ["uniform", "learned"])
def test_step(kind, device, seconds, record):
    """A training step of a ViT-S/16 under SO(2), S = 4, beside timm's own model on as many images that are there already."""
    keep_freed_memory()
    torch.manual_seed(0)
    B, S = (4, 4) if device == "cpu" else (32, 4)
    bare, group = classifier().to(device).train(), SpecialOrthogonal(2)
    model = (
        symmetrize(classifier(), group, distribution="learned" if kind == "learned" else "uniform").to(device).train()
    )
    images = torch.randn(B, 3, 224, 224, device=device)
    many, labels = images.repeat_interleave(S, 0), torch.arange(B, device=device) % 10

    def step(parameters, logits, target):
        loss = torch.nn.functional.cross_entropy(logits(), target)
        torch.autograd.grad(loss, parameters)

    sides = {
        "bare": (list(bare.parameters()), lambda: bare(many), labels.repeat_interleave(S)),
        "symmetrized": (list(model.parameters()), lambda: model(Images(images), S)[0], labels),
    }
    rows = compare(
        f"training step, ViT-S/16, {B} images of 224^2, S = {S}, SO(2), {kind}",
        {name: lambda side=side: step(*side) for name, side in sides.items()},
        device=device,
        reference="bare",
        seconds=seconds,
        whole=True,
    )
    for row in rows:
        row.extra = {"tax": round(1 / row.ratio, 3)}
    record(rows, lambda: step(*sides["symmetrized"]))
