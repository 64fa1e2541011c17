"""Files that ask for more than they hold, and files that would run code: refused in one line, with bounded work."""

import io
import os
import pickle
import re
import resource
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from probsym_fast._untrusted import check_pickle, load_tensors, read_bytes
from probsym_fast.data import read_exp
from probsym_fast.data._store import load_arrays
from probsym_fast.data.graph6 import read_g6

BOMB = b"\x80\x02" + b"K\x01" + b"q\x00h\x00\x86" * 60  # a pair of pairs of pairs ...: 2^60 values, each made once
KEYED = b"\x80\x02}" + BOMB[2:] + b"K\x02s."  # whose hash visits all of them


@contextmanager
def little_work(seconds: float = 5.0, memory: int = 2 << 30):
    """Ends a test that takes too much memory, and fails one that takes too long."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm", encoding="ascii").read().split()[0]) * resource.getpagesize()
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < seconds


def rewritten(path, change, **kind):
    """The zip archive at the path with its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_comes_back(tmp_path, zipped):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "part": torch.arange(6).reshape(2, 3).T[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "dtype": torch.float16,
        "other": OrderedDict(a=b"bytes", b=(1, 2.5, None, True), c=[2**40, "größe"]),
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = load_tensors(tmp_path / "x.pt")
    torch.testing.assert_close(found.pop("state_dict"), content.pop("state_dict"), rtol=0, atol=0)
    assert repr(found) == repr(content)


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(tmp_path, kind):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {"x": torch.arange(4.0)}}, path)
    entry = lambda name: name.endswith("/data.pkl")  # noqa: E731
    swap = lambda old, new: lambda name, content: content.replace(old, new) if entry(name) else content  # noqa: E731
    large = b"J" + (2**31 - 1).to_bytes(4, "little")
    if kind == "compressed":
        torch.save({"x": torch.zeros(1 << 24)}, path)
        rewritten(path, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    elif kind == "more numbers":
        rewritten(path, swap(b"K\x04t", large + b"t"))
    elif kind == "stride 0":
        torch.save({"x": torch.ones(1).expand(1 << 40)}, path)
    elif kind == "key":
        rewritten(path, lambda name, content: KEYED if entry(name) else content)
    elif kind == "code":
        torch.save({"x": Call(os.system, f"touch {tmp_path}/trace")}, path)
    elif kind == "legacy code":
        torch.save({"x": Call(os.system, f"touch {tmp_path}/trace")}, path, _use_new_zipfile_serialization=False)
    elif kind == "legacy":
        torch.save({"x": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"K\x04Nt", large + b"Nt"))
    elif kind == "script":
        rewritten(path, lambda name, content: content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x/constants.pkl", b"\x80\x02].")
    elif kind == "tar":
        path.write_bytes(b"\0" * 10240)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"x": 1}))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("compressed", "expected entries without compression, got x/data"),
        ("more numbers", "expected 8589934588 bytes of storage 0, got 16"),
        ("stride 0", "expected tensors within their storage, got (1099511627776,), 4398046511104 bytes"),
        ("key", "SETITEM with a key that is neither a string nor a small number"),
        ("code", "the global posix.system, which is not allowed"),
        ("legacy code", "the global posix.system, which is not allowed"),
        ("legacy", "expected storages of at most"),
        ("script", "expected tensors, got a TorchScript program"),
        ("tar", "ValueError: at position 0, opcode b'\\x00' unknown"),
        ("pickle", "expected torch's file format, got another one"),
    ],
)
def test_hostile_torch_files_are_refused_in_one_line(tmp_path, kind, message):
    path = hostile(tmp_path, kind)
    with little_work(), pytest.raises(ValueError, match=re.escape(message)) as found:
        load_tensors(path)
    assert "\n" not in str(found.value) and "weights_only" not in str(found.value)
    assert "safe_globals" not in str(found.value) and not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (KEYED, "with a key"),
        (BOMB + b"(" + b"h\x00" * 2000 + b"tR.", "REDUCE with a list or more than 1000 values"),
        (b"\x80\x04\x8f(" + BOMB[2:] + b"\x90.", "ADDITEMS with a key"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f", "expected|not enough"),
        (b"\x80\x02X\xff\xff\xff\xff", "expected|not enough"),
        (b"\x80\x02" + b"\x8a\xff" + b"\x7f" * 255 + b".", "an integer of 2039 bits"),
        (b"\x80\x02" + b"]" * 6_000_000 + b".", "more than 5000000 instructions"),
        (b"\x80\x02R.", "REDUCE without its arguments"),
        (b"\x80\x02t.", "list"),
    ],
)
def test_pickles_that_are_small_and_dear(tmp_path, content, message, monkeypatch):
    if len(content) > 1000_000:
        monkeypatch.setattr("probsym_fast._untrusted.OPCODES", 5000)
        message = "more than 5000 instructions"
    with little_work(), pytest.raises((ValueError, pickle.UnpicklingError, IndexError), match=message):
        check_pickle(io.BytesIO(content), len(content))
    (tmp_path / "x.pkl").write_bytes(content)
    with little_work(), pytest.raises(ValueError, match=r"x.pkl: expected a pickle of graphs, got \w+: "):
        read_exp(tmp_path / "x.pkl")


def test_deep_nesting_is_followed_without_recursion(tmp_path):
    content = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    assert check_pickle(io.BytesIO(content), len(content)) == []
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="expected a list of an even number of graphs, got list of 1"):
        read_exp(tmp_path / "x.pkl")


def test_files_without_an_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        for read in (read_exp, read_g6, load_tensors, lambda path: load_arrays(path, {})):
            with little_work(), pytest.raises(ValueError, match="expected a regular file, got another kind"):
                read(path)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_bytes(tmp_path, 10)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    for read in (read_exp, read_g6):
        with little_work(), pytest.raises(ValueError, match=r"sparse: expected at most \d+ bytes, got 1099511627776"):
            read(tmp_path / "sparse")


def test_arrays_that_claim_more_than_the_file_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3))
    rewritten(path, lambda name, content: content.replace(b"'shape': (3,), }          ", b"'shape': (30000000000,), }"))
    message = "x.npz: expected a readable .npz file, got ValueError: expected 240000000000 bytes of a.npy, got 24"
    with little_work(), pytest.raises(ValueError, match=re.escape(message)):
        load_arrays(path, {})
    np.savez_compressed(path, a=np.zeros(1 << 26))
    with little_work(), pytest.raises(ValueError, match=r"expected entries without compression, got a\.npy with it"):
        load_arrays(path, {})


def test_a_large_graph_takes_little_more_than_its_bits(tmp_path):
    n = 4000
    size = bytes([126, *(63 + (n >> shift & 63) for shift in (12, 6, 0))])
    (tmp_path / "x.g6").write_bytes(size + b"?" * (-(-n * (n - 1) // 2 // 6)) + b"\n")
    with little_work(memory=150 << 20):
        (found,) = read_g6(tmp_path / "x.g6")
    assert found.shape == (n, n) and not found.any()


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.randn(50, 100)}, "epoch": 3}, path)
    whole = path.read_bytes()
    start = whole.index(b"data/0")
    for place in range(start + 200, start + 20_000, 3000):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"expected intact entries, got a wrong checksum in .*data/0"):
            load_tensors(path)
