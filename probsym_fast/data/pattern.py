"""PATTERN: which nodes of a graph of random communities belong to a planted pattern?

Dwivedi et al., "Benchmarking Graph Neural Networks" (JMLR 2023, arXiv 2003.00982). The parameters below are those of the
authors' final generator (github.com/graphdeeplearning/benchmarking-gnns, data/SBMs/generate_SBM_PATTERN.ipynb, "v4"),
which made the published set. The paper gives the same values, except a pattern size of 20; with that, no graph could have
the smallest published size, 44.

Our graphs are drawn from the same model, with two differences. Sizes outside the published 44 to 188 are drawn again (one
in 9,000). The mean size is the model's 117, up to 1 more or less for the random sizes of the hundred patterns; in the
published draw it is 118.9, with 6,099 directed edges.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probsym_fast._progress import announced
from probsym_fast.data import _published
from probsym_fast.data._graphs import geometric
from probsym_fast.data._store import cache_dir, load_arrays, save_arrays

COMMUNITIES = 5
SIZE = (5, 34)  # smallest and largest community, and pattern; uniform
INSIDE, BETWEEN = 0.5, 0.35  # probability of an edge within a community (p), and between two (q)
PATTERN_INSIDE, PATTERN_OUTSIDE = 0.5, 0.5  # within a pattern (p_P), and between it and the rest (q_P)
FEATURES = 3  # a node's feature is uniform in 0, 1, 2; those of a pattern are drawn once, with its edges
NODES = (44, 188)  # sizes of the published graphs
COUNTS = {"train": 10_000, "valid": 2_000, "test": 2_000}
PER_PATTERN = {"train": 100, "valid": 20, "test": 20}  # consecutive graphs that share one of the 100 patterns
RAW = "PATTERN_v2.pt"  # as PyG names it


def pattern(
    split: str = "train", count: int | None = None, seed: int = 0, root: str | Path | None = None, force: bool = False
) -> list[Any]:
    """Graphs of our own draw, generated at first use (about 0.4 s per thousand) and kept in a file (1 KB per graph).

    Args:
        split: "train", "valid" or "test". As published, they share patterns: graph k has pattern k // 100 (valid and test:
            k // 20).
        count: number of graphs; None: as published, 10,000, 2,000 and 2,000.
        seed: 0 to 2^32 - 1. Graph k depends only on (seed, split, k), on every machine.
        root: folder of the file; by default `cache_dir()/pattern`.
        force: generate again even if the file exists.

    Returns a list of torch_geometric `Data` with x (n, 3) float32, one-hot; edge_index (2, E) int64, every edge in both
    directions, sorted, no self loops; y (n,) int64, 1 in the pattern. About 0.1 MB of memory per graph. Raises ValueError
    for wrong arguments and for a damaged file, ModuleNotFoundError without torch_geometric.
    """
    _checked_split("pattern", split)
    count = COUNTS[split] if count is None else count
    own = root is not None or count != COUNTS[split] or seed != 0  # a file that the command cannot make
    if count < 1:
        raise ValueError(f"pattern: count must be at least 1, got {count}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"pattern: seed must be in 0..2^32 - 1, got {seed}")
    folder = cache_dir() / "pattern" if root is None else Path(root)
    path, about = folder / f"{split}-{count}-seed{seed}.npz", {"split": split, "count": count, "seed": seed}
    if force or not path.exists():
        with announced(f"PATTERN: drawing {count} graphs ({split})", count) as advance:
            graphs: list[tuple[np.ndarray, ...]] = []
            for number in range(count):
                adjacency, features, community = draw(seed, split, number)
                graphs.append((adjacency, features, community == COMMUNITIES))
                advance(1)
        save_arrays(path, _packed(graphs), about)
    rest = " (the next use draws it again)" if own else " or run `probsym data get pattern --force`"
    return _load(path, count, about, f"delete the file{rest}")


def published_pattern(
    split: str = "train", path: str | Path | None = None, download: bool = False, force: bool = False
) -> list[Any]:
    """The published set, as `pattern` returns it.

    Args:
        split: "train", "valid" or "test".
        path: root folder of torch_geometric's `GNNBenchmarkDataset(root, "PATTERN")`, whose raw file is read; by default
            `cache_dir()/gnn_benchmark`. A compact copy is stored there (16 MB in all).
        download: let torch_geometric download the raw file if it is missing, or always with force.
        force: read the raw file again.

    Raises FileNotFoundError if the file is missing, ConnectionError if the download fails. Raises ValueError with the path,
    and stores nothing, for a damaged file, another number of graphs than 10,000, 2,000 and 2,000, or graphs of another kind.
    """
    _checked_split("published_pattern", split)
    root = cache_dir() / "gnn_benchmark" if path is None else Path(path)
    raw, folder = root / "PATTERN" / "raw" / RAW, root / "PATTERN" / "compact"
    if force or not (folder / f"{split}.npz").exists():
        if download and (force or not raw.is_file()):
            geometric()
            from torch_geometric.datasets import GNNBenchmarkDataset

            _published.fetch(GNNBenchmarkDataset, root, "PATTERN", [RAW])
        for part, arrays in _read(raw, path is not None).items():
            save_arrays(folder / f"{part}.npz", arrays, {"set": "PATTERN", "split": part})
    about = {"set": "PATTERN", "split": split}
    mend = _published.mending("published_pattern", path is not None)
    return _load(folder / f"{split}.npz", COUNTS[split], about, mend)


def draw(seed: int, split: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One graph: adjacency (n, n) bool, features (n,) in 0..2, community (n,) in 0..4 or 5, the pattern."""
    part = list(COUNTS).index(split)
    planted, planted_features = _planted(seed, number // PER_PATTERN[split])
    random = np.random.RandomState((seed, 1 + part, number))  # its stream is fixed across versions of numpy
    least, most = (n - len(planted) for n in NODES)
    sizes = random.randint(SIZE[0], SIZE[1] + 1, COMMUNITIES)
    while not least <= sizes.sum() <= most:
        sizes = random.randint(SIZE[0], SIZE[1] + 1, COMMUNITIES)
    community = np.repeat(np.arange(COMMUNITIES + 1), [*sizes, len(planted)])
    n = len(community)
    features = np.concatenate([random.randint(0, FEATURES, n - len(planted)), planted_features])
    first, second = _pairs(n)
    probability = np.where(community[first] == community[second], INSIDE, BETWEEN)
    probability[community[second] == COMMUNITIES] = PATTERN_OUTSIDE
    adjacency = _symmetric(random.random_sample(len(first)) < probability, n)
    adjacency[-len(planted) :, -len(planted) :] = planted
    order = random.permutation(n)
    return adjacency[np.ix_(order, order)], features[order], community[order]


@lru_cache(maxsize=4)
def _planted(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A pattern: adjacency (m, m) bool, features (m,)."""
    random = np.random.RandomState((seed, 0, number))
    m = random.randint(SIZE[0], SIZE[1] + 1)
    adjacency = _symmetric(random.random_sample(m * (m - 1) // 2) < PATTERN_INSIDE, m)
    return adjacency, random.randint(0, FEATURES, m)


@lru_cache(maxsize=256)
def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(n, 1)


def _symmetric(upper: np.ndarray, n: int) -> np.ndarray:
    adjacency = np.zeros((n, n), bool)
    adjacency[_pairs(n)] = upper
    return adjacency | adjacency.T


def _packed(graphs: list[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """Packs (adjacency, features, labels) of each graph into arrays; edges are the bits of the upper triangle."""
    return {
        "nodes": np.array([len(a) for a, _, _ in graphs], np.int16),
        "features": np.concatenate([x for _, x, _ in graphs]).astype(np.uint8),
        "labels": np.concatenate([y for _, _, y in graphs]).astype(np.uint8),
        "edges": np.concatenate([np.packbits(a[_pairs(len(a))]) for a, _, _ in graphs]),
    }


def _load(path: Path, count: int, about: dict[str, Any], mend: str) -> list[Any]:
    shapes = {"nodes": (count,), "features": (None,), "labels": (None,), "edges": (None,)}
    arrays, _ = load_arrays(path, shapes, about, mend=mend)
    nodes = arrays["nodes"].astype(np.int64)
    ends = np.cumsum(nodes)[:-1]
    bits = np.split(arrays["edges"], np.cumsum((nodes * (nodes - 1) // 2 + 7) // 8)[:-1])
    one_hot = torch.eye(FEATURES)
    data = geometric().data.Data
    graphs = []
    for n, x, y, b in zip(
        nodes.tolist(), np.split(arrays["features"], ends), np.split(arrays["labels"], ends), bits, strict=True
    ):
        adjacency = _symmetric(np.unpackbits(b, count=n * (n - 1) // 2).view(bool), n)
        edge_index = torch.from_numpy(np.stack(adjacency.nonzero()))
        label = torch.from_numpy(y.astype(np.int64))
        graphs.append(data(x=one_hot[torch.from_numpy(x.astype(np.int64))], edge_index=edge_index, y=label))
    return graphs


def _read(path: Path, own_root: bool) -> dict[str, dict[str, np.ndarray]]:
    """Reads the published raw file, three lists of dictionaries, and packs it."""
    parts = _published.read(path, "published_pattern", own_root)
    wanted = list(COUNTS.values())
    found = [len(part) for part in parts] if isinstance(parts, (list, tuple)) else type(parts).__name__
    if found != wanted:
        raise ValueError(f"{path}: expected lists of {wanted} graphs, got {found}")
    try:
        return {
            split: _packed([_checked(f"{split} graph {k}", record) for k, record in enumerate(part)])
            for split, part in zip(COUNTS, parts, strict=True)
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(what: str, record: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Adjacency, features and labels of a published record, checked."""
    values = record if isinstance(record, dict) else {}
    x, y = (values.get(name) for name in ("x", "y"))
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != FEATURES or not NODES[0] <= len(x) <= NODES[1]:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x of {what} must be (n, {FEATURES}) with n in {NODES[0]}..{NODES[1]}, got {got}")
    n = len(x)
    if not (((x == 0) | (x == 1)).all() and (x.sum(1) == 1).all()):
        raise ValueError(f"x of {what} must be one-hot, got a row {x[(x.max(1).values != 1) | (x.sum(1) != 1)][:1]}")
    if isinstance(y, Tensor) and y.is_floating_point() and (y == y.round()).all():
        y = y.long()
    y = _published.integers(f"y of {what}", y, (n,), 2)
    edges = _published.integers(f"edge_index of {what}", values.get("edge_index"), (2, None), n).numpy()
    adjacency = np.zeros((n, n), bool)
    adjacency[edges[0], edges[1]] = True
    if adjacency.sum() != edges.shape[1] or adjacency.diagonal().any() or (adjacency != adjacency.T).any():
        raise ValueError(f"edge_index of {what} must hold every edge once in both directions and no self loops")
    return adjacency, x.argmax(1).numpy(), y.numpy()


def _checked_split(where: str, split: str) -> None:
    if split not in COUNTS:
        raise ValueError(f"{where}: split must be one of {list(COUNTS)}, got {split!r}")
