"""Graph sets for vision transformers, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from probsym_fast.data import MolecularGraphs, lrgb, molecules, pattern, published_pattern
from probsym_fast.data.molecules import PCQM, PEPTIDES
from probsym_fast.draws import seeded
from probsym_fast.groups import Graphs
from probsym_fast.tasks.graphs import add_frames, collate, frames

Source = list[Any] | MolecularGraphs
RANDOM = {"train": 1024, "valid": 256, "test": 256}  # molecules in a random set


class GraphSet(NamedTuple):
    """A set of graphs.

    N: most nodes. node_channels, edge_channels: channels of x and edge_attr. outputs: channels of the prediction. about:
    text for the report. load(split, count, path, seed): its graphs; count: for generated sets (None: as published).
    """

    N: int
    node_channels: int
    edge_channels: int
    outputs: int
    about: str
    load: Callable[[str, int | None, str | None, int], Source]


def _pattern(split: str, count: int | None, path: str | None, seed: int) -> Source:
    return pattern(split, count, seed, root=path)


def _published_pattern(split: str, count: int | None, path: str | None, seed: int) -> Source:
    return published_pattern(split, path)


def _published(name: str) -> Callable[..., Source]:
    return lambda split, count, path, seed: lrgb(name, split, path)


def _random(kind: str, labels: str) -> Callable[..., Source]:
    def load(split: str, count: int | None, path: str | None, seed: int) -> Source:
        number = seeded(seed, f"molecules {split}", 0).initial_seed() % 2**32
        return molecules(count or RANDOM[split], kind, number, labels)

    return load


_PEPTIDES, _PCQM = ((table.nodes, table.node_channels, table.edge_channels) for table in (PEPTIDES, PCQM))
SETS = {
    "pattern": GraphSet(188, 3, 1, 2, "PATTERN, our own draw of the published model", _pattern),
    "published_pattern": GraphSet(188, 3, 1, 2, "PATTERN as published", _published_pattern),
    "peptides_func": GraphSet(*_PEPTIDES, 10, "Peptides-func", _published("peptides-func")),
    "peptides_struct": GraphSet(*_PEPTIDES, 11, "Peptides-struct", _published("peptides-struct")),
    "pcqm_contact": GraphSet(*_PCQM, 1, "PCQM-Contact", _published("pcqm-contact")),
    "random_peptides_func": GraphSet(*_PEPTIDES, 10, "random molecules, random labels", _random("peptides", "binary")),
    "random_peptides_struct": GraphSet(*_PEPTIDES, 11, "random molecules, random labels", _random("peptides", "real")),
    "random_pcqm_contact": GraphSet(*_PCQM, 1, "random molecules, random contacts", _random("pcqm", "binary")),
}


class LabelledGraphs(Dataset):
    """Graphs with targets: an index tensor gives (Graphs, target), the target (nodes,) int64, (B, T) float or (pairs, 1).

    A graph's `key` is its number, so that fixed noise does not depend on the batch.
    by_frame: add the frame's node order to the graphs (`Graphs.frame`).
    """

    def __init__(self, source: Source, by_frame: bool = False):
        self.source = source
        self.frames: list[Tensor] | None = None
        if by_frame and isinstance(source, list):
            add_frames(source)
        elif by_frame and isinstance(source, MolecularGraphs):
            self.frames = frames(source.edges(), source.ptr)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Tensor) -> tuple[Graphs, Tensor]:
        if isinstance(self.source, list):
            some = [self.source[i] for i in index.tolist()]
            return collate(some).replace(key=index.clone()), torch.cat([graph.y for graph in some])
        data = self.source[index]
        graphs = Graphs.from_data(data)
        if self.frames is not None:
            graphs = graphs.replace(frame=torch.cat([self.frames[i] for i in index.tolist()]))
        return graphs, data.y if graphs.pairs is None else data.edge_label[:, None]
