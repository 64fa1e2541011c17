import importlib
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from probsym_fast.data import graph8c, read_g6, write_g6
from probsym_fast.data.graph8c import all_graphs, canonical_codes, connected_graphs, graphs_of_codes

pytest.importorskip("torch_geometric")
module = importlib.import_module("probsym_fast.data.graph8c")

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(os.environ.get("PROBSYM_SHARED", ROOT.parent / "shared")) / "data" / "GRAPH8c" / "graph8c.g6"


@pytest.fixture(scope="module")
def connected():
    return connected_graphs(8)


def shuffled(graphs, seed=0):
    random = np.random.RandomState(seed)
    orders = [random.permutation(graphs.shape[1]) for _ in graphs]
    return np.stack([g[np.ix_(o, o)] for g, o in zip(graphs, orders, strict=True)])


def test_counts_are_the_known_ones(connected):  # OEIS A000088 and A001349
    assert [len(all_graphs(n)) for n in range(1, 9)] == [1, 2, 4, 11, 34, 156, 1044, 12346]
    assert [len(connected_graphs(n)) for n in range(1, 8)] == [1, 1, 2, 6, 21, 112, 853]
    assert connected.shape == (11_117, 8, 8)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the published set is not at {PUBLISHED} (set PROBSYM_SHARED)")
def test_published_graphs_are_ours(connected):
    codes = canonical_codes(np.stack(read_g6(PUBLISHED)))
    np.testing.assert_array_equal(np.sort(codes), canonical_codes(connected))


def test_codes_do_not_depend_on_the_order_of_the_nodes(connected):
    codes = canonical_codes(connected)
    assert (np.diff(codes) > 0).all()
    np.testing.assert_array_equal(canonical_codes(shuffled(connected)), codes)
    np.testing.assert_array_equal(graphs_of_codes(codes, 8), connected)
    np.testing.assert_array_equal(canonical_codes(connected[7:8]), codes[7:8])  # nor on what else is asked for


def test_equal_codes_mean_isomorphic():
    random = np.random.RandomState(1)
    upper = np.triu(random.random_sample((60, 5, 5)) < 0.5, 1)
    graphs = upper | upper.swapaxes(1, 2)
    orders = np.array(list(permutations(range(5))))
    forms = [{g[np.ix_(o, o)].tobytes() for o in orders} for g in graphs]  # everything isomorphic to each
    isomorphic = np.array([[b.tobytes() in form for b in graphs] for form in forms])
    codes = canonical_codes(graphs)
    np.testing.assert_array_equal(codes[:, None] == codes, isomorphic)


def test_refuses():
    with pytest.raises(ValueError, match=r"n must be in 1..8, got 9"):
        all_graphs(9)
    with pytest.raises(ValueError, match=r"graphs must be \(M, n, n\) with n in 1..8, got \(2, 3, 4\)"):
        canonical_codes(np.zeros((2, 3, 4), bool))


def test_set_is_kept_in_a_file(tmp_path, monkeypatch, connected):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    data = graph8c()
    assert len(data) == 11_117
    for graph, adjacency in zip(data[::500], connected[::500], strict=True):
        assert graph.x.dtype == torch.float32 and graph.edge_index.dtype == torch.int64
        assert graph.y is None
        dense = torch.zeros(8, 8).index_put_(tuple(graph.edge_index), torch.tensor(1.0), accumulate=True)
        np.testing.assert_array_equal(dense.numpy(), adjacency)
        np.testing.assert_array_equal(graph.x.numpy(), np.stack([np.ones(8), adjacency.sum(1)], 1))

    monkeypatch.setattr(module, "connected_graphs", lambda n: pytest.fail("must not enumerate"))
    assert len(graph8c()) == 11_117
    with pytest.raises(pytest.fail.Exception):
        graph8c(force=True)
    file = tmp_path / "graph8c" / "graph8c.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"readable .npz file, got .*call graph8c\(force=True\)"):
        graph8c()


def test_other_files_can_be_read(tmp_path, connected):
    write_g6(tmp_path / "a.g6", connected[:5])
    data = graph8c(path=tmp_path / "a.g6", root=tmp_path / "none")
    assert [g.num_edges for g in data] == connected[:5].sum((1, 2)).tolist()
    assert not (tmp_path / "none").exists()
