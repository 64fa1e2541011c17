"""Vector Neurons: the network of the learned distribution on point clouds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast._autocast import promoted, without_autocast
from probsym_fast._checkpointing import checkpoint_layer
from probsym_fast._checks import (
    as_number,
    check_count,
    check_counts,
    check_int,
    check_share,
    looks_at_values,
    transformed,
)
from probsym_fast.batches import check_batch
from probsym_fast.distributions.vector_layers import EdgeConvolution, Layer, uniform
from probsym_fast.distributions.vector_nodes import ListedNodes, Nodes, ValidNodes
from probsym_fast.groups import PointClouds
from probsym_fast.ops.reference.vector_edge_convolution import linear

GATES = 8  # copies of an input vector, each times a number from the node's features


class VectorNeurons(nn.Module):
    """Scores (invariant, one per node) and matrices (equivariant columns) of point clouds with noise.

    A DGCNN (Wang et al. 2019) of vector neurons (Deng et al. 2021, arXiv 2104.12229), as in Kim et al. 2023. An
    orthogonal h on every vector leaves the scores unchanged and turns matrices M into h M; permuting the nodes permutes
    the scores.

    Args:
        channels: 1 (positions) or 2 (positions and velocities, which the batch must then have).
        width: hidden vectors per node.
        neighbors: k nearest nodes joined to a node, itself included; at most n are used.
        dropout: share of whole vectors dropped in training.
        scores, matrices: the outputs to build.
        dim: d.
        features: F, invariant features of nodes to read, such as one-hot types; 0: none. A perceptron makes numbers of them:
            8 for each node, which multiply copies of its input vectors, and one for each vector of the first two layers,
            from 0 to 2.
        column_noise: noise of their own for the columns of the matrices, as a share of that of the nodes. Fewer nodes than
            dimensions (two atoms in space), or nodes in a plane without noise, give dependent columns, which
            `ops.orthogonal_frame` completes by constants: the frames are then not equivariant, and have no gradient there.
            With this noise they are, and have one.

    forward(batch, noise): adds noise (B, S, n, d, channels) to [positions - center, velocities]. Returns a dict with
    "scores" (B, S, n) and "matrices" (B, S, d, d), if built, in the dtype of the parameters or float32 if that is better,
    under any autocast. In a batch with num_nodes neighbours, maxima, means and statistics are of the valid nodes, and other
    nodes have the score 0: padding changes nothing. Where a CPU runs it as it is, time grows with the valid nodes.
    Gradients: of any order, to the parameters, the noise and the batch. Time and memory grow as B S n^2 width d.
    Where `ops.vector_edge_convolution` has a kernel the edge convolutions run as one op each, and no tensor of pairs is
    written, unless their `one_pass` is False. Under torch.func transforms it runs in plain torch; in training mode
    they must take its buffers as inputs too.
    Raises ValueError for shapes, and for valid positions, velocities, features or noise that are not finite (on a GPU only
    in debug mode).
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
        features: int = 0,
        column_noise: float = 0.0,
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
        features = check_count(owner, "features", features, least=0)
        if (share := as_number(column_noise)) is None:
            raise TypeError(f"VectorNeurons: column_noise must be a number, got {type(column_noise).__name__}")
        if not 0 <= share < math.inf:
            raise ValueError(f"VectorNeurons: column_noise must be finite and >= 0, got {share}")
        self.column_noise = share
        self.channels, self.width, self.dim, self.dropout, self.features = channels, width, dim, dropout, features
        self.scores, self.matrices = scores, matrices
        self.conv1 = EdgeConvolution(channels * (1 + GATES if features else 1), width, neighbors)
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
        if features:
            gates = GATES + (2 if scores else 1) * width
            self.gates = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, gates))

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name in ("scores", "matrices") if getattr(self, name))

    def extra_repr(self) -> str:
        features = f", features={self.features}" if self.features else ""
        return f"channels={self.channels}, width={self.width}, dim={self.dim}{features}, outputs={self.outputs}"

    def noise_shape(self, batch: PointClouds, samples: int) -> tuple[int, ...]:
        """(B, S, n, d, channels); with column_noise (B, S, d + n, d, channels), that of the columns first."""
        check_batch("VectorNeurons", batch, *(name for name, _ in self._read()))
        B, n, d = batch.positions.shape
        if n < 1:
            raise ValueError(f"VectorNeurons: positions must be (B, n, d) with n >= 1, got {(B, n, d)}")
        return B, samples, n + self._noisy_columns, d, self.channels

    @property
    def _noisy_columns(self) -> int:
        return self.dim if self.matrices and self.column_noise else 0

    def _read(self) -> Iterator[tuple[str, str]]:
        """The fields to read of a batch, and their shapes in words."""
        yield "positions", f"(B, n, {self.dim})"
        if self.channels == 2:
            yield "velocities", f"(B, n, {self.dim})"
        if self.features:
            yield "features", f"(B, n, {self.features})"

    def forward(self, batch: PointClouds, noise: Tensor) -> dict[str, Tensor]:
        B, n, d = batch.positions.shape
        given: dict[str, Any] = {name: getattr(batch, name) for name, _ in self._read()}
        for name, axes in self._read():
            x, width = given[name], self.features if name == "features" else self.dim
            if x is None or tuple(x.shape) != (B, n, width):
                raise ValueError(f"VectorNeurons: {name} must be {axes}, got {None if x is None else tuple(x.shape)}")
        rows = n + self._noisy_columns
        if noise.dim() != 5 or (B, rows, d, self.channels) != (noise.shape[0], *noise.shape[2:]):
            raise ValueError(
                f"VectorNeurons: noise must be {(B, 'S', rows, d, self.channels)}, got {tuple(noise.shape)}"
            )
        of_columns, noise = noise.split_with_sizes([rows - n, n], 2)
        counts, S = batch.num_nodes, noise.shape[1]
        if counts is not None:
            inside = torch.arange(n, device=noise.device) < counts[:, None]
            given = {name: torch.where(inside[..., None], x, 0) for name, x in given.items()}
        if self.training and B * S * n == 1:
            raise ValueError("VectorNeurons: training needs B S n > 1 for the batch statistics, got 1")
        for name, x in (*given.items(), ("noise", noise)):
            if looks_at_values(x) and not x.isfinite().all():
                raise ValueError(f"VectorNeurons: {name} must be finite, got NaN or infinity")
        given |= {"noise": noise, "center": batch.center}
        outputs = self._of_valid(given, counts, S)
        if self._noisy_columns:
            columns = of_columns[..., 0].mT.to(outputs["matrices"])  # (B, S, d, d)
            outputs["matrices"] = outputs["matrices"] + self.column_noise * columns
        return outputs

    def _of_valid(self, given: dict[str, Any], counts: Tensor | None, S: int) -> dict[str, Tensor]:
        noise, (B, n) = given["noise"], given["positions"].shape[:2]
        with without_autocast(noise.device):
            if counts is None:
                return self._outputs(given, Nodes())
            if counts.device.type != "cpu" or not looks_at_values(counts, noise) or transformed() or not B:
                return self._outputs(given, ValidNodes(counts.repeat_interleave(S, output_size=B * S), n))
            return self._by_size(given, counts)

    def _by_size(self, given: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        """The outputs of clouds of different sizes: computed without padding, the largest first."""
        most, (B, S, n) = max(1, int(counts.max())), given["noise"].shape[:3]
        nodes, order = Nodes(), torch.arange(B)
        if int(counts.min()) < most:
            order = counts.argsort(descending=True, stable=True)
            nodes = ListedNodes(counts[order].repeat_interleave(S), most)
        axes = {"center": None, "noise": 2}
        some = {
            name: x if (axis := axes.get(name, 1)) is None else x.narrow(axis, 0, most) for name, x in given.items()
        }
        outputs = self._outputs({name: x[order] for name, x in some.items()}, nodes)
        outputs = {name: y[order.argsort()] for name, y in outputs.items()}
        return {name: F.pad(y, (0, n - most)) if name == "scores" else y for name, y in outputs.items()}

    def _outputs(self, given: dict[str, Tensor], nodes: Nodes) -> dict[str, Tensor]:
        (B, S, n, d), noise = given["noise"].shape[:4], given["noise"]
        dtype = promoted(self.conv1.feature.dtype, torch.float32)  # below it nodes would tie
        positions, center = (x.to(promoted(x.dtype, dtype)) for x in (given["positions"], given["center"]))
        vectors = [positions - center[:, None], *([given["velocities"].to(positions)] if self.channels == 2 else [])]
        x = (torch.stack(vectors, -1)[:, None] + noise).to(dtype)
        x = x.flatten(0, 1).permute(3, 2, 1, 0)  # (channels, d, n, M)
        gates: list[Tensor] = []  # of the vectors of a layer, (w, 1, n, M)
        if self.features:
            lift, *gates = self._gates(given["features"].to(dtype), S)
            x = torch.cat([x, (x * lift.unsqueeze(1)).flatten(0, 1)])
        x1 = self.conv1(x.contiguous(), nodes.num_nodes)
        x1 = x1 * gates[0] if gates else x1
        outputs = {}
        if self.matrices:
            outputs["matrices"] = self._equivariant(x1, nodes).permute(2, 1, 0).contiguous().view(B, S, d, d)
        if self.scores:
            outputs["scores"] = self._invariant(x1, nodes, *gates[1:]).t().contiguous().view(B, S, n)
        return outputs

    def _gates(self, features: Tensor, samples: int) -> list[Tensor]:
        """(8, 1, n, M), (w, 1, n, M) and, for scores, another of these, from features (B, n, F)."""
        first, _, second = self.gates
        weights = [x.to(features.dtype) for x in (*first.parameters(), *second.parameters())]
        hidden = F.silu(F.linear(features, *weights[:2]))
        gates = F.linear(hidden, *weights[2:]).permute(2, 1, 0)  # (gates, n, B)
        lift, *others = (
            gates.repeat_interleave(samples, -1)
            .unsqueeze(1)
            .split_with_sizes([GATES, *(self.width,) * (2 if self.scores else 1)])
        )
        return [lift, *(2 * x.sigmoid() for x in others)]

    def _equivariant(self, x: Tensor, nodes: Nodes) -> Tensor:
        """x (w, d, n, M) -> d vectors per cloud, (d, d, M): max pooling over the nodes, then a linear map."""
        node = nodes.farthest(x, self.pool.to(x.dtype))[:, None, None].expand(-1, x.shape[1], 1, -1)
        return linear(self.matrix_head.to(x.dtype), x.gather(2, node).squeeze(2))

    def _invariant(self, x1: Tensor, nodes: Nodes, gate: Tensor | None = None) -> Tensor:
        """x (w, d, n, M) -> one score per node, (n, M).

        A linear map of <[x1, x2]_c, z_v>, with z the frame of the node, and of the largest <[x3, mean x3]_c, z_v> over
        all nodes.
        """
        x2 = self.conv2(x1, nodes.num_nodes)
        x2 = x2 if gate is None else x2 * gate
        x1, x2 = nodes.of(x1), nodes.of(x2)
        x2 = x2 * F.dropout(torch.ones_like(x2[:, :1]), self.dropout, self.training)
        x3 = checkpoint_layer(partial(self.conv3, inside=nodes.inside), x1, x2, modules=[self.conv3])
        mean = nodes.mean(x3)
        z = checkpoint_layer(partial(self.frame1, inside=nodes.inside), x3, mean, modules=[self.frame1])
        z = checkpoint_layer(partial(self.frame2, inside=nodes.inside), z, modules=[self.frame2])
        frame_head, score_head, bias = (p.to(x1.dtype) for p in (self.frame_head, *self.score_head.parameters()))
        z = linear(frame_head, z)  # (v, d, ...)
        cloud, node = score_head.view(2, 2 * self.width, self.dim)  # (2 w, v) each
        node1, node2 = node.t().split(self.width, 1)
        local = ((linear(node1, x1) + linear(node2, x2)) * z).flatten(0, 1).sum(0)[None, None]
        largest = torch.cat([nodes.largest(x3, z), nodes.largest(mean, z)])
        whole = (cloud.flatten() @ largest.flatten(0, 1)).view(1, 1, 1, -1)
        return nodes.padded(local + nodes.spread(whole) + bias)[0, 0]
