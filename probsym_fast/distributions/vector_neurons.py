"""Vector Neurons: the network of the learned distribution on point clouds.

Vector features are (channels, d, n, M): M = B S clouds on the last axis, so that every elementwise pass runs over
contiguous memory and a linear map of the channels is one matrix product. Pairs of nodes are (channels, d, i, j, M).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from probsym_fast._recompute import layer
from probsym_fast.groups import PointClouds
from probsym_fast.ops._op import looks_at_values

SLOPE = 0.2  # of the leaky ReLU
NORM_EPS = 1e-6  # |p| is sqrt(<p, p> + NORM_EPS^2): smooth at zero
VARIANCE_EPS = 1e-5
MOMENTUM = 0.1  # of the running statistics
CHUNK = 500_000  # numbers of a pair tensor worked on at a time, to stay in the cache


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product over axis 1, the d components."""
    out = x[:, 0] * y[:, 0]
    for a in range(1, x.shape[1]):
        out.addcmul_(x[:, a], y[:, a])
    return out


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in) times (in, d, ...) -> (out, d, ...)"""
    return (weight @ x.flatten(1)).unflatten(1, x.shape[1:])


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *(1,) * (like.dim() - 1))


def _chunks(shape: torch.Size) -> Iterator[slice]:
    step = max(1, CHUNK // math.prod(shape[:-1]))
    return (slice(i, i + step) for i in range(0, shape[-1], step))


def _sum_of(terms: tuple[Tensor, ...], m: slice) -> Tensor:
    first, *rest = (t[..., m] for t in terms)
    return first + rest[0] if rest else first


class _NormMoments(Function):
    """Mean and variance per channel of |p| for p the sum of one or two broadcastable terms, weighted by 0 or 1."""

    @staticmethod
    def forward(ctx, weight: Tensor | None, *terms: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(*(t.shape for t in terms))
        norm = terms[0].new_empty(shape[0], *shape[2:])
        for m in _chunks(shape):
            p = _sum_of(terms, m)
            norm[..., m] = _dot(p, p).add_(NORM_EPS**2).sqrt_()
        flat = norm.flatten(1)
        weight_flat = None if weight is None else weight.flatten()
        count = flat.shape[1] if weight is None else weight.sum()

        def mean_of(x: Tensor) -> Tensor:
            return (x.sum(1) if weight_flat is None else x @ weight_flat) / count

        mean = mean_of(flat)
        variance = mean_of((flat - mean[:, None]).square_())
        ctx.save_for_backward(weight, norm, mean, *terms)
        ctx.count = count
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor, d_variance: Tensor):
        weight, norm, mean, *terms = ctx.saved_tensors
        slope = d_variance * (2 / ctx.count)
        offset = d_mean / ctx.count - slope * mean
        d_terms = [torch.empty_like(t) for t in terms]
        for m in _chunks(torch.broadcast_shapes(*(t.shape for t in terms))):
            ratio = (_per_channel(offset, norm) / norm[..., m]).add_(_per_channel(slope, norm))  # d norm / norm
            if weight is not None:
                ratio.mul_(weight[..., m])
            d_p = _sum_of(terms, m) * ratio.unsqueeze(1)
            for d_term in d_terms:
                d_term[..., m] = d_p.sum_to_size(d_term[..., m].shape)
        return None, *d_terms


def _activation_factors(p: Tensor, d: Tensor, scale: Tensor, shift: Tensor):
    """The activation is s p - c d; returns s, c and what the gradient needs: 1/|p|, <p, d>, <d, d>."""
    inverse_norm = _dot(p, p).add_(NORM_EPS**2).rsqrt_()
    s = torch.addcmul(_per_channel(scale, inverse_norm), _per_channel(shift, inverse_norm), inverse_norm)
    pd, dd = _dot(p, d), _dot(d, d).add_(NORM_EPS)
    c = (s * pd).clamp_max_(0).mul_(1 - SLOPE).div_(dd)
    return s, c, inverse_norm, pd, dd


class _VectorActivation(Function):
    """Norm scaling, then leaky ReLU along a direction: y = (scale |p| + shift) p / |p|; y - (1 - slope) min(<y, d>, 0)
    d / <d, d>. p (w, d, ...), d (w or 1, d, ...), scale and shift (w,)."""

    @staticmethod
    def forward(ctx, p: Tensor, d: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        s, c, inverse_norm, pd, dd = _activation_factors(p, d, scale, shift)
        ctx.save_for_backward(p, d, shift, s, c, inverse_norm, pd, dd)
        return (p * s.unsqueeze(1)).addcmul_(d, c.unsqueeze(1), value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        p, d, shift, s, c, inverse_norm, pd, dd = ctx.saved_tensors
        d_s = _dot(g, p)
        e = _dot(g, d).div_(dd).masked_fill_(c >= 0, 0)  # -d_c / <d, d>, where the leaky side is on
        d_pd = e * (SLOPE - 1)
        d_s.addcmul_(d_pd, pd)
        d_pd.mul_(s)
        d_shift = d_s * inverse_norm
        d_scale_sum, d_shift_sum = d_s.flatten(1).sum(1), d_shift.flatten(1).sum(1)
        radial = d_shift.mul_(inverse_norm).mul_(inverse_norm).mul_(-_per_channel(shift, d_shift))
        d_p = (g * s.unsqueeze(1)).addcmul_(d, d_pd.unsqueeze(1)).addcmul_(p, radial.unsqueeze(1))
        d_d = (p * d_pd.unsqueeze(1)).addcmul_(g, c.unsqueeze(1), value=-1)
        d_d.addcmul_(d, e.mul_(c).unsqueeze(1), value=2)
        return d_p, d_d.sum_to_size(d.shape), d_scale_sum, d_shift_sum


class _LargestInvariant(Function):
    """max over the nodes of <x_c, z_v>: x (c, d, n or 1, M), z (v, d, n, M) -> (c, v, M)."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor) -> Tensor:
        largest = _dot(x.unsqueeze(2), z.transpose(0, 1).unsqueeze(0)).max(2, keepdim=True)
        ctx.save_for_backward(x, z, largest.indices)
        return largest.values.squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, z, node = ctx.saved_tensors
        g = g.new_zeros(*g.shape[:2], *z.shape[2:]).scatter_(2, node, g.unsqueeze(2))  # (c, v, n, M)
        d_x = _dot(g.unsqueeze(2), z.unsqueeze(0)).sum_to_size(x.shape)
        d_z = _dot(g.transpose(0, 1).unsqueeze(2), x.unsqueeze(0))
        return d_x, d_z


