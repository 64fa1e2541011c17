"""Images read at moved places: between four pixels, or of integers at the nearest one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast._autocast import promoted, without_autocast
from probsym_fast._checks import transformed, vmapped
from probsym_fast.ops.reference.embed_image import moved_image


def interpolated(x: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
    """x (B, S or 1, C, H, W), read at R p by the matrices R (B, S, 2, 2): (B, S, C, H, W)."""
    if x.is_complex():
        parts = torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(2, 3)
        y = interpolated(parts, matrices, replicate).unflatten(2, (2, -1)).movedim(2, -1)
        return torch.view_as_complex(y.contiguous())
    B, S = matrices.shape[:2]
    if x.shape[1] != 1:  # each sample is an image of its own
        y = interpolated(x.flatten(0, 1)[:, None], matrices.flatten(0, 1)[:, None], replicate)
        return y.unflatten(0, (B, S))[:, :, 0]
    image = x[:, 0]
    if not x.is_floating_point():
        return _nearest(image, matrices, replicate)
    dtype = promoted(promoted(image.dtype, matrices.dtype), torch.float32)
    image, matrices = image.to(dtype), matrices.to(dtype)
    with without_autocast(x.device):
        if _plain(image):
            y = moved_image(image, matrices, replicate)
        elif torch.compiler.is_compiling():  # programs have first derivatives only
            y = _sampled(image, _grid(matrices, *image.shape[2:]), S, replicate)
        else:
            y = _Sampled.apply(image, matrices, replicate)
    return y.to(x.dtype)


def _plain(image: Tensor) -> bool:
    """Whether to move by torch's basic operations: under torch.func, and where a GPU must be deterministic."""
    exact = image.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()
    return exact or (not torch.compiler.is_compiling() and transformed())


def _coordinates(H: int, W: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x (W, 1) and y (H, 1) of the places, from the centre to the right and upwards."""
    x = torch.arange(W, dtype=like.dtype, device=like.device) - (W - 1) / 2
    y = (H - 1) / 2 - torch.arange(H, dtype=like.dtype, device=like.device)
    return x[:, None], y[:, None]


def _read_at(matrices: Tensor, H: int, W: int) -> Tensor:
    """R p for all places p: (B, S, H, W, 2), from the centre to the right and upwards."""
    x, y = _coordinates(H, W, matrices)
    by_x, by_y = matrices[..., None, :, 0] * x, matrices[..., None, :, 1] * y  # (B, S, W or H, 2)
    return by_x[:, :, None] + by_y[:, :, :, None]


def _grid(matrices: Tensor, H: int, W: int) -> Tensor:
    """(B, S H, W, 2) for `grid_sample`: samples one below another, so that no image is copied."""
    return _read_at(matrices * _scales(matrices, H, W), H, W).flatten(1, 2)


def _scales(like: Tensor, H: int, W: int) -> Tensor:
    """(2, 1) from pixels to the right and upwards to `grid_sample`'s -1..1, downwards."""
    return torch.stack([like.new_full((1,), 2 / W), like.new_full((1,), -2 / H)])


def _sampled(image: Tensor, grid: Tensor, samples: int, replicate: bool) -> Tensor:
    """image (B, C, H, W), grid (B, S H, W, 2) -> (B, S, C, H, W)."""
    pad = "border" if replicate else "zeros"
    y = F.grid_sample(image, grid, mode="bilinear", padding_mode=pad, align_corners=False)
    return y.unflatten(2, (samples, image.shape[2])).transpose(1, 2)


class _Sampled(torch.autograd.Function):
    """`_sampled` by matrices, whose gradient has gradients of any order: those of `moved_image`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
        grid = _grid(matrices, *image.shape[2:])
        ctx.save_for_backward(image, matrices, grid)
        ctx.replicate = replicate
        return _sampled(image, grid, matrices.shape[1], replicate)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        image, matrices, grid = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        with without_autocast(image.device):
            if torch.is_grad_enabled() or vmapped(d_y):
                return *_second(d_y, image, matrices, ctx.replicate, needs), None
            return *_first(d_y, image, grid, ctx.replicate, needs), None


Gradients = tuple[Tensor | None, Tensor | None]


def _first(d_y: Tensor, image: Tensor, grid: Tensor, replicate: bool, needs: tuple[bool, bool]) -> Gradients:
    """Of image and matrices by torch's kernel, of matrices as sums over the places p of d_(R p) p^T."""
    H, W = image.shape[2:]
    d_rows = d_y.transpose(1, 2).flatten(2, 3)  # (B, C, S H, W)
    d_image, d_grid = torch.ops.aten.grid_sampler_2d_backward(d_rows, image, grid, 0, int(replicate), False, needs)
    d_image = d_image if needs[0] else None
    if not needs[1]:
        return d_image, None
    d_grid, (x, y) = d_grid.unflatten(1, (-1, H)), _coordinates(H, W, grid)  # (B, S, H, W, 2)
    d_matrices = torch.stack([(d_grid.sum(2) * x).sum(2), (d_grid.sum(3) * y).sum(2)], -1)
    return d_image, d_matrices * _scales(grid, H, W)


def _second(d_y: Tensor, image: Tensor, matrices: Tensor, replicate: bool, needs: tuple[bool, bool]) -> Gradients:
    """The same, to be differentiated further, or of many d_y at once (torch.vmap)."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        own = image.view_as(image), matrices.view_as(matrices)  # one may depend on the other
        wanted = [x for x, needed in zip(own, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(moved_image(*own, replicate), wanted, d_y, create_graph=further))
    d_image, d_matrices = (next(found) if needed else None for needed in needs)
    return d_image, d_matrices


def _nearest(image: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
    """image (B, C, H, W) of integers or bools -> (B, S, C, H, W)."""
    (B, C, H, W), S = image.shape, matrices.shape[1]
    read = _read_at(matrices.detach().to(promoted(matrices.dtype, torch.float32)), H, W)
    column, row = (read[..., 0] + (W - 1) / 2).round().long(), ((H - 1) / 2 - read[..., 1]).round().long()
    place = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).view(B, S, 1, H * W).expand(B, S, C, H * W)
    y = image.flatten(2)[:, None].expand(B, S, C, H * W).gather(3, place).unflatten(3, (H, W))
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return y if replicate else torch.where(inside[:, :, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
