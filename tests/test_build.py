"""Without compiled kernels everything works, and is reported once; how setup.py decides what to build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

WITHOUT = """
import importlib.abc, sys, warnings
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "probsym_fast._C":
            raise {error}
sys.meta_path.insert(0, Broken())
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import probsym_fast as psf
    assert not caught, [str(w.message) for w in caught]
    for _ in range(2):
        p = psf.ops.soft_permutation(torch.randn(2, 3, 5, requires_grad=True))
        psf.ops.permutation_entropy(p).backward()
        psf.ops.act_orthogonal(torch.randn(1, 2, 3, 1), psf.ops.orthogonal_frame(torch.randn(1, 2, 3, 3)))
messages = [str(w.message) for w in caught if "probsym_fast" in str(w.message)]
assert len(messages) == 1, messages
print(messages[0])
assert psf.info()["ops"]["soft_permutation"]["cpu"] == ["reference"]
try:
    psf.ops.soft_permutation(torch.randn(1, 1, 2), backend="cpu")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        ('ModuleNotFoundError("none", name="probsym_fast._C")', "the compiled kernels are not built"),
        ('ImportError("undefined symbol: _ZN2at4_ops")', "do not load under torch"),
    ],
)
def test_missing_or_broken_extension_is_reported_once(error, problem):
    code = WITHOUT.replace("{error}", error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    warning, refusal = done.stdout.strip().splitlines()
    assert problem in warning
    assert "pip install" in warning
    assert "backend must be one of ('auto', 'reference') on cpu, got 'cpu'" in refusal
    assert problem in refusal


@pytest.fixture
def tree(tmp_path) -> Path:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "module.cpp").write_text("#error never compiled here\n")
    (tmp_path / "probsym_fast").mkdir()
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_failing_compiler_leaves_the_package_without_kernels(tree):
    done = build(tree, CXX="false", CC="false", PROBSYM_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "the kernels did not build, ops use their reference" in done.stderr
    assert not list(tree.glob("probsym_fast/*.so"))
    assert build(tree, CXX="false", CC="false", PROBSYM_BUILD="1").returncode != 0
    assert build(tree, PROBSYM_BUILD="0").returncode == 0


def test_cuda_files_are_built_where_the_toolkit_is_without_a_gpu(tree):
    code = "import setup; kind, _ = setup.extension(); print(*kind.sources)"
    ask = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", f"import setuptools; setuptools.setup = lambda **k: None; {code}"],
        cwd=tree, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert ask() == ["csrc/module.cpp"]
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "op.cu").touch()
    from torch.utils.cpp_extension import CUDA_HOME

    toolkit = torch.version.cuda and CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists()
    assert ("csrc/cuda/op.cu" in ask()) == bool(toolkit)