def _near(x: Tensor, k: int) -> Tensor:
    """(i, j, M): whether j is among the k nodes nearest to i, itself included, over all channels. Nodes as far as
    the k-th are in, which keeps the choice independent of the order of the nodes."""
    n, clouds = x.shape[2:]
    if k >= n:
        return torch.ones(n, n, clouds, dtype=torch.bool, device=x.device)
    nodes = x.detach().flatten(0, 1).permute(2, 1, 0).contiguous()  # (M, n, channels d)
    distance = torch.cdist(nodes, nodes, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance <= distance.kthvalue(k, -1, keepdim=True).values).permute(1, 2, 0).contiguous()


@torch.no_grad()
def _farthest_along(x: Tensor, direction: Tensor) -> Tensor:
    """VN max pooling: the node where <x, direction x> is largest, x (w, d, n, M) -> (w, M)."""
    return _dot(x, _linear(direction, x)).max(1).indices


@torch.no_grad()
def _select_neighbor(p_terms, d_terms, scale: Tensor, shift: Tensor, near: Tensor, direction: Tensor) -> Tensor:
    """The neighbour j that VN max pooling keeps for every channel and node i: (w, i, M)."""
    shape = torch.broadcast_shapes(*(t.shape for t in p_terms))
    neighbor = near.new_empty(shape[0], shape[2], shape[4], dtype=torch.int64)
    for m in _chunks(shape):
        p, d = _sum_of(p_terms, m), _sum_of(d_terms, m)
        s, c, *_ = _activation_factors(p, d, scale, shift)
        x = p.mul_(s.unsqueeze(1)).addcmul_(d, c.unsqueeze(1), value=-1)
        height = _dot(x, _linear(direction, x)).masked_fill_(~near[..., m], -math.inf)
        neighbor[..., m] = height.max(2).indices
    return neighbor


