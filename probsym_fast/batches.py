"""Batches: what groups and distributions read of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from probsym_fast._checks import looks_at_values
from probsym_fast._geometric import OWNER, check_agreement, fields_of

T = TypeVar("T", bound="_Fields")
MOST_NODES, MOST_KEYS = 2**20, 2**43  # nodes per graph and graph keys: together they name a node in 63 bits


class Batch(Protocol):
    """size: number of graphs B. num_nodes: (B,) valid nodes, or None (all). center: (B, d) centroids, or None.

    check: raises where fields do not fit the class's description; models and distributions call it first.
    """

    @property
    def size(self) -> int: ...

    @property
    def num_nodes(self) -> Tensor | None: ...

    @property
    def center(self) -> Tensor | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def check(self) -> None: ...

    def names(self, rows: int) -> Tensor | None:
        """(rows,) int64 keys of fixed noise, one per row (graph or node); None: the row numbers."""


def _values(batch: Any) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def _each(function: Callable[[Tensor], Any], batch: T) -> T:
    """The batch with function(x) for every Tensor x."""
    return type(batch)(**{name: function(x) if isinstance(x, Tensor) else x for name, x in _values(batch).items()})


def _flatten(batch: Any) -> tuple[list[Any], list[list[str]]]:
    """What is not None; the names of these fields and of the others."""
    there = {name: x for name, x in _values(batch).items() if x is not None}
    return list(there.values()), [list(there), [field.name for field in fields(batch) if field.name not in there]]


def _flatten_with_keys(batch: Any) -> tuple[list[Any], list[list[str]]]:
    there, names = _flatten(batch)
    return [(GetAttrKey(name), x) for name, x in zip(names[0], there, strict=True)], names


def _unflatten(kind: type[T], there: Any, names: list[list[str]]) -> T:
    return kind(**dict(zip(names[0], there, strict=True)), **dict.fromkeys(names[1]))


def _mover(
    owner: str,
    *where: torch.device | str | int | torch.dtype | Tensor,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Moves a Tensor to a device, and to a dtype if it is floating point. TypeError for an integer dtype."""
    for one in where:
        if isinstance(one, Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (torch.device, str, int)) and not isinstance(one, bool):
            device = one
        elif one is not None:
            raise TypeError(f"{owner}.to: must be a device, a dtype or a Tensor, got {type(one).__name__} {one!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{owner}.to: dtype must be floating point, got {dtype}")
    return lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None, non_blocking=non_blocking)


