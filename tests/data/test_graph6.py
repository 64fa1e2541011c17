import re

import numpy as np
import pytest

from probsym_fast.data import read_g6, write_g6


def random_graph(n, seed=0):
    upper = np.triu(np.random.RandomState(seed).random_sample((n, n)) < 0.3, 1)
    return upper | upper.T


def test_format_follows_its_definition(tmp_path):
    path = tmp_path / "a.g6"
    path.write_bytes(b"DQc\n")  # the example of the format's description
    (graph,) = read_g6(path)
    edges = {(int(u), int(v)) for u, v in zip(*np.nonzero(np.triu(graph)), strict=True)}
    assert edges == {(0, 2), (0, 4), (1, 3), (3, 4)}
    write_g6(path, [graph])
    assert path.read_bytes() == b"DQc\n"


def test_round_trip_of_any_size(tmp_path):
    graphs = [random_graph(n, seed=n) for n in (1, 2, 3, 4, 5, 8, 62, 63, 64, 130)] + [np.zeros((0, 0), bool)]
    write_g6(tmp_path / "a.g6", graphs)
    back = read_g6(tmp_path / "a.g6")
    assert len(back) == len(graphs)
    for graph, expected in zip(back, graphs, strict=True):
        np.testing.assert_array_equal(graph, expected, strict=True)
    (tmp_path / "b.g6").write_bytes(b">>graph6<<" + (tmp_path / "a.g6").read_bytes())
    assert len(read_g6(tmp_path / "b.g6")) == len(graphs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "expected a graph, got an empty line"),
        (b"DQ c", "expected bytes 63 to 126, got 32"),
        (b"DQ", "expected 2 bytes of adjacency for 5 nodes, got 1"),
        (b"DQcc", "expected 2 bytes of adjacency for 5 nodes, got 3"),
        (b"DQd", "expected zeros after the 10 bits of adjacency, got [0, 1]"),
        (b"~?", "expected at most 258047 nodes in four bytes, got b'~?'"),
        (b"~~?????", "expected at most 258047 nodes in four bytes, got b'~~??'"),
        (b"~}}}", "expected * bytes of adjacency for 257982 nodes, got 0"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.g6"
    path.write_bytes(b"DQc\n" + line + b"\nDQc\n")
    pattern = re.escape(f"{path}: line 2: {message}").replace(r"\*", r"\d+")
    with pytest.raises(ValueError, match=pattern):
        read_g6(path)


def test_writer_refuses(tmp_path):
    for graph, message in (
        (np.zeros((2, 3)), r"graph 1 must be \(n, n\) with n <= 258047, got \(2, 3\)"),
        (np.eye(3), "graph 1 must be symmetric without loops"),
        (np.array([[0, 1], [0, 0]]), "graph 1 must be symmetric without loops"),
    ):
        with pytest.raises(ValueError, match=message):
            write_g6(tmp_path / "a.g6", [random_graph(4), graph])
    assert not list(tmp_path.iterdir())
