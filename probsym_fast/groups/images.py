"""Elements of the plane, and how they move images about their centre."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast._checks import check_type, looks_at_values
from probsym_fast.groups._bilinear import interpolated
from probsym_fast.groups.group import Group
from probsym_fast.ops import Permutation
from probsym_fast.ops.embed_image import PAD_MODES
from probsym_fast.ops.reference.embed_image import TURNS


def plane_of(group: Group, g: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The elements g of a group as elements of the plane, for `ops.embed_image` and `move_images`.

    int64 numbers (B, S) of the eight symmetries of a square (as `Dihedral(4)` counts them) where every element of the group
    is one of them, else matrices (B, S, 2, 2): of finite groups in `dtype`, of others as they are. Of a `Product` those of
    the factor that moves images. Differentiable in g. Raises TypeError for arguments of another type or dtype, ValueError for
    a group that does not act on the plane, a product of two that do, and for other elements than its own.
    """
    check_type("plane_of", "group", group, Group, "a Group")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"plane_of: dtype must be a floating point dtype, got {dtype!r}")
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

    NaN and infinity in x spread to the pixels that read them, as in any sum.

    Raises: TypeError (dtypes), ValueError (shapes; numbers out of range or odd where H is not W, and matrices that are not
    finite, on a GPU only in debug mode).
    """
    _check(x, plane, pad_mode)
    x = x if x.ndim == 5 else x[:, None]
    if plane.is_floating_point():
        return interpolated(x, plane if inverse else plane.mT, pad_mode == "replicate")
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
    if not all(x.shape[-2:]):
        raise ValueError(f"{op}: x must have pixels, got {tuple(x.shape)}")
    if not looks_at_values(plane) or not plane.numel():
        return
    if rest:
        if not plane.isfinite().all():
            raise ValueError(f"{op}: plane must be finite, got inf or nan")
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


def check_sides(group: Group, H: int, W: int) -> None:
    """ValueError for images H x W that some element of the group does not map to themselves, whatever the elements drawn."""
    for factor in getattr(group, "factors", (group,)):
        if "h" in (factor.moves or "") and getattr(factor, "_square", False) and H != W:
            raise ValueError(f"{factor}: images must be square for turns by 90 degrees, got {H} x {W}")


def move_along(owner: Group, x: Tensor, axes: tuple[int, int], plane: Tensor, inverse: bool) -> Tensor:
    """g . x on the image axes of x (B, S or 1, *layout) -> (B, S, *layout). Raises as `check_sides`."""
    h, w = (2 + axis for axis in axes)
    H, W = x.shape[h], x.shape[w]
    check_sides(owner, H, W)
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
