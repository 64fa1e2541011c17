import importlib
import re
import zipfile

import numpy as np
import pytest
import torch

from probsym_fast import cli
from probsym_fast.data import pattern, published_pattern
from probsym_fast.data.pattern import COMMUNITIES, draw

pytest.importorskip("torch_geometric")
module = importlib.import_module("probsym_fast.data.pattern")

SMALL = {"train": 3, "valid": 2, "test": 1}


@pytest.fixture(scope="module")
def drawn():
    return [draw(seed, "train", 100 * number) for seed in range(3) for number in range(100)]


def same(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a.x, b.x) and torch.equal(a.edge_index, b.edge_index) and torch.equal(a.y, b.y)
        for a, b in zip(found, expected, strict=True)
    )


def test_form_of_the_graphs(tmp_path):
    for split in ("train", "valid", "test"):
        graphs = pattern(split, 20, root=tmp_path)
        assert len(graphs) == 20
        for g in graphs:
            n = len(g.y)
            assert 44 <= n <= 188
            assert g.x.shape == (n, 3) and g.x.dtype == torch.float32
            assert ((g.x == 0) | (g.x == 1)).all() and (g.x.sum(1) == 1).all()
            assert g.y.shape == (n,) and g.y.dtype == torch.int64 and 5 <= g.y.sum() <= 34
            assert g.edge_index.dtype == torch.int64
            assert g.is_undirected() and not g.has_self_loops() and g.is_coalesced()
            assert g.validate()


def test_a_graph_depends_on_seed_split_and_number_alone(tmp_path):
    graphs = pattern("train", 12, seed=5, root=tmp_path)
    assert same(pattern("train", 7, seed=5, root=tmp_path), graphs[:7])
    for k in (0, 11):
        adjacency, features, community = draw(5, "train", k)
        assert torch.equal(graphs[k].edge_index, torch.from_numpy(np.stack(adjacency.nonzero())))
        np.testing.assert_array_equal(graphs[k].x.argmax(1), features)
        np.testing.assert_array_equal(graphs[k].y, community == COMMUNITIES)
    for other in (draw(6, "train", 0), draw(5, "valid", 0), draw(5, "train", 1)):
        assert other[0].shape != draw(5, "train", 0)[0].shape or (other[0] != draw(5, "train", 0)[0]).any()


def test_values_are_fixed():  # of the random stream: no change of ours or numpy's may go unseen
    adjacency, features, community = draw(0, "test", 3)
    assert (len(adjacency), int(adjacency.sum()), int(features.sum()), int(community.sum())) == (101, 4114, 98, 263)


def test_graphs_of_a_pattern_share_its_edges_and_features():
    def planted(split, number):
        adjacency, features, community = draw(2, split, number)
        inside = community == COMMUNITIES
        degrees = adjacency[np.ix_(inside, inside)].sum(1)
        return sorted(zip(features[inside].tolist(), degrees.tolist(), strict=True))

    first = planted("train", 0)
    assert first == planted("train", 99) == planted("valid", 0) == planted("valid", 19) == planted("test", 19)
    assert first != planted("train", 100) == planted("valid", 20) == planted("test", 39)


def test_probabilities_are_the_published_ones(drawn):
    edges, pairs = np.zeros((2, 3))
    for adjacency, _, community in drawn:
        member = community == COMMUNITIES
        crossing = member[:, None] != member
        one = (community[:, None] == community) & ~np.eye(len(member), dtype=bool)
        within_pattern = one & member
        groups = (one & ~member & ~member[:, None], ~one & ~crossing & ~np.eye(len(member), dtype=bool), crossing)
        edges += [adjacency[g].sum() / 2 for g in groups]
        pairs += [g.sum() / 2 for g in groups]
        assert 0.25 < adjacency[within_pattern].mean() < 0.95 or member.sum() < 12
    deviation = np.sqrt(np.array([0.5, 0.35, 0.5]) * [0.5, 0.65, 0.5] / pairs)
    assert (np.abs(edges / pairs - [0.5, 0.35, 0.5]) < 5 * deviation).all()
    inside = [adjacency[np.ix_(c == COMMUNITIES, c == COMMUNITIES)] for adjacency, _, c in drawn]
    total = sum(len(a) * (len(a) - 1) for a in inside)
    assert abs(sum(a.sum() for a in inside) / total - 0.5) < 5 * np.sqrt(0.25 / (total / 2))


