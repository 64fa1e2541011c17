"""Arguments that do not fit: each is refused by name, with its value."""

import re

import pytest
import torch

from probsym_fast.ops.triton import _lazy as launcher
from tests.helpers.networks import gin_weights, message_weights, mlp_weights
from tests.ops.triton.inputs import edge_arguments, sequences


def check_refused(name, message, *arguments, direction="forward"):
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(message)}$"):
        launcher(name, direction)(*arguments)


def test_arguments_that_do_not_fit_images():
    x, frames, turns = torch.zeros(2, 3, 4, 6), torch.zeros(2, 5, 2, 2), torch.zeros(2, 5, dtype=torch.int64)
    weight = torch.zeros(7, 3, 2, 3)
    for arguments, message in (
        ((x[0], frames, weight, None), "pixels must have 4 axes, got (3, 4, 6)"),
        ((x[:1], frames, weight, None), "pixels must be (2, 3, 4, 6), got (1, 3, 4, 6)"),
        ((x[:, :2], frames, weight, None), "pixels must be (2, 3, 4, 6), got (2, 2, 4, 6)"),
        ((x[..., :5], frames, weight, None), "pixels must be whole patches, got 4 x 5 of 2 x 3"),
        ((x, frames, weight[..., :0], None), "pixels must be whole patches, got 4 x 6 of 2 x 0"),
        ((x, turns, weight, None), "plane must have 4 axes, got (2, 5)"),
        ((x, frames[..., :1], weight, None), "plane must be (2, 5, 2, 2), got (2, 5, 2, 1)"),
        ((x, frames, weight[0], None), "weight must have 4 axes, got (3, 2, 3)"),
        ((x, frames, weight, torch.zeros(6)), "bias must be (7,), got (6,)"),
    ):
        check_refused("embed_image", message, *arguments, False)
    for tokens in (torch.zeros(2, 5, 4, 6), torch.zeros(2, 5, 3, 7)):
        message = f"tokens must be (2, 5, 4, 7), got {tuple(tokens.shape)}"
        check_refused("embed_turned", message, tokens, x, turns, weight, True, True, True, direction="backward")


def test_arguments_that_do_not_fit_a_transformer():
    x, row, sizes = sequences(3, 4)
    lengths = torch.ones(3, dtype=torch.int64)
    for arguments, message in (
        ((x, row[1:], None, sizes, []), f"weights must be ({len(row)},), got ({len(row) - 1},)"),
        ((x[0], row, None, sizes, []), "x must have 3 axes, got (4, 3)"),
        ((x, row, None, [4, *sizes[1:]], []), f"sizes must fit x (3, 4, 3), got {[4, *sizes[1:]]}"),
        ((x, row, None, sizes[1:], []), f"sizes must fit x (3, 4, 3), got {sizes[1:]}"),
        ((x, row, None, [3, 6, 2, 0, 5, 2], []), "sizes must fit x (3, 4, 3), got [3, 6, 2, 0, 5, 2]"),
        ((x, row, None, [*sizes[:3], 4, 5, 2], []), "sizes must fit x (3, 4, 3), got [3, 6, 2, 4, 5, 2]"),
        ((x, row, None, sizes, [4]), "each of read must be in 0..3, got [4]"),
        ((x, row, lengths[1:], sizes, []), "lengths must be (3,), got (2,)"),
        ((x, row, lengths, sizes, [0]), "read must be empty where lengths are given, got 1 tokens"),
        ((x, row, None, [3, 260, 1, 2, 5, 2], []), "its kernels take at most 256 features of the width, got 260"),
        ((x, row, None, [3, 130, 1, 2, 5, 2], []), "its kernels take at most 64 features of a head, got 65"),
        ((x[:, :1].expand(3, 65, 3), row, None, sizes, []), "its kernels take at most 64 tokens, got 65"),
    ):
        check_refused("transformer", message, *arguments, True, 1e-5, False)
    y, other = torch.zeros(3, 4, 2), torch.zeros(2, (2 * 4 + 4) * 6)
    arguments = y, x, row, other, None, sizes, [], True, 1e-5, True, True
    check_refused("transformer", "kept must be (17, 72), got (2, 72)", *arguments, direction="backward")


