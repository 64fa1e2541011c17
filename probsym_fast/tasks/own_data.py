"""Data of one's own: lists of PyTorch Geometric's Data from files, and their splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probsym_fast._untrusted import load_tensors
from probsym_fast.data._graphs import geometric
from probsym_fast.draws import seeded

SPLITS = ("train", "valid", "test")
Lists = dict[str, list[Any]]  # split -> Data


@dataclass
class Splitting:
    """How one list of graphs is cut into three; ignored where the data come in three.

    Args:
        valid: share of the graphs for validation.
        test: share of the graphs for the test; the rest is for training.
        seed: seed of the shuffle, apart from that of the run, so that runs share a test set.
    """

    valid: float = 0.1
    test: float = 0.1
    seed: int = 0


def splits_of(given: Any, place: str | None, splitting: Splitting) -> Lists:
    """The Data of "train", "valid" and "test": those given, as lists by split or one list, or those of a file or folder."""
    if given is None:
        if place is None:
            raise ValueError("config: data must be a folder or a file of graphs, got null")
        return read_splits(place, splitting)
    if not isinstance(given, Mapping):
        return split(check_graphs("graphs", given), splitting)
    if set(given) != set(SPLITS):
        raise ValueError(f"data: graphs must have the splits {', '.join(SPLITS)}, got {', '.join(given)}")
    return {name: check_graphs(name, given[name]) for name in SPLITS}


def read_splits(place: str | Path, splitting: Splitting) -> Lists:
    """The Data of "train", "valid" and "test".

    place: a folder with train.pt, valid.pt (or val.pt) and test.pt; or one file (or a folder that holds one .pt file), whose
    graphs are split. A file holds a list of Data (torch.save) or the graphs of an InMemoryDataset (`InMemoryDataset.save`).
    Runs no code from it.

    Raises FileNotFoundError for what is missing, ValueError for other content.
    """
    place = Path(place)
    if not place.is_dir():
        return split(read_graphs(place), splitting)
    files = {path.stem: path for path in sorted(place.glob("*.pt"))}
    files.setdefault("valid", files.get("val", place / "valid.pt"))
    if all(files.get(name, place).is_file() for name in SPLITS):
        return {name: read_graphs(files[name]) for name in SPLITS}
    found = [path for path in files.values() if path.is_file()]
    if len(found) != 1:
        text = f"must hold train.pt, valid.pt and test.pt, or one file, found {[path.name for path in found]}"
        raise FileNotFoundError(f"data: {place} {text}")
    return split(read_graphs(found[0]), splitting)


def read_graphs(path: Path) -> list[Any]:
    """The Data in one file. Raises FileNotFoundError or ValueError, both with the path."""
    geometric()
    from torch_geometric.data import Data
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    if not path.is_file():
        raise FileNotFoundError(f"data: {path} must be a folder or a file of torch.save, found nothing")
    try:
        content = load_tensors(path, [Data, DataEdgeAttr, DataTensorAttr, GlobalStorage])
    except ValueError as error:
        raise ValueError(f"data: {path} must hold Data of PyTorch Geometric, got {error}") from None
    if isinstance(content, tuple) and len(content) in (2, 3) and content[1:] and isinstance(content[1], dict):
        content = _separated(path, Data, *content[:2])
    return check_graphs(str(path), content)


def check_graphs(what: str, graphs: Any) -> list[Any]:
    """The graphs as a list. Raises ValueError, with `what`, unless they are Data and at least one."""
    given = list(graphs) if isinstance(graphs, Sequence) or hasattr(graphs, "indices") else graphs
    if not isinstance(given, list) or not given or any(not hasattr(one, "num_nodes") for one in given):
        got = sorted({type(one).__name__ for one in given}) if isinstance(given, list) else type(given).__name__
        raise ValueError(f"data: {what} must hold a list of Data, one or more, got {got or 'none'}")
    return given


def split(graphs: Sequence[Any], splitting: Splitting) -> Lists:
    """Shuffled by the seed and cut; every split gets a graph. ValueError for fewer than three graphs."""
    count = len(graphs)
    if count < len(SPLITS):
        raise ValueError(f"data: graphs must be at least 3 to be split, got {count}")
    order = torch.randperm(count, generator=seeded(splitting.seed, "split", 0)).tolist()
    held = [max(1, round(share * count)) for share in (splitting.valid, splitting.test)]
    if sum(held) >= count:
        raise ValueError(f"config: split must leave graphs for training, got {held[0]} and {held[1]} of {count}")
    ends = [count - sum(held), count - held[1], count]
    parts = [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return {name: [graphs[k] for k in part] for name, part in zip(SPLITS, parts, strict=True)}


def _separated(path: Path, kind: Any, joined: Any, slices: Mapping[str, Any]) -> list[Any]:
    """The graphs of an InMemoryDataset's file: all of them in one, and where each begins."""
    from torch_geometric.data.separate import separate

    try:
        joined = kind.from_dict(joined) if isinstance(joined, dict) else joined
        count = len(next(iter(slices.values()))) - 1
        return [separate(kind, joined, k, slices, decrement=False) for k in range(count)]
    except Exception as error:  # wrong slices may show anywhere
        text = f"must hold the graphs of an InMemoryDataset, got {type(error).__name__}: {error}"
        raise ValueError(f"data: {path} {text}") from error