def test_sizes_and_features_are_the_published_ones(drawn):
    counts = np.array([np.bincount(c, minlength=6) for _, _, c in drawn])  # (graphs, 6)
    assert counts.min() == 5 and counts.max() == 34
    assert abs(counts[:, :5].mean() - 19.5) < 5 * 8.66 / np.sqrt(1500)
    assert abs(counts[:, 5].mean() - 19.5) < 5 * 8.66 / np.sqrt(300)
    nodes, directed = counts.sum(1), np.array([a.sum() for a, _, _ in drawn])
    assert 112 < nodes.mean() < 123  # 117
    assert 0.40 < (directed / (nodes * (nodes - 1))).mean() < 0.44
    for inside in (False, True):
        features = np.bincount(np.concatenate([x[(c == COMMUNITIES) == inside] for _, x, c in drawn]), minlength=3)
        assert (np.abs(features / features.sum() - 1 / 3) < 5 * np.sqrt(2 / 9 / features.sum())).all()
    where = np.concatenate([np.flatnonzero(c == COMMUNITIES) / len(c) for _, _, c in drawn])
    assert abs(where.mean() - 0.5) < 5 * 0.29 / np.sqrt(len(where))  # the order of the nodes tells nothing


def test_sizes_beyond_the_published_are_drawn_again(monkeypatch):
    monkeypatch.setattr(module, "NODES", (100, 120))
    assert all(100 <= len(draw(0, "train", k)[0]) <= 120 for k in range(0, 3000, 100))


def test_file_is_kept_small_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    graphs = pattern("valid", 30)
    (file,) = (tmp_path / "pattern").iterdir()
    assert file.stat().st_size < 30 * 1500 and "drawing 30 graphs (valid)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", None)
        assert same(pattern("valid", 30), graphs)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(str(file)) + r".*delete the file \(the next use draws it again\)$"):
        pattern("valid", 30)
    file.unlink()
    assert same(pattern("valid", 30), graphs)
    file.write_bytes(content[:-40])
    assert same(pattern("valid", 30, force=True), graphs)
    assert len(list((tmp_path / "pattern").iterdir())) == 1


