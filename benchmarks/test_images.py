"""Patch tokens of rotated images, beside torch's: grid_sample or copies, then a convolution."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample

from benchmarks import shapes
from benchmarks.harness import compare
from benchmarks.inputs import images_like
from probsym_fast._memory import peak_memory
from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import embed_image


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


@pytest.mark.parametrize("part", ["forward", "forward and backward"])
def test_any_angle(part, device, seconds, record):
    x = Inputs(device)
    d_tokens = torch.randn_like(x.ours(x.angles))

    def run(call):
        if part == "forward":
            with torch.no_grad():
                return call(x.angles)
        angles = x.angles.clone().requires_grad_()
        return torch.autograd.grad(call(angles), angles, d_tokens)[0]

    torch.testing.assert_close(run(x.ours), run(x.theirs), rtol=1e-2, atol=5e-2 * run(x.theirs).abs().max().item())
    needs = shapes.embed_image(x.B, x.S, x.side, x.P, x.D, "backward" in part)
    variants = {"grid_sample + conv2d": lambda: run(x.theirs), "embed_image": lambda: run(x.ours)}
    rows = compare(
        f"{needs.case}, any angle, {part}",
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
    needs = shapes.embed_image(x.B, len(turns), x.side, x.P, x.D, False)
    variants = {"copies + conv2d": lambda: x.copies(len(turns)), "embed_image": ours}
    with torch.no_grad():
        rows = compare(
            f"{needs.case}, {group}",
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
