"""Checks untrusted files before loading them, so that their size bounds the work and the memory."""

from __future__ import annotations

import errno
import os
import pickletools
import stat
import zipfile
from collections.abc import Collection, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

OPCODES = 5_000_000  # most instructions of a pickle; a ViT checkpoint with Adam's moments has about ten thousand
ARGUMENTS = 1000  # most values in the arguments of one call
PICKLE = 1 << 26  # bytes of the largest pickle
INTEGER = 128  # bits of the largest integer
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # start of torch's file format before zip
STORAGES = {  # bytes per element
    "torch.storage.UntypedStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.ShortStorage": 2,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.IntStorage": 4,
    "torch.FloatStorage": 4,
    "torch.LongStorage": 8,
    "torch.DoubleStorage": 8,
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
}
NAMES = {  # globals that the pickle of a torch file may name, besides dtypes
    *STORAGES,
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
}


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file. Raises ValueError for a pipe or device, or for more than `most` bytes."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path}: expected at most {most} bytes, got {size}")
        return file.read(size)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading. Raises ValueError for other kinds, which might never end."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return open(number, "rb")
    os.close(number)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError(f"{path}: expected a regular file, got another kind")


def check_zip(file: BinaryIO) -> dict[str, int]:
    """Name and size of every entry of a zip archive. Raises ValueError if its content could be larger than the file."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    sizes = {entry.filename: entry.file_size for entry in entries}
    if len(sizes) != len(entries):
        raise ValueError("expected entries of different names, got one twice")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"expected entries without compression, got {entry.filename} with it")
    if (total := sum(sizes.values())) > size:
        raise ValueError(f"expected entries of at most {size} bytes, the file's, got {total}")
    return sizes


class Storage(NamedTuple):
    """A tensor's storage, which the pickle of a torch file refers to."""

    key: str
    bytes: int


class _Seen(NamedTuple):
    """A value that a pickle would make. weight: number of values inside, counting shared parts of tuples each time."""

    weight: int
    value: Any = None  # known for scalars, names of globals, and tuples of `_Seen`


OBJECTS = (
    pickletools.pydict,
    pickletools.anyobject,
    pickletools.pyfrozenset,
    pickletools.pybuffer,  # type: ignore[attr-defined]  # not in its stub
)
_SCALAR = 1  # weight of a valid key
_OBJECT = _Seen(2)
_LIST = _Seen(ARGUMENTS + 1)  # too heavy for any call's arguments: `set` and the like would hash its items


def check_pickle(stream: BinaryIO, size: int, names: Collection[str] | None = None) -> list[Storage]:
    """Follows a pickle's instructions without executing them, and returns the storages it refers to.

    size: bytes of the file. Raises UnpicklingError for a global that is not in `names`, and where the size does not bound
    the work: too many instructions, a list or too many values in a call's arguments, or a key that is neither a string nor a
    number of at most 31 bits (hashing a nested tuple visits shared parts every time).
    """
    stack: list[_Seen] = []
    marks: list[int] = []
    memo: dict[int, _Seen] = {}
    found: dict[str, int] = {}
    opcode: pickletools.OpcodeInfo
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count >= OPCODES:
            raise UnpicklingError(f"more than {OPCODES} instructions")
        if isinstance(argument, int) and argument.bit_length() > INTEGER:
            raise UnpicklingError(f"an integer of {argument.bit_length()} bits")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else argument
            if place > size:  # pickle would allocate that many
                raise UnpicklingError(f"{name} {place} in {size} bytes")
            memo[place] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _taken(opcode, stack, marks)
            if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                full = (
                    ".".join(str(part.value) for part in taken)
                    if name == "STACK_GLOBAL"
                    else argument.replace(" ", ".")
                )
                if names is not None and full not in names and not _is_dtype(full):
                    raise UnpicklingError(f"the global {full}, which is not allowed")
                stack.append(_Seen(2, full))
            else:
                _check_taken(name, taken)
                if name == "BINPERSID":
                    _note(taken[-1], found)
                stack.extend(_made(opcode, argument, taken))
        if name == "STOP":
            break
    return [Storage(key, count) for key, count in found.items()]


