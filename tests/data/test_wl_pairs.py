import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from probsym_fast.data import wl_colors, wl_equivalent, wl_pairs
from probsym_fast.data._graphs import graph

pytest.importorskip("torch_geometric")


@pytest.fixture(scope="module")
def pairs():
    return wl_pairs(seed=3)


def adjacency(data):
    return torch.zeros(len(data.x), len(data.x), dtype=torch.float64).index_put_(
        tuple(data.edge_index), torch.tensor(1.0, dtype=torch.float64), accumulate=True
    )


def undirected(n, *edges):
    both = torch.tensor([*edges, *((v, u) for u, v in edges)]).T
    return graph(torch.ones(n), both, 0)


def cycles(*lengths):
    starts = np.cumsum([0, *lengths])
    edges = [(s + i, s + (i + 1) % k) for s, k in zip(starts, lengths, strict=False) for i in range(k)]
    return undirected(int(starts[-1]), *edges)


def test_colours_of_small_graphs():
    path = undirected(5, (0, 1), (1, 2), (2, 3), (3, 4))
    assert len(wl_colors(path.edge_index, path.x).unique()) == 3
    colors = wl_colors(path.edge_index, torch.tensor([[1.0], [0], [0], [0], [0]]))
    assert len(colors.unique()) == 5
    ring = cycles(6)
    assert (wl_colors(ring.edge_index, ring.x) == 0).all()
    assert wl_colors(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 1)).shape == (0,)


def test_equivalence_of_small_graphs():
    assert wl_equivalent(cycles(6), cycles(3, 3))
    assert not wl_equivalent(cycles(6), cycles(7))
    assert not wl_equivalent(cycles(6), undirected(6, (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 2)))
    marked = cycles(3, 3)
    marked.x[0, 0] = 2
    assert not wl_equivalent(cycles(6), marked)


def test_no_pair_is_told_apart_by_1_wl(pairs):
    assert len(pairs) == 1200
    assert all(wl_equivalent(*pairs[i : i + 2]) for i in range(0, 1200, 2))
    assert not any(wl_equivalent(*pairs[i : i + 2]) for i in range(1, 199, 2))  # but neighbouring pairs are


def test_closed_walks_tell_every_pair_apart(pairs):
    """A graph is bipartite if and only if no closed walk of it has odd length: trace A^k = 0 for odd k."""
    for i, data in enumerate(pairs):
        a = adjacency(data)
        a = a / a.sum(1).max()  # no overflow
        power, square, odd = a, a @ a, a.trace()
        for _ in range(len(a) // 2):
            power = power @ square
            odd = odd + power.trace()
        assert (odd == 0) == (i % 2 == 0)


def test_connected_parts_do_not_tell_pairs_apart(pairs):
    for data in pairs[:200]:
        reach = adjacency(data) + torch.eye(len(data.x), dtype=torch.float64)
        for _ in range(6):
            reach = (reach @ reach > 0).double()
        assert len(reach.unique(dim=0)) == 2  # the core and the part that a pair shares


def test_format_is_that_of_exp(pairs):
    for i, data in enumerate(pairs):
        n = len(data.x)
        a = adjacency(data)
        assert 16 <= n <= 64
        assert data.x.shape == (n, 2) and data.x.dtype == torch.float32
        assert torch.equal(data.x[:, 0], data.x[:, 0].bool().float())
        assert torch.equal(data.x[:, 1], a.sum(1).float()) and data.x[:, 1].min() >= 1
        assert data.edge_index.shape[0] == 2 and data.edge_index.dtype == torch.int64
        assert a.max() == 1 and torch.equal(a, a.T) and a.trace() == 0
        assert torch.equal(data.y, torch.tensor([1 - i % 2]))
    assert np.mean([len(d.x) for d in pairs]) == pytest.approx(44.4, abs=1)  # of EXP
    assert np.mean([d.num_edges for d in pairs]) == pytest.approx(110.2, abs=3)
    assert torch.cat([d.x[:, 0] for d in pairs]).mean() == pytest.approx(0.59, abs=0.05)


def test_seed_says_all():
    first, again, other = (wl_pairs(4, seed=seed) for seed in (1, 1, 2))
    same = [all(torch.equal(a[k], b[k]) for k in ("x", "edge_index", "y")) for a, b in zip(first, again, strict=True)]
    assert all(same)
    assert not any(a.x.shape == b.x.shape and torch.equal(a.x, b.x) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("cores", [1, 3, 40])
def test_number_of_cores(cores):
    pairs = wl_pairs(40, cores=cores)
    sizes = [[len(d.x) for d in pairs[i::2]] for i in (0, 1)]
    assert sizes[0] == sizes[1]
    assert all(wl_equivalent(*pairs[i : i + 2]) for i in range(0, 80, 2))


def test_refuses():
    assert wl_pairs(0) == []
    for arguments in ({"count": -1}, {"cores": 0}):
        values = {"count": 600, "cores": 3, **arguments}
        text = "count must be at least 0 and cores at least 1, got {count} and {cores}".format(**values)
        with pytest.raises(ValueError, match=re.escape(text)):
            wl_pairs(**arguments)


def test_torch_geometric_is_imported_late_and_quietly():
    code = """
import sys, warnings
import probsym_fast, probsym_fast.data
assert "torch_geometric" not in sys.modules
warnings.simplefilter("error")
from probsym_fast.data import wl_pairs
print(len(wl_pairs(1)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


def test_without_torch_geometric(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_geometric"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "probsym_fast[train]"')) as error:
        wl_pairs(1)
    assert error.value.name == "torch_geometric"