class _Fields:
    """A dataclass whose fields are tensors or None, and a pytree of those that are not None; so are its subclasses.

    Not frozen: Lightning's precision plugins refuse frozen dataclasses.
    """

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        register_pytree_node(
            cls,
            _flatten,
            partial(_unflatten, cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def replace(self: T, **changes: Any) -> T:
        """The batch with other values for these fields. TypeError for a name that is no field."""
        values = _values(self)
        if unknown := [name for name in changes if name not in values]:
            raise TypeError(f"{type(self).__name__}.replace: fields must be of {', '.join(values)}, got {unknown[0]}")
        return type(self)(**{**values, **changes})

    def to(self: T, *where: Any, **named: Any) -> T:
        """Moved to a device, a floating-point dtype or those of a Tensor, as `Tensor.to`; integers keep their dtype."""
        return _each(_mover(type(self).__name__, *where, **named), self)

    def pin_memory(self: T) -> T:
        """In page-locked memory, for faster copies to a GPU."""
        return _each(Tensor.pin_memory, self)


@dataclass(eq=False)
class PointClouds(_Fields):
    """B clouds of n points in d dimensions with velocities and pair features.

    positions, velocities: (B, n, d). edges: (B, n, n, C), invariant under rotations and translations.
    """

    positions: Tensor
    velocities: Tensor
    edges: Tensor

    def check(self) -> None:
        """Raises TypeError where a field is no Tensor, ValueError for shapes, RuntimeError for devices."""
        owner, x = "PointClouds", self.positions
        _check_field(owner, "positions", x, "(B, n, d)", (None, None, None))
        B, n, d = x.shape
        _check_field(owner, "velocities", self.velocities, "(B, n, d) = ({}, {}, {})", (B, n, d), x.device)
        _check_field(owner, "edges", self.edges, "(B, n, n, C) = ({}, {}, {}, *)", (B, n, n, None), x.device)

    def moved(self, group: Any, g: Any) -> PointClouds:
        """g . batch, for elements g with one sample per cloud.

        Moves positions as points, velocities as vectors and edges as pairs of nodes.
        """
        positions, velocities = (
            self.carried(group, g, self.positions, "np"),
            self.carried(group, g, self.velocities, "nv"),
        )
        edges = self.carried(group, g, self.edges, "nnc")
        return self.replace(positions=positions, velocities=velocities, edges=edges)

    def carried(self, group: Any, g: Any, values: Tensor, layout: str) -> Tensor:
        """g . values, for elements g with one sample per cloud and values (B, ...) of that layout (`groups.Group`)."""
        return _of_one_sample(group.act(g, values, layout))

    def names(self, rows: int) -> None:
        """None: fixed noise goes by a cloud's position in the batch."""

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def num_nodes(self) -> Tensor | None:
        return None

    @property
    def center(self) -> Tensor:
        return self.positions.mean(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    @property
    def device(self) -> torch.device:
        return self.positions.device


@dataclass(eq=False)
class Graphs(_Fields):
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
        check_agreement(getattr(batch, "batch", None), graphs)
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
        if not looks_at_values(self.ptr):
            return
        if self.key is not None and B and not (0 <= int(self.key.min()) and int(self.key.max()) < MOST_KEYS):
            bad = next(key for key in self.key.tolist() if not 0 <= key < MOST_KEYS)
            raise ValueError(f"{owner}: key must be in 0..2^43 - 1, got {bad}")
        ptr = self.ptr.tolist()
        if ptr[0] != 0:
            raise ValueError(f"{owner}: ptr must begin with 0, got {ptr[0]}")
        if ptr[-1] != nodes:
            raise ValueError(f"{owner}: ptr must end with the number of nodes {nodes}, got {ptr[-1]}")
        if ptr != sorted(ptr):
            b, some = next((b, some) for b, some in enumerate(pairwise(ptr)) if some[1] < some[0])
            raise ValueError(f"{owner}: ptr must not decrease, got ptr[{b}] = {some[0]} and ptr[{b + 1}] = {some[1]}")

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
        return torch.arange(self.x.shape[0], device=self.ptr.device) - self.ptr[self.graph]

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
        old = _of_one_sample(group.act(g, local, "n")).round().to(torch.int64) + self.ptr[:-1, None]
        return old[torch.arange(N, device=self.device) < self.num_nodes[:, None]]

    def names(self, rows: int) -> Tensor:
        """(rows,) keys for fixed noise, one per node, or one per graph: that of its first node.

        A key combines the graph's `key` (default: its position in the batch) and the node's number in the graph.
        """
        key = torch.arange(self.size, device=self.device) if self.key is None else self.key
        return key * MOST_NODES if rows == self.size else key[self.graph] * MOST_NODES + self.local

    def padded(self, values: Tensor, N: int) -> Tensor:
        """values (nodes, S) as (B, S, N), zero-padded. ValueError for a graph with more than N nodes."""
        if looks_at_values(self.ptr) and self.size and (most := int(self.num_nodes.max())) > N:
            graph = int(self.num_nodes.argmax())
            raise ValueError(f"Graphs: a graph must have at most N = {N} nodes, got {most} in graph {graph}")
        out = values.new_zeros(self.size, N, values.shape[1])
        return out.index_put((self.graph, self.local), values).mT

    def matrix(self, values: Tensor, N: int) -> Tensor:
        """values (E, C) as matrices (B, N, N, C), summed over the edges from row to column."""
        graph, local = self.graph, self.local
        u, v = self.edge_index
        out = values.new_zeros(self.size, N, N, values.shape[1])
        return out.index_put((graph[u], local[u], local[v]), values, accumulate=True)

    def pooled(self, values: Tensor) -> Tensor:
        """Sums over the nodes of each graph: (nodes, ...) -> (B, ...)."""
        return values.new_zeros(self.size, *values.shape[1:]).index_add(0, self.graph, values)


torch.serialization.add_safe_globals([PointClouds, Graphs])  # torch.load takes them, in exported programs too


def _of_one_sample(values: Tensor) -> Tensor:
    """(B, 1, ...) -> (B, ...). ValueError for more samples: a batch is moved by one element per graph."""
    if values.shape[1] != 1:
        raise ValueError(f"moved: g must have one sample per graph, (B, 1), got {values.shape[1]}")
    return values[:, 0]


def check_batch(owner: str, batch: Any, *fields: str) -> None:
    """TypeError unless batch is a batch with the fields that the owner reads."""
    kind = type(batch).__name__
    if not hasattr(batch, "check"):
        way_out = "; convert it with psf.Graphs.from_data" if hasattr(batch, "edge_index") else ""
        raise TypeError(
            f"{owner}: batch must be Graphs, PointClouds or another batch with a check method, got {kind}{way_out}"
        )
    if missing := [name for name in fields if not hasattr(batch, name)]:
        raise TypeError(f"{owner}: batch must have {' and '.join(fields)}, got {kind} without {missing[0]}")


def check_all_valid(owner: str, batch: Batch) -> None:
    """ValueError if the batch has num_nodes, for an owner that treats every node as valid."""
    if (given := batch.num_nodes) is not None:
        got = tuple(given.shape) if isinstance(given, Tensor) else given
        raise ValueError(f"{owner}: num_nodes must be None (every node counts as valid), got {got}")


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
