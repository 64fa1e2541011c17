"""EXP: 600 pairs of graphs that the 1-WL test cannot distinguish, one of each pair satisfiable.

The set of Abboud, Ceylan, Grohe, Lukasiewicz, "The Surprising Power of Graph Neural Networks with Random Node
Initialization" (IJCAI 2021, arXiv 2010.01179). Graphs 2k (label 1) and 2k + 1 (label 0) are a pair. `wl_pairs` generates
a similar set without a download.
"""

import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsym_fast._untrusted import check_legacy, check_pickle, read_bytes, reason
from probsym_fast.data._graphs import graph
from probsym_fast.data._store import cache_dir
from probsym_fast.data.download import download
from probsym_fast.data.wl_pairs import wl_pairs

URL = "https://raw.githubusercontent.com/ralphabb/GNN-RNI/master/Data/EXP/raw/GRAPHSAT.pkl"
SHA256 = "82f25cfab85e8bf51d518271afc12f45340f8a297d68994259c5b8bb9618ef17"
LARGEST = 1 << 26  # bytes per file; the published one has 3.8 million


def exp(path: str | Path | None = None, url: str | None = None, root: str | Path | None = None) -> list[Any]:
    """EXP from a file or a URL; with neither, our own pairs, `wl_pairs()`.

    Args:
        path: the published GRAPHSAT.pkl.
        url: where to download it, once; the authors publish it at `probsym_fast.data.exp.URL`. Its SHA-256 must be that of
            the published file.
        root: folder for the downloaded file; by default `cache_dir()/exp`.

    Returns 1,200 torch_geometric `Data` with x (n, 2) float32 = [given feature, degree], edge_index (2, E) int64 and
    y (1,) int64. Raises ValueError for a damaged file or a wrong checksum, ConnectionError if the download fails.
    """
    if path is not None and url is not None:
        raise ValueError(f"exp: path and url must not both be given, got {str(path)!r} and {url!r}")
    if url is not None:
        path = download(url, (cache_dir() / "exp" if root is None else Path(root)) / "GRAPHSAT.pkl", SHA256)
    return wl_pairs() if path is None else read_exp(path)


def read_exp(path: str | Path) -> list[Any]:
    """The graphs of a published pickle, as `exp` returns them. Runs no code from the file.

    The pickle is a list of torch_geometric `Data`, each tensor embedded in torch's old file format. It may name only four
    globals, which are replaced by our own functions. torch.load reads the embedded tensors with weights_only. The file's
    size bounds the work and the memory. Raises ValueError with the path for anything else, for graphs of another kind, and
    for a file of more than 64 MiB.
    """
    content = read_bytes(path, LARGEST)
    try:
        graphs = _unpickled(content)
    except Exception as error:  # a damaged pickle may fail anywhere
        text = f"{path}: expected a pickle of graphs, got {reason(error)}"
        raise ValueError(text) from None  # torch's errors recommend running the file's code
    if not isinstance(graphs, list) or not all(isinstance(g, _Graph) for g in graphs) or len(graphs) % 2:
        kind = f"{type(graphs).__name__} of {len(graphs)}" if isinstance(graphs, list) else type(graphs).__name__
        raise ValueError(f"{path}: expected a list of an even number of graphs, got {kind}")
    try:
        checked = [_checked(i, g) for i, g in enumerate(graphs)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for i in range(0, len(checked), 2):
        labels = [checked[i].y.item(), checked[i + 1].y.item()]
        if sum(labels) != 1:
            raise ValueError(f"{path}: expected labels 0 and 1 of graphs {i} and {i + 1}, got {labels}")
    return checked


class _Box:
    """A value that the pickle can pass on but neither inspect nor change."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state set where none belongs")


class _Graph:
    """In place of torch_geometric's `Data`: just keeps the state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _storage(content: bytes) -> _Box:
    """The content of an embedded storage as a 1-D tensor."""
    check_legacy(io.BytesIO(content), len(content))
    storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"embedded {type(storage).__name__} in place of a storage")
    return _Box(torch.empty(0, dtype=storage.dtype).set_(storage.untyped()))


def _tensor(storage: _Box, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any) -> _Box:
    """A whole storage as a contiguous tensor."""
    values = storage.value
    contiguous = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    if offset != 0 or stride != contiguous or math.prod(size) != len(values):
        text = f"tensor of size {size}, stride {stride} and offset {offset} in {len(values)} numbers"
        raise pickle.UnpicklingError(text)
    return _Box(values.view(size))


def _empty(*arguments: Any) -> None:
    """In place of a tensor's hooks, which nothing reads."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch.storage._load_from_bytes": _storage,
            "collections.OrderedDict": _empty,
        }
        if f"{module}.{name}" == "torch_geometric.data.data.Data":
            return _Graph
        if function := known.get(f"{module}.{name}"):
            return lambda *arguments: function(
                *arguments
            )  # a new one each time: a pickle can set attributes of a function
        raise pickle.UnpicklingError(f"the global {module}.{name}, which is not allowed")


def _unpickled(content: bytes) -> Any:
    stream = io.BytesIO(content)
    check_pickle(stream, len(content))
    if rest := len(content) - stream.tell():
        raise pickle.UnpicklingError(f"{rest} trailing bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns about its old format
        return _Unpickler(io.BytesIO(content)).load()


def _checked(place: int, record: _Graph) -> Any:
    """The graph of a record. Raises ValueError if it is invalid."""
    state = record.state if isinstance(record.state, dict) else {}
    x, edge_index, y = (_int64(place, state, name) for name in ("x", "edge_index", "y"))
    for name, tensor, shape, wanted in (
        ("x", x, (len(x), 1) if x.ndim else (1, 1), "(n, 1)"),
        ("edge_index", edge_index, (2, edge_index.shape[-1] if edge_index.ndim else 0), "(2, E)"),
        ("y", y, (1,), "(1,)"),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} of graph {place} to be {wanted}, got {tuple(tensor.shape)}")
    for name, tensor, end in (("x", x, 2), ("edge_index", edge_index, len(x)), ("y", y, 2)):
        if (wrong := tensor[(tensor < 0) | (tensor >= end)]).numel():
            raise ValueError(f"expected {name} of graph {place} to be in 0..{end - 1}, got {wrong[0].item()}")
    return graph(x[:, 0], edge_index, int(y))


def _int64(place: int, state: dict[str, Any], name: str) -> Tensor:
    tensor = getattr(state.get(name), "value", None)
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(state.get(name)).__name__
        raise ValueError(f"expected {name} of graph {place} to be an int64 tensor, got {got}")
    return tensor
