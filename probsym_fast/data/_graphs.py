"""Graphs as torch_geometric data. Only this file imports torch_geometric, when it makes the first graph."""

import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def geometric() -> ModuleType:
    """The module torch_geometric, imported without its warning about torch.jit.script.

    Raises ModuleNotFoundError if it is not installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.")
        try:
            import torch_geometric
        except ModuleNotFoundError as error:
            if error.name != "torch_geometric":
                raise
            text = 'torch_geometric is needed for graphs: pip install "probsym_fast[train]"'
            raise ModuleNotFoundError(text, name=error.name) from None
    return torch_geometric


def graph(feature: Tensor, edge_index: Tensor, label: int | None = None) -> Any:
    """One torch_geometric.data.Data.

    Args:
        feature: (n,), a node feature.
        edge_index: (2, E) int64, every edge in both directions.
        label: y, if any.

    Returns x (n, 2) float32 = [feature, degree], edge_index and, with a label, y (1,) int64.
    """
    degree = torch.bincount(edge_index[0], minlength=len(feature))
    x = torch.stack([feature, degree], 1).float()
    y = {} if label is None else {"y": torch.tensor([label])}
    return geometric().data.Data(x=x, edge_index=edge_index, **y)
