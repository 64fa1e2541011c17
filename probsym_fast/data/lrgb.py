"""Peptides-func, Peptides-struct and PCQM-Contact of the Long Range Graph Benchmark (Dwivedi et al. 2022, arXiv 2206.08164).

torch_geometric's `LRGBDataset` downloads the files. They are read here instead: PyG checks neither number nor content,
leaves partly written files after a failure, and takes eight times the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probsym_fast._progress import announced
from probsym_fast.data import _published
from probsym_fast.data._graphs import geometric
from probsym_fast.data._store import cache_dir, load_arrays, save_arrays
from probsym_fast.data.molecules import EDGE_FEATURES, NODE_FEATURES, PCQM, PEPTIDES, MolecularGraphs

TABLES = {"peptides-func": PEPTIDES, "peptides-struct": PEPTIDES, "pcqm-contact": PCQM}
TARGETS = {"peptides-func": 10, "peptides-struct": 11}
COUNTS = {"peptides-func": 15_535, "peptides-struct": 15_535, "pcqm-contact": 529_434}  # all splits, as published
RAW = {"train": "train.pt", "valid": "val.pt", "test": "test.pt"}
STEP = 1000  # graphs per update of the progress bar


def lrgb(
    name: str, split: str = "train", path: str | Path | None = None, download: bool = False, force: bool = False
) -> MolecularGraphs:
    """A split of a published set.

    Args:
        name: "peptides-func", "peptides-struct" or "pcqm-contact".
        split: "train", "valid" or "test".
        path: root folder of torch_geometric's `LRGBDataset(root, name)`, whose raw files are read; by default
            `cache_dir()/lrgb`.
        download: let torch_geometric download the raw files if they are missing, or always with force.
        force: read the raw files again.

    Returns `MolecularGraphs`: integer features in memory (Peptides 55 MB; PCQM-Contact 380 MB plus 5 bytes per labelled
    pair); an item or batch has one-hot channels. Peptides: 50 node and 8 edge channels, y (1, 10) or (1, 11) float32, NaN
    for a missing label of Peptides-func. PCQM-Contact: 68 node and 7 edge channels, edge_label_index (2, m), edge_label (m,).

    The first call reads the raw files of all splits and stores a compact copy in root/name/compact, with a checksum. Raises
    FileNotFoundError if raw files are missing, ConnectionError if the download fails. Raises ValueError with the path, and
    stores nothing, for a damaged file, another number of graphs than published (15,535 and 529,434 over the splits), graphs
    of another kind, or a feature outside its table.
    """
    if name not in TABLES:
        raise ValueError(f"lrgb: name must be one of {list(TABLES)}, got {name!r}")
    if split not in RAW:
        raise ValueError(f"lrgb: split must be one of {list(RAW)}, got {split!r}")
    root = cache_dir() / "lrgb" if path is None else Path(path)
    folder = root / name / "compact"
    if force or not all((folder / f"{part}.npz").exists() for part in RAW):
        raw = {part: root / name / "raw" / file for part, file in RAW.items()}
        if download and (force or not all(file.is_file() for file in raw.values())):
            geometric()
            from torch_geometric.datasets import LRGBDataset

            _published.fetch(LRGBDataset, root, name, list(RAW.values()))
        for part, arrays in _read_all(name, raw, path is not None).items():
            save_arrays(folder / f"{part}.npz", arrays, {"set": name, "split": part})
    shapes: dict[str, tuple[int | None, ...]] = {"nodes": (None,), "edges": (None,)}
    shapes |= {"x": (None, len(NODE_FEATURES)), "edge_index": (2, None), "edge_attr": (None, len(EDGE_FEATURES))}
    if name in TARGETS:
        shapes["y"] = (None, TARGETS[name])
    else:
        shapes |= {"pairs": (None,), "edge_label_index": (2, None), "edge_label": (None,)}
    mend = _published.mending(name, path is not None)
    arrays, _ = load_arrays(folder / f"{split}.npz", shapes, {"set": name, "split": split}, mend=mend)
    return MolecularGraphs(TABLES[name], arrays)


def _read_all(name: str, raw: dict[str, Path], own_root: bool) -> dict[str, dict[str, np.ndarray]]:
    """All splits from their raw files. Raises ValueError if they are not as published."""
    with announced(f"{name}: reading the published files", COUNTS[name]) as advance:
        splits = {split: _read(name, file, own_root, advance) for split, file in raw.items()}
    found = {split: len(arrays["nodes"]) for split, arrays in splits.items()}
    if sum(found.values()) != COUNTS[name]:
        folder = raw["train"].parent
        raise ValueError(f"{folder}: expected {COUNTS[name]} graphs, got {sum(found.values())} ({found})")
    return splits


def _read(name: str, path: Path, own_root: bool, advance: Callable[[int], object]) -> dict[str, np.ndarray]:
    """The graphs of a raw file: a list of tuples (x, edge_attr, edge_index, y or edge_label_index and edge_label)."""
    records = _published.read(path, name, own_root)
    wanted = 4 if name in TARGETS else 5
    if not isinstance(records, (list, tuple)) or not records:
        got = type(records).__name__ if not isinstance(records, (list, tuple)) else "an empty list"
        raise ValueError(f"{path}: expected a list of graphs, got {got}")
    graphs = []
    for k, record in enumerate(records):
        if not isinstance(record, (list, tuple)) or len(record) != wanted:
            got = f"{type(record).__name__} of {len(record)}" if isinstance(record, (list, tuple)) else repr(record)
            raise ValueError(f"{path}: expected graph {k} to be a tuple of {wanted} tensors, got {got}")
        try:
            graphs.append(_graph(name, f"of graph {k}", record))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if (k + 1) % STEP == 0 or k + 1 == len(records):
            advance(k % STEP + 1)
    fields = {field: [g[field] for g in graphs] for field in graphs[0]}
    joined = {field: np.concatenate(parts, axis=-1 if "index" in field else 0) for field, parts in fields.items()}
    counts = {"nodes": fields["x"], "edges": fields["edge_attr"], "pairs": fields.get("edge_label")}
    return joined | {c: np.array([len(part) for part in parts], np.int32) for c, parts in counts.items() if parts}


def _graph(name: str, of: str, record: Any) -> dict[str, np.ndarray]:
    """Checked arrays of one graph."""
    table = TABLES[name]
    x, edge_attr, edge_index, *labels = record
    nodes, edges = (t.shape[0] if isinstance(t, Tensor) and t.ndim else 0 for t in (x, edge_attr))
    if not 1 <= nodes <= table.nodes:
        raise ValueError(f"x {of} must have 1 to {table.nodes} rows, got {nodes}")
    out = {
        "x": _features(f"x {of}", x, NODE_FEATURES, table.node),
        "edge_attr": _features(f"edge_attr {of}", edge_attr, EDGE_FEATURES, table.edge),
        "edge_index": _published.integers(f"edge_index {of}", edge_index, (2, edges), nodes).numpy().astype(np.int16),
    }
    if name in TARGETS:
        (y,) = labels
        if not isinstance(y, Tensor) or tuple(y.shape) != (1, TARGETS[name]):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y {of} must be (1, {TARGETS[name]}), got {got}")
        if name == "peptides-func" and not ((y == 0) | (y == 1) | y.isnan()).all():
            raise ValueError(f"y {of} must hold 0, 1 or NaN, got {y.tolist()}")
        if name == "peptides-struct" and not torch.isfinite(y).all():
            raise ValueError(f"y {of} must be finite, got {y.tolist()}")
        return out | {"y": y.float().numpy()}
    index = _published.integers(f"edge_label_index {of}", labels[0], (2, None), nodes)
    label = labels[1]
    if isinstance(label, Tensor) and label.is_floating_point() and (label == label.round()).all():
        label = label.long()
    label = _published.integers(f"edge_label {of}", label, (index.shape[1],), 2)
    return out | {"edge_label_index": index.numpy().astype(np.int16), "edge_label": label.numpy().astype(np.uint8)}


def _features(what: str, value: Any, names: tuple[str, ...], values: tuple[int, ...]) -> np.ndarray:
    value = _published.integers(what, value, (None, len(names)))
    beyond = (value < 0) | (value >= torch.tensor(values))
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        wanted = f"{names[column]} must be in 0..{values[column] - 1}"
        raise ValueError(f"{what}: {wanted}, got {value[row, column].item()} in row {row}")
    return value.numpy().astype(np.uint8)
