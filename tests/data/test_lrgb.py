import importlib
import re
import zipfile

import pytest
import torch
from torch.nn.functional import one_hot

from probsym_fast import cli
from probsym_fast.data import lrgb

geometric = pytest.importorskip("torch_geometric")
module = importlib.import_module("probsym_fast.data.lrgb")

# read off the public code of Kim et al. 2023: values of each integer feature that become channels
NODE = {"peptides": [17, 3, 7, 7, 5, 1, 6, 2, 2], "pcqm": [35, 3, 7, 7, 2, 4, 6, 2, 2]}
EDGE = {"peptides": [4, 1, 2], "pcqm": [4, 1, 1]}
NAMES = ["peptides-func", "peptides-struct", "pcqm-contact"]
RAW = {"train": "train.pt", "valid": "val.pt", "test": "test.pt"}
SIZES = {"train": 4, "valid": 3, "test": 2}


def record(name, number, **changes):
    """A graph as the published files have it; the first has the largest values there are."""
    random = torch.Generator().manual_seed(number)
    node, edge = (table[name.split("-")[0]] for table in (NODE, EDGE))
    n, e = 3 + number, 4 * (number % 3)

    def features(rows, values):
        drawn = torch.stack([torch.randint(v, (rows,), generator=random) for v in values], 1)
        return torch.tensor(values).expand(rows, -1) - 1 if number == 0 else drawn

    fields = {
        "x": features(n, node),
        "edge_attr": features(e, edge),
        "edge_index": torch.randint(n, (2, e), generator=random),
    }
    if name == "pcqm-contact":
        fields["edge_label_index"] = torch.randint(n, (2, 5), generator=random)
        fields["edge_label"] = torch.randint(2, (5,), generator=random, dtype=torch.int32)
    elif name == "peptides-func":
        fields["y"] = torch.randint(2, (1, 10), generator=random).float()
        fields["y"][0, 3] = float("nan") if number == 1 else 1.0
    else:
        fields["y"] = torch.randn(1, 11, generator=random)
    return tuple({**fields, **changes}.values())


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Writes raw files to tmp_path/set; of `changes` are fields of graph 1 of the test split."""

    def write(name, **changes):
        folder = tmp_path / "set" / name / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setitem(module.COUNTS, name, sum(SIZES.values()))
        for k, (split, file) in enumerate(RAW.items()):
            graphs = [record(name, i + k) for i in range(SIZES[split])]
            if split == "test" and changes:
                graphs[1] = record(name, 1 + k, **changes)
            torch.save(graphs, folder / file)
        return tmp_path / "set"

    return write


def channels(features, values):
    return torch.cat([one_hot(column, v) for column, v in zip(features.unbind(1), values, strict=True)], 1).float()


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_those_of_the_public_code(raw, name):
    root = raw(name)
    kind = name.split("-")[0]
    for k, split in enumerate(SIZES):
        graphs = lrgb(name, split, root)
        assert len(graphs) == SIZES[split]
        for i, g in enumerate(graphs):
            x, edge_attr, edge_index, *labels = record(name, i + k)
            assert torch.equal(g.x, channels(x, NODE[kind]))
            present = torch.ones(len(edge_attr), 1)
            assert torch.equal(g.edge_attr, torch.cat([present, channels(edge_attr, EDGE[kind])], 1))
            assert g.x.shape[1] == {"peptides": 50, "pcqm": 68}[kind]
            assert g.edge_attr.shape[1] == {"peptides": 8, "pcqm": 7}[kind]
            assert torch.equal(g.edge_index, edge_index)
            if name == "pcqm-contact":
                assert torch.equal(g.edge_label_index, labels[0]) and torch.equal(g.edge_label, labels[1].float())
                assert "y" not in g
            else:
                torch.testing.assert_close(g.y, labels[0], rtol=0, atol=0, equal_nan=True)
    assert graphs.x.dtype == torch.uint8  # compact in memory


@pytest.mark.parametrize("name", NAMES)
def test_raw_files_are_those_torch_geometric_reads(raw, name):
    from torch_geometric.datasets import LRGBDataset

    root = raw(name)
    ours, theirs = lrgb(name, "valid", root), LRGBDataset(str(root), name, "val")
    kind = name.split("-")[0]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.x, channels(b.x, NODE[kind])) and torch.equal(a.edge_index, b.edge_index)
        for field in {"y", "edge_label_index", "edge_label"} & set(b.keys()):
            torch.testing.assert_close(a[field], b[field].to(a[field].dtype), rtol=0, atol=0, equal_nan=True)


def test_what_was_read_is_kept(raw, tmp_path, monkeypatch, capsys):
    root = raw("peptides-func")
    first = lrgb("peptides-func", "train", root)[[0, 1, 2, 3]]
    assert "peptides-func: reading the published files" in capsys.readouterr().err
    for file in (root / "peptides-func" / "raw").iterdir():
        file.unlink()
    again = lrgb("peptides-func", "train", root)[[0, 1, 2, 3]]
    assert capsys.readouterr().err == ""
    assert torch.equal(first.x, again.x) and torch.equal(first.edge_attr, again.edge_attr)
    with pytest.raises(FileNotFoundError, match="download it with `probsym data get peptides-func`"):
        lrgb("peptides-func", "train", root, force=True)
    file = root / "peptides-func" / "compact" / "train.npz"
    file.write_bytes(file.read_bytes()[:-30])
    advice = r"delete the file \(the next use rebuilds it from the raw files\)$"
    with pytest.raises(ValueError, match=re.escape(str(file)) + ".*" + advice):
        lrgb("peptides-func", "train", root)
    monkeypatch.setenv("PROBSYM_CACHE", str(root.rename(tmp_path / "lrgb").parent))
    with pytest.raises(ValueError, match=r"train.npz: .*run `probsym data get peptides-func --force`$"):
        lrgb("peptides-func", "train")


def refused(root, name, message, kind=ValueError):
    with pytest.raises(kind, match=message) as error:
        lrgb(name, "train", root)
    assert str(error.value).startswith(str(root / name / "raw"))
    assert [p.name for p in (root / name).iterdir()] == ["raw"]  # nothing is kept


def test_missing_files(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"train.pt must be the published file, found nothing; download it with"
    ):
        lrgb("pcqm-contact")
    assert not (tmp_path / "lrgb").exists()
    root = raw("pcqm-contact")
    (root / "pcqm-contact" / "raw" / "test.pt").unlink()
    refused(root, "pcqm-contact", "test.pt must be the published file", FileNotFoundError)


def test_damaged_files(raw):
    root = raw("peptides-struct")
    file = root / "peptides-struct" / "raw" / "val.pt"
    content = file.read_bytes()
    for part in (b"", content[:200], content[: len(content) // 2], b"<html>not found</html>"):
        file.write_bytes(part)
        mend = re.escape(f"delete {file} and call again with download=True")
        refused(
            root, "peptides-struct", rf"val.pt: expected tensors in torch's file format, got \w+.*; to fix it, {mend}$"
        )


def test_code_in_a_file_is_not_run(raw, tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("harm",), None)

    root = raw("peptides-func")
    torch.save([Harm()], root / "peptides-func" / "raw" / "train.pt")
    refused(
        root, "peptides-func", "train.pt: expected tensors in torch's file format, got UnpicklingError; to fix it, d"
    )


def test_number_of_graphs(raw, monkeypatch):
    root = raw("peptides-func")
    torch.save([record("peptides-func", 0)], root / "peptides-func" / "raw" / "val.pt")
    refused(root, "peptides-func", r"raw: expected 9 graphs, got 7 \({'train': 4, 'valid': 1, 'test': 2}\)")
    for content, got in (([], "an empty list"), ({"a": 1}, "dict"), (torch.ones(3), "Tensor")):
        torch.save(content, root / "peptides-func" / "raw" / "val.pt")
        refused(root, "peptides-func", f"val.pt: expected a list of graphs, got {got}")
    torch.save([(torch.ones(1),)], root / "peptides-func" / "raw" / "val.pt")
    refused(root, "peptides-func", "val.pt: expected graph 0 to be a tuple of 4 tensors, got tuple of 1")


X = torch.zeros(6, 9, dtype=torch.int64)


def with_value(tensor, row, column, value):
    out = tensor.clone()
    out[row, column] = value
    return out


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "peptides-func",
            {"x": with_value(X, 2, 0, 17)},
            "x of graph 1: atomic number must be in 0..16, got 17 in row 2",
        ),
        ("peptides-struct", {"x": with_value(X, 0, 5, 1)}, "radical electrons must be in 0..0, got 1 in row 0"),
        ("pcqm-contact", {"x": with_value(X, 5, 0, 300)}, "atomic number must be in 0..34, got 300 in row 5"),
        ("pcqm-contact", {"x": with_value(X, 5, 8, -1)}, "in a ring must be in 0..1, got -1 in row 5"),
        ("peptides-func", {"edge_attr": torch.tensor([[0, 1, 0]])}, "stereo must be in 0..0, got 1 in row 0"),
        ("pcqm-contact", {"edge_attr": torch.tensor([[0, 0, 1]])}, "conjugated must be in 0..0, got 1 in row 0"),
        ("peptides-func", {"x": X.float()}, "x of graph 1 must be an integer tensor, got torch.float32"),
        ("peptides-func", {"x": X[:, :8]}, r"x of graph 1 must be \(\*, 9\), got \(6, 8\)"),
        ("peptides-func", {"x": X[:0]}, "x of graph 1 must have 1 to 444 rows, got 0"),
        ("peptides-func", {"x": X[:1].repeat(445, 1)}, "x of graph 1 must have 1 to 444 rows, got 445"),
        ("pcqm-contact", {"x": X[:1].repeat(54, 1)}, "x of graph 1 must have 1 to 53 rows, got 54"),
        ("peptides-func", {"x": None}, "x of graph 1 must have 1 to 444 rows, got 0"),
        (
            "peptides-func",
            {"edge_index": torch.tensor([[0], [0]])},
            r"edge_index of graph 1 must be \(2, 0\), got \(2, 1\)",
        ),
        ("peptides-func", {"y": torch.zeros(1, 11)}, r"y of graph 1 must be \(1, 10\), got \(1, 11\)"),
        ("peptides-func", {"y": torch.full((1, 10), 2.0)}, r"y of graph 1 must hold 0, 1 or NaN, got \[\[2.0"),
        ("peptides-struct", {"y": torch.full((1, 11), float("nan"))}, r"y of graph 1 must be finite, got \[\[nan"),
        (
            "pcqm-contact",
            {"edge_label_index": torch.full((2, 5), 6)},
            "edge_label_index of graph 1 must be in 0..5, got 6",
        ),
        ("pcqm-contact", {"edge_label": torch.ones(4).int()}, r"edge_label of graph 1 must be \(5,\), got \(4,\)"),
        ("pcqm-contact", {"edge_label": torch.full((5,), 2)}, "edge_label of graph 1 must be in 0..1, got 2"),
    ],
)
def test_graphs_of_another_kind(raw, name, changes, message):
    refused(raw(name, **changes), name, "test.pt: " + ".*" + message)


def test_wrong_names():
    with pytest.raises(ValueError, match=r"lrgb: name must be one of \['peptides-func', .*\], got 'Peptides-func'"):
        lrgb("Peptides-func")
    with pytest.raises(ValueError, match=r"lrgb: split must be one of \['train', 'valid', 'test'\], got 'val'"):
        lrgb("peptides-func", "val")


def packed(archive, source, files=("train.pt", "val.pt", "test.pt")):
    """An archive of raw files as they are published; its address."""
    with zipfile.ZipFile(archive, "w") as file:
        for f in files:
            file.write(source / f, f"{archive.stem}/{f}")
    return archive.as_uri()


def test_damaged_downloads_are_fetched_again(raw, tmp_path, monkeypatch):
    from torch_geometric.datasets import LRGBDataset

    name = "peptides-func"
    root = raw(name)
    archive, file = tmp_path / "peptidesfunc.zip", root / name / "raw" / "val.pt"
    monkeypatch.setattr(LRGBDataset, "urls", {name: packed(archive, file.parent)})
    whole = file.read_bytes()
    for damaged in (b"\x80\x02.", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"delete {file} and call again with download=True")) as error:
            lrgb(name, "test", root, force=True)
        assert "weights_only" not in str(error.value)
        assert len(lrgb(name, "test", root, download=True, force=True)) == SIZES["test"]
        assert file.read_bytes() == whole
    content = archive.read_bytes()
    archive.write_bytes(content[:-100])
    file.write_bytes(b"as it was")
    with pytest.raises(ValueError, match="expected to download a zip archive"):
        lrgb(name, "test", root, download=True, force=True)
    assert file.read_bytes() == b"as it was" and sorted(p.name for p in root.iterdir()) == [name]
    monkeypatch.setenv("PROBSYM_CACHE", str(root.rename(tmp_path / "lrgb").parent))
    file = tmp_path / "lrgb" / name / "raw" / "val.pt"
    with pytest.raises(ValueError, match=re.escape(f"delete {file} and run `probsym data get {name} --force`") + "$"):
        lrgb(name, "test", force=True)
    archive.write_bytes(content)
    file.unlink()
    assert cli.main(["data", "get", name, "--force"]) == 0
    assert len(lrgb(name, "test", force=True)) == SIZES["test"]


def test_download(raw, tmp_path, monkeypatch):
    from torch_geometric.datasets import LRGBDataset

    name = "peptides-func"
    archive, source = tmp_path / "peptidesfunc.zip", raw(name) / name / "raw"

    def pack(files):
        packed(archive, source, files)

    pack(RAW.values())
    monkeypatch.setattr(LRGBDataset, "urls", {name: archive.as_uri()})
    root = tmp_path / "fetched"
    with pytest.raises(FileNotFoundError, match="must be the published file"):
        lrgb(name, "test", root)
    assert len(lrgb(name, "test", root, download=True)) == SIZES["test"]
    assert [p.name for p in root.iterdir()] == [name]
    assert sorted(p.name for p in (root / name).iterdir()) == ["compact", "raw"]
    assert all((root / name / "raw" / f).read_bytes() == (source / f).read_bytes() for f in RAW.values())
    other = tmp_path / "other"
    pack(["train.pt", "val.pt"])
    with pytest.raises(ValueError, match=r"peptides-func: expected to download a zip .* got one without .*test.pt"):
        lrgb(name, "test", other, download=True)
    content = archive.read_bytes()
    damaged = content[:40] + bytes(200) + content[240:]
    for part in (content[:-100], content[:300], b"", damaged):  # the first still looks like an archive
        archive.write_bytes(part)
        with pytest.raises(ValueError, match=r"peptides-func: expected to download a zip archive of"):
            lrgb(name, "test", other, download=True)
    archive.unlink()
    with pytest.raises(ConnectionError, match="peptides-func: the published files cannot be downloaded"):
        lrgb(name, "test", other, download=True)
    monkeypatch.setattr(LRGBDataset, "download", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lrgb(name, "test", other, download=True)
    assert not list(other.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_command(raw, name, tmp_path, monkeypatch, capsys):
    from torch_geometric.datasets import LRGBDataset

    archive = tmp_path / f"{name.replace('-', '')}.zip"
    monkeypatch.setattr(LRGBDataset, "urls", {name: packed(archive, raw(name) / name / "raw")})
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    (tmp_path / "set").rename(tmp_path / "lrgb")
    assert cli.main(["data", "list"]) == 0
    assert f"`probsym data get {name}` downloads it" in capsys.readouterr().out
    for arguments in ([], ["--force"]):
        assert cli.main(["data", "get", name, *arguments]) == 0
        out = capsys.readouterr()
        assert (
            f"{name}: 4 + 3 + 2 graphs in {tmp_path / 'lrgb'}" in out.out and "reading the published files" in out.err
        )
    assert cli.main(["data", "get", name.replace("-", "_")]) == 0, "as the configurations spell it"
    assert "reading" not in capsys.readouterr().err
    assert cli.main(["data", "list"]) == 0
    assert f"in {tmp_path / 'lrgb' / name / 'compact'}" in capsys.readouterr().out