class _Norm(nn.Module):
    """Batch normalisation of the vectors' norms, as (scale, shift): |p| becomes scale |p| + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, *terms: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = self.running_mean, self.running_var
        if self.training and terms[0].numel():
            weight = None if near is None else near.to(terms[0].dtype)
            mean, variance = _NormMoments.apply(weight, *terms)
            count = terms[0][0, 0].numel() if weight is None else weight.sum()
            with torch.no_grad():  # NaN and infinity would stay in the statistics for good
                finite = (mean + variance).isfinite()
                unbiased = variance * (count / (count - 1))
                self.running_mean.lerp_(torch.where(finite, mean, self.running_mean), MOMENTUM)
                self.running_var.lerp_(torch.where(finite, unbiased, self.running_var), MOMENTUM)
        scale = self.weight * (variance + VARIANCE_EPS).rsqrt()
        return scale, self.bias - scale * mean


def _uniform(*shape: int) -> Tensor:
    """Weights as nn.Linear draws them."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1])


class _Layer(nn.Module):
    """Linear, norm batch normalisation and leaky ReLU; the inputs are concatenated (a size of 1 is broadcast)."""

    def __init__(self, in_width: int, width: int, shared_direction: bool = False) -> None:
        super().__init__()
        self.feature = nn.Parameter(_uniform(width, in_width))
        self.direction = nn.Parameter(_uniform(1 if shared_direction else width, in_width))
        self.norm = _Norm(width)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = torch.cat([self.feature, self.direction]).split([x.shape[0] for x in inputs], 1)
        first, *rest = (_linear(w, x) for w, x in zip(weights, inputs, strict=True))
        p, d = sum(rest, first).split([self.feature.shape[0], self.direction.shape[0]])
        return _VectorActivation.apply(p, d, *self.norm(p))


class _EdgeConvolution(_Layer):
    """The layer on [x_j - x_i, x_i] for the k nearest j, then VN max pooling over them.

    The linear map is made once a node: W [x_j - x_i, x_i] = A x_j + C x_i. Pooling takes one neighbour a channel and
    no gradient reaches its direction (argmax), so this is a buffer, and only what was taken is differentiated.
    """

    def __init__(self, in_width: int, width: int, neighbors: int) -> None:
        super().__init__(2 * in_width, width)
        self.neighbors = neighbors
        self.register_buffer("pool", _uniform(width, width))

    def forward(self, x: Tensor) -> Tensor:
        near = _near(x, self.neighbors)
        a, c = torch.cat([self.feature, self.direction]).chunk(2, 1)
        p_neighbor, d_neighbor, p_center, d_center = _linear(torch.cat([a, c - a]), x).chunk(4)
        p_terms = p_neighbor.unsqueeze(2), p_center.unsqueeze(3)
        d_terms = d_neighbor.unsqueeze(2), d_center.unsqueeze(3)
        scale, shift = self.norm(*p_terms, near=near)
        taken = _select_neighbor(p_terms, d_terms, scale, shift, near, self.pool)
        taken = taken.unsqueeze(1).expand_as(p_center)
        p, d = p_neighbor.gather(2, taken) + p_center, d_neighbor.gather(2, taken) + d_center
        return _VectorActivation.apply(p, d, scale, shift)


