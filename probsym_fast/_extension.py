"""Loads the compiled kernels, or keeps the reason why not: a missing build costs speed, never a feature."""

from __future__ import annotations

import importlib
import warnings

import torch

MEND = (
    "build the kernels for this torch with `pip install --no-build-isolation --force-reinstall --no-deps probsym_fast` "
    "(`-e .` in a checkout), which needs a C++ compiler"
)
NEEDED = ("torch_version", "differentiate", "instruction_set")  # what Python takes from the extension
_module = None
_problem: str | None = None
_reported = False


def load() -> None:
    """Imports probsym_fast._C, whose kernels register themselves; a build for another torch or source is not used."""
    global _module, _problem
    try:
        module = importlib.import_module("probsym_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "probsym_fast._C":
            raise
        _problem = f"the compiled kernels are not built: {MEND}"
        return
    except (ImportError, OSError) as error:
        _problem = f"the compiled kernels do not load under torch {torch.__version__} ({error}): {MEND}"
        return
    if missing := [name for name in NEEDED if not hasattr(module, name)]:
        _problem = f"the compiled kernels are of another version of probsym_fast, without {', '.join(missing)}: {MEND}"
    elif module.torch_version != torch.__version__.split("+")[0]:
        _problem = (
            f"the compiled kernels were built for torch {module.torch_version}, this is {torch.__version__}: {MEND}"
        )
    else:
        _module = module


def module():
    """The extension in use, or None."""
    return _module


def problem() -> str | None:
    """What is wrong with the compiled kernels and how to mend it; None where all is well."""
    return _problem


def report_once(device: str) -> None:
    """Warns, the first time an op falls back to its reference on a device that kernels could serve."""
    global _reported
    if _reported or _problem is None or device != "cpu":
        return
    _reported = True
    warnings.warn(f"probsym_fast: {_problem}. Ops use their slower reference until then.", RuntimeWarning, stacklevel=4)