def test_arguments_that_do_not_fit_message_passing():
    x, edges, row = torch.randn(4, 5, 3), torch.randn(2, 5, 5, 2), message_weights(3, 2, 6, 2, 2).float()
    for arguments, message in (
        ((x[0], edges, row, 6), "x must have 3 axes, got (5, 3)"),
        ((x, edges[:, 1:], row, 6), "edges must be (2, 5, 5, 2), got (2, 4, 5, 2)"),
        ((x[1:], edges, row, 6), "M must be a multiple of edges' B = 2, got 3"),
        (
            (x, edges, row, 0),
            "sizes must be at least 1, got n, features, width, layers and out_features = (5, 3, 0, 2, 2)",
        ),
        ((x, edges, row[1:], 6), f"weights must be ({len(row)},), got ({len(row) - 1},)"),
        ((x, edges, row, 257), "its kernels take at most 256 features of the width or output, got 257"),
    ):
        check_refused("message_passing", message, *arguments, 2, 2, False)
    y, other = torch.zeros(4, 5, 2), torch.zeros(16, 90)
    arguments = y, x, edges, row, other, 6, 2, 2, True, True, True
    check_refused("message_passing", "kept must be (17, 90), got (16, 90)", *arguments, direction="backward")


def test_arguments_that_do_not_fit_the_other_networks():
    rows, row, numbers = torch.randn(4, 3), mlp_weights([3, 5, 2]).float(), torch.zeros(2, 3, dtype=torch.int64)
    nodes, ptr, of_graphs = torch.randn(4, 2, 3), torch.tensor([0, 4]), gin_weights(3, 2, 2).float()
    clouds = edge_arguments(2, 3, 4, 5, 3, 2)
    few = [*clouds[:1], *(clouds[k] for k in (2, 1)), *clouds[3:]]
    few[4] = few[4][:2]
    for name, arguments, message in (
        ("mlp", (rows[0], row, [3, 5, 2], 0), "x must have 2 axes, got (3,)"),
        ("mlp", (rows, row, [4, 5, 2], 0), "widths must fit x (4, 3), got [4, 5, 2]"),
        ("mlp", (rows, row, [3, 5, 2], 4), "activation must be in 0..3, got 4"),
        ("mlp", (rows, row[1:], [3, 5, 2], 0), f"weights must be ({len(row)},), got ({len(row) - 1},)"),
        ("mlp", (rows, row, [3, 4097], 0), "its kernels take at most 4096 features, got 4097"),
        ("gin", (nodes[0], numbers, ptr, of_graphs, 2, 2, 0), "x must have 3 axes, got (2, 3)"),
        ("gin", (nodes, numbers, ptr[:1], of_graphs, 2, 2, 0), "ptr must rise from 0 to the 4 nodes, got one number"),
        (
            "gin",
            (nodes, numbers, ptr, of_graphs, 0, 2, 0),
            "sizes must be at least 1, got width, layers, out_features and B + 1 = (3, 0, 2, 2)",
        ),
        ("gin", (nodes, numbers, ptr, of_graphs, 2, 2, -1), "activation must be in 0..3, got -1"),
        ("gin", (nodes, numbers[:1], ptr, of_graphs, 2, 2, 0), "edge_index must be (2, 3), got (1, 3)"),
        ("gin", (nodes, numbers, ptr, of_graphs, 2, 4097, 0), "its kernels take at most 4096 features, got 4097"),
        ("vector_edge_convolution", few, "feature must be (2, 4), got (3, 4)"),
        ("vector_edge_convolution", [*clouds[:-1], 0], "neighbors must be at least 1, got 0"),
        (
            "vector_edge_convolution",
            [clouds[0][..., :0], *clouds[1:]],
            "x must be of at least one cloud without running statistics, got M = 0",
        ),
        (
            "vector_edge_convolution",
            [*clouds[:6], clouds[5], None, None, 2],
            "running_mean must be given with running_var, got one of them",
        ),
    ):
        more = {"mlp": (True, True, False), "gin": (True, False)}.get(name, ())
        check_refused(name, message, *arguments, *more)