class VectorNeurons(nn.Module):
    """Scores (invariant, one a node) and matrices (equivariant columns) of point clouds with noise.

    A DGCNN (Wang et al. 2019) of vector neurons (Deng et al. 2021, arXiv 2104.12229), as in Kim et al. 2023. Under an
    orthogonal h on every vector the scores stay and matrices become h M; a permutation of the nodes permutes the scores.

    Args:
        channels: 1 (positions) or 2 (positions and velocities).
        width: vectors a node inside.
        neighbors: k nearest nodes joined to a node, itself included; at most n are taken.
        dropout: share of whole vectors dropped in training.
        scores, matrices: the outputs to build.
        dim: d.

    forward(batch, noise): noise (B, S, n, d, channels) is added to [positions - center, velocities]. Returns a dict with
    "scores" (B, S, n) and "matrices" (B, S, d, d), as asked for, in the dtype of the parameters under any autocast.
    Gradients: first order, to the parameters, the noise and the batch. Time and memory grow as B S n^2 width d.
    Raises ValueError for shapes, and for positions, velocities or noise that are not finite (on a GPU in debug mode only).
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
    ) -> None:
        super().__init__()
        if channels not in (1, 2):
            raise ValueError(f"VectorNeurons: channels must be 1 or 2 (positions, velocities), got {channels}")
        if not (scores or matrices):
            raise ValueError("VectorNeurons: scores or matrices must be True, got False for both")
        if width < (least := 2 if scores else 1):  # the frame of a score has width // 2 channels
            raise ValueError(f"VectorNeurons: width must be at least {least}, got {width}")
        if neighbors < 1:
            raise ValueError(f"VectorNeurons: neighbors must be at least 1, got {neighbors}")
        self.channels, self.width, self.dim, self.dropout = channels, width, dim, dropout
        self.scores, self.matrices = scores, matrices
        self.conv1 = _EdgeConvolution(channels, width, neighbors)
        if matrices:
            self.register_buffer("pool", _uniform(width, width))
            self.matrix_head = nn.Parameter(_uniform(dim, width))
        if scores:
            self.conv2 = _EdgeConvolution(width, width, neighbors)
            self.conv3 = _Layer(2 * width, width, shared_direction=True)
            self.frame1 = _Layer(2 * width, width)
            self.frame2 = _Layer(width, width // 2)
            self.frame_head = nn.Parameter(_uniform(dim, width // 2))
            self.score_head = nn.Linear(4 * width * dim, 1)

    def noise_shape(self, batch: PointClouds, samples: int) -> tuple[int, ...]:
        """(B, S, n, d, channels)."""
        B, n, d = batch.positions.shape
        return B, samples, n, d, self.channels

    def forward(self, batch: PointClouds, noise: Tensor) -> dict[str, Tensor]:
        B, n, d = batch.positions.shape
        if d != self.dim:
            raise ValueError(f"VectorNeurons: positions must be (B, n, {self.dim}), got {(B, n, d)}")
        if noise.dim() != 5 or (B, n, d, self.channels) != (noise.shape[0], *noise.shape[2:]):
            raise ValueError(f"VectorNeurons: noise must be {(B, 'S', n, d, self.channels)}, got {tuple(noise.shape)}")
        S = noise.shape[1]
        if self.training and B * S * n == 1:
            raise ValueError("VectorNeurons: training needs B S n > 1 for the batch statistics, got 1")
        read = {"positions": batch.positions, "velocities": batch.velocities, "noise": noise}
        for name, values in read.items() if looks_at_values(noise) else ():
            if (name != "velocities" or self.channels == 2) and not values.isfinite().all():
                raise ValueError(f"VectorNeurons: {name} must be finite, got NaN or infinity")
        with torch.autocast(noise.device.type, enabled=False):
            x = torch.stack([batch.positions - batch.center[:, None], batch.velocities][: self.channels], -1)
            x = (x[:, None] + noise).to(self.conv1.feature.dtype)
            x1 = layer(self.conv1, x.flatten(0, 1).permute(3, 2, 1, 0).contiguous(), modules=[self.conv1])
            outputs = {}
            if self.matrices:
                outputs["matrices"] = self._equivariant(x1).permute(2, 1, 0).contiguous().view(B, S, d, d)
            if self.scores:
                outputs["scores"] = self._invariant(x1).t().contiguous().view(B, S, n)
        return outputs

    def _equivariant(self, x: Tensor) -> Tensor:
        """x (w, d, n, M) -> d vectors of the cloud, (d, d, M): max pooling over the nodes, then linear."""
        node = _farthest_along(x, self.pool)[:, None, None].expand(-1, x.shape[1], 1, -1)
        return _linear(self.matrix_head, x.gather(2, node).squeeze(2))

    def _invariant(self, x1: Tensor) -> Tensor:
        """x (w, d, n, M) -> a score a node, (n, M).

        A linear map of <[x1, x2]_c, z_v>, z the frame of the node, and of the largest <[x3, mean x3]_c, z_v> of all nodes.
        """
        x2 = layer(self.conv2, x1, modules=[self.conv2])
        x2 = x2 * F.dropout(torch.ones_like(x2[:, :1]), self.dropout, self.training)
        x12 = torch.cat([x1, x2])
        x3 = layer(self.conv3, x12, modules=[self.conv3])
        mean = x3.mean(2, keepdim=True)
        z = layer(self.frame1, x3, mean, modules=[self.frame1])
        z = layer(self.frame2, z, modules=[self.frame2])
        z = _linear(self.frame_head, z)  # (v, d, n, M)
        cloud, node = self.score_head.weight.view(2, 2 * self.width, self.dim)  # (2 w, v) each
        local = (_linear(node.t(), x12) * z).flatten(0, 1).sum(0)
        largest = torch.cat([_LargestInvariant.apply(x3, z), _LargestInvariant.apply(mean, z)])
        return local + cloud.flatten() @ largest.flatten(0, 1) + self.score_head.bias
