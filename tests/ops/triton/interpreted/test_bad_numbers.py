"""Numbers that point nowhere: the kernels reach no memory but their own, and all results are finite."""

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from tests.conftest import assert_near
from tests.helpers.items import batch, weights
from tests.helpers.networks import gin_weights
from tests.ops.triton.inputs import axis_of, soft_arguments

NOWHERE = [-1, -(2**40), 2**40, 10**9]
NO_OFFSETS = [0, 10**9, 2**40], [-(2**40), 3, 8], [5, 2, 9]  # in place of [0, 3, 8], the ptr of two graphs


def run_fenced(fences, name, arguments, result):
    """The op and its whole gradient on fenced tensors: every result is finite, and returned."""
    arguments = [fences(x) for x in arguments]
    out = launcher(name, "forward")(*arguments)
    schema = [x.name for x in OPS[name].kernel._schema.arguments]
    known = dict(zip(schema, arguments, strict=True)) | {f"d_{result}": fences(torch.ones_like(out))}
    takes = [x.name for x in OPS[name].backward._schema.arguments]
    known |= {x: True for x in takes if x.startswith("needs_")}
    found = launcher(name, "backward")(*(known[x] for x in takes))
    found = [out, *(x for x in found if x is not None)]
    assert all(x.isfinite().all() for x in found)
    return found


def with_bad_columns(items):
    """The items, and after them columns with a number that is no node, or of two graphs."""
    bad = torch.tensor(NOWHERE)[None].expand(items.shape[0], -1).contiguous()
    half = bad.clone()
    half[0] = items[0, 0]
    across = torch.tensor([[0], [4]]) if items.shape[0] == 2 else bad[:, :1]
    return torch.cat([items, bad, *([half, half.flip(0)] if items.shape[0] == 2 else []), across], 1)


def with_bad_entries(x):
    """A copy of x (B, S, N) with numbers of no slot and no node, some in every place but the last."""
    most = x[..., :-1]
    bad = torch.tensor([*NOWHERE, x.shape[-1]])[torch.randint(5, most.shape)]
    return torch.cat([torch.where(torch.rand(most.shape) < 0.5, bad, most), x[..., -1:]], -1)


@pytest.mark.parametrize("axes", [1, 2])
def test_bad_items_reach_no_memory(axes, fences):
    """Items that are no nodes count as nothing; offsets and permutations that are none read and write nothing beyond."""
    data, axis = batch([3, 5], 5, C=1, S=2, edges=3), axis_of(5, 2, "circular", True)
    items = data.edges if axes == 2 else torch.arange(8)[None]
    bad, good = with_bad_columns(items), items.shape[1]
    ptr, rank, order, *soft = soft_arguments(data)
    weight, values = weights(5, 1, *[3] * axes).float(), torch.randn(bad.shape[1], 1)
    tokens = torch.randn(2, 2, 2**axes, 5)

    def embed(items, ptr, rank):
        rest = ptr, rank, order, *soft, *axis, weight, torch.arange(5.0)
        return run_fenced(fences, "embed", [items, values[: items.shape[1]], *rest], "tokens")

    def readout(items, ptr, rank):
        rest = ptr, rank, order, *soft, *plain, weight, torch.ones(1)
        return run_fenced(fences, "readout", [tokens, items, *rest], "values")

    plain = axis_of(5, 2)
    for x, y in zip(embed(bad, ptr, rank), embed(items, ptr, rank), strict=True):
        if x.shape == values.shape:
            assert (x[good:] == 0).all()
            x = x[:good]
        assert_near(x, y)
    found, expected = readout(bad, ptr, rank), readout(items, ptr, rank)
    assert_near(found[0][:good], expected[0])
    assert torch.equal(found[0][good:], found[0][good : good + 1].expand(len(found[0]) - good, -1))  # the bias
    for x, y in zip(found[1:-1], expected[1:-1], strict=True):
        assert_near(x, y)
    for offsets in NO_OFFSETS:
        embed(bad, torch.tensor(offsets), rank)
        readout(bad, torch.tensor(offsets), rank)
    wrong = rank.clone()
    wrong[:, :, :4] = torch.where(torch.rand(2, 2, 4) < 0.5, torch.tensor(NOWHERE), wrong[:, :, :4])
    embed(bad, ptr, wrong)
    readout(bad, ptr, wrong)


def test_bad_numbers_reach_no_memory_of_aggregate(fences):
    data, own = batch([3, 5], 5), torch.tensor(1.5)
    edges, x = with_bad_columns(data.edges)[:, :-1], torch.randn(10, 3)
    for ptr, rows in ((data.ptr, 10), (None, 8)):
        found = run_fenced(fences, "aggregate", [x[:rows], edges, ptr, own], "sums")
        for y, z in zip(found, run_fenced(fences, "aggregate", [x[:rows], data.edges, ptr, own], "sums"), strict=True):
            assert_near(y, z)
    for offsets in (*NO_OFFSETS, [2**40, -(2**40), 8]):
        run_fenced(fences, "aggregate", [x, edges, torch.tensor(offsets), own], "sums")


