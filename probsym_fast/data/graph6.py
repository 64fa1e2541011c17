"""The graph6 format: one simple graph per line, in ASCII (McKay, users.cecs.anu.edu.au/~bdm/data/formats.txt).

A line holds the number of nodes n: one byte n + 63 up to 62 nodes, else "~" and 18 bits. Then come the bits (0,1), (0,2),
(1,2), (0,3), ... of the adjacency, padded with zeros to a multiple of six. Each six bits plus 63 make a byte.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from probsym_fast._files import write_atomically
from probsym_fast._untrusted import read_bytes

HEADER = b">>graph6<<"
LOWEST, HIGHEST = 63, 126  # the bytes in use
MAX_NODES = 258_047  # largest number in 18 bits after "~", short of "~~"
LARGEST = 1 << 30  # bytes per file; reading takes about 30 times as many


def read_g6(path: str | Path) -> list[np.ndarray]:
    """The graphs of a .g6 file, each an (n, n) bool array, symmetric with an empty diagonal.

    Raises ValueError for a damaged file, with the path and the first bad line, and for a file of more than 1 GiB.
    """
    content = read_bytes(path, LARGEST).removeprefix(HEADER)
    graphs = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            graphs.append(_decode(np.frombuffer(line, np.uint8)))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    return graphs


def write_g6(path: str | Path, graphs: Iterable[np.ndarray]) -> None:
    """Writes graphs, (n, n) arrays of 0 and 1, to a .g6 file, atomically.

    Raises ValueError if one is not square or symmetric, has a self loop, or has more than 258,047 nodes.
    """
    lines = [_encode(i, np.asarray(adjacency) != 0) + b"\n" for i, adjacency in enumerate(graphs)]
    write_atomically(path, lambda file: file.writelines(lines))


def _bits(values: np.ndarray) -> np.ndarray:
    """(k,) bytes to their six bits each, high bit first: (6 k,)."""
    return np.unpackbits(values[:, None].astype(np.uint8), axis=1)[:, 2:].ravel()


def _decode(line: np.ndarray) -> np.ndarray:
    if len(line) == 0:
        raise ValueError("expected a graph, got an empty line")
    if (wrong := line[(line < LOWEST) | (line > HIGHEST)]).size:
        raise ValueError(f"expected bytes {LOWEST} to {HIGHEST}, got {wrong[0]}")
    values = line - LOWEST
    if values[0] <= 62:
        nodes, rest = int(values[0]), values[1:]
    elif len(values) >= 4 and values[1] <= 62:
        nodes, rest = int(values[1:4].astype(int) @ [1 << 12, 1 << 6, 1]), values[4:]
    else:
        raise ValueError(f"expected at most {MAX_NODES} nodes in four bytes, got {line[:4].tobytes()!r}")
    pairs = nodes * (nodes - 1) // 2
    if len(rest) != (expected := -(-pairs // 6)):
        raise ValueError(f"expected {expected} bytes of adjacency for {nodes} nodes, got {len(rest)}")
    bits = _bits(rest)
    if bits[pairs:].any():
        raise ValueError(f"expected zeros after the {pairs} bits of adjacency, got {bits[pairs:].tolist()}")
    adjacency = np.zeros((nodes, nodes), bool)
    adjacency[np.tri(nodes, k=-1, dtype=bool)] = bits[:pairs]  # the lower triangle by rows is the upper one by columns
    return adjacency | adjacency.T


def _encode(place: int, adjacency: np.ndarray) -> bytes:
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1] or len(adjacency) > MAX_NODES:
        raise ValueError(f"write_g6: graph {place} must be (n, n) with n <= {MAX_NODES}, got {adjacency.shape}")
    if adjacency.diagonal().any() or (adjacency != adjacency.T).any():
        raise ValueError(f"write_g6: graph {place} must be symmetric without loops")
    nodes = len(adjacency)
    size = [nodes] if nodes <= 62 else [63, nodes >> 12, nodes >> 6 & 63, nodes & 63]
    bits = adjacency[np.tril_indices(nodes, -1)]
    bits = np.pad(bits, (0, -len(bits) % 6)).reshape(-1, 6)
    values = bits @ np.array([32, 16, 8, 4, 2, 1])
    return bytes(int(value) + LOWEST for value in (*size, *values))
