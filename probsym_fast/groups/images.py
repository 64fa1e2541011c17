"""Elements of the plane, and how they move images about their centre."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast import ops
from probsym_fast._autocast import without_autocast
from probsym_fast._checks import check_type, looks_at_values, transformed
from probsym_fast.ops import Permutation
from probsym_fast.ops.embed_image import PAD_MODES
from probsym_fast.ops.reference.embed_image import TURNS, moved_image

if TYPE_CHECKING:
    from probsym_fast.groups.group import Group


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

    Gradients: x, and matrices, of any order; the first only in compiled programs. It is that of torch's `grid_sample`. Second
    derivatives, torch.func and forward mode go through the same formula in basic operations of torch, at many times the time
    and memory, and so does all of it on a GPU with `torch.use_deterministic_algorithms`.

    Raises: TypeError (dtypes), ValueError (shapes; numbers out of range or odd where H is not W, on a GPU only in debug
    mode).
    """
    _check(x, plane, pad_mode)
    x = x if x.ndim == 5 else x[:, None]
    if plane.is_floating_point():
        return _interpolated(x, plane if inverse else plane.mT, pad_mode == "replicate")
    back = torch.where(plane > 3, plane, -plane % 4)
    there, back = (plane, back) if inverse else (back, plane)
    B, S1, C, H, W = x.shape
    rows = x.permute(0, 1, 3, 4, 2)
    if torch.compiler.is_compiling():  # else the view below fixes a program to more than one input
        rows = rows.clone(memory_format=torch.contiguous_format)
    rows = rows.reshape(B, S1, H * W, C)
    place = _places(H, W, x.device)
    p = Permutation(place[back], None, place[there], checked=True)
    return ops.permute(p, rows).unflatten(2, (H, W)).permute(0, 1, 4, 2, 3)


def _check(x: Tensor, plane: Tensor, pad_mode: str) -> None:
    op = "move_images"
    for name, given in (("x", x), ("plane", plane)):
        check_type(op, name, given, Tensor, "a Tensor")
    if pad_mode not in PAD_MODES:
        raise ValueError(f"{op}: pad_mode must be one of {PAD_MODES}, got {pad_mode!r}")
    if not plane.is_floating_point() and plane.dtype != torch.int64:
        raise TypeError(f"{op}: plane must be a floating point or int64 Tensor, got {plane.dtype}")
    rest, axes = ((2, 2), "(B, S, 2, 2)") if plane.is_floating_point() else ((), "(B, S)")
    if plane.ndim != 2 + len(rest) or tuple(plane.shape[2:]) != rest:
        raise ValueError(f"{op}: plane must be {axes}, got {tuple(plane.shape)}")
    if x.ndim not in (4, 5) or x.shape[0] != plane.shape[0] or (x.ndim == 5 and x.shape[1] not in (1, plane.shape[1])):
        raise ValueError(
            f"{op}: x must be (B, [S,] C, H, W) with B and S of {tuple(plane.shape)}, got {tuple(x.shape)}"
        )
    if rest or not looks_at_values(plane) or not plane.numel():
        return
    if len(bad := plane[(plane < 0) | (plane > 7)]):
        raise ValueError(f"{op}: plane must hold numbers 0 to 7, got {int(bad[0])}")
    H, W = x.shape[-2:]
    if H != W and len(bad := plane[plane % 2 > 0]):
        raise ValueError(f"{op}: x must be square images for quarter turn {int(bad[0])}, got {H} x {W}")


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
    rest = tuple(last.shape[2:-2])
    y = move_images(last.flatten(2, -3) if rest else last[:, :, None], plane, inverse=inverse)
    return (y.unflatten(2, rest) if rest else y[:, :, 0]).movedim((-2, -1), (h, w))


def turns_of(matrices: Tensor, close: float) -> Tensor | None:
    """(n,) int64: which symmetries of a square the matrices (n, 2, 2) are; None if one is none of them."""
    same = (matrices[:, None] - torch.tensor(TURNS, dtype=matrices.dtype, device=matrices.device)).abs().amax(
        (2, 3)
    ) < close
    return same.to(torch.int64).argmax(1) if bool(same.any(1).all()) else None


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
            if torch.is_grad_enabled():
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
    """The same, to be differentiated further."""
    own = image.view_as(image), matrices.view_as(matrices)  # one may depend on the other
    wanted = [x for x, needed in zip(own, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(moved_image(*own, replicate), wanted, d_y, create_graph=True))
    d_image, d_matrices = (next(found) if needed else None for needed in needs)
    return d_image, d_matrices


def _nearest(image: Tensor, matrices: Tensor, replicate: bool) -> Tensor:
    """image (B, C, H, W) of integers or bools -> (B, S, C, H, W)."""
    (B, C, H, W), S = image.shape, matrices.shape[1]
    read = _read_at(matrices.detach().to(torch.promote_types(matrices.dtype, torch.float32)), H, W)
    column, row = (read[..., 0] + (W - 1) / 2).round().long(), ((H - 1) / 2 - read[..., 1]).round().long()
    place = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).view(B, S, 1, H * W).expand(B, S, C, H * W)
    y = image.flatten(2)[:, None].expand(B, S, C, H * W).gather(3, place).unflatten(3, (H, W))
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return y if replicate else torch.where(inside[:, :, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
