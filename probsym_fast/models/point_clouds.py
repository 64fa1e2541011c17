"""Embeddings and readouts of point clouds: coordinates and features in; points, vectors or scalars out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_bool, check_count, check_type
from probsym_fast.batches import check_all_valid, check_batch
from probsym_fast.groups import Group, PointClouds, Product, Symmetric

POOLS = "sum", "mean"


class NodeVectors(nn.Module):
    """Nodes with their coordinates and features, and features of pairs: (B, S, n, d (+ d) (+ F)) and (B, S or 1, n, n, C).

    Coordinates are positions, then velocities if there are any; features are invariant and come last. Without edges in the
    batch, the first tensor is all. Features of pairs have one sample where the group leaves them unchanged (`Group.keeps`).

    lengths: append the number of valid nodes, (B, S) int64, at least 1, for a backbone that takes it (`Transformer`,
    `fuse` of an nn.TransformerEncoder); other nodes are 0. None: only for a batch with num_nodes. Without it a batch with
    num_nodes is a ValueError, since the backbone would take every node.
    """

    def __init__(self, lengths: bool | None = False):
        super().__init__()
        self.lengths = None if lengths is None else check_bool("NodeVectors", "lengths", lengths)

    def extra_repr(self) -> str:
        return f"lengths={self.lengths}"

    def forward(self, batch: PointClouds, group: Group, g: Any) -> tuple[Tensor, ...]:
        check_batch("NodeVectors", batch, "positions")
        if self.lengths is False:
            check_all_valid("NodeVectors", batch, "; for a backbone that takes lengths set lengths=True")
        x = _coordinates(batch, group, g)
        given = [x]
        if (edges := _given(batch, "edges")) is not None:
            given.append(edges[:, None] if group.keeps("nnc") else group.act(g, edges, "nnc", inverse=True))
        if self.lengths or (self.lengths is None and batch.num_nodes is not None):
            B, S, n, _ = x.shape
            counts = torch.full((B,), n, device=x.device) if batch.num_nodes is None else batch.num_nodes.clamp(min=1)
            given.append(counts[:, None].expand(B, S))
        return tuple(given)


class FlatCloud(nn.Module):
    """All values of `NodeVectors` but those of pairs in one vector, for an MLP: (B, S, n (d (+ d) (+ F))).

    Values of nodes that are not valid are 0.

    n: the nodes that the vector has room for, for batches that are padded to fewer; the others are 0. None: as many as the
    batch has. ValueError for a batch with more. Symmetric(n) takes no batch with fewer: pad it with `PointClouds(..., n=n)`.
    """

    def __init__(self, n: int | None = None):
        super().__init__()
        self.n = None if n is None else check_count("FlatCloud", "n", n)

    def extra_repr(self) -> str:
        return "" if self.n is None else f"n={self.n}"

    def forward(self, batch: PointClouds, group: Group, g: Any) -> tuple[Tensor]:
        check_batch("FlatCloud", batch, "positions")
        x = _coordinates(batch, group, g)
        if self.n is not None:
            if x.shape[2] > self.n:
                got = tuple(batch.positions.shape)
                raise ValueError(f"FlatCloud: positions must be (B, n, d) with n of at most {self.n}, got {got}")
            x = nn.functional.pad(x, (0, 0, 0, self.n - x.shape[2]))
        return (x.flatten(2),)


class PairTokens(nn.Module):
    """One token per pair of nodes: features of pairs, if any, and those of `NodeVectors` on the diagonal: (B, S, n n, ...).

    Raises ValueError for a batch with num_nodes, which the backbone would ignore.
    """

    def forward(self, batch: PointClouds, group: Group, g: Any) -> tuple[Tensor]:
        check_batch("PairTokens", batch, "positions")
        check_all_valid("PairTokens", batch)
        x = _coordinates(batch, group, g)
        tokens = torch.diag_embed(x.movedim(-1, 2)).movedim(2, -1)  # (B, S, n, n, width)
        if (edges := _given(batch, "edges")) is not None:
            tokens = torch.cat([tokens, group.act(g, edges, "nnc", inverse=True)], dim=-1)
        return (tokens.flatten(2, 3),)


class NodeReadout(nn.Module):
    """One point per node, averaged over samples: (B, S, n, d) -> (B, n, d).

    displacement=False: the output is a position in the element's frame (layout "np": the translation is restored).
    displacement=True: it is a vector (layout "nv"), added to the node's position.
    In a batch with num_nodes, rows of invalid nodes are 0.
    """

    layout = "np"  # of the prediction, for `equivariance_error`

    def __init__(self, displacement: bool):
        super().__init__()
        self.displacement = check_bool("NodeReadout", "displacement", displacement)

    def forward(self, outputs: Tensor, batch: PointClouds, group: Group, g: Any) -> Tensor:
        y = group.act(g, outputs, "nv" if self.displacement else "np", mean=True)
        return _of_valid(batch, batch.positions + y if self.displacement else y)


class LayoutReadout(nn.Module):
    """Outputs of any layout, moved by the elements and averaged over samples: (B, S, *layout) -> (B, *layout).

    layout: as in `groups.Group`, such as "nv" for a vector per node or "v" for one per cloud. Where it begins with "n",
    values of nodes that are not valid are 0.
    """

    def __init__(self, layout: str):
        super().__init__()
        check_type("LayoutReadout", "layout", layout, str, "a str")
        self.layout = layout

    def extra_repr(self) -> str:
        return f"layout={self.layout!r}"

    def forward(self, outputs: Tensor, batch: PointClouds, group: Group, g: Any) -> Tensor:
        y = group.act(g, outputs, self.layout, mean=True)
        if not self.layout.startswith("n") or batch.num_nodes is None:
            return y
        valid = torch.arange(y.shape[1], device=y.device) < batch.num_nodes[:, None]
        return torch.where(valid.view(*valid.shape, *(1,) * (y.ndim - 2)), y, 0)


class PooledReadout(nn.Module):
    """One invariant vector per cloud, averaged over samples: (B, S, n, C) -> (B, C).

    pool: "sum" over the valid nodes, as an energy is of its atoms, or "mean" (0 for a cloud without nodes).
    """

    layout = "c"  # of the prediction, for `equivariance_error`

    def __init__(self, pool: str = "sum"):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"PooledReadout: pool must be one of {POOLS}, got {pool!r}")
        self.pool = pool

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}"

    def forward(self, outputs: Tensor, batch: PointClouds, group: Group, g: Any) -> Tensor:
        n = outputs.shape[2]
        y = _of_valid(batch, outputs.mean(1)).sum(1)  # the slots of permuted nodes are valid as the nodes are
        if self.pool == "sum":
            return y
        return y / n if batch.num_nodes is None else y / batch.num_nodes.clamp(min=1)[:, None].to(y.dtype)


def _coordinates(batch: PointClouds, group: Group, g: Any) -> Tensor:
    """g^-1 applied to positions, velocities and features: (B, S, n, d (+ d) (+ F)). ValueError for another n than S_n's."""
    for factor in group.factors if isinstance(group, Product) else (group,):
        if isinstance(factor, Symmetric) and factor.axis == "n" and factor.n != batch.positions.shape[1]:
            n, got = factor.n, tuple(batch.positions.shape)
            raise ValueError(
                f"{factor}: positions must be (B, n, d) with n = {n}, got {got}; pad them: PointClouds(..., n={n})"
            )
    given = {"np": batch.positions, "nv": _given(batch, "velocities"), "nc": _given(batch, "features")}
    parts = [
        group.act(g, _of_valid(batch, x), layout, inverse=True) for layout, x in given.items() if x is not None
    ]  # moves no value of a node that is not valid, and so has no gradient by it
    return _of_valid(batch, torch.cat(parts, dim=-1), axis=2)


def _given(batch: PointClouds, name: str) -> Tensor | None:
    """A field that a batch of another kind need not have."""
    return getattr(batch, name, None)


def _of_valid(batch: PointClouds, x: Tensor, axis: int = 1) -> Tensor:
    """x (B, ..., n, C), with the nodes on that axis, and 0 at those that are not valid."""
    if batch.num_nodes is None:
        return x
    valid = torch.arange(x.shape[axis], device=x.device) < batch.num_nodes[:, None]  # (B, n)
    return torch.where(valid.view(x.shape[0], *(1,) * (axis - 1), x.shape[axis], 1), x, 0)