def _taken(opcode: pickletools.OpcodeInfo, stack: list[_Seen], marks: list[int]) -> list[_Seen]:
    """Pops the instruction's arguments from the stack."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        start = marks.pop() - before.index(pickletools.markobject)
    else:
        start = len(stack) - len(before)
    if not 0 <= start <= len(stack):
        raise UnpicklingError(f"{opcode.name} without its arguments")
    taken = stack[start:]
    del stack[start:]
    return taken


def _check_taken(name: str, taken: list[_Seen]) -> None:
    if name in ("SETITEM", "SETITEMS"):
        keys = taken[1::2]
    elif name == "DICT":
        keys = taken[::2]
    elif name in ("ADDITEMS", "FROZENSET"):
        keys = taken[name == "ADDITEMS" :]
    else:
        keys = []
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST") and sum(v.weight for v in taken) > ARGUMENTS:
            raise UnpicklingError(f"{name} with a list or more than {ARGUMENTS} values")
    if any(key.weight != _SCALAR for key in keys):
        raise UnpicklingError(f"{name} with a key that is neither a string nor a small number")


def _made(opcode: pickletools.OpcodeInfo, argument: Any, taken: list[_Seen]) -> Iterator[_Seen]:
    """The values that the instruction pushes."""
    name = opcode.name
    if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
        yield taken[0]
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
        weight = 2 + sum(part.weight for part in taken)
        yield _Seen(weight, tuple(taken) if weight <= ARGUMENTS else None)
    else:
        for kind in opcode.stack_after:
            if kind in (pickletools.pylist, pickletools.pyset):
                yield _LIST
            elif kind in OBJECTS:
                yield _OBJECT
            else:
                large = isinstance(argument, int) and argument.bit_length() > 31
                yield _Seen(2 if large else _SCALAR, argument)


def _note(key: _Seen, found: dict[str, int]) -> None:
    """Adds the storage that a persistent id of torch names."""
    parts = [part.value for part in key.value] if isinstance(key.value, tuple) else []
    kind = parts[1] if len(parts) > 1 and isinstance(parts[1], str) else ""
    if len(parts) < 5 or parts[0] != "storage" or not isinstance(parts[2], str) or not isinstance(parts[4], int):
        raise UnpicklingError("a reference to something other than a storage")
    if kind not in STORAGES or parts[4] < 0:
        raise UnpicklingError(f"a storage of {kind}, {parts[4]} numbers")
    found[parts[2]] = max(found.get(parts[2], 0), parts[4] * STORAGES[kind])


def _is_dtype(full: str) -> bool:
    module, _, name = full.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def check_torch_file(path: Path, names: Collection[str] = NAMES) -> None:
    """Raises ValueError, UnpicklingError or BadZipFile for a file that torch.save did not write or that claims more than it
    holds, OSError if it cannot be read. names: globals that it may name."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) == b"PK\x03\x04":
            file.seek(0)
            sizes = check_zip(file)
            pickles = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
            if any(name.endswith("/constants.pkl") for name in sizes):
                raise ValueError("expected tensors, got a TorchScript program")
            if len(pickles) != 1 or sizes[pickles[0]] > PICKLE:
                raise ValueError(f"expected one data.pkl of at most {PICKLE} bytes, got {pickles}")
            with zipfile.ZipFile(file) as archive:
                storages = check_pickle(BytesIO(archive.read(pickles[0])), size, names)
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"expected intact entries, got a wrong checksum in {damaged}")
            folder = pickles[0].removesuffix("data.pkl")
            for storage in storages:
                held = sizes.get(f"{folder}data/{storage.key}", 0)
                if storage.bytes > held:
                    raise ValueError(f"expected {storage.bytes} bytes of storage {storage.key}, got {held}")
        else:
            file.seek(0)
            check_legacy(file, size, names)


def check_legacy(file: BinaryIO, size: int, names: Collection[str] = NAMES) -> None:
    """`check_torch_file` for torch's file format before zip, from the start of the file."""
    start = [
        argument for _, (_, argument, _) in zip(range(2), pickletools.genops(file), strict=False)
    ]  # protocol, magic
    if start[1:] != [LEGACY_MAGIC]:
        raise UnpicklingError("expected torch's file format, got another one")
    file.seek(0)
    storages = [storage for _ in range(5) for storage in check_pickle(file, size, names)]
    if (total := sum(storage.bytes for storage in storages)) > size:
        raise UnpicklingError(f"expected storages of at most {size} bytes, the file's, got {total}")


def load_tensors(path: Path, classes: Sequence[type] = ()) -> Any:
    """What torch.save wrote: tensors, numbers, strings and containers, on the CPU. Runs no code from the file.

    classes: further ones whose objects it may hold; their __setstate__ runs. The file's size bounds the work and the memory.
    Raises OSError if it cannot be read, ValueError if its content is wrong, with one line that does not name the file.
    """
    try:
        check_torch_file(path, {*NAMES, *(f"{kind.__module__}.{kind.__qualname__}" for kind in classes)})
        with torch.serialization.safe_globals(list(classes)):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content)
    except OSError:
        raise
    except Exception as error:  # damage may show anywhere in zipfile, pickle and torch
        raise ValueError(reason(error)) from None  # torch's errors recommend running the file's code
    return content


def reason(error: Exception) -> str:
    """An error in one line, without torch's advice to run the file's code."""
    text = " ".join(str(error).split())
    if "weights_only" in text or "safe_globals" in text:
        text = ""
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _check_tensors(content: Any) -> None:
    """Raises ValueError for a tensor larger than its storage (stride 0), because work on it would be unbounded."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError(f"expected dense tensors, got one of {value.layout} on {value.device}")
            if (wanted := value.numel() * value.element_size()) > value.untyped_storage().nbytes():
                raise ValueError(f"expected tensors within their storage, got {tuple(value.shape)}, {wanted} bytes")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
            seen.add(id(value))
            waiting += vars(value).values()
