"""Molecular graphs, stored compactly with one-hot channels made at collation; and random ones for benchmarks.

The integer features are those of the Open Graph Benchmark (arXiv 2005.00687, ogb/utils/features.py). As in the public code
of Kim et al. 2023 (github.com/jw9730/lps, src/data), only values that occur become channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from probsym_fast.data._graphs import geometric

NODE_FEATURES = (
    "atomic number",
    "chirality",
    "degree",
    "formal charge",
    "hydrogens",
    "radical electrons",
    "hybridization",
    "aromatic",
    "in a ring",
)
EDGE_FEATURES = ("bond type", "stereo", "conjugated")
DEGREE = NODE_FEATURES.index("degree")


class Table(NamedTuple):
    """Number of values of each node and edge feature; channels are their concatenated one-hot codes.

    The first channel of an edge is always 1, to mark an edge.
    """

    node: tuple[int, ...]
    edge: tuple[int, ...]
    nodes: int  # most nodes per graph

    @property
    def node_channels(self) -> int:
        return sum(self.node)

    @property
    def edge_channels(self) -> int:
        return 1 + sum(self.edge)


PEPTIDES = Table((17, 3, 7, 7, 5, 1, 6, 2, 2), (4, 1, 2), 444)  # 50 and 8 channels
PCQM = Table((35, 3, 7, 7, 2, 4, 6, 2, 2), (4, 1, 1), 53)  # 68 and 7 channels


class MolecularGraphs(Dataset):
    """Graphs with integer features; an index gives one-hot channels.

    Args:
        table: number of values of each feature.
        arrays: nodes (G,) and edges (G,), the counts per graph; x (nodes, 9) uint8; edge_index (2, E) int16, node
            numbers within the graph; edge_attr (E, 3) uint8; either y (G, T), or pairs (G,), edge_label_index (2, M) int16
            and edge_label (M,).

    Item i (an int) is a torch_geometric `Data` with x (n, table.node_channels) float32, edge_index (2, e) int64,
    edge_attr (e, table.edge_channels) float32, key (1,) int64 = i, and either y (1, T) float32 or edge_label_index (2, m)
    int64 and edge_label (m,) float32. An index tensor, list or slice gives one `Data` of all those graphs for
    `Graphs.from_data`: node numbers are global, ptr (B + 1,) and batch (nodes,) int64 separate the graphs, key and y have B
    rows. Storage takes 16 to 22 bytes per node, instead of about 500 as float32 and int64. A batch of 128 Peptides takes 3
    to 4 ms on one core.
    """

    def __init__(self, table: Table, arrays: dict[str, np.ndarray]):
        self.table = table
        held = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        self.x, self.edge_index, self.edge_attr = held["x"], held["edge_index"].T.contiguous(), held["edge_attr"]
        self.ptr, self.edge_ptr = _offsets(held["nodes"]), _offsets(held["edges"])
        self.y = held["y"].float() if "y" in held else None
        if self.y is None:
            self.edge_label_index, self.edge_label = held["edge_label_index"].T.contiguous(), held["edge_label"]
            self.pair_ptr = _offsets(held["pairs"])

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def edges(self) -> Tensor:
        """(2, E) int64, the edges of all graphs with global node numbers."""
        return _global(self.edge_index, self.ptr, self.edge_ptr)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Any:
        if single := isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"MolecularGraphs: index must be in -{len(self)}..{len(self) - 1}, got {index}")
            index = [index]
        key = torch.arange(len(self))[index]
        rows, ptr = _rows(self.ptr, key)
        edges, edge_ptr = _rows(self.edge_ptr, key)
        fields = {
            "x": one_hot(self.x[rows], self.table.node),
            "edge_index": _global(self.edge_index[edges], ptr, edge_ptr),
            "edge_attr": one_hot(self.edge_attr[edges], self.table.edge, present=True),
            "key": key,
        }
        if self.y is not None:
            fields["y"] = self.y[key]
        else:
            pairs, pair_ptr = _rows(self.pair_ptr, key)
            fields["edge_label_index"] = _global(self.edge_label_index[pairs], ptr, pair_ptr)
            fields["edge_label"] = self.edge_label[pairs].float()
        if not single:
            fields["ptr"] = ptr
            fields["batch"] = torch.arange(len(key)).repeat_interleave(ptr.diff())
        return geometric().data.Data(**fields)


def one_hot(features: Tensor, values: tuple[int, ...], present: bool = False) -> Tensor:
    """(rows, F) integers in 0..values[f] - 1 to (rows, sum of values) float32; `present` puts a channel of ones first."""
    sizes = torch.tensor([1] * present + list(values))
    first = sizes.cumsum(0)[present:] - sizes[present:]
    out = torch.zeros(len(features), int(sizes.sum()))
    if present:
        out[:, 0] = 1
    return out.scatter_(1, features + first, 1.0)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.long().cumsum(0)])


def _rows(ptr: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the graphs `key`, and the offsets of these graphs in them."""
    counts = ptr[key + 1] - ptr[key]
    offsets = _offsets(counts)
    shift = (ptr[key] - offsets[:-1]).repeat_interleave(counts)
    return torch.arange(len(shift)) + shift, offsets


