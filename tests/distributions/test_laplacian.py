import itertools

import numpy as np
import pytest
import torch

from probsym_fast.distributions import laplacian
from probsym_fast.distributions.laplacian import laplacian_keys


def graph(n, pairs):
    """Adjacency (n, n) bool of an undirected graph."""
    a = torch.zeros(n, n, dtype=torch.bool)
    for u, v in pairs:
        a[u, v] = a[v, u] = True
    return a


def batch(graphs):
    ptr = torch.tensor([0, *itertools.accumulate(len(a) for a in graphs)])
    return torch.cat([a.nonzero().T + start for a, start in zip(graphs, ptr, strict=False)], dim=1), ptr


def keys(*graphs):
    edge_index, ptr = batch(graphs)
    return laplacian_keys(edge_index, ptr).split(ptr.diff().tolist())


def empty(n):
    return graph(n, [])


def complete(n):
    return ~torch.eye(n, dtype=torch.bool)


def cycle(n):
    return graph(n, [(u, (u + 1) % n) for u in range(n)])


def path(n):
    return graph(n, [(u, u + 1) for u in range(n - 1)])


def star(n):
    return graph(n, [(0, u) for u in range(1, n)])


def hypercube(d):
    return graph(2**d, [(u, u ^ 2**i) for u in range(2**d) for i in range(d)])


def rook(n):
    cells = list(itertools.product(range(n), repeat=2))
    pairs = itertools.combinations(range(n * n), 2)
    return graph(n * n, [(i, j) for i, j in pairs if (cells[i][0] == cells[j][0]) != (cells[i][1] == cells[j][1])])


def petersen():
    pairs = list(itertools.combinations(range(5), 2))
    return graph(10, [(i, j) for i, j in itertools.combinations(range(10), 2) if not {*pairs[i]} & {*pairs[j]}])


