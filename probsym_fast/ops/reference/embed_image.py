"""embed_image, dense: the moved images, then a strided convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import looks_at_values

# rows (x, y) of the elements of D4: k quarter turns counterclockwise; 4 + k: y negated, then k turns
TURNS = (
    ((1, 0), (0, 1)),
    ((0, -1), (1, 0)),
    ((-1, 0), (0, -1)),
    ((0, 1), (-1, 0)),
    ((1, 0), (0, -1)),
    ((0, 1), (1, 0)),
    ((-1, 0), (0, 1)),
    ((0, -1), (-1, 0)),
)


def embed_image(pixels: Tensor, frames: Tensor, weight: Tensor, bias: Tensor | None, replicate: bool) -> Tensor:
    """pixels (B, C, H, W), frames (B, S, 2, 2), weight (D, C, P, Q) -> tokens (B, S, L, D)."""
    check_frames(pixels, frames, weight, bias, replicate)
    return tokens_of(moved_image(pixels, frames, replicate), weight, bias)


def embed_turned(pixels: Tensor, turns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """pixels (B, C, H, W), turns (B, S) of D4, weight (D, C, P, Q) -> tokens (B, S, L, D)."""
    check_turns(pixels, turns, weight, bias)
    return tokens_of(turned_image(pixels, turns), weight, bias)


def moved_image(pixels: Tensor, frames: Tensor, replicate: bool) -> Tensor:
    """The images of g^-1: pixels (B, C, H, W), frames (B, S, 2, 2) -> (B, S, C, H, W), bilinear.

    Place p reads the image at g p, both from the centre, to the right and upwards. Where a coordinate is whole, and at the
    border of `replicate`, the gradient to the frames is that of larger coordinates (columns and rows).
    """
    H, W = pixels.shape[-2:]
    x = torch.arange(W, dtype=frames.dtype, device=frames.device) - (W - 1) / 2
    y = (H - 1) / 2 - torch.arange(H, dtype=frames.dtype, device=frames.device)[:, None]
    across, up = (frames[..., k, 0, None, None] * x + frames[..., k, 1, None, None] * y for k in (0, 1))
    column, row = across + (W - 1) / 2, (H - 1) / 2 - up  # (B, S, H, W)
    if replicate:
        column, row = column.clamp(0, W - 1), row.clamp(0, H - 1)
    left, top = column.detach().floor(), row.detach().floor()
    right_share, lower_share = (column - left).to(pixels.dtype), (row - top).to(pixels.dtype)
    total: Tensor | None = None
    for i, share_y in enumerate((1 - lower_share, lower_share)):
        for j, share_x in enumerate((1 - right_share, right_share)):
            read = _read(pixels, (top + i).long().clamp(0, H - 1), (left + j).long().clamp(0, W - 1))
            if not replicate:
                inside = (top >= -i) & (top < H - i) & (left >= -j) & (left < W - j)
                read = torch.where(inside[:, :, None], read, 0)
            term = (share_y * share_x)[:, :, None] * read
            total = term if total is None else total + term
    assert total is not None
    return total


def turned_image(pixels: Tensor, turns: Tensor) -> Tensor:
    """The images of g^-1 for elements of D4: pixels (B, C, H, W), turns (B, S) -> (B, S, C, H, W), exact."""
    H, W = pixels.shape[-2:]
    g = torch.tensor(TURNS, device=turns.device)[turns.clamp(0, 7)]
    x = 2 * torch.arange(W, device=turns.device) - (W - 1)  # twice the coordinates: whole
    y = (H - 1) - 2 * torch.arange(H, device=turns.device)[:, None]
    across, up = (g[..., k, 0, None, None] * x + g[..., k, 1, None, None] * y for k in (0, 1))
    column, row = (across + (W - 1)) // 2, ((H - 1) - up) // 2
    return _read(pixels, row.clamp(0, H - 1), column.clamp(0, W - 1))


def tokens_of(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """images (B, S, C, H, W), weight (D, C, P, Q) -> (B, S, L, D): the patches row by row."""
    P, Q = weight.shape[-2:]
    patches = images.unflatten(-1, (-1, Q)).unflatten(-3, (-1, P))  # (B, S, C, H / P, P, W / Q, Q)
    patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(2, 3).flatten(3)
    return torch.nn.functional.linear(patches, weight.flatten(1), bias)


def _read(pixels: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """pixels (B, C, H, W), row and column (B, S, H, W) -> (B, S, C, H, W)."""
    B, S, H, W = row.shape
    C = pixels.shape[1]
    place = (row * W + column).flatten(2)[:, :, None].expand(B, S, C, H * W)
    return pixels.flatten(2)[:, None].expand(B, S, C, H * W).gather(3, place).unflatten(3, (H, W))


def check_frames(pixels: Tensor, frames: Tensor, *_: object) -> None:
    """ValueError for entries that are not finite; where they may be read."""
    if looks_at_values(frames) and not bool(frames.isfinite().all()):
        raise ValueError("embed_image: plane must be finite, got inf or nan")


def check_turns(pixels: Tensor, turns: Tensor, *_: object) -> None:
    """ValueError for turns out of range, or odd ones of images that are not square; where they may be read."""
    if not looks_at_values(turns) or not turns.numel():
        return
    if int(turns.min()) < 0 or int(turns.max()) > 7:
        bad = int(turns[(turns < 0) | (turns > 7)][0])
        raise ValueError(f"embed_image: plane must hold quarter turns 0 to 7, got {bad}")
    H, W = pixels.shape[-2:]
    if H != W and bool((turns % 2).any()):
        bad = int(turns[turns % 2 > 0][0])
        raise ValueError(f"embed_image: pixels must be square for quarter turn {bad}, got {H} x {W}")