def _global(local: Tensor, ptr: Tensor, counts_ptr: Tensor) -> Tensor:
    """(M, 2) node numbers within graphs to (2, M) within the batch."""
    return (local + ptr[:-1].repeat_interleave(counts_ptr.diff())[:, None]).T.contiguous()


CHILDREN, RING, CONTACTS, NEGATIVES = 3, 5, 0.3, 2
SIZES = {  # table, smallest graph, Beta(a, b) scaled from there to table.nodes, ring closures per node
    "peptides": (PEPTIDES, 8, (2.0, 4.1), 0.0253),
    "pcqm": (PCQM, 6, (8.0, 7.6), 0.0545),
}


def molecules(count: int, kind: str = "peptides", seed: int = 0, labels: str = "binary") -> MolecularGraphs:
    """Random trees with rings of the published sizes and features, with random labels: for benchmarks and tests only.

    A node's parent is one of the three nodes before it, mostly the last; a ring has six nodes. Peptides: 8 to 444 nodes,
    151 on average, with 307 directed edges. PCQM: 6 to 53 nodes, 30 on average, with 61 directed edges. Features are uniform
    in their ranges, except the degree, which is real.

    Args:
        count: number of graphs.
        kind: "peptides" or "pcqm".
        seed: 0 to 2^32 - 1; with count, kind and labels it determines the result.
        labels: for Peptides, "binary": y (1, 10) of random 0 and 1, as in Peptides-func; "real": y (1, 11) of random normals,
            as in Peptides-struct. PCQM has about 0.3 n random contacts, in both directions, between nodes whose numbers
            differ by 5 or more; each comes with two pairs (same head, random tail) labelled 0.

    Raises ValueError for wrong arguments.
    """
    if kind not in SIZES:
        raise ValueError(f"molecules: kind must be one of {list(SIZES)}, got {kind!r}")
    if count < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"molecules: count must be at least 1 and seed in 0..2^32 - 1, got {count} and {seed}")
    if labels not in ("binary", "real") or (kind == "pcqm" and labels != "binary"):
        raise ValueError(f"molecules: labels must be binary, or real for peptides, got {labels!r} for {kind}")
    table, least, beta, closures = SIZES[kind]
    random = np.random.RandomState(seed)
    nodes = np.rint(least + (table.nodes - least) * random.beta(*beta, count)).astype(np.int64)
    total = nodes.sum()
    start = np.repeat(np.cumsum(nodes) - nodes, nodes)  # first node of each node's graph
    local = np.arange(total) - start
    back = random.choice(np.arange(1, CHILDREN + 1), total, p=[0.8, 0.1, 0.1])
    children = local.nonzero()[0]
    closing = ((local >= RING) & (random.random_sample(total) < closures)).nonzero()[0]
    ends = np.concatenate([children, closing])
    others = np.concatenate([np.maximum(children - back[children], start[children]), closing - RING])
    order = np.lexsort((others, ends))  # graph by graph
    bonds = np.stack([ends[order], others[order]], 1)  # (bonds, 2), global node numbers
    edges = np.stack([bonds, bonds[:, ::-1]], 1).reshape(-1, 2)
    x = np.stack([random.randint(0, values, total) for values in table.node], 1)
    x[:, DEGREE] = np.bincount(edges[:, 0], minlength=total)
    graph = np.repeat(np.arange(count), nodes)
    arrays = {
        "nodes": nodes,
        "edges": np.bincount(graph[edges[:, 0]], minlength=count),
        "x": x.astype(np.uint8),
        "edge_index": (edges - start[edges]).T.astype(np.int16),
        "edge_attr": np.stack([random.randint(0, v, len(bonds)) for v in table.edge], 1).repeat(2, 0).astype(np.uint8),
    }
    if kind == "pcqm":
        return MolecularGraphs(table, arrays | _random_contacts(random, nodes))
    y = random.randint(0, 2, (count, 10)) if labels == "binary" else random.standard_normal((count, 11))
    return MolecularGraphs(table, arrays | {"y": y.astype(np.float32)})


def _random_contacts(random: np.random.RandomState, nodes: np.ndarray) -> dict[str, np.ndarray]:
    graph = np.repeat(np.arange(len(nodes)), np.maximum(1, np.rint(CONTACTS * nodes)).astype(np.int64))
    n = nodes[graph]
    i = np.floor(random.random_sample(len(n)) * (n - RING)).astype(np.int64)
    j = i + RING + np.floor(random.random_sample(len(n)) * (n - RING - i)).astype(np.int64)
    side = nodes.max()
    code = (graph * side + i) * side + j
    positive = np.unique(np.concatenate([code, (graph * side + j) * side + i]))
    head = np.repeat(positive // side, NEGATIVES)
    tail = np.floor(random.random_sample(len(head)) * nodes[head // side]).astype(np.int64)
    code = np.union1d(positive, head * side + tail)
    return {
        "pairs": np.bincount(code // side**2, minlength=len(nodes)),
        "edge_label_index": np.stack([code // side % side, code % side]).astype(np.int16),
        "edge_label": np.isin(code, positive).astype(np.uint8),
    }
