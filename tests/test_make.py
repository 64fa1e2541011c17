"""The Makefile's set-up: interrupted, repeated, and after changes; by a Python that only notes what it is asked for."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp python .venv/bin/python ;;
  *"-e ."*) test ! -e broken ;;
  "-c"*psf*) echo Ready ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture
def tree(tmp_path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "csrc/check.h", "csrc/cpu/op.cpp"):
        (tmp_path / name).touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(tree: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """The exit status, what was printed, and what Python was asked for."""
    (tree / "calls").write_text("")
    command = ["make", ".venv/ready", "PYTHON=./python", *arguments]
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # the tests run under make
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=ours | {"LC_ALL": "C"})
    return done.returncode, done.stdout, (tree / "calls").read_text().splitlines()


KERNELS = "setup.py build_ext --inplace"


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith("-m pip install")]


def test_an_interrupted_set_up_continues(tree):
    (tree / "broken").touch()
    status, said, calls = make(tree)
    assert status != 0 and not (tree / ".venv" / "ready").exists()
    assert "Ready" not in said and calls.count("-m venv .venv") == 1
    (tree / "broken").unlink()
    status, said, calls = make(tree)
    assert status == 0 and (tree / ".venv" / "ready").exists()
    assert "-m venv .venv" not in calls and len(installs(calls)) == 3 and calls.count(KERNELS) == 1
    assert make(tree)[::2] == (0, [])


def test_an_environment_without_pip_is_completed(tree):
    (tree / ".venv" / "bin").mkdir(parents=True)  # as where its making was interrupted
    (tree / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tree / ".venv" / "bin" / "python").chmod(0o755)
    status, _, calls = make(tree)
    assert status == 0 and calls.count("-m venv .venv") == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "csrc/check.h", "csrc/cpu/op.cpp"])
def test_what_the_kernels_are_built_from_sets_up_again(tree, name):
    make(tree)
    later = time.time() + 5
    os.utime(tree / name, (later, later))
    status, _, calls = make(tree)
    assert status == 0 and calls.count(KERNELS) == 1


def test_each_step_is_a_line(tree):
    _, said, calls = make(tree)
    lines = said.splitlines()
    assert [line[:3] for line in lines] == ["Set", "1/2", "2/2", "Rea"]
    assert all("-qq" in call.split() for call in installs(calls))  # errors only


def test_kernels_that_do_not_build_end_the_set_up(tree):
    """With what the compiler said; setup.py itself reports a missing compiler and goes on."""
    fails = PYTHON.replace('case "$*" in\n', 'case "$*" in\n  "setup.py"*) echo no space left; exit 1 ;;\n')
    (tree / "python").write_text(fails)
    status, said, _ = make(tree)
    assert status != 0 and "no space left" in said and "Ready" not in said
