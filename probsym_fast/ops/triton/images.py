"""Patches of moved images, as factors of the library's matrix products.

A row of patches is a token's K = C P Q values (c, p, q): what its places of the moved image read. They are written once,
for some samples at a time (`BYTES`, which the cache holds), for a product that reads 16 bytes at a time. Gathered while
multiplying, a value costs its reads and all their instructions again in each block of the width: with quarter turns, in
bfloat16 on an H100, twice the predicted time of both steps.
The gradient of the patches comes from a product too: one kernel reads it beside the pixels around each place, writes the
patches for the weight's gradient and reduces the frames' gradient in its program. The gradient to pixels gathers: a pixel
looks for the places that may have read it. No atomics: sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops._patches import rows_like
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_axes, check_counts, check_tensors

BYTES = 2**25  # of the patches, and of their gradient, at a time
BLOCK = 256


@triton.jit
def place_in_patches(o_x, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Row and column in the image of places numbered patch after patch."""
    b_token, b_place = o_x // (P * Q), o_x % (P * Q)
    return b_token // (W // Q) * P + b_place // Q, b_token % (W // Q) * Q + b_place % Q


@triton.jit
def in_patches(b_row, b_column, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Where a place's value of the first channel is in a sample's patches."""
    b_token = b_row // P * (W // Q) + b_column // Q
    return b_token * (C * P * Q) + b_row % P * Q + b_column % Q


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in their dtype, also under autocast, which does not cast products with `out`."""
    return torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1], dtype=b.dtype, device=b.device))


class Images:
    """Images and the samples that move them: on one device, contiguous.

    pixels (B, C, H, W), plane (B, S, ...), weight (D, C, P, Q); tokens (B, S, L, D).
    """

    def __init__(self, pixels: Tensor, plane: Tensor, weight: Tensor, *element: int, **others: Tensor | None):
        """element: the shape of one element of the plane. others: tokens, bias."""
        self.pixels, self.plane, self.weight = pixels.contiguous(), plane.contiguous(), weight
        self.B, self.S = check_axes("plane", plane, 2 + len(element))[:2]
        D, C, self.P, self.Q = check_axes("weight", weight, 4)
        self.C, self.H, self.W = check_axes("pixels", pixels, 4)[1:]
        if 0 in weight.shape or 0 in (self.H, self.W) or self.H % self.P or self.W % self.Q:
            got = f"{self.H} x {self.W} of {self.P} x {self.Q}"
            raise Refused(ValueError, f"pixels must be whole patches, got {got}")
        self.L, self.K = self.H // self.P * (self.W // self.Q), C * self.P * self.Q
        self.samples = self.B * self.S
        shapes = {"bias": (D,), "tokens": (self.B, self.S, self.L, D)}
        check_tensors(
            weight.device,
            pixels=(pixels, (self.B, C, self.H, self.W)),
            plane=(plane, (self.B, self.S, *element)),
            **{name: (x, shapes[name]) for name, x in others.items()},
        )
        check_counts(
            tokens=self.samples * self.L,
            numbers_of_an_image=self.L * self.K,
            pixels_of_all_images=self.B * self.H * self.W,
            programs=self.samples * self.blocks,
        )
        # of the compiled kernels, one set for a model: divisions and addresses are a third of their instructions
        self.sizes = {"C": C, "H": self.H, "W": self.W, "P": self.P, "Q": self.Q}

    @property
    def blocks(self) -> int:
        return cdiv(self.H * self.W, BLOCK)

    def parts(self) -> Iterator[tuple[int, int]]:
        """First and last sample of each part."""
        step = max(1, BYTES // (self.weight.element_size() * self.L * self.K))
        for first in range(0, self.samples, step):
            yield first, min(self.samples, first + step)

    def rows(self, count: int) -> Tensor:
        """Memory for the patches of so many samples."""
        return torch.empty(count * self.L, self.K, dtype=self.weight.dtype, device=self.weight.device)

    def of(self, tokens: Tensor, first: int, last: int) -> Tensor:
        return tokens.view(self.samples * self.L, -1)[first * self.L : last * self.L]

    def forward(self, bias: Tensor | None) -> Tensor:
        tokens = self.weight.new_empty(self.B, self.S, self.L, self.weight.shape[0])
        W = self.weight.flatten(1).t()
        for first, last in self.parts():
            patches, out = self.rows(last - first), self.of(tokens, first, last)
            self.cut(first, last, patches, None, None)
            torch.mm(patches, W, out=out) if bias is None else torch.addmm(bias, patches, W, out=out)
        return tokens

    def backward(
        self, d_tokens: Tensor, needs_pixels: bool, needs_plane: bool, needs_weight: bool
    ) -> tuple[Tensor | None, ...]:
        """d_pixels, d_plane, d_weight; sums over places, samples and parts are in float32 for any dtype."""
        d_tokens, W = d_tokens.contiguous(), self.weight.flatten(1)
        d_pixels = torch.zeros(self.pixels.shape, device=W.device) if needs_pixels else None
        slopes = torch.empty(self.samples, 4, self.blocks, device=W.device) if needs_plane else None
        d_weight: Tensor | None = None
        if needs_weight and not self.samples:
            d_weight = W.new_zeros(self.K, W.shape[0])
        for first, last in self.parts():
            d, d_patches, patches = self.of(d_tokens, first, last), None, None
            if needs_pixels or needs_plane:
                d_patches = product(d, W)
            if needs_weight:
                patches = self.rows(last - first)
            if needs_weight or needs_plane:
                self.cut(first, last, patches, d_patches if needs_plane else None, slopes)
            if patches is not None:
                part = product(patches.t(), d)
                d_weight = part if d_weight is None else d_weight.float() + part
            if d_pixels is not None:
                self.pull(first, last, d_patches, d_pixels)
        d_plane = None if slopes is None else slopes.sum(-1).view(self.plane.shape).to(self.plane.dtype)
        d_pixels = None if d_pixels is None else d_pixels.to(self.pixels.dtype)
        return d_pixels, d_plane, None if d_weight is None else self._like_weight(d_weight)

    def _like_weight(self, d_weight: Tensor) -> Tensor:
        D, C, P, Q = self.weight.shape
        return rows_like(self.weight).copy_(d_weight.view(C, P, Q, D).permute(3, 0, 1, 2))

    def cut(self, first: int, last: int, patches: Tensor | None, d_patches: Tensor | None, slopes: Tensor | None):
        """Writes the patches of samples first..last - 1; reduces the plane's gradient, a row of slopes for each sample."""
        raise NotImplementedError

    def pull(self, first: int, last: int, d_patches: Tensor | None, d_pixels: Tensor) -> None:
        """Adds what the places of samples first..last - 1 have read to the pixels' gradient."""
        raise NotImplementedError