@pytest.mark.parametrize("C", [1, 3])
def test_bad_numbers_reach_no_memory_of_embed_matrix(C, fences):
    """More valid nodes than slots count as all of them; permutations that are none read and write nothing beyond."""
    data, axis = batch([3, 5], 5, C=C, S=2), axis_of(5, 2, "circular", True)
    matrix, weight = data.matrix.float(), weights(20, C, 3, 3).float()
    _, rank, order, *soft = soft_arguments(data)

    def run(counts, rank, order):
        counts = torch.tensor(counts)
        rest = counts, rank, order, *soft, *axis, weight, torch.arange(20.0)
        return run_fenced(fences, "embed_matrix", [matrix, *rest], "tokens")

    expected = run([5, 5], rank, order)
    for x, y in zip(run([6, 2**40], rank, order), expected, strict=True):
        assert_near(x, y)
    for counts in ([3, 5], [7, 2**40], [0, -(2**40)]):
        run(counts, with_bad_entries(rank), with_bad_entries(order))


def test_bad_numbers_reach_no_memory_of_node_identifiers(fences):
    data, weight = batch([3, 5], 5, S=2), weights(5, 20).float()
    ptr, rank, order, *soft = soft_arguments(data)

    def run(ptr, rank, order):
        return run_fenced(fences, "node_identifiers", [ptr, rank, order, *soft, weight, 8], "features")

    for offsets in (ptr.tolist(), *NO_OFFSETS, [2**40, -(2**40), 8], [0, 7, 8]):
        offsets = torch.tensor(offsets)
        run(offsets, rank, order)
        run(offsets, with_bad_entries(rank), order)
        run(offsets, rank, with_bad_entries(order))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_bad_planes_reach_no_memory_of_images(fences):
    """Matrices of huge and of no numbers, turns out of range, odd ones of images that are not square."""
    x, weight, tokens = (fences(torch.randn(size)) for size in ((1, 2, 4, 6), (5, 2, 2, 3), (1, 6, 4, 5)))
    frames = torch.tensor([1e30, -1e-30, torch.inf, torch.nan, 1e4, 3e38]).view(1, 6, 1, 1) * torch.tensor(
        [[1, 0.5], [0, 1]]
    )
    turns = fences(torch.tensor([[1, 7, -1, -(2**40), 2**40 + 3, 11]]))
    for replicate in (False, True):
        launcher("embed_image", "forward")(x, fences(frames), weight, None, replicate)
        launcher("embed_image", "backward")(tokens, x, fences(frames), weight, replicate, True, True, True, True)
    launcher("embed_turned", "forward")(x, turns, weight, None)
    launcher("embed_turned", "backward")(tokens, x, turns, weight, True, True, True)


def test_bad_numbers_reach_no_memory_of_soft_permutation(fences):
    """Counts out of range count as none or as all; an order that is none writes nothing beyond."""
    scores, num_nodes = (fences(x) for x in (torch.randn(3, 1, 6), torch.tensor([2**40, 6, -5])))
    t, log_r, log_c, order, _ = launcher("soft_permutation", "forward")(scores, num_nodes, 0.1, 2, True, False)
    soft = [fences(x) for x in (t, log_r, log_c)]
    for given in (order, with_bad_entries(order)):
        launcher("soft_permutation", "backward")(*soft, scores, fences(given), soft[0], num_nodes, 0.1, 2, True)
    launcher("permutation_entropy", "forward")(*soft, num_nodes, 0.1)
    launcher("permutation_entropy", "backward")(torch.ones(()), *soft, num_nodes, 0.1)
    alone = launcher("soft_permutation", "forward")(scores[:2], None, 0.1, 2, True, False)
    assert all(torch.equal(x[:2], y) for x, y in zip((t, log_r, log_c, order), alone, strict=False))


def test_bad_numbers_reach_no_memory_of_gin(fences):
    data, row, sizes = batch([3, 5], 5), gin_weights(4, 2, 3).float(), (2, 3, 0, False)
    x, edges = torch.randn(8, 2, 4), with_bad_columns(data.edges)
    for ptr in NO_OFFSETS:
        arguments = [fences(t) for t in (x, edges, torch.tensor(ptr), row)]
        y, kept = launcher("gin", "forward")(*arguments, *sizes, True)
        gradients = launcher("gin", "backward")(fences(torch.ones_like(y)), *arguments, kept, *sizes, True, True)
        assert all(t.isfinite().all() for t in (y, *gradients))
