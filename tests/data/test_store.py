import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from probsym_fast._files import write_atomically
from probsym_fast.data._store import cache_dir, load_arrays, save_arrays

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1, 2], np.int8), "c": np.array(7)}
SHAPES = {"a": (2, 3), "b": (None,), "c": ()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "folder" / "file.npz"
    save_arrays(path, ARRAYS, {"seed": 43, "frames": (30, 40)})
    return path


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PROBSYM_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "probsym_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "probsym_fast"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, b"old"])
def test_failed_write_changes_nothing(tmp_path, failure, before):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)

    def writer(file):
        file.write(b"half")
        file.flush()
        assert len(list(tmp_path.iterdir())) == 1 + bool(before)  # the temporary file is in the same folder
        raise failure

    with pytest.raises(failure):
        write_atomically(path, writer)
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if before else [])
    assert not before or path.read_bytes() == before


def test_readers_and_writers_at_once_see_whole_files(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 100_000 for i in range(4)]
    write_atomically(path, lambda file: file.write(contents[0]))
    done = threading.Event()
    seen, broken = set(), []

    def read():
        while not done.is_set():
            content = path.read_bytes()
            (seen.add(content[0]) if content in contents else broken.append(len(content)))

    def write(content):
        for _ in range(20):
            write_atomically(path, lambda file: [file.write(content[i::2]) for i in range(2)])

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not broken
    assert seen
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_arrays_and_metadata_come_back(saved):
    arrays, metadata = load_arrays(saved, SHAPES, {"frames": (30, 40)})
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)
    assert metadata == {"seed": 43, "frames": [30, 40]}


def test_save_refuses_objects_and_the_reserved_name(tmp_path):
    with pytest.raises(TypeError, match=r"Python objects in \['x'\]"):
        save_arrays(tmp_path / "f", {"x": np.array([None])}, {})
    with pytest.raises(ValueError, match='must not use the name "metadata"'):
        save_arrays(tmp_path / "f", {"metadata": np.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "none.npz", SHAPES)


def refused(path, expected, got, **arguments):
    """load_arrays must name the file, what was expected, what came, and how to mend it."""
    with pytest.raises(ValueError) as error:
        load_arrays(path, **{"shapes": SHAPES, "mend": "fetch it again", **arguments})
    assert re.search(f"expected {expected}, got {got}; to fix it, fetch it again$", str(error.value), re.DOTALL)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_file(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    refused(saved, "a readable .npz file", r"\w+: .+")


def test_any_changed_byte_is_noticed_or_harmless(saved):
    content = saved.read_bytes()
    refusals = 0
    for i in range(0, len(content), 7):
        saved.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            arrays, _ = load_arrays(saved, SHAPES)
        except ValueError:
            refusals += 1
        else:  # a byte of the zip directory that is not used, such as a date
            assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert refusals > len(content) / 7 / 2


def test_other_kinds_of_file(tmp_path):
    text, array, folder = tmp_path / "text.npz", tmp_path / "array.npz", tmp_path / "folder.npz"
    text.write_text("<html>not found</html>")
    with array.open("wb") as file:
        np.save(file, np.zeros(3))
    folder.mkdir()
    for path in (text, array, folder):
        refused(path, "a readable .npz file", r"\w+: .+")


def test_pickles_are_not_loaded(tmp_path):
    path = tmp_path / "pickle.npz"
    np.savez(path, a=np.array([{}]))
    refused(path, "a readable .npz file", "ValueError: Object arrays cannot be loaded.+")


def test_file_of_another_writer(tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, **ARRAYS)
    refused(path, re.escape("arrays ['a', 'b', 'c', 'metadata']"), r".+ without \['metadata'\]")
    np.savez(path, **ARRAYS, metadata=np.frombuffer(b"{}", np.uint8))
    refused(path, "JSON metadata with sha256", "KeyError: 'sha256'")


def test_changed_values_break_the_checksum(saved):
    with np.load(saved) as file:
        arrays = dict(file)
    np.savez(saved, **{**arrays, "a": arrays["a"] + 1})
    refused(saved, r"sha256 \w{64}", r"\w{64}")
    stored = json.loads(arrays["metadata"].tobytes())
    changed = np.frombuffer(json.dumps({**stored, "seed": 44}).encode(), np.uint8)
    np.savez(saved, **{**arrays, "metadata": changed})
    refused(saved, r"sha256 \w{64}", r"\w{64}")


def test_missing_arrays_wrong_shapes_and_wrong_metadata(saved):
    refused(saved, r"arrays \['d', 'metadata'\]", r".+ without \['d'\]", shapes={"d": ()})
    refused(saved, r"a of shape \(\*, 4\)", r"\(2, 3\)", shapes={"a": (None, 4)})
    refused(saved, r"a of shape \(2,\)", r"\(2, 3\)", shapes={"a": (2,)})
    refused(saved, r"metadata frames = \[30, 41\]", r"\[30, 40\]", metadata={"frames": (30, 41)})
    refused(saved, "metadata dt = 0.1", "None", metadata={"dt": 0.1})
