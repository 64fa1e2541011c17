"""orthogonal_frame: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import looks_at_values, transformed

# A column whose orthogonal part is shorter than this share of its length depends on those before it.
DEPENDENT = {torch.float32: 1e-6, torch.float64: 1e-14}
# Axes whose squared distances from a span differ by less count as equally far, so rounding cannot choose.
TIE = 0.999


def check_values(matrices: Tensor, *_) -> None:
    if looks_at_values(matrices) and not matrices.isfinite().all():
        raise ValueError("orthogonal_frame: matrices must be finite, got NaN or infinity")


def orthogonal_frame(matrices: Tensor, special: bool | Tensor) -> Tensor:
    """matrices (..., d, d) -> (..., d, d); see `probsym_fast.ops.orthogonal_frame`. special: may differ, (...) bool."""
    check_values(matrices)
    columns: list[Tensor] = []
    for k in range(matrices.shape[-1]):
        x = matrices[..., k]
        top = x.detach().abs().amax(-1, keepdim=True)
        scale = torch.where(top > 0, top, 1)
        x = x / scale if transformed() else _Scaled.apply(x, scale)  # torch.compile takes no Function with a jvp
        before = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
        x = _without(x, columns)
        squared = (x * x).sum(-1, keepdim=True)
        dependent = squared.detach().sqrt() <= DEPENDENT[matrices.dtype] * before
        kept = x / torch.where(dependent, 1, squared).sqrt()
        columns.append(torch.where(dependent, _farthest_axis(x.detach(), columns), kept))
    frame = torch.stack(columns, dim=-1)
    if special is not False:
        mirrored = special & (torch.linalg.det(frame.detach()) < 0)
        sign = torch.where(mirrored, -1.0, 1.0).to(frame.dtype)[..., None]
        frame = torch.cat([frame[..., :1] * sign[..., None], frame[..., 1:]], dim=-1)
    return frame


class _Scaled(torch.autograd.Function):
    """x / scale for a constant scale; gradients beyond the dtype's range become its largest finite value."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x / scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, d_x: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        range_of = torch.finfo(d_x.dtype)
        return (d_x / scale).clamp(range_of.min, range_of.max), None


def _without(x: Tensor, columns: list[Tensor]) -> Tensor:
    """x without its components along the columns.

    The second pass removes what rounding left. It also makes the gradient that of the projection onto the complement of the
    columns, even if one of them is a constant that does not rotate with the others.
    """
    for _ in range(2):
        for q in columns:
            x = x - q * (q * x).sum(-1, keepdim=True)
    return x


def _farthest_axis(x: Tensor, columns: list[Tensor]) -> Tensor:
    """The coordinate axis farthest from the span of the columns, orthonormalised to them; a constant for autograd."""
    columns = [q.detach() for q in columns]
    left = torch.ones_like(x) - sum(q * q for q in columns)
    first = (left >= TIE * left.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    axis = (torch.arange(x.shape[-1], device=x.device) == first[..., None]).to(x.dtype)
    return torch.nn.functional.normalize(_without(axis, columns), dim=-1)
