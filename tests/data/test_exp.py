import importlib
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from probsym_fast.data import exp, read_exp, wl_equivalent, wl_pairs

pytest.importorskip("torch_geometric")
module = importlib.import_module("probsym_fast.data.exp")

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(os.environ.get("PROBSYM_SHARED", ROOT.parent / "shared")) / "data" / "EXP" / "GRAPHSAT.pkl"

needs_published = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"the published set is not at {PUBLISHED} (set PROBSYM_SHARED)"
)


class Record:
    """Pickled under the name of torch_geometric's Data."""

    def __init__(self, **state):
        self.__dict__.update(state)


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state)

    def __reduce__(self):
        return self.call


def graph(label, n=6, **changes):
    """A cycle of 6 or two of 3, as a record."""
    v = torch.arange(n)
    w = (v + 1) % n if label else torch.tensor([1, 2, 0, 4, 5, 3])
    edge_index = torch.stack([torch.cat([v, w]), torch.cat([w, v])])
    state = {"x": v[:, None] % 2 * 0 + 1, "edge_index": edge_index, "edge_attr": None, "y": torch.tensor([label])}
    return Record(**{**state, **changes})


def pickled(content, protocol=3):
    name = f"c{Record.__module__}\nRecord\n".encode()
    return pickle.dumps(content, protocol).replace(name, b"ctorch_geometric.data.data\nData\n")


