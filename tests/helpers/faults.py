"""Faults that are put into copies of sources."""

from pathlib import Path


def replaced(path: Path, text: str, instead: str) -> None:
    """Replaces a text that is in the file exactly once."""
    source = path.read_text()
    assert source.count(text) == 1, f"{path.name} has {source.count(text)} times: {text}"
    path.write_text(source.replace(text, instead))
