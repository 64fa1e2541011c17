"""Vector Neurons: the S_n x O(d)-equivariant network of the learned distribution on point clouds.

Features are (M, n, d, w): w vectors a node, channels last, so that lengths are sums of d contiguous rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probsym_fast.groups import PointClouds

SLOPE, EPS = 0.2, 1e-6


class VectorNorm(nn.Module):
    """Batch normalisation of the lengths: x -> x bn(|x|) / |x|; x (..., d, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        length = ((x * x).sum(-2) + EPS**2).sqrt()
        scale = self.norm(length.flatten(0, -2)).view_as(length) / length
        return x * scale.unsqueeze(-2)


def leaky_relu(x: Tensor, direction: Tensor) -> Tensor:
    """Takes (1 - slope) of the part of x that points against `direction` away: both (..., d, w)."""
    against = (x * direction).sum(-2, keepdim=True).clamp(max=0)
    return x - (1 - SLOPE) * against / ((direction * direction).sum(-2, keepdim=True) + EPS) * direction


class VectorLayer(nn.Module):
    """Linear, norm, leaky ReLU along a learned direction: (..., d, w_in) -> (..., d, w_out)."""

    def __init__(self, features: int, width: int, shared_direction: bool = False):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(features, width + (1 if shared_direction else width), bias=False)
        self.norm = VectorNorm(width)

    def activate(self, projected: Tensor) -> Tensor:
        """From linear outputs: features and direction side by side."""
        x, direction = projected.tensor_split([self.width], dim=-1)
        return leaky_relu(self.norm(x), direction)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.linear(x))


class MaxPool(nn.Module):
    """For each channel the one of k vectors that is longest along a fixed random direction: (M, ..., k, d, w) -> (M, ..., d, w).

    The direction is W x with W drawn once: the choice has no gradient to it, so W is no parameter.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", nn.Linear(width, width, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            best = (x * (x @ self.weight.mT)).sum(-2).argmax(-2)  # (M, ..., w)
        index = best[..., None, None, :].expand(*best.shape[:-1], 1, *x.shape[-2:])
        return x.gather(-3, index).squeeze(-3)


class EdgeConv(nn.Module):
    """A layer on [x_j - x_i, x_i] for the k nearest j of every i (itself included), max-pooled: (M, n, d, w) -> (M, n, d, w').

    The linear map is taken once a node: W [x_j - x_i, x_i] = A x_j + (B - A) x_i.
    """

    def __init__(self, features: int, width: int, neighbors: int):
        super().__init__()
        self.layer = VectorLayer(2 * features, width)
        self.pool, self.neighbors = MaxPool(width), neighbors

    def forward(self, x: Tensor) -> Tensor:
        M, n, d, w = x.shape
        k = min(self.neighbors, n)
        a, b = self.layer.linear.weight.split(w, dim=1)
        far = x @ a.mT  # (M, n, d, 2 w')
        near = x @ (b - a).mT
        flat = x.detach().reshape(M, n, d * w)
        index = torch.cdist(flat, flat).topk(k, dim=-1, largest=False).indices  # (M, n, k)
        rows = (index + torch.arange(M, device=x.device)[:, None, None] * n).flatten()
        pairs = far.flatten(0, 1).index_select(0, rows).view(M, n, k, d, -1) + near[:, :, None]
        return self.pool(self.layer.activate(pairs))


class VectorNeurons(nn.Module):
    """Scores (invariant, one a node) and matrices (equivariant columns) of a point cloud with noise.

    A DGCNN (Wang et al. 2019) of vector neurons (Deng et al. 2021, arXiv 2104.12229), as in Kim et al. 2023. Under an
    orthogonal h on every vector the scores stay and matrices become h M; under a permutation the scores are permuted.

    Args:
        channels: vectors a node at the input (position, velocity). width: vectors a node inside. neighbors: k.
        dropout: of whole vectors, in training. scores, matrices: the outputs to build.

    forward(batch, noise): noise (B, S, n, d, channels) is added to [positions - center, velocities]. Returns "scores"
    (B, S, n) and "matrices" (B, S, d, 3), float32 under any autocast (float64 for float64 data).
    """

    def __init__(
        self,
        channels: int = 2,
        width: int = 21,
        neighbors: int = 4,
        dropout: float = 0.08,
        scores: bool = True,
        matrices: bool = True,
        dim: int = 3,
    ):
        super().__init__()
        self.channels, self.dropout, self.dim = channels, dropout, dim
        self.conv1 = EdgeConv(channels, width, neighbors) if scores or matrices else None
        self.scores, self.matrices = scores, matrices
        if matrices:
            self.pool = MaxPool(width)
            self.matrix_head = nn.Linear(width, dim, bias=False)
        if scores:
            self.conv2 = EdgeConv(width, width, neighbors)
            self.conv3 = VectorLayer(2 * width, width, shared_direction=True)
            self.frame = nn.Sequential(
                VectorLayer(2 * width, width),
                VectorLayer(width, width // 2),
                nn.Linear(width // 2, dim, bias=False),
            )
            self.score_head = nn.Linear(4 * width * dim, 1)

    def noise_shape(self, batch: PointClouds, samples: int) -> tuple[int, ...]:
        """(B, S, n, d, channels)."""
        B, n, d = batch.positions.shape
        return B, samples, n, d, self.channels

    def forward(self, batch: PointClouds, noise: Tensor) -> dict[str, Tensor]:
        with torch.autocast(noise.device.type, enabled=False):
            x = torch.stack([batch.positions - batch.center[:, None], batch.velocities], dim=-1).to(noise.dtype)
            return self._forward(x[:, None] + noise)

    def _forward(self, x: Tensor) -> dict[str, Tensor]:
        lead = x.shape[:2]
        outputs = {}
        if self.conv1 is None:  # nothing wanted but the samples axis
            return {"samples": x[..., 0, 0, 0]}
        x1 = self.conv1(x.flatten(0, 1))
        if self.matrices:
            outputs["matrices"] = self.matrix_head(self.pool(x1)).unflatten(0, lead)
        if self.scores:
            x2 = self.conv2(x1)
            keep = torch.ones_like(x2[..., :1, :])
            x2 = x2 * nn.functional.dropout(keep, self.dropout, self.training)
            x12 = torch.cat([x1, x2], dim=-1)
            x3 = self.conv3(x12)
            x3 = torch.cat([x3, x3.mean(1, keepdim=True).expand_as(x3)], dim=-1)  # (M, n, d, 2 w)
            frame = self.frame(x3)  # (M, n, d, 3)
            whole = (x3.mT @ frame).flatten(2).amax(1, keepdim=True)  # (M, 1, 6 w)
            local = (x12.mT @ frame).flatten(2)
            score = self.score_head(torch.cat([whole.expand_as(local), local], dim=-1))
            outputs["scores"] = score.squeeze(-1).unflatten(0, lead)
        return outputs
