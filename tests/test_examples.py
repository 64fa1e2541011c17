"""The examples run, each at a small size, and give what they say."""

import importlib.util
import math
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTH = 60  # lines that a person still copies from


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_graph_classification():
    pytest.importorskip("torch_geometric")
    found = example("graph_classification").main(Namespace(graphs=40, epochs=2, seed=0))
    assert 0 <= found <= 1


def test_nbody():
    error = example("nbody").main(Namespace(count=20, epochs=1, seed=0))
    assert math.isfinite(error)


def test_vit_on_graphs(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    options = Namespace(name="vit_tiny_patch16_224", pretrained=False, graphs=8, epochs=1, seed=0)
    assert 0 <= example("vit_on_graphs").main(options) <= 1


def test_images(tmp_path):
    for name in ("timm", "sklearn", "matplotlib"):
        pytest.importorskip(name)
    picture = tmp_path / "images.png"
    found = example("images").main(Namespace(epochs=3, images=2, seed=0, picture=str(picture)))
    assert len(found) == 4 and all(0 <= value <= 1 for value in found.values())
    assert picture.stat().st_size > 10_000


def test_own_group():
    errors = example("own_group").main(Namespace(clouds=8, seed=0))
    assert errors[256] < errors[16] < errors[1] and errors[8] < 1e-5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_short_and_tested(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < LENGTH
    assert f"test_{path.stem}" in globals()
