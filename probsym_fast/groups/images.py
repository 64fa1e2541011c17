"""Elements of the plane, and how they move images about their centre."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast import ops
from probsym_fast._autocast import without_autocast
from probsym_fast._checks import transformed
from probsym_fast.ops import Permutation
from probsym_fast.ops.embed_image import PAD_MODES
from probsym_fast.ops.reference.embed_image import TURNS, moved_image

if TYPE_CHECKING:
    from probsym_fast.groups.group import Group

INVERSE_TURNS = (0, 3, 2, 1, 4, 5, 6, 7)


def plane_of(group: Group, g: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The elements g of a group as elements of the plane, for `ops.embed_image` and `move_images`.

    int64 numbers (B, S) of the eight symmetries of a square (as `Dihedral(4)` counts them) where every element of the group
    is one of them, else matrices (B, S, 2, 2): of finite groups in `dtype`, of others as they are. Of a `Product` those of
    the factor that moves images. Differentiable in g. Raises ValueError for a group that does not act on the plane.
    """
    return group.plane(g, dtype)


def move_images(x: Tensor, plane: Tensor, *, inverse: bool = False, pad_mode: str = "zeros") -> Tensor:
    """g . x (or g^-1 . x) about the centre: images (B, [S,] C, H, W) -> (B, S, C, H, W), dtype of x.

    `(g . x)(p) = x(g^-1 p)` at places p = (to the right, upwards) from the centre, in pixels.

    plane: the elements g (`plane_of`). Numbers (B, S) int64 of the symmetries of a square are exact; the odd ones, quarter
    turns, need H = W. Matrices (B, S, 2, 2), orthogonal, read between four pixels (bilinear); of integers and bools the
    nearest. Computed in float32 or wider.
    pad_mode: what matrices read outside the image: "zeros", each of the four pixels that lies outside as 0, or "replicate",
    the nearest pixel of the border.

    Gradients: x, and matrices; of any order. The first is that of torch's `grid_sample`, which adds up in no fixed order on
    a GPU; second derivatives, torch.func and forward mode go through the same formula in plain torch, at several times the
    time and memory.
    """
    if pad_mode not in PAD_MODES:
        raise ValueError(f"move_images: pad_mode must be one of {PAD_MODES}, got {pad_mode!r}")
    x = x if x.ndim == 5 else x[:, None]
    if plane.is_floating_point():
        return _interpolated(x, plane if inverse else plane.mT, pad_mode == "replicate")
    there, back = plane, _constant(INVERSE_TURNS, plane)[plane]
    if not inverse:
        there, back = back, there
    B, S1, C, H, W = x.shape
    rows = x.permute(0, 1, 3, 4, 2).reshape(B, S1, H * W, C)
    place = _places(H, W, x.device)
    p = Permutation(place[back], None, place[there], checked=True)
    return ops.permute(p, rows).unflatten(2, (H, W)).permute(0, 1, 4, 2, 3)


def image_axes(owner: Group, layout: str) -> tuple[int, int] | None:
    """Where "h" and "w" are in a layout; None if neither is. ValueError unless each is there once, h first."""
    if not set("hw") & set(layout):
        return None
    if [letter for letter in layout if letter in "hw"] != ["h", "w"]:
        raise ValueError(f"{owner}: layout must have 'h' and 'w' once each, in this order, got {layout!r}")
    return layout.index("h"), layout.index("w")


def move_along(owner: Group, x: Tensor, axes: tuple[int, int], plane: Tensor, square: bool, inverse: bool) -> Tensor:
    """g . x on the image axes of x (B, S or 1, *layout) -> (B, S, *layout).

    square: the elements have quarter turns, so H must be W.
    """
    h, w = (2 + axis for axis in axes)
    H, W = x.shape[h], x.shape[w]
    if square and H != W:
        raise ValueError(f"{owner}: images must be square for turns by 90 degrees, got {H} x {W}")
    last = x.movedim((h, w), (-2, -1))
    rest = last.shape[2:-2]
    y = move_images(last.reshape(*x.shape[:2], math.prod(rest), H, W), plane, inverse=inverse)
    return y.reshape(*y.shape[:2], *rest, H, W).movedim((-2, -1), (h, w))


def turns_of(matrices: Tensor, close: float) -> Tensor | None:
    """(n,) int64: which symmetries of a square the matrices (n, 2, 2) are; None if one is none of them."""
    same = (matrices[:, None] - torch.tensor(TURNS, dtype=matrices.dtype)).abs().amax((2, 3)) < close
    return same.to(torch.int64).argmax(1) if bool(same.any(1).all()) else None


def _constant(values: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)


