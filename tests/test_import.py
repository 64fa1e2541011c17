"""What an import costs: torch's compiler, Lightning and matplotlib are left to those who use them."""

import subprocess
import sys

import pytest
import torch

from probsym_fast import _checkpointing, _compilers

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "lightning",
    "matplotlib",
    "timm",
    "transformers",
    "torch_geometric",
    "triton",
)


def loaded(code: str) -> set[str]:
    """Those of HEAVY that a fresh Python has imported after the code."""
    code = f"import sys, torch\nbefore = set(sys.modules)\n{code}\nprint(*({HEAVY!r} & (set(sys.modules) - before)))"
    code = code.replace(repr(HEAVY), f"set({HEAVY!r})")
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_imports_nothing_heavy():
    assert loaded("import probsym_fast") == set()


def test_configurations_are_listed_without_the_trainer():
    """`probsym info` reads their names; it also asks which kernels Triton has."""
    quietly = "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): "
    assert loaded(f"from probsym_fast import cli\n{quietly}cli.main(['info'])") <= {"triton"}
    assert not loaded("import probsym_fast.tasks.nbody") & {"lightning", "matplotlib", "timm", "transformers"}


def test_marks_are_those_of_torch():
    """What the compiler looks for, written without importing it, is what its own functions write."""

    def function():
        return 1

    ours = dict(vars(_compilers.constant_in_programs(function)))
    vars(function).clear()
    assert vars(torch.compiler.assume_constant_result(function)) == ours != {}
    assert _checkpointing.uncompiled is _checkpointing.uncompiled  # made once
    assert "_torchdynamo_disable" in vars(_checkpointing.uncompiled)
    with pytest.raises(AttributeError, match="nothing"):
        _checkpointing.nothing  # noqa: B018
