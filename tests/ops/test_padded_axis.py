"""How many places a slot has, from sizes only: exact while a graph is traced, and without a look at values."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

from probsym_fast.ops import Permutation, embed_edges, embed_matrix, embed_nodes, readout
from probsym_fast.ops._patches import PAD_MODES, most_places, padded_axis, patch_size, slots_of_places

CPU = torch.device("cpu")
PADDINGS = list(itertools.product(PAD_MODES, (False, True)))


def counted(N: int, grid: int, pad_mode: str, centered: bool) -> int:
    slots = slots_of_places(N, grid, pad_mode, centered, CPU)
    return int(slots[slots >= 0].bincount().max())


@pytest.mark.parametrize(("pad_mode", "centered"), PADDINGS)
def test_the_closed_form_counts(pad_mode, centered):
    """All N and grids: no padding, some, longer than the slots, many times as long."""
    for N in range(1, 18):
        for grid in range(1, 52):
            assert most_places(N, grid, pad_mode, centered) == counted(N, grid, pad_mode, centered), (N, grid)


def calls(pad_mode: str, centered: bool, device: str = "cpu"):
    """Every op on patches with its arguments made on the device: op -> (call, grid, padding)."""
    B, S, N, D, C, grid, settings = 2, 2, 5, 6, 2, 4, {"pad_mode": pad_mode, "centered": centered}
    P, p = patch_size(N, grid), Permutation(torch.arange(N, device=device).expand(B, S, N))
    ptr, edges = torch.tensor([0, N, 2 * N], device=device), torch.zeros(2, 7, dtype=torch.int64, device=device)
    w2, w1 = torch.ones(D, C, P, P, device=device), torch.ones(D, C, P, device=device)
    attr, x = torch.ones(7, C, device=device), torch.ones(B * N, C, device=device)
    matrix, tokens = torch.ones(B, N, N, C, device=device), torch.ones(B, S, grid**2, D, device=device)
    padded, cropped = most_places(N, grid, pad_mode, centered), 1
    return {
        "embed_edges": (lambda w: embed_edges(edges, attr, ptr, p, w, grid=grid, **settings), w2, padded),
        "embed_nodes": (lambda w: embed_nodes(x, ptr, p, w, tokens=grid, **settings), w1, padded),
        "embed_matrix": (lambda w: embed_matrix(matrix, p, w, grid=grid, **settings), w2, padded),
        "readout": (lambda w: readout(tokens, ptr, p, w, at=edges, centered=centered), w2, cropped),
    }


@pytest.mark.parametrize(("pad_mode", "centered"), [("replicate", True), ("reflect", False), ("circular", True)])
def test_a_traced_graph_has_the_number_and_no_search(pad_mode, centered):
    """Without a kernel the reference is traced, where only the search would show."""
    for name, (call, weight, expected) in calls(pad_mode, centered).items():
        nodes = []

        def look(graph, inputs, nodes=nodes):
            nodes.extend(graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        assert torch.equal(torch.compile(call, fullgraph=True, backend=look)(weight), call(weight))
        for node in nodes:
            assert not any(x in str(node.target) for x in ("nonzero", "bincount", "unique")), (name, node)
            if "probsym_fast" in str(node.target):
                schema = [x.name for x in node.target._schema.arguments]
                assert node.args[schema.index("most_places")] == expected, name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.filterwarnings("ignore:probsym_fast")  # of kernels that are not built
def test_fake_tensors_go_through_and_are_not_kept(device):
    """As tools trace models for a device that is not here; real tensors before and after it."""
    for pad_mode, centered in PADDINGS:
        real = {name: call(weight) for name, (call, weight, _) in calls(pad_mode, centered).items()}
        with FakeTensorMode():
            for name, (call, weight, _) in calls(pad_mode, centered, device).items():
                out = call(weight.requires_grad_())
                assert (out.shape, out.device.type) == (real[name].shape, device)
                if device == "cpu":  # torch's backward pass asks a GPU for its streams
                    torch.autograd.grad(out.sum(), weight)
        for name, (call, weight, _) in calls(pad_mode, centered).items():
            assert torch.equal(call(weight), real[name])
    assert type(padded_axis(5, 4, "reflect", True, CPU)[0]) is torch.Tensor