def _places(H: int, W: int, device: torch.device) -> Tensor:
    """(8, H W) int64: for each symmetry of a square the places that g^-1 . x reads; quarter turns only where H = W."""
    place = torch.arange(H * W, device=device).view(H, W)
    turned = [place.rot90(-k) if H == W or k % 2 == 0 else place for k in range(4)]
    return torch.stack([*turned, *(x.flip(0) for x in turned)]).flatten(1)


def _interpolated(x: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
    """x (B, S or 1, C, H, W), read at R p by the matrices R (B, S, 2, 2): (B, S, C, H, W)."""
    if x.is_complex():
        parts = torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(2, 3)
        y = _interpolated(parts, matrices, replicate).unflatten(2, (2, -1)).movedim(2, -1)
        return torch.view_as_complex(y.contiguous())
    B, S = matrices.shape[:2]
    if x.shape[1] != 1:  # each sample is an image of its own
        y = _interpolated(x.flatten(0, 1)[:, None], matrices.flatten(0, 1)[:, None], replicate)
        return y.unflatten(0, (B, S))[:, :, 0]
    image = x[:, 0]
    if not x.is_floating_point():
        return _nearest(image, matrices, replicate)
    dtype = torch.promote_types(torch.promote_types(image.dtype, matrices.dtype), torch.float32)
    image, matrices = image.to(dtype), matrices.to(dtype)
    with without_autocast(x.device):
        if transformed():
            y = moved_image(image, matrices, replicate)
        elif not torch.is_grad_enabled() or torch.compiler.is_compiling():
            y = _sampled(image, matrices, replicate)
        else:
            y = _Sampled.apply(image, matrices, replicate)
    return y.to(x.dtype)


def _coordinates(H: int, W: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x (W,) and y (H, 1) of the places, from the centre to the right and upwards."""
    x = torch.arange(W, dtype=like.dtype, device=like.device) - (W - 1) / 2
    y = (H - 1) / 2 - torch.arange(H, dtype=like.dtype, device=like.device)
    return x, y[:, None]


def _read_at(matrices: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """R p for all places p: two (B, S, H, W), from the centre to the right and upwards."""
    x, y = _coordinates(H, W, matrices)
    m = matrices[..., None, None]
    return m[:, :, 0, 0] * x + m[:, :, 0, 1] * y, m[:, :, 1, 0] * x + m[:, :, 1, 1] * y


def _grid(matrices: Tensor, H: int, W: int) -> Tensor:
    """(B, S H, W, 2) for `grid_sample`: samples one below another, so that no image is copied."""
    across, up = _read_at(matrices, H, W)
    return torch.stack([across * (2 / W), up * (-2 / H)], -1).flatten(1, 2)


def _sampled(image: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
    """image (B, C, H, W), matrices (B, S, 2, 2) -> (B, S, C, H, W)."""
    H, W = image.shape[-2:]
    pad = "border" if replicate else "zeros"
    y = F.grid_sample(image, _grid(matrices, H, W), mode="bilinear", padding_mode=pad, align_corners=False)
    return y.unflatten(2, (matrices.shape[1], H)).transpose(1, 2)


class _Sampled(torch.autograd.Function):
    """`_sampled`, whose gradient has gradients of any order: those of `moved_image`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
        ctx.save_for_backward(image, matrices)
        ctx.replicate = replicate
        return _sampled(image, matrices, replicate)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        image, matrices = ctx.saved_tensors
        further = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(image.device):
            own = [x.view_as(x) if further else x.detach() for x in (image, matrices)]
            wanted = [
                x if further else x.requires_grad_()
                for x, needs in zip(own, ctx.needs_input_grad, strict=False)
                if needs
            ]
            y = (moved_image if further else _sampled)(*own, ctx.replicate)
            found = iter(torch.autograd.grad(y, wanted, d_y, create_graph=further))
        d_image, d_matrices = (next(found) if needs else None for needs in ctx.needs_input_grad[:2])
        return d_image, d_matrices, None


def _nearest(image: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
    """image (B, C, H, W) of integers or bools -> (B, S, C, H, W)."""
    (B, C, H, W), S = image.shape, matrices.shape[1]
    across, up = _read_at(matrices.detach().to(torch.promote_types(matrices.dtype, torch.float32)), H, W)
    column, row = (across + (W - 1) / 2).round().long(), ((H - 1) / 2 - up).round().long()
    place = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).view(B, S, 1, H * W).expand(B, S, C, H * W)
    y = image.flatten(2)[:, None].expand(B, S, C, H * W).gather(3, place).unflatten(3, (H, W))
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return y if replicate else torch.where(inside[:, :, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
