"""The Lorentz groups: matrices that keep the metric of space and time."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._autocast import promoted
from probsym_fast._checks import check_count
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups._gram_schmidt import pseudo_orthonormal
from probsym_fast.groups.linear import Linear
from probsym_fast.ops import orthogonal_frame


class Lorentz(Linear):
    """O(1, d-1) on the vector ("v") and point ("p") axes: matrices g (B, S, d, d) with `g^T m g = m`, m = diag(1, -1, ...).

    The first coordinate is time. The group is not compact: it has no uniform elements, and `uniform` raises ValueError.
    `anywhere` gives random boosts, rotations and reflections of space and of time, to test with. Models draw from
    `distributions.Learned`, or from another distribution of their own.

    `project` makes frames of "matrices" (B, S, d, d) by Gram-Schmidt in this metric, in float64: `project(h @ A) = h @
    project(A)`. It is defined where no column is null (light-like) after those before it are removed, as for a time-like
    first column and independent others; the time-like one of the result comes first. Another column is replaced by a
    coordinate axis, which is not equivariant. Raises TypeError unless d is an int, ValueError for d below 2.
    """

    def __init__(self, d: int = 4):
        super().__init__(check_count("Lorentz", "d", d, least=2))

    def metric(self, like: Tensor) -> Tensor:
        """(d,) the diagonal 1, -1, ..., -1, in the dtype and on the device of `like`."""
        metric = -torch.ones(self.d, dtype=like.dtype, device=like.device)
        metric[0] = 1
        return metric

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Tensor:
        way_out = "draw from distributions.Learned, or use anywhere in tests"
        raise ValueError(f"{self}: the group must be compact for uniform elements, got one that is not; {way_out}")

    def anywhere(self, batch: Batch, samples: int, draws: Draws | None = None) -> Tensor:
        """Time and space reflected or not, a rotation, then a boost of normal rapidity in a uniform direction."""
        draws, space = draws or Draws(), self.d - 1
        shape = (batch.size, samples)
        normal = draws.normal((*shape, space, space + 1), "lorentz", device=batch.device)
        rapidity = normal[..., -1].square().sum(-1).sqrt()[..., None, None] / space**0.5
        n = normal[..., -1:] / normal[..., -1:].norm(dim=-2, keepdim=True)  # (B, S, d - 1, 1)
        sign = 1 - 2 * (draws.uniform((*shape, 1, 1), "time", device=batch.device) < 0.5).to(n.dtype)
        eye = torch.eye(space, dtype=n.dtype, device=n.device)
        boost = torch.cat(
            [
                torch.cat([rapidity.cosh(), rapidity.sinh() * n.mT], -1),
                torch.cat([rapidity.sinh() * n, eye + (rapidity.cosh() - 1) * (n @ n.mT)], -1),
            ],
            -2,
        )
        turned = boost[..., 1:] @ orthogonal_frame(normal[..., :-1])
        return torch.cat([boost[..., :1] * sign, turned], -1).to(self.dtype(batch))

    def frames(self, matrices: Tensor) -> Tensor:
        double = matrices.double()
        columns, signs = pseudo_orthonormal(double, self.metric(double))
        order = signs.argsort(dim=-1, descending=True, stable=True)[..., None, :]
        dtype = promoted(matrices.dtype, torch.float32)
        return columns.gather(-1, order.expand_as(columns)).to(dtype)

    def inverse(self, g: Tensor) -> Tensor:
        metric = self.metric(g)
        return metric[:, None] * g.mT * metric
