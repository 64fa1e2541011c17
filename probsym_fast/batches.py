"""Batches of point clouds, graphs and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from probsym_fast._batch import Batch, of_one_sample
from probsym_fast._checks import MOST_KEYS, check_count, check_key, looks_at_values
from probsym_fast._compilers import is_fake
from probsym_fast._geometric import OWNER, check_agreement, clouds_of, fields_of
from probsym_fast._images import Images as Images

MOST_NODES = 2**63 // MOST_KEYS  # nodes per graph: with the graph's key they name a node in 63 bits


@dataclass(eq=False)
class PointClouds(Batch):
    """B clouds of up to n points in d dimensions.

    positions: (B, n, d). velocities: (B, n, d), or None. edges: (B, n, n, C) features of pairs of points, or None. features:
    (B, n, F) features of points, such as one-hot types, or None. Edges and features are invariant under rotations and
    translations. num_nodes: (B,) int64, the first points of each cloud that are valid, or None: all. Values of other points
    are never read. key: (B,) int64 in 0..2^43 - 1, keys of the clouds for fixed noise, or None.

    ptr: (B + 1,) int64. With it positions, velocities and features are (nodes, ...), the points of all clouds in one list:
    cloud b has points ptr[b] to ptr[b + 1]. They are padded at once, to the largest cloud and one point at least; `listed`
    and `padded` convert values between the two forms. This reads ptr, which waits for a GPU. RuntimeError where a program is
    recorded.

    n: pads to so many points, the same in every batch: for networks of one size (an MLP on all coordinates) and for
    Symmetric(n). Clouds that are (B, m, d) already, m <= n, are padded too, and get num_nodes. Edges (B, m, m, C) are padded
    with them. TypeError unless n is an int, ValueError for a cloud of more points.
    """

    positions: Tensor
    velocities: Tensor | None = None
    edges: Tensor | None = None
    features: Tensor | None = None
    num_nodes: Tensor | None = None
    key: Tensor | None = None
    ptr: InitVar[Tensor | None] = None
    n: InitVar[int | None] = field(default=None, kw_only=True)

    axes: ClassVar = {
        "positions": {0: "batch", 1: "points"},
        "velocities": {0: "batch", 1: "points"},
        "features": {0: "batch", 1: "points"},
        "edges": {0: "batch", 1: "points", 2: "points"},
        "num_nodes": {0: "batch"},
        "key": {0: "batch"},
    }
    fixed: ClassVar = ("points",)

    def __post_init__(self, ptr: Tensor | None, n: int | None) -> None:
        n = None if n is None else check_count("PointClouds", "n", n)
        if ptr is not None:
            self._pad(ptr, n)
        elif n is not None:
            self._pad_further(n)
        if n is not None and self.edges is not None and self.edges.ndim == 4:
            more = n - self.edges.shape[1]
            self.edges = nn.functional.pad(self.edges, (0, 0, 0, more, 0, more)) if more > 0 else self.edges

    def _pad(self, ptr: Tensor, n: int | None) -> None:
        owner, x = "PointClouds", self.positions
        if self.num_nodes is not None:
            raise ValueError(f"{owner}: num_nodes must be None with ptr, got {tuple(self.num_nodes.shape)}")
        _check_field(owner, "positions", x, "(nodes, d)", (None, None))
        _check_field(owner, "ptr", ptr, "(B + 1,)", (None,), x.device, torch.int64)
        if torch.compiler.is_compiling() or is_fake(ptr):
            raise RuntimeError(
                f"{owner}: ptr must be None where a program is recorded; pad the clouds before, with num_nodes"
            )
        _check_ptr(owner, ptr, x.shape[0])
        self.num_nodes = counts = ptr.diff()
        most = int(counts.max()) if len(counts) else 0
        if n is not None and most > n:
            raise ValueError(f"{owner}: n must be at least the {most} points of cloud {int(counts.argmax())}, got {n}")
        valid = torch.arange(max(1, most) if n is None else n, device=x.device) < counts[:, None]
        for name in ("positions", "velocities", "features"):
            if (values := getattr(self, name)) is not None:
                _check_field(owner, name, values, "(nodes, *) = ({}, *)", (x.shape[0], None), x.device)
                setattr(self, name, _padded(values, valid))

    def _pad_further(self, n: int) -> None:
        """Clouds (B, m, d) to n points."""
        owner, x = "PointClouds", self.positions
        _check_field(owner, "positions", x, "(B, n, d)", (None, None, None))
        B, m, _ = x.shape
        if m > n:
            raise ValueError(f"{owner}: n must be at least the {m} points of positions {tuple(x.shape)}, got {n}")
        if self.num_nodes is None and m < n:
            self.num_nodes = torch.full((B,), m, device=x.device)
        for name in ("positions", "velocities", "features"):
            if (values := getattr(self, name)) is not None:
                _check_field(owner, name, values, "(B, n, *) = ({}, {}, *)", (B, m, None), x.device)
                setattr(self, name, nn.functional.pad(values, (0, 0, 0, n - m)))

    @classmethod
    def from_data(
        cls,
        batch: Any,
        features: str | Sequence[str] = (),
        *,
        types: Sequence[int] | None = None,
        n: int | None = None,
    ) -> PointClouds:
        """From a PyTorch Geometric `Batch`, or one `Data`, with positions `pos` (nodes, d).

        features: fields of points to read, such as "z" or ("z", "charge"), (nodes,) or (nodes, F) of any real dtype, joined
        in this order. Integers and bools become the dtype of `pos`, which must hold them exactly. types: the values of an
        integer field (nodes,), such as atomic numbers (1, 6, 7, 8); it is then joined as one-hot features, one per type.
        Velocities are read from `vel` and keys from `key`, if present. Edges, y and other fields are ignored.
        n: pads to so many points, the same in every batch; default: to the largest cloud of this one.

        Raises TypeError for what is no `Data` or `Batch`. ValueError for a missing field, for a value that is not in types,
        for a cloud of more than n points, and where batch and ptr disagree.
        """
        clouds = cls(**clouds_of(batch, features, types), n=n)
        clouds.check()
        return clouds

    def check(self) -> None:
        """Raises TypeError where a field is no Tensor, ValueError for shapes and counts, RuntimeError for devices.

        num_nodes must be in 0..n (on a GPU checked only in debug mode).
        """
        owner, x = "PointClouds", self.positions
        _check_field(owner, "positions", x, "(B, n, d)", (None, None, None))
        B, n, d = x.shape
        if not x.is_floating_point():
            raise TypeError(f"{owner}: positions must be floating point, got {x.dtype}")
        if self.velocities is not None:
            _check_field(owner, "velocities", self.velocities, "(B, n, d) = ({}, {}, {})", (B, n, d), x.device)
        if self.edges is not None:
            _check_field(owner, "edges", self.edges, "(B, n, n, C) = ({}, {}, {}, *)", (B, n, n, None), x.device)
        if self.features is not None:
            _check_field(owner, "features", self.features, "(B, n, F) = ({}, {}, *)", (B, n, None), x.device)
        if self.key is not None:
            _check_field(owner, "key", self.key, "(B,) = ({},)", (B,), x.device, torch.int64)
            check_key(owner, self.key)
        if self.num_nodes is None:
            return
        _check_field(owner, "num_nodes", self.num_nodes, "(B,) = ({},)", (B,), x.device, torch.int64)
        if (
            looks_at_values(self.num_nodes)
            and B
            and not (0 <= int(self.num_nodes.min()) and int(self.num_nodes.max()) <= n)
        ):
            bad = next(count for count in self.num_nodes.tolist() if not 0 <= count <= n)
            raise ValueError(f"{owner}: num_nodes must be in 0..n = {n}, got {bad}")

    def moved(self, group: Any, g: Any) -> PointClouds:
        """g . batch, for elements g with one sample per cloud.

        Moves positions as points, velocities as vectors, edges as pairs of nodes and features as nodes.
        """
        layouts = {"positions": "np", "velocities": "nv", "edges": "nnc", "features": "nc"}
        given = {name: getattr(self, name) for name in layouts}
        moved = {name: self.carried(group, g, x, layouts[name]) for name, x in given.items() if x is not None}
        return self.replace(**moved)

    def carried(self, group: Any, g: Any, values: Tensor, layout: str) -> Tensor:
        """g . values, for elements g with one sample per cloud and values (B, ...) of that layout (`groups.Group`)."""
        return of_one_sample(group.act(g, values, layout))

    def names(self, rows: int) -> Tensor | None:
        """The clouds' keys; None: fixed noise goes by a cloud's position in the batch."""
        return self.key

    @property
    def valid(self) -> Tensor | None:
        """(B, n) which points are valid; None: all."""
        if self.num_nodes is None:
            return None
        return torch.arange(self.positions.shape[1], device=self.device) < self.num_nodes[:, None]

    def listed(self, values: Tensor) -> Tensor:
        """Values of points (B, n, ...) -> those of the valid ones in one list, (nodes, ...)."""
        return values.flatten(0, 1) if self.num_nodes is None else values[self.valid]

    def padded(self, values: Tensor) -> Tensor:
        """Values of points in one list (nodes, ...) -> (B, n, ...), 0 at points that are not valid."""
        if (valid := self.valid) is None:
            return values.unflatten(0, self.positions.shape[:2])
        return _padded(values, valid)

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def center(self) -> Tensor:
        if (valid := self.valid) is None or self.num_nodes is None:
            return self.positions.mean(1)
        count = valid.sum(1, keepdim=True).clamp(min=1)
        return torch.where(valid[..., None], self.positions, 0).sum(1) / count

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    @property
    def device(self) -> torch.device:
        return self.positions.device


@dataclass(eq=False)
class Graphs(Batch):
    """B graphs as PyTorch Geometric batches them, with all nodes in one list.

    x: (nodes, C) node features. edge_index: (2, E) int64 global node numbers, an undirected edge in both directions.
    ptr: (B + 1,) int64, where each graph's nodes begin. edge_attr: (E, Ce), or None: every edge is a 1. key: (B,) int64 in
    0..2^43 - 1, keys of the graphs for fixed noise, or None. frame: (nodes,) int64 classes of a predefined node order
    (`distributions.Frame`), or None. pairs: (2, M) int64 global numbers of the node pairs to predict (`models.PairReadout`),
    or None.
    """

    x: Tensor
    edge_index: Tensor
    ptr: Tensor
    edge_attr: Tensor | None = None
    key: Tensor | None = None
    frame: Tensor | None = None
    pairs: Tensor | None = None

    axes: ClassVar = {
        "x": {0: "nodes"},
        "edge_index": {1: "edges"},
        "ptr": {0: "batch + 1"},
        "edge_attr": {0: "edges"},
        "key": {0: "batch"},
        "frame": {0: "nodes"},
        "pairs": {1: "pairs"},
    }

    @classmethod
    def from_data(cls, batch: Any) -> Graphs:
        """From a PyTorch Geometric `Batch`, or one `Data`.

        x: (nodes,) or (nodes, C), of any real dtype. Integers and bools become the default floating dtype, which must
        hold them exactly (float32 holds integers up to 2^24). edge_attr: the same, (E,) or (E, Ce). edge_weight (E,)
        takes its place if there is none. ptr: the data's, or made from `batch` (nodes,), which must not decrease (this
        waits for a GPU); without both the data are one graph. key, frame and pairs (PyG's edge_label_index) are read if
        present. Positions, y and other fields are ignored.

        Raises as `check`. TypeError for lists (`Batch.from_data_list` joins them), HeteroData and objects that are no
        graph. ValueError for a missing x or edge_index, for adj_t, edge_type and node_type, for both edge_attr and
        edge_weight, and where batch and ptr disagree (on a GPU only in debug mode).
        """
        fields = fields_of(batch)
        graphs = cls(**fields)
        graphs.check(OWNER)
        check_agreement(OWNER, getattr(batch, "batch", None), graphs.graph)
        return graphs

    def check(self, owner: str = "Graphs") -> None:
        """Raises unless the fields are as above: TypeError for dtypes, ValueError for shapes, RuntimeError for devices.

        Also ValueError unless ptr rises from 0 to the number of nodes (on a GPU only in debug mode). The ops check the node
        numbers in edge_index.
        """
        _check_field(owner, "x", self.x, "(nodes, C)", (None, None))
        nodes, device = self.x.shape[0], self.x.device
        _check_field(owner, "edge_index", self.edge_index, "(2, E)", (2, None), device, torch.int64)
        _check_field(owner, "ptr", self.ptr, "(B + 1,)", (None,), device, torch.int64)
        E, B = self.edge_index.shape[1], self.size
        if B < 0:
            raise ValueError(f"{owner}: ptr must be (B + 1,) with B >= 0, got (0,)")
        if self.edge_attr is not None:
            _check_field(owner, "edge_attr", self.edge_attr, "(E, Ce) = ({}, *)", (E, None), device)
        if self.key is not None:
            _check_field(owner, "key", self.key, "(B,) = ({},)", (B,), device, torch.int64)
        if self.frame is not None:
            _check_field(owner, "frame", self.frame, "(nodes,) = ({},)", (nodes,), device, torch.int64)
        if self.pairs is not None:
            _check_field(owner, "pairs", self.pairs, "(2, M)", (2, None), device, torch.int64)
        if self.key is not None:
            check_key(owner, self.key)
        _check_ptr(owner, self.ptr, nodes)

    @property
    def size(self) -> int:
        return self.ptr.shape[0] - 1

    @property
    def num_nodes(self) -> Tensor:
        return self.ptr.diff()

    @property
    def graph(self) -> Tensor:
        """(nodes,) the graph of each node."""
        graphs = torch.arange(self.size, device=self.ptr.device)
        return graphs.repeat_interleave(self.num_nodes, output_size=self.x.shape[0])

    @property
    def local(self) -> Tensor:
        """(nodes,) the number of each node within its graph."""
        return self._places()[1]

    def _places(self) -> tuple[Tensor, Tensor]:
        """`graph` and `local`."""
        graph = self.graph
        return graph, torch.arange(self.x.shape[0], device=self.ptr.device) - self.ptr[graph]

    @property
    def center(self) -> None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def attributes(self) -> Tensor:
        """(E, Ce): edge_attr, or ones (E, 1)."""
        return self.x.new_ones(self.edge_index.shape[1], 1) if self.edge_attr is None else self.edge_attr

    def moved(self, group: Any, g: Any) -> Graphs:
        """g . batch, for elements g with one sample per graph: nodes reordered, edges and pairs renumbered."""
        old = self._old_numbers(group, g)
        new = torch.empty_like(old).index_put((old,), torch.arange(len(old), device=old.device))
        frame, pairs = None if self.frame is None else self.frame[old], None if self.pairs is None else new[self.pairs]
        return self.replace(x=self.x[old], edge_index=new[self.edge_index], frame=frame, pairs=pairs)

    def carried(self, group: Any, g: Any, values: Tensor, layout: str) -> Tensor:
        """g . values, for elements g with one sample per graph.

        layout "nc": values of nodes (nodes, ...), which move. layout "c": values of graphs or pairs, which stay. ValueError
        for other layouts.
        """
        if layout not in ("nc", "c"):
            raise ValueError(f"Graphs.carried: layout must be 'nc' or 'c', got {layout!r}")
        return values[self._old_numbers(group, g)] if layout == "nc" else values

    def _old_numbers(self, group: Any, g: Any) -> Tensor:
        """(nodes,) the number in the batch of every node of g . batch."""
        if group.keeps("n"):
            return torch.arange(self.x.shape[0], device=self.device)
        if (N := getattr(group, "n", None)) is None:
            raise ValueError(f"Graphs: group must permute n nodes, as Symmetric(n) does, or keep them, got {group!r}")
        local = torch.arange(N, device=self.device, dtype=torch.float64).expand(self.size, N)
        old = of_one_sample(group.act(g, local, "n")).round().to(torch.int64) + self.ptr[:-1, None]
        return old[torch.arange(N, device=self.device) < self.num_nodes[:, None]]

    def names(self, rows: int) -> Tensor:
        """(rows,) keys for fixed noise, one per node, or one per graph: that of its first node.

        A key combines the graph's `key` (default: its position in the batch) and the node's number in the graph.
        """
        key = torch.arange(self.size, device=self.device) if self.key is None else self.key
        if rows == self.size:
            return key * MOST_NODES
        graph, local = self._places()
        return key[graph] * MOST_NODES + local

    def padded(self, values: Tensor, N: int) -> Tensor:
        """values (nodes, S) as (B, S, N), zero-padded. ValueError for a graph with more than N nodes."""
        if looks_at_values(self.ptr) and self.size and (most := int(self.num_nodes.max())) > N:
            graph = int(self.num_nodes.argmax())
            raise ValueError(f"Graphs: a graph must have at most N = {N} nodes, got {most} in graph {graph}")
        out = values.new_zeros(self.size, N, values.shape[1])
        return out.index_put(self._places(), values).mT

    def matrix(self, values: Tensor, N: int) -> Tensor:
        """values (E, C) as matrices (B, N, N, C), summed over the edges from row to column."""
        graph, local = self._places()
        u, v = self.edge_index
        out = values.new_zeros(self.size, N, N, values.shape[1])
        return out.index_put((graph[u], local[u], local[v]), values, accumulate=True)

    def pooled(self, values: Tensor) -> Tensor:
        """Sums over the nodes of each graph: (nodes, ...) -> (B, ...)."""
        return values.new_zeros(self.size, *values.shape[1:]).index_add(0, self.graph, values)


def _padded(values: Tensor, valid: Tensor) -> Tensor:
    """Values (nodes, ...) of the valid points (B, n) in order -> (B, n, ...), 0 at the others."""
    return values.new_zeros(*valid.shape, *values.shape[1:]).index_put((valid,), values)


def check_batch(owner: str, batch: Any, *fields: str, name: str = "batch") -> None:
    """TypeError unless batch, the argument of that name, is a batch with the fields that the owner reads."""
    kind = type(batch).__name__
    if not hasattr(batch, "check"):
        way_out = "; convert it with psf.Graphs.from_data" if hasattr(batch, "edge_index") else ""
        fitting = {3: "PointClouds(positions)", 4: "Images(pixels)"}.get(batch.ndim if isinstance(batch, Tensor) else 0)
        way_out = f"; give psf.{fitting}" if fitting else way_out
        raise TypeError(
            f"{owner}: {name} must be Graphs, PointClouds or another batch with a check method, got {kind}{way_out}"
        )
    if missing := [field for field in fields if not hasattr(batch, field)]:
        raise TypeError(f"{owner}: {name} must have {' and '.join(fields)}, got {kind} without {missing[0]}")


def check_all_valid(owner: str, batch: Batch, way_out: str = "") -> None:
    """ValueError if the batch has num_nodes, for an owner that treats every node as valid."""
    if (given := batch.num_nodes) is not None:
        got = tuple(given.shape) if isinstance(given, Tensor) else given
        raise ValueError(f"{owner}: num_nodes must be None (every node counts as valid), got {got}{way_out}")


def _check_ptr(owner: str, offsets: Tensor, nodes: int) -> None:
    """ValueError unless ptr rises from 0 to the number of nodes, where values are read."""
    if not looks_at_values(offsets):
        return
    ptr = offsets.tolist()
    if not ptr or ptr[0] != 0:
        raise ValueError(f"{owner}: ptr must begin with 0, got {ptr[0] if ptr else 'no entry'}")
    if ptr[-1] != nodes:
        raise ValueError(f"{owner}: ptr must end with the number of nodes {nodes}, got {ptr[-1]}")
    if ptr != sorted(ptr):
        b, some = next((b, some) for b, some in enumerate(pairwise(ptr)) if some[1] < some[0])
        raise ValueError(f"{owner}: ptr must not decrease, got ptr[{b}] = {some[0]} and ptr[{b + 1}] = {some[1]}")


def _check_field(
    owner: str,
    name: str,
    x: Tensor,
    axes: str,
    sizes: tuple[int | None, ...],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises unless x is a Tensor of these sizes (None: any), device and dtype.

    axes: the sizes in words, with {} for each that is given. Filled in only for an error: a program that is recorded with
    a size in a text holds for this size only.
    """
    if x is None:
        raise ValueError(f"{owner}: {name} must be {_filled(axes, sizes)}, got None")
    if not isinstance(x, Tensor) or dtype not in (None, x.dtype):
        wanted = "a Tensor" if dtype is None else f"an {str(dtype).removeprefix('torch.')} Tensor"
        raise TypeError(
            f"{owner}: {name} must be {wanted}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.ndim != len(sizes) or any(size not in (None, found) for size, found in zip(sizes, x.shape, strict=True)):
        raise ValueError(f"{owner}: {name} must be {_filled(axes, sizes)}, got {tuple(x.shape)}")
    if device not in (None, x.device):
        raise RuntimeError(f"{owner}: {name} must be on {device} as the nodes are, got {x.device}")


def _filled(axes: str, sizes: tuple[int | None, ...]) -> str:
    return axes.format(*(size for size in sizes if size is not None))
