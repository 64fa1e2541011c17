"""The source distribution holds the whole checkout; .ci/run builds a wheel from it and uses that."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("benchmarks", "csrc", "docs", "examples", "probsym_fast", "tests")
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
)
MADE = ("__pycache__", "*.pyc", "*.so", ".*")  # by use, hence in no distribution


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, with what builds and runs leave in a checkout beside it."""
    folder = tmp_path_factory.mktemp("distribution") / "checkout"
    for name in TREES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*MADE))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_source_distribution_holds_the_checkout(checkout, tmp_path):
    """Headers and the tests' helpers too; nothing that was built."""
    wanted = files(checkout)
    built = (
        "probsym_fast/_C.cpython-311-x86_64-linux-gnu.so",
        "tests/__pycache__/conftest.pyc",
        "runs/demo/config.yaml",
    )
    for name in built:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    settings = os.environ | {"PROBSYM_BUILD": "0"}  # the kernels' sources are there without their build's saying so
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in found if ".egg-info/" in name or name in ("PKG-INFO", "setup.cfg")}
    assert found - made == wanted
