"""Vector Neurons: the network of the learned distribution on point clouds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast._autocast import without_autocast
from probsym_fast._checkpointing import checkpoint_layer
from probsym_fast._checks import check_count, check_counts, check_int, check_share, looks_at_values
from probsym_fast.batches import check_all_valid, check_batch
from probsym_fast.distributions.vector_layers import EdgeConvolution, Layer, uniform
from probsym_fast.distributions.vector_steps import LargestInvariant, some_clouds
from probsym_fast.groups import PointClouds
from probsym_fast.ops.reference.vector_edge_convolution import dot, linear


@torch.no_grad()
def _farthest_along(x: Tensor, direction: Tensor) -> Tensor:
    """VN max pooling: the node where <x, direction x> is largest, x (w, d, n, M) -> (w, M)."""
    parts = (x[..., m] for m in some_clouds(x.shape[-1], 3 * math.prod(x.shape[:-1]), x.device))
    return torch.cat([dot(some, linear(direction, some)).max(1).indices for some in parts], -1)


class VectorNeurons(nn.Module):
    """Scores (invariant, one per node) and matrices (equivariant columns) of point clouds with noise.

    A DGCNN (Wang et al. 2019) of vector neurons (Deng et al. 2021, arXiv 2104.12229), as in Kim et al. 2023. An
    orthogonal h on every vector leaves the scores unchanged and turns matrices M into h M; permuting the nodes permutes
    the scores.

    Args:
        channels: 1 (positions) or 2 (positions and velocities).
        width: hidden vectors per node.
        neighbors: k nearest nodes joined to a node, itself included; at most n are used.
        dropout: share of whole vectors dropped in training.
        scores, matrices: the outputs to build.
        dim: d.

    forward(batch, noise): adds noise (B, S, n, d, channels) to [positions - center, velocities]. Returns a dict with
    "scores" (B, S, n) and "matrices" (B, S, d, d), if built, in the dtype of the parameters or float32 if that is better,
    under any autocast.
    Gradients: of any order, to the parameters, the noise and the batch. Time and memory grow as B S n^2 width d.
    Where `ops.vector_edge_convolution` has a kernel the edge convolutions run as one op each, and no tensor of pairs is
    written; on a GPU where their `one_pass` is True. Under torch.func transforms it runs in plain torch; in training mode
    they must take its buffers as inputs too.
    Raises ValueError for shapes, for a batch with num_nodes (every node counts as valid), and for positions, velocities or
    noise that are not finite (on a GPU only in debug mode).
    """

    pool: Tensor

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
        owner = "VectorNeurons"
        channels = check_int(owner, "channels", channels)
        neighbors, dim = check_counts(owner, neighbors=neighbors, dim=dim)
        dropout = check_share(owner, "dropout", dropout)
        if channels not in (1, 2):
            raise ValueError(f"VectorNeurons: channels must be 1 or 2 (positions, velocities), got {channels}")
        if not (scores or matrices):
            raise ValueError("VectorNeurons: scores or matrices must be True, got False for both")
        width = check_count(
            owner, "width", width, least=2 if scores else 1
        )  # the frame of a score has width // 2 channels
        self.channels, self.width, self.dim, self.dropout = channels, width, dim, dropout
        self.scores, self.matrices = scores, matrices
        self.conv1 = EdgeConvolution(channels, width, neighbors)
        if matrices:
            self.register_buffer("pool", uniform(width, width))
            self.matrix_head = nn.Parameter(uniform(dim, width))
        if scores:
            self.conv2 = EdgeConvolution(width, width, neighbors)
            self.conv3 = Layer(2 * width, width, shared_direction=True)
            self.frame1 = Layer(2 * width, width)
            self.frame2 = Layer(width, width // 2)
            self.frame_head = nn.Parameter(uniform(dim, width // 2))
            self.score_head = nn.Linear(4 * width * dim, 1)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name in ("scores", "matrices") if getattr(self, name))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, width={self.width}, dim={self.dim}, outputs={self.outputs}"

    def noise_shape(self, batch: PointClouds, samples: int) -> tuple[int, ...]:
        """(B, S, n, d, channels)."""
        check_batch("VectorNeurons", batch, "positions", "velocities")
        B, n, d = batch.positions.shape
        return B, samples, n, d, self.channels

    def forward(self, batch: PointClouds, noise: Tensor) -> dict[str, Tensor]:
        check_all_valid("VectorNeurons", batch)
        B, n, d = batch.positions.shape
        if d != self.dim:
            raise ValueError(f"VectorNeurons: positions must be (B, n, {self.dim}), got {(B, n, d)}")
        if noise.dim() != 5 or (B, n, d, self.channels) != (noise.shape[0], *noise.shape[2:]):
            raise ValueError(f"VectorNeurons: noise must be {(B, 'S', n, d, self.channels)}, got {tuple(noise.shape)}")
        S = noise.shape[1]
        if self.training and B * S * n == 1:
            raise ValueError("VectorNeurons: training needs B S n > 1 for the batch statistics, got 1")
        read = {"positions": batch.positions, "velocities": batch.velocities, "noise": noise}
        for name, values in read.items():
            wanted = (name != "velocities" or self.channels == 2) and looks_at_values(values)
            if wanted and not values.isfinite().all():
                raise ValueError(f"VectorNeurons: {name} must be finite, got NaN or infinity")
        with without_autocast(noise.device):
            dtype = torch.promote_types(self.conv1.feature.dtype, torch.float32)  # below it nodes would tie
            positions, center = (y.to(torch.promote_types(y.dtype, dtype)) for y in (batch.positions, batch.center))
            x = torch.stack([positions - center[:, None], batch.velocities.to(positions)][: self.channels], -1)
            x = (x[:, None] + noise).to(dtype)
            x1 = self.conv1(x.flatten(0, 1).permute(3, 2, 1, 0).contiguous())
            outputs = {}
            if self.matrices:
                outputs["matrices"] = self._equivariant(x1).permute(2, 1, 0).contiguous().view(B, S, d, d)
            if self.scores:
                outputs["scores"] = self._invariant(x1).t().contiguous().view(B, S, n)
        return outputs

    def _equivariant(self, x: Tensor) -> Tensor:
        """x (w, d, n, M) -> d vectors per cloud, (d, d, M): max pooling over the nodes, then a linear map."""
        node = _farthest_along(x, self.pool.to(x.dtype))[:, None, None].expand(-1, x.shape[1], 1, -1)
        return linear(self.matrix_head.to(x.dtype), x.gather(2, node).squeeze(2))

    def _invariant(self, x1: Tensor) -> Tensor:
        """x (w, d, n, M) -> one score per node, (n, M).

        A linear map of <[x1, x2]_c, z_v>, with z the frame of the node, and of the largest <[x3, mean x3]_c, z_v> over
        all nodes.
        """
        x2 = self.conv2(x1)
        x2 = x2 * F.dropout(torch.ones_like(x2[:, :1]), self.dropout, self.training)
        x3 = checkpoint_layer(self.conv3, x1, x2, modules=[self.conv3])
        mean = x3.mean(2, keepdim=True)
        z = checkpoint_layer(self.frame1, x3, mean, modules=[self.frame1])
        z = checkpoint_layer(self.frame2, z, modules=[self.frame2])
        frame_head, score_head, bias = (p.to(x1.dtype) for p in (self.frame_head, *self.score_head.parameters()))
        z = linear(frame_head, z)  # (v, d, n, M)
        cloud, node = score_head.view(2, 2 * self.width, self.dim)  # (2 w, v) each
        node1, node2 = node.t().split(self.width, 1)
        local = ((linear(node1, x1) + linear(node2, x2)) * z).flatten(0, 1).sum(0)
        largest = torch.cat([LargestInvariant.of(x3, z), LargestInvariant.of(mean, z)])
        return local + cloud.flatten() @ largest.flatten(0, 1) + bias
