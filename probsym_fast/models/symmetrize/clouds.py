"""The parts around a network on point clouds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from probsym_fast.batches import PointClouds
from probsym_fast.groups import Group, Orthogonal, Product, Symmetric
from probsym_fast.groups.euclidean import Motions
from probsym_fast.models.backbones.folded import Folded
from probsym_fast.models.backbones.transformer import Transformer
from probsym_fast.models.graphs import MeanReadout
from probsym_fast.models.point_clouds import (
    FlatCloud,
    LayoutReadout,
    NodeReadout,
    NodeVectors,
    PairTokens,
    PooledReadout,
)
from probsym_fast.models.symmetrize.choices import width_of
from probsym_fast.models.symmetrize.networks import EncoderOnNodes, WithLengths, first_linear, like, takes_any_axes


class CloudParts:
    """The parts for point clouds."""

    def __init__(self, net, group, clouds: PointClouds, tokens, output, out_features):
        self.net, self.clouds, self.output, self.out_features = net, clouds, output, out_features
        self.n, self.d = clouds.positions.shape[1:]
        for factor in group.factors if isinstance(group, Product) else (group,):
            n, d = getattr(factor, "n", self.n), getattr(factor, "d", self.d)
            if isinstance(factor, Symmetric) and factor.axis == "n" and n != self.n:
                way_out = f"; pad the clouds: PointClouds(..., n={n}) or from_data(..., n={n})" if n > self.n else ""
                raise ValueError(
                    f"symmetrize: group must permute the n = {self.n} points of the example, got {factor}{way_out}"
                )
            if isinstance(factor, Orthogonal | Motions) and d != self.d:
                raise ValueError(
                    f"symmetrize: group must act in the d = {self.d} dimensions of the example, got {factor}"
                )
        if tokens is None:
            flat = not isinstance(net, nn.TransformerEncoder | Transformer) and first_linear(net) == self.n * width_of(
                clouds
            )
            tokens = "flat" if flat and self.n > 1 else "nodes"
        self.tokens = tokens
        if out_features is not None and not isinstance(net, nn.TransformerEncoder):
            got = f"{out_features} for {type(net).__name__}"
            raise ValueError(f"symmetrize: out_features must be None for a network with outputs of its own, got {got}")
        if clouds.edges is not None and tokens == "nodes" and isinstance(net, nn.TransformerEncoder):
            shape = tuple(clouds.edges.shape)
            raise ValueError(
                "symmetrize: example must have no edges for an nn.TransformerEncoder on nodes (tokens='pairs' reads them),"
                f" got {shape}"
            )
        if out_features is None and isinstance(net, nn.TransformerEncoder):
            raise ValueError("symmetrize: out_features must be given for an nn.TransformerEncoder, got None")

    def embed(self) -> nn.Module:
        if self.tokens == "flat":
            return FlatCloud(self.n)
        if self.tokens == "pairs":
            return PairTokens()
        return NodeVectors(lengths=None)

    def backbone(self) -> nn.Module:
        net = self.net
        if isinstance(net, nn.TransformerEncoder):
            width = width_of(self.clouds)
            if self.tokens == "pairs" and self.clouds.edges is not None:
                width += self.clouds.edges.shape[3]
            return like(EncoderOnNodes(net, width, self.out_features), net, self.clouds)
        given = net if takes_any_axes(net) else Folded(net)
        if self.tokens == "nodes" and not isinstance(net, Transformer):
            given = WithLengths(given)
        return given

    def readout(self, y: Tensor, pool: str) -> nn.Module:
        n, d, flat = self.n, self.d, self.tokens == "flat"
        if self.output == "invariant" and y.ndim == 3:
            return MeanReadout()
        if self.output == "invariant" and y.ndim == 4 and y.shape[2] == n:
            return PooledReadout(pool)
        wanted = f"(B, S, n, C) with n = {n}" if self.output == "nodes" else f"(B, S, n, d) with n, d = {n}, {d}"
        size = None if self.output == "nodes" else d
        if self.output == "invariant":
            wanted = f"(B, S, C) or (B, S, n, C) with n = {n}"
        elif flat and y.ndim == 3 and y.shape[2] % n == 0 and size in (None, y.shape[2] // n):
            return _Unflattened(n, self._of_nodes())
        elif not flat and y.ndim == 4 and y.shape[2] == n and size in (None, y.shape[3]):
            return self._of_nodes()
        elif flat:
            wanted = f"(B, S, n C) with n = {n}" if size is None else f"(B, S, n d) with n, d = {n}, {d}"
        raise ValueError(f"symmetrize: net must return {wanted} for output {self.output!r}, got {tuple(y.shape)}")

    def _of_nodes(self) -> nn.Module:
        if self.output == "positions":
            return NodeReadout(displacement=True)
        return LayoutReadout("nc" if self.output == "nodes" else "nv")


class _Unflattened(nn.Module):
    """A readout of nodes, for outputs of all nodes in one vector: (B, S, n C) as (B, S, n, C), the batch's own nodes."""

    def __init__(self, n: int, readout: nn.Module):
        super().__init__()
        self.n, self.readout = n, readout

    @property
    def layout(self) -> Any:
        return getattr(self.readout, "layout", None)

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        given = outputs.unflatten(2, (self.n, -1)).narrow(
            2, 0, batch.positions.shape[1]
        )  # `FlatCloud` added the others
        return self.readout(given, batch, group, g)
