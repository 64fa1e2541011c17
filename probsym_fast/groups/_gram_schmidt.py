"""Gram-Schmidt for complex matrices and for indefinite metrics, in plain torch; `ops.orthogonal_frame` has the real one."""

from __future__ import annotations

import torch
from torch import Tensor

DEPENDENT = 1e-12  # a column whose rest has a smaller squared length, relative to its own, depends on those before it


def pseudo_orthonormal(matrices: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Columns q_k (..., d, d) with `q_j^* metric q_k = s_k` where j = k, else 0; and the signs s (..., d) of +-1.

    matrices: (..., d, d) float64 or complex128. metric: (d,) of +-1, the diagonal. `u_k = a_k - sum_{j<k} s_j q_j <q_j,
    a_k>`, `q_k = u_k / sqrt |<u_k, u_k>|`. Equivariant under matrices that keep the metric. A column whose rest is null, or
    nearly, is replaced by the coordinate axis whose own rest is farthest from null: a constant, not equivariant.
    Gradients: to the columns that are kept; which ones, and the signs, are constants.
    """
    columns: list[Tensor] = []
    signs: list[Tensor] = []

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a.conj() * metric * b).sum(-1, keepdim=True)

    def rest(x: Tensor) -> Tensor:
        for _ in range(2):  # the second time removes what rounding has left
            for q, s in zip(columns, signs, strict=True):
                x = x - s * q * inner(q, x)
        return x

    for k in range(matrices.shape[-1]):
        a = matrices[..., k]
        top = a.detach().abs().amax(-1, keepdim=True)
        a = a / torch.where(top > 0, top, 1)
        u = rest(a)
        squared = inner(u, u).real
        least = DEPENDENT * a.detach().abs().square().sum(-1, keepdim=True)
        dependent = squared.detach().abs() <= least
        with torch.no_grad():
            axes = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            others = [rest(axis.expand_as(a)) for axis in axes]
            lengths = torch.stack([inner(x, x).real for x in others])  # (d, ..., 1)
            best = lengths.abs().argmax(0, keepdim=True)
            axis = torch.stack(others).gather(0, best.expand(1, *a.shape))[0]
            length = lengths.gather(0, best)[0]
        u = torch.where(dependent, axis, u)
        squared = torch.where(dependent, length, squared)
        signs.append(squared.detach().sign())
        columns.append(u / squared.abs().sqrt())
    return torch.stack(columns, -1), torch.cat(signs, -1)