def legacy(value):
    """In torch's old file format, as bytes."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "GRAPHSAT.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickled(content))
        return path

    return write


def test_small_file(file):
    data = read_exp(file([graph(1), graph(0), graph(0), graph(1)]))
    assert [d.y.tolist() for d in data] == [[1], [0], [0], [1]]
    for d in data:
        assert torch.equal(d.x, torch.tensor([[1.0, 2.0]] * 6)) and d.x.dtype == torch.float32
        assert torch.equal(d.edge_index, graph(d.y.item()).edge_index)
    assert wl_equivalent(*data[:2])
    assert read_exp(file([])) == []


@needs_published
def test_published_file(recwarn):
    data = exp(PUBLISHED)
    assert not recwarn.list
    assert len(data) == 1200
    assert [d.y.item() for d in data] == [1, 0] * 600
    sizes = np.array([(len(d.x), d.num_edges) for d in data])
    np.testing.assert_array_equal(sizes[::2], sizes[1::2])
    assert sizes.min(0).tolist() == [32, 78] and sizes.max(0).tolist() == [64, 158]
    np.testing.assert_allclose(sizes.mean(0), [44.447, 110.217], atol=1e-3)
    assert all(set(d.x[:, 0].tolist()) == {0.0, 1.0} for d in data)
    assert all(wl_equivalent(*data[i : i + 2]) for i in range(0, 1200, 10))


@needs_published
@pytest.mark.slow
def test_no_published_pair_is_told_apart_by_1_wl():
    data = read_exp(PUBLISHED)
    assert all(wl_equivalent(*data[i : i + 2]) for i in range(0, 1200, 2))
    assert not any(wl_equivalent(*data[i : i + 2]) for i in range(1, 1199, 2))


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        read_exp(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_the_pickle_is_refused_and_not_run(file, tmp_path, protocol):
    trace = tmp_path / "trace"
    content = pickled([Call(os.system, f"touch {trace}"), graph(1)], protocol)
    refused(file(content), rf"the global {os.system.__module__}\.system, which is not allowed")
    assert not trace.exists()


@pytest.mark.parametrize("wrapped", [legacy, pickle.dumps, lambda call: pickle.dumps(call, 2)])
def test_code_in_an_embedded_tensor_is_refused_and_not_run(file, tmp_path, wrapped):
    trace = tmp_path / "trace"
    storage = Call(torch.storage._load_from_bytes, wrapped(Call(os.system, f"touch {trace}")))
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (6, 1), (1, 1), False, None)
    refused(file([graph(1, x=tensor), graph(0)]), "expected a pickle of graphs, got UnpicklingError")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch.storage\n_load_from_bytes.__globals__\n.",
        b"cprobsym_fast.data.exp\n_storage\n.",
        b"ctorch\nload\n.",
    ],
)
def test_other_globals_are_refused(file, content):
    name = ".".join(content.decode()[1:-2].split("\n"))
    refused(file(content), re.escape(f"the global {name}, which is not allowed"))


def test_pickle_cannot_change_our_functions(file):
    before = module._tensor.__kwdefaults__, module._tensor.__defaults__, dict(vars(module._tensor))
    file_content = b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    refused(file(file_content), "expected a list of an even number of graphs, got function")
    assert (module._tensor.__kwdefaults__, module._tensor.__defaults__, dict(vars(module._tensor))) == before
    storage = Call(torch.storage._load_from_bytes, legacy(torch.zeros(6).storage()), state={"value": 1})
    refused(file([storage, storage]), "UnpicklingError: state set where none belongs")


def test_numbers_that_would_take_all_memory(file):
    refused(file(b"\x80\x03]r\xff\xff\xff\xff."), "UnpicklingError: LONG_BINPUT 4294967295 in 9 bytes")
    storage = Call(torch.storage._load_from_bytes, legacy(torch.zeros(6, dtype=torch.long).storage()))
    for size, stride, offset in (
        ((1 << 40, 1), (1, 1), 0),
        ((6, 1), (0, 1), 0),
        ((5, 1), (1, 1), 1),
    ):
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)
        refused(file([graph(1, x=tensor), graph(0)]), re.escape(f"tensor of size {size}, stride {stride} and offset"))


def test_truncated_file(file):
    content = pickled([graph(1), graph(0)])
    for length in range(0, len(content), 37):
        refused(file(content[:length]), r"expected a pickle of graphs, got \w+: ")


@pytest.mark.parametrize("rest", [b".", b"\n\n", pickled([graph(1), graph(0)])])
def test_what_follows_the_pickle_is_refused(file, rest):
    refused(file(pickled([graph(1), graph(0)]) + rest), f"UnpicklingError: {len(rest)} trailing bytes")


def test_damaged_bytes_are_refused_or_give_graphs(file):
    content = pickled([graph(1), graph(0)])
    messages = []
    places = range(0, len(content), 11)
    for i in places:
        path = file(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            assert all(d.edge_index.max() < len(d.x) for d in read_exp(path))
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert len(messages) > len(places) / 3


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_exp(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(6, 2, dtype=torch.long)}, r"x of graph 1 to be \(n, 1\), got \(6, 2\)"),
        ({"x": torch.ones(6, dtype=torch.long)}, r"x of graph 1 to be \(n, 1\), got \(6,\)"),
        ({"x": torch.tensor(1)}, r"x of graph 1 to be \(n, 1\), got \(\)"),
        ({"x": torch.ones(6, 1)}, "x of graph 1 to be an int64 tensor, got torch.float32"),
        ({"x": torch.full((6, 1), 2)}, "x of graph 1 to be in 0..1, got 2"),
        ({"x": None}, "x of graph 1 to be an int64 tensor, got NoneType"),
        ({"x": "text"}, "x of graph 1 to be an int64 tensor, got str"),
        ({"edge_index": torch.zeros(3, 4, dtype=torch.long)}, r"edge_index of graph 1 to be \(2, E\), got \(3, 4\)"),
        ({"edge_index": torch.tensor([[0, 6], [1, 2]])}, "edge_index of graph 1 to be in 0..5, got 6"),
        ({"edge_index": torch.tensor([[0, -1], [1, 2]])}, "edge_index of graph 1 to be in 0..5, got -1"),
        ({"y": torch.tensor([2])}, "y of graph 1 to be in 0..1, got 2"),
        ({"y": torch.tensor([0, 1])}, r"y of graph 1 to be \(1,\), got \(2,\)"),
        ({"y": torch.tensor([1])}, r"labels 0 and 1 of graphs 0 and 1, got \[1, 1\]"),
    ],
)
def test_graphs_of_another_kind(file, changes, message):
    refused(file([graph(1), graph(0, **changes)]), message)


def test_lists_of_another_kind(file):
    refused(file([graph(1)]), "expected a list of an even number of graphs, got list of 1")
    refused(file([1, 2]), "expected a list of an even number of graphs, got list of 2")
    refused(file({"a": graph(1)}), "expected a list of an even number of graphs, got dict")


def test_where_the_graphs_come_from(file, tmp_path, monkeypatch):
    pairs = exp()
    assert all(torch.equal(a.x, b.x) for a, b in zip(pairs, wl_pairs(), strict=True))

    def fetch(url, path, sha256):
        fetched.append((url, path, sha256))
        return file([graph(1), graph(0)])

    fetched = []
    monkeypatch.setattr(module, "download", fetch)
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    assert len(exp(url=module.URL)) == len(exp(url="http://mirror", root=tmp_path / "own")) == 2
    assert fetched == [
        (module.URL, tmp_path / "exp" / "GRAPHSAT.pkl", module.SHA256),
        ("http://mirror", tmp_path / "own" / "GRAPHSAT.pkl", module.SHA256),
    ]
    with pytest.raises(ValueError, match="path and url must not both be given, got 'a' and 'b'"):
        exp("a", "b")


@needs_published
def test_checksum_is_that_of_the_published_file(tmp_path):
    assert len(exp(url=PUBLISHED.as_uri(), root=tmp_path)) == 1200
    assert (tmp_path / "GRAPHSAT.pkl").read_bytes() == PUBLISHED.read_bytes()
