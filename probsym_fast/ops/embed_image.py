"""Rotated and reflected images to patch tokens, without forming the moved images."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._autocast import promoted
from probsym_fast._checks import check_type
from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import check_devices, common_dtype, rows_like
from probsym_fast.ops.reference import embed_image as reference

PAD_MODES = ("zeros", "replicate")


def _shapes(pixels, plane, weight, bias, *replicate):
    D, _, P, Q = weight.shape
    return weight.new_empty(*plane.shape[:2], (pixels.shape[2] // P) * (pixels.shape[3] // Q), D)


def _gradient_shapes(d_tokens, pixels, frames, weight, replicate, needs_pixels, needs_frames, needs_weight, needs_bias):
    d_pixels, d_weight, d_bias = _turned_shapes(
        d_tokens, pixels, frames, weight, needs_pixels, needs_weight, needs_bias
    )
    return d_pixels, frames.new_empty(frames.shape) if needs_frames else None, d_weight, d_bias


def _turned_shapes(d_tokens, pixels, turns, weight, needs_pixels, needs_weight, needs_bias):
    return (
        pixels.new_empty(pixels.shape) if needs_pixels else None,
        rows_like(weight) if needs_weight else None,
        weight.new_empty(weight.shape[0]) if needs_bias else None,
    )


OP = Op(
    "embed_image",
    "(Tensor pixels, Tensor frames, Tensor weight, Tensor? bias, bool replicate) -> Tensor tokens",
    reference=reference.embed_image,
    values=reference.check_frames,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_tokens, Tensor pixels, Tensor frames, Tensor weight, bool replicate, bool needs_pixels,"
    " bool needs_frames, bool needs_weight, bool needs_bias)"
    " -> (Tensor d_pixels, Tensor d_frames, Tensor d_weight, Tensor d_bias)",
    shapes=_gradient_shapes,
)
TURNED = Op(
    "embed_turned",
    "(Tensor pixels, Tensor turns, Tensor weight, Tensor? bias) -> Tensor tokens",
    reference=reference.embed_turned,
    values=reference.check_turns,
    shapes=_shapes,
)
TURNED.gradient(
    "(Tensor d_tokens, Tensor pixels, Tensor turns, Tensor weight, bool needs_pixels, bool needs_weight,"
    " bool needs_bias) -> (Tensor d_pixels, Tensor d_weight, Tensor d_bias)",
    shapes=_turned_shapes,
)


def embed_image(
    pixels: Tensor,
    plane: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pad_mode: str = "zeros",
    backend: str = "auto",
) -> Tensor:
    """Patch tokens of images moved by elements of the plane, `tokens[b, s, l] = weight . patch_l(g^-1 x_b) + bias`.

    Place p of `g^-1 x` reads the image at g p. Both are from the image's centre, in pixels, to the right and upwards.

    Args:
        pixels: (B, C, H, W), H and W multiples of P and Q.
        plane: the elements g. Float: matrices (B, S, 2, 2), bilinear. int64: quarter turns (B, S), exact: 0 to 3 turn
            counterclockwise by 90 degrees so many times, 4 + k flips the rows and then turns by k, as `Dihedral(4)` counts
            them; odd ones need H = W.
        weight: (D, C, P, Q), as in Conv2d; one stored with D innermost is not copied. bias: (D,).
        pad_mode: what matrices read outside of the image: "zeros", or with "replicate" the nearest pixel.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: (B, S, L, D), the L = (H / P) (W / Q) patches row by row, dtype of the weight. Coordinates have the matrices'
    dtype or more.

    Gradients: pixels, matrices, weight, bias. To matrices by the image's differences around g p: where a coordinate is
    whole, by those towards larger columns and rows.
    Raises: TypeError (dtypes), ValueError (shapes; matrices not finite and turns out of range, on a GPU only in debug
    mode), RuntimeError (devices, backend).
    """
    op = "embed_image"
    if pad_mode not in PAD_MODES:
        raise ValueError(f"{op}: pad_mode must be one of {PAD_MODES}, got {pad_mode!r}")
    for name, x in (("pixels", pixels), ("weight", weight)):
        check_type(op, name, x, Tensor, "a Tensor")
    turned = isinstance(plane, Tensor) and plane.dtype == torch.int64
    kernels = TURNED if turned else OP
    dtype = common_dtype(op, kernels, backend, weight=weight, pixels=pixels, bias=bias)
    _check_shapes(pixels, plane, weight, bias, turned)
    run = kernels.select(backend, weight.device, dtype)
    x, w, b = pixels.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if turned:
        reference.check_turns(pixels, plane)  # a kernel's errors name the operator
        out = run(x, plane, w, b)
    else:
        wide = promoted(plane.dtype, promoted(dtype, torch.float32))
        out = run(x, plane.to(wide), w, b, pad_mode == "replicate")
    return out.to(weight.dtype)


def _check_shapes(pixels: Tensor, plane: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> None:
    op = "embed_image"
    if not turned and not (isinstance(plane, Tensor) and plane.is_floating_point()):
        got = plane.dtype if isinstance(plane, Tensor) else type(plane).__name__
        raise TypeError(f"{op}: plane must be a floating point or int64 Tensor, got {got}")
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be (D, C, P, Q), got {tuple(weight.shape)}")
    D, C, P, Q = weight.shape
    if pixels.ndim != 4 or pixels.shape[1] != C or pixels.shape[2] < 1 or pixels.shape[3] < 1:
        raise ValueError(f"{op}: pixels must be (B, C, H, W) with C = {C}, got {tuple(pixels.shape)}")
    B, _, H, W = pixels.shape
    if H % P or W % Q:
        raise ValueError(f"{op}: pixels must be whole patches of {P} x {Q}, got {H} x {W}")
    if bias is not None and tuple(bias.shape) != (D,):
        raise ValueError(f"{op}: bias must be ({D},), got {tuple(bias.shape)}")
    rest, wanted = ((), "(B, S)") if turned else ((2, 2), "(B, S, 2, 2)")
    if plane.ndim != 2 + len(rest) or plane.shape[0] != B or tuple(plane.shape[2:]) != rest or plane.shape[1] < 1:
        raise ValueError(f"{op}: plane must be {wanted} with B = {B} and S >= 1, got {tuple(plane.shape)}")
    check_devices(op, weight.device, plane=plane)