def test_the_command_is_advised_for_the_files_it_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "COUNTS", SMALL)
    folder = tmp_path / "pattern"
    for arguments, advised in (
        ({}, True),
        ({"count": 3}, True),
        ({"count": 2}, False),
        ({"seed": 1}, False),
        ({"root": folder}, False),
    ):
        pattern(**arguments, force=True)
        file = folder / f"train-{arguments.get('count', 3)}-seed{arguments.get('seed', 0)}.npz"
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(ValueError, match=re.escape(f"{file}: ")) as error:
            pattern(**arguments)
        assert str(error.value).endswith("or run `probsym data get pattern --force`") == advised
        if advised:
            assert cli.main(["data", "get", "pattern", "--force"]) == 0
        else:
            file.unlink()
        assert len(pattern(**arguments)) == arguments.get("count", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, r"pattern: split must be one of \['train', 'valid', 'test'\], got 'val'"),
        ({"count": 0}, "pattern: count must be at least 1, got 0"),
        ({"seed": -1}, r"pattern: seed must be in 0..2\^32 - 1, got -1"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pattern(root=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


# --- the published set ---


def record(graph, **changes):
    return {"x": graph.x, "edge_index": graph.edge_index, "y": graph.y.float(), **changes}


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Writes a raw file of the published format to tmp_path/set; gives our graphs of it, split by split."""
    ours = {split: pattern(split, count, root=tmp_path / "ours") for split, count in SMALL.items()}
    monkeypatch.setattr(module, "COUNTS", SMALL)
    file = tmp_path / "set" / "PATTERN" / "raw" / "PATTERN_v2.pt"
    file.parent.mkdir(parents=True)

    def write(content=None, **changes):
        lists = [[record(g) for g in ours[split]] for split in SMALL]
        lists[1][1].update(changes)
        torch.save(lists if content is None else content, file)
        return file

    write.ours, write.root, write.file = ours, tmp_path / "set", file
    return write


def test_published_set_has_the_same_form(raw):
    raw()
    for split in SMALL:
        assert same(published_pattern(split, raw.root), raw.ours[split])
    raw.file.unlink()
    assert same(published_pattern("test", raw.root), raw.ours["test"])  # what was read is kept


def test_raw_file_is_the_one_torch_geometric_reads(raw):
    from torch_geometric.datasets import GNNBenchmarkDataset

    raw()
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert same(published_pattern(split, raw.root), list(GNNBenchmarkDataset(str(raw.root), "PATTERN", name)))


def refused(raw, message, kind=ValueError):
    with pytest.raises(kind, match=message) as error:
        published_pattern("train", raw.root)
    assert str(error.value).startswith(str(raw.file))
    assert not (raw.root / "PATTERN" / "compact").exists()


def test_missing_and_damaged_raw_file(raw):
    refused(raw, "found nothing; download it with `probsym data get published_pattern`", FileNotFoundError)
    content = raw().read_bytes()
    for part in (b"", content[:100], content[: len(content) // 2], b"text"):
        raw.file.write_bytes(part)
        refused(
            raw,
            rf"expected tensors in torch's file format, got \w+.*; to fix it, delete {re.escape(str(raw.file))} and",
        )
    raw({"train": []})
    refused(raw, r"expected lists of \[3, 2, 1\] graphs, got dict")
    raw([[record(raw.ours["train"][0])], [], []])
    refused(raw, r"expected lists of \[3, 2, 1\] graphs, got \[1, 0, 0\]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, r"x of valid graph 1 must be \(n, 3\) with n in 44..188, got NoneType"),
        ({"x": torch.zeros(50, 2)}, r"x of valid graph 1 must be \(n, 3\) with n in 44..188, got \(50, 2\)"),
        ({"x": torch.zeros(189, 3)}, r"x of valid graph 1 must be \(n, 3\) with n in 44..188, got \(189, 3\)"),
        ({"x": torch.full((50, 3), 1 / 3)}, "x of valid graph 1 must be one-hot, got a row"),
        ({"y": None}, "y of valid graph 1 must be an integer tensor, got NoneType"),
        ({"y": torch.zeros(3)}, r"y of valid graph 1 must be \(\d+,\), got \(3,\)"),
        ({"y": 0.5}, "y of valid graph 1 must be an integer tensor, got float"),
        ({"edge_index": torch.zeros(3, 4).long()}, r"edge_index of valid graph 1 must be \(2, \*\), got \(3, 4\)"),
        ({"edge_index": torch.tensor([[0, 1], [1, 500]])}, r"edge_index of valid graph 1 must be in 0..\d+, got 500"),
        ({"edge_index": torch.tensor([[0], [1]])}, "every edge once in both directions and no self loops"),
        ({"edge_index": torch.tensor([[2], [2]])}, "every edge once in both directions and no self loops"),
        ({"edge_index": torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])}, "every edge once in both directions"),
    ],
)
def test_graphs_of_another_kind(raw, changes, message):
    raw(**changes)
    refused(raw, message)


def test_labels_beyond_the_classes(raw):
    raw(y=raw.ours["valid"][1].y + 1)
    refused(raw, "y of valid graph 1 must be in 0..1, got 2")


def test_damaged_compact_file(raw):
    raw()
    published_pattern("train", raw.root)
    file = raw.root / "PATTERN" / "compact" / "train.npz"
    file.write_bytes(file.read_bytes()[:-50])
    content = file.read_bytes()
    message = r"delete the file \(the next use rebuilds it from the raw files\)$"
    with pytest.raises(ValueError, match=re.escape(str(file)) + ".*" + message):
        published_pattern("train", raw.root)
    file.unlink()
    assert same(published_pattern("train", raw.root), raw.ours["train"])
    file.write_bytes(content)
    assert same(published_pattern("train", raw.root, force=True), raw.ours["train"])


def test_download(raw, tmp_path, monkeypatch):
    from torch_geometric.datasets import GNNBenchmarkDataset

    archive = tmp_path / "PATTERN_v2.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(raw(), "PATTERN_v2.pt")
    monkeypatch.setattr(GNNBenchmarkDataset, "urls", {"PATTERN": archive.as_uri()})
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "gnn_benchmark"
    with pytest.raises(FileNotFoundError, match=r"PATTERN_v2.pt must be the published file"):
        published_pattern("train")
    assert same(published_pattern("train", download=True), raw.ours["train"])
    assert sorted(p.name for p in root.iterdir()) == ["PATTERN"]
    assert sorted(p.name for p in (root / "PATTERN").iterdir()) == ["compact", "raw"]
    content = archive.read_bytes()
    archive.unlink()
    assert same(published_pattern("valid", download=True), raw.ours["valid"])  # nothing is fetched twice
    fetched = root / "PATTERN" / "raw" / "PATTERN_v2.pt"
    fetched.write_bytes(b"\x80\x02.")
    with pytest.raises(ConnectionError, match="PATTERN: the published files cannot be downloaded"):
        published_pattern("train", download=True, force=True)
    assert fetched.read_bytes() == b"\x80\x02." and same(published_pattern("train"), raw.ours["train"])
    with pytest.raises(
        ValueError, match=rf"delete {re.escape(str(fetched))} and run `probsym data get published_pattern --force`$"
    ):
        published_pattern("train", force=True)
    archive.write_bytes(content)
    assert same(published_pattern("train", download=True, force=True), raw.ours["train"])
    assert fetched.read_bytes() == raw.file.read_bytes()
    archive.unlink()
    with pytest.raises(ConnectionError, match="PATTERN: the published files cannot be downloaded"):
        published_pattern("train", tmp_path / "other", download=True)
    archive.write_bytes(b"half a zip")
    with pytest.raises(ValueError, match=r"PATTERN: expected to download a zip archive of .* got BadZipFile"):
        published_pattern("train", tmp_path / "other", download=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(
        ValueError, match=r"PATTERN: expected to download a zip archive of .* got one without .*PATTERN_v2.pt"
    ):
        published_pattern("train", tmp_path / "other", download=True)
    assert not list((tmp_path / "other").iterdir())


def test_commands(raw, tmp_path, monkeypatch, capsys):
    from torch_geometric.datasets import GNNBenchmarkDataset

    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    assert cli.main(["data", "get", "pattern"]) == 0
    assert f"pattern: 3 + 2 + 1 graphs in {tmp_path / 'pattern'}" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "PATTERN_v2.zip", "w") as archive:
        archive.write(raw(), "PATTERN_v2.pt")
    monkeypatch.setattr(GNNBenchmarkDataset, "urls", {"PATTERN": (tmp_path / "PATTERN_v2.zip").as_uri()})
    raw.root.rename(tmp_path / "gnn_benchmark")
    for arguments in ([], ["--force"], []):
        assert cli.main(["data", "get", "published_pattern", *arguments]) == 0
        assert "published_pattern: 3 + 2 + 1 graphs in " in capsys.readouterr().out
    assert cli.main(["data", "list"]) == 0
    assert f"in {tmp_path / 'gnn_benchmark' / 'PATTERN' / 'compact'}" in capsys.readouterr().out
