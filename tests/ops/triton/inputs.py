"""Arguments of the launchers, for tensors on the CPU."""

import torch

from probsym_fast.ops._patches import padded_axis
from tests.helpers.networks import transformer_weights


def axis_of(N, grid, pad_mode="zeros", centered=False):
    """The slot of each place, the most places of a slot, and the grid, as in the schemas of the ops on patches."""
    return padded_axis(N, grid, pad_mode, centered, torch.device("cpu"))


def soft_arguments(data, tau=0.5):
    """ptr and the soft permutation of the batch's scores, as in the schemas of the ops on graphs."""
    p = data.soft(data.scores.float())
    return data.ptr, p.rank, p.order, p.scores, p.log_r, p.log_c, tau


NETWORK = {"in_features": 3, "width": 6, "layers": 2, "heads": 2, "feedforward": 5, "out_features": 2}


def sequences(M, L, **settings):
    """x (M, L, features), the weights and the sizes, as in the schema of transformer."""
    settings = NETWORK | settings
    weights_of_all = transformer_weights(settings, L).float()
    return torch.randn(M, L, settings["in_features"] or settings["width"]), weights_of_all, list(settings.values())


def edge_arguments(C, d, n, M, w, neighbors, running=False):
    """M clouds of n points in d dimensions with C channels, to w, as in the schema of vector_edge_convolution.

    running: with running statistics.
    """
    leaves = [torch.randn(shape) for shape in ((C, d, n, M), (w, 2 * C), (w, 2 * C), (w, w), (w,), (w,))]
    leaves[4] = leaves[4].abs() + 0.5
    return [*leaves, *((torch.rand(w) + 0.5 for _ in range(2)) if running else (None, None)), None, neighbors]