def binary_tree(depth):
    n = 2**depth - 1
    return graph(n, [(u, (u - 1) // 2) for u in range(1, n)])


def dumbbell(clique, length):
    """Two cliques at the ends of a path: pairs of eigenvalues that come together exponentially with the length."""
    middle = path(length)
    a = union(complete(clique), middle, complete(clique))
    for u in (clique - 1, clique + length - 1):
        a[u, u + 1] = a[u + 1, u] = True
    return a


def union(*graphs):
    return torch.block_diag(*(a.int() for a in graphs)).bool()


def random_graph(n, p, generator):
    upper = (torch.rand(n, n, generator=generator) < p).triu(1)
    return upper | upper.T


def random_tree(n, generator):
    return graph(n, [(u, int(torch.randint(u, (), generator=generator))) for u in range(1, n)])


VERTEX_TRANSITIVE = [
    empty(1), empty(7), complete(2), complete(64), cycle(5), cycle(16), cycle(64), hypercube(3), hypercube(6), rook(4),
    rook(8), petersen(), union(cycle(4), cycle(4), cycle(4)),
]  # fmt: skip
SYMMETRIC = [
    star(2), star(17), star(64), star(101), path(6), path(64), binary_tree(5), binary_tree(6), union(cycle(3), path(9)),
    union(random_graph(9, 0.4, torch.Generator().manual_seed(1)), cycle(64), empty(3)), union(petersen(), hypercube(4)),
    union(star(9), star(9), cycle(9)), *(dumbbell(k, m) for k in (3, 6) for m in range(1, 31)),
]  # fmt: skip


def by_definition(a):
    """Row by row, with Python's order of tuples; the half is rounded up as documented."""
    a = a.double().numpy()
    values, vectors = np.linalg.eigh(np.diag(a.sum(0)) - a)
    spaces = [[0]]
    for k in range(1, len(a)):
        if values[k] - values[k - 1] > 1e-6 * values[-1]:
            spaces.append([])
        spaces[-1].append(k)
    norms = np.stack([np.linalg.norm(vectors[:, space], axis=1) for space in spaces], axis=1)
    rows = [tuple(row) for row in np.floor(100 * (norms + 1e-8) + 0.5)]
    return torch.tensor([sorted(set(rows)).index(row) for row in rows])


def random_graphs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        n = int(torch.randint(1, 65, (), generator=generator))
        p = float(torch.rand((), generator=generator)) ** 2
        yield random_tree(n, generator) if i % 3 == 0 else random_graph(n, p, generator)


def assert_permutes(graphs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(a), generator=generator) for a in graphs]
    permuted = keys(*(a[order][:, order] for a, order in zip(graphs, orders, strict=True)))
    for i, (was, now, order) in enumerate(zip(keys(*graphs), permuted, orders, strict=True)):
        assert torch.equal(now, was[order]), f"graph {i}, {len(order)} nodes"


def test_agrees_with_the_definition():
    graphs = [*VERTEX_TRANSITIVE, *SYMMETRIC, *random_graphs(200, seed=2)]
    for a, got in zip(graphs, keys(*graphs), strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got, by_definition(a))


@pytest.mark.parametrize("seed", range(3))
def test_permuting_the_nodes_permutes_the_classes(seed):
    assert_permutes([*VERTEX_TRANSITIVE, *SYMMETRIC, *random_graphs(500, seed)], seed)


def test_permuting_the_nodes_of_larger_graphs():
    generator = torch.Generator().manual_seed(3)
    assert_permutes([random_graph(n, p, generator) for n in (100, 150, 188) for p in (0.02, 0.2, 0.5)])
    assert_permutes([random_tree(n, generator) for n in (100, 150, 188)])


@pytest.mark.parametrize("i", range(len(VERTEX_TRANSITIVE)))
def test_all_nodes_of_a_vertex_transitive_graph_are_tied(i):
    assert keys(VERTEX_TRANSITIVE[i])[0].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("a", "classes"),
    [
        (star(17), [0] + [1] * 16),  # all the same at eigenvalue 0, the leaves alone at 1
        (path(6), [2, 1, 0, 0, 1, 2]),  # cos(pi (u + 1/2) / 6) at the second eigenvalue
        (binary_tree(3), [0, 1, 1, 2, 2, 2, 2]),
        (union(cycle(16), cycle(64)), [1] * 16 + [0] * 64),  # 1/4 and 1/8, the half of the rounding, at eigenvalue 0
        (union(cycle(3), empty(2)), [0, 0, 0, 1, 1]),
    ],
)
def test_orbits_are_tied(a, classes):
    assert keys(a)[0].tolist() == classes


def test_values_at_the_half_need_the_margin(monkeypatch):
    monkeypatch.setattr(laplacian, "MARGIN", 0.0)
    with pytest.raises(AssertionError):
        assert_permutes([union(cycle(64), a) for a in random_graphs(20, seed=4)])


def test_eigenspaces_need_the_tolerance(monkeypatch):
    monkeypatch.setattr(laplacian, "SAME_EIGENVALUE", 0.0)
    with pytest.raises(AssertionError):
        assert_permutes([*VERTEX_TRANSITIVE, *SYMMETRIC])


def test_loops_repeated_edges_and_missing_directions_change_nothing():
    graphs = list(random_graphs(30, seed=5))
    edge_index, ptr = batch(graphs)
    nodes = torch.arange(int(ptr[-1]))
    one_way = edge_index[:, edge_index[0] < edge_index[1]]
    want = laplacian_keys(edge_index, ptr)
    assert torch.equal(laplacian_keys(one_way.flip(0), ptr), want)
    assert torch.equal(laplacian_keys(torch.cat([edge_index, one_way, nodes.expand(2, -1)], dim=1), ptr), want)
    strided = edge_index.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(laplacian_keys(strided, ptr), want)


@pytest.mark.parametrize("chunk", [1, 3000])
def test_graphs_do_not_depend_on_their_batch(monkeypatch, chunk):
    graphs = [*random_graphs(60, seed=6), *(random_graph(12, 0.3, torch.Generator().manual_seed(i)) for i in range(50))]
    together = keys(*graphs)
    for a, got in zip(graphs, together, strict=True):
        assert torch.equal(got, keys(a)[0])
    monkeypatch.setattr(laplacian, "CHUNK", chunk)
    assert torch.equal(torch.cat(keys(*graphs)), torch.cat(together))


def test_no_graphs_and_inputs_unchanged():
    assert laplacian_keys(torch.empty(2, 0, dtype=torch.int64), torch.tensor([0])).shape == (0,)
    edge_index, ptr = batch([path(4), star(3)])
    before, threads = (edge_index.clone(), ptr.clone()), torch.get_num_threads()
    laplacian_keys(edge_index, ptr)
    assert torch.equal(edge_index, before[0]) and torch.equal(ptr, before[1])
    assert torch.get_num_threads() == threads


PAIR = [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("edges", "ptr", "message"),
    [
        ([[0, 3, 1], [1, 4, 0]], [0, 2, 4], "edge_index must be in 0..ptr[-1] - 1 = 3, got edge_index[:, 1] = [3, 4]"),
        ([[0, -1], [1, 0]], [0, 2], "edge_index must be in 0..ptr[-1] - 1 = 1, got edge_index[:, 1] = [-1, 0]"),
        (PAIR, [0], "edge_index must be in 0..ptr[-1] - 1 = -1, got edge_index[:, 0] = [0, 1]"),
        (
            [[0, 1, 1], [1, 0, 2]],
            [0, 2, 4],
            "edges must stay in one graph, got edge_index[:, 2] = [1, 2] in graphs [0, 1]",
        ),
        (PAIR, [0, 2, 2], "ptr must increase, got ptr[1] = 2 and ptr[2] = 2"),
        (PAIR, [0, 3, 2], "ptr must increase, got ptr[1] = 3 and ptr[2] = 2"),
        (PAIR, [1, 2], "ptr must start at 0, got 1"),
        (PAIR, [], "ptr must be (B + 1,), got (0,)"),
        (PAIR, [[0, 2]], "ptr must be (B + 1,), got (1, 2)"),
        ([0, 1], [0, 2], "edge_index must be (2, E), got (2,)"),
        ([[0, 1]], [0, 2], "edge_index must be (2, E), got (1, 2)"),
    ],
)
def test_what_raises(edges, ptr, message):
    with pytest.raises(ValueError) as error:
        laplacian_keys(torch.tensor(edges, dtype=torch.int64), torch.tensor(ptr, dtype=torch.int64))
    assert str(error.value) == f"laplacian_keys: {message}"


def test_wrong_types():
    edge_index, ptr = batch([path(3)])
    with pytest.raises(TypeError) as error:
        laplacian_keys(edge_index.int(), ptr)
    assert str(error.value) == "laplacian_keys: edge_index must be an int64 Tensor, got torch.int32"
    with pytest.raises(TypeError) as error:
        laplacian_keys(edge_index, ptr.tolist())
    assert str(error.value) == "laplacian_keys: ptr must be an int64 Tensor, got list"
