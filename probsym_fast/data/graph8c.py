"""GRAPH8c: all 11,117 connected graphs of 8 nodes up to isomorphism, enumerated here (Balcilar et al., ICML 2021,
arXiv 2106.04319, use the set).

Every graph of n nodes is a graph of n - 1 nodes plus a node of the highest degree. So the classes of n nodes follow from
those of n - 1: connect a new node in all 2^(n-1) ways, and keep one graph per canonical form.

Canonical form: colour refinement sorts the nodes into cells. Among all node orders that respect the cells, it is the one
whose adjacency, read as a binary number, is smallest.
"""

from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probsym_fast.data._graphs import graph
from probsym_fast.data._store import cache_dir, load_arrays, save_arrays
from probsym_fast.data.graph6 import read_g6

NODES = 8
COUNT = 11_117
MAX_NODES = 8  # all 40,320 orders of a cell of eight fit in memory
BLOCK = 1 << 22  # numbers in memory at once


def graph8c(root: str | Path | None = None, path: str | Path | None = None, force: bool = False) -> list[Any]:
    """All connected graphs of 8 nodes, enumerated at first use (seconds) and kept in a file.

    Args:
        root: folder of the file; by default `cache_dir()/graph8c`.
        path: a .g6 file to read instead, with any graphs.
        force: enumerate again even if the file exists.

    Returns a list of torch_geometric `Data` with x (n, 2) float32 = [1, degree] and edge_index (2, E) int64, every edge
    in both directions; no labels. Raises ValueError for a damaged file, ModuleNotFoundError without torch_geometric.
    """
    graphs = read_g6(path) if path is not None else _stored(cache_dir() / "graph8c" if root is None else root, force)
    return [graph(torch.ones(len(a)), torch.from_numpy(np.stack(np.nonzero(a)))) for a in graphs]


def _stored(root: str | Path, force: bool) -> np.ndarray:
    """(11117, 8, 8) bool."""
    file = Path(root) / "graph8c.npz"
    if force or not file.exists():
        save_arrays(file, {"codes": canonical_codes(connected_graphs(NODES)).astype(np.uint32)}, {"nodes": NODES})
    mend = "delete the file or call graph8c(force=True)"
    arrays, _ = load_arrays(file, {"codes": (COUNT,)}, {"nodes": NODES}, mend=mend)
    return graphs_of_codes(arrays["codes"], NODES)


def connected_graphs(n: int) -> np.ndarray:
    """The connected graphs among `all_graphs(n)`, (G, n, n) bool; G = 1, 1, 2, 6, 21, 112, 853, 11117 for n = 1 to 8."""
    graphs = all_graphs(n)
    reach = graphs | np.eye(n, dtype=bool)
    for _ in range((n - 1).bit_length()):  # paths of length 1, 2, 4, ...
        reach = reach @ reach
    return graphs[reach.all((1, 2))]


def all_graphs(n: int) -> np.ndarray:
    """One graph per isomorphism class on n nodes, in canonical form, sorted by code.

    Returns (G, n, n) bool, G = 1, 2, 4, 11, 34, 156, 1044, 12346 for n = 1 to 8. Raises ValueError for n beyond 1..8.
    """
    if not 1 <= n <= MAX_NODES:
        raise ValueError(f"all_graphs: n must be in 1..{MAX_NODES}, got {n}")
    graphs = np.zeros((1, 1, 1), bool)
    for size in range(2, n + 1):
        joined = np.array(list(product([False, True], repeat=size - 1)))  # (2^(size-1), size-1)
        larger: np.ndarray = np.zeros((len(graphs), len(joined), size, size), bool)
        larger[:, :, :-1, :-1] = graphs[:, None]
        larger[:, :, -1, :-1] = larger[:, :, :-1, -1] = joined
        larger = larger.reshape(-1, size, size)
        degree = larger.sum(2)
        codes = canonical_codes(larger[degree[:, -1] == degree.max(1)])
        graphs = graphs_of_codes(np.unique(codes), size)
    return graphs


def canonical_codes(graphs: np.ndarray) -> np.ndarray:
    """(M, n, n) bool, n <= 8, to (M,) int64 codes: equal for two graphs of one size if and only if they are isomorphic.

    The bits of a code are the pairs (0,1), (0,2), ..., (n-2,n-1) of the canonical adjacency, first pair lowest. Cost per
    graph: the product of the factorials of its cell sizes. Raises ValueError for another shape.
    """
    if graphs.ndim != 3 or not 1 <= graphs.shape[1] == graphs.shape[2] <= MAX_NODES:
        raise ValueError(f"canonical_codes: graphs must be (M, n, n) with n in 1..{MAX_NODES}, got {graphs.shape}")
    n = graphs.shape[1]
    colors = _refined(graphs)
    order = colors.argsort(1, kind="stable")
    graphs = np.take_along_axis(np.take_along_axis(graphs, order[:, :, None], 1), order[:, None, :], 2)
    first, second = np.triu_indices(n, 1)
    bits = graphs[:, first, second].astype(float)  # (M, pairs)
    cells, kind = np.unique(np.take_along_axis(colors, order, 1), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    codes = np.empty(len(graphs), np.int64)
    place = np.zeros((n, n), int)  # index of each pair in triu_indices
    place[first, second] = place[second, first] = np.arange(len(first))
    for k, cell in enumerate(cells):
        orders = _orders(cell)  # (P, n)
        weights = np.zeros((len(first), len(orders)))  # of each pair of old nodes in the code of each order
        weights[place[orders[:, first], orders[:, second]], np.arange(len(orders))[:, None]] = 2.0 ** np.arange(
            len(first)
        )
        members = np.flatnonzero(kind == k)
        for part in np.array_split(members, -(-len(members) * len(orders) // BLOCK)):
            codes[part] = (bits[part] @ weights).min(1)  # below 2^28: exact
    return codes


def graphs_of_codes(codes: np.ndarray, n: int) -> np.ndarray:
    """The graphs (M, n, n) bool with the given codes (M,), see `canonical_codes`."""
    first, second = np.triu_indices(n, 1)
    graphs = np.zeros((len(codes), n, n), bool)
    graphs[:, first, second] = graphs[:, second, first] = codes[:, None].astype(np.int64) >> np.arange(len(first)) & 1
    return graphs


def _refined(graphs: np.ndarray) -> np.ndarray:
    """Colour refinement: (M, n) colours; a colour is the number of nodes in earlier cells."""
    n = graphs.shape[1]
    adjacency = graphs.astype(np.int64)
    colors = np.zeros(graphs.shape[:2], np.int64)
    for _ in range(n):
        # digits in base n + 1: own colour, then the number of neighbours of each colour
        key = colors * (n + 1) ** n + (adjacency * (n + 1) ** colors[:, None, :]).sum(2)
        colors = (key[:, :, None] > key[:, None, :]).sum(2)
    return colors


def _orders(cell: np.ndarray) -> np.ndarray:
    """All orders (P, n) of the nodes that permute only within cells, given their sorted colours `cell` (n,)."""
    groups = [np.flatnonzero(cell == c) for c in np.unique(cell)]
    return np.array([np.concatenate(parts) for parts in product(*(list(permutations(g)) for g in groups))], int)
