"""Downloads of files with a known checksum."""

import hashlib
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from probsym_fast._files import write_atomically
from probsym_fast._progress import announced

CHUNK = 1 << 16
TIMEOUT = 30.0  # seconds without a byte
LARGEST = 1 << 32  # bytes per file, even if the server sends no length


def download(url: str, path: str | Path, sha256: str) -> Path:
    """Downloads `url` to the file `path`, unless it already exists with this SHA-256. Returns the path.

    The bytes go to a temporary file, which is renamed to `path` once its checksum is verified; a failure leaves no trace.
    Raises ConnectionError if the download fails or is incomplete, ValueError if the checksum differs.
    """
    path = Path(path)
    if path.is_file() and _sha256(path) == sha256:
        return path
    write_atomically(path, lambda file: _fetch(url, file, sha256))
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(url: str, file: BinaryIO, sha256: str) -> None:
    digest, got = hashlib.sha256(), 0
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
            expected = int(length) if length else None
            with announced(f"download: {url}", expected) as advance:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    got += len(chunk)
                    advance(len(chunk))
                    if got > LARGEST:
                        raise ConnectionError(f"expected at most {LARGEST} bytes, got more")
                if expected is not None and got != expected:
                    raise ConnectionError(f"expected {expected} bytes, got {got}")
    except (OSError, ValueError, HTTPException) as error:
        raise ConnectionError(f"download: {url} cannot be downloaded: {error}") from error
    if (found := digest.hexdigest()) != sha256:
        raise ValueError(f"download: expected SHA-256 {sha256} of {url}, got {found} ({got} bytes)")
