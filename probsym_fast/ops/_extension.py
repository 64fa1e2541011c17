"""Loads the compiled kernels, or records why it cannot: without them ops are slower, but all work."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

from probsym_fast._compilers import constant_in_programs

MEND = (
    "build the kernels for this torch with `pip install --no-build-isolation --force-reinstall --no-deps probsym_fast` "
    "(`-e .` in a checkout), which needs a C++ compiler"
)
CUDA_KERNELS = ("soft_permutation", "permutation_entropy")  # the ops of csrc/cuda
NEEDED = (
    "torch_version",
    "make_differentiable",
    "instruction_set",
    "portable",
    "register_kernels",
)  # what Python uses of the extension
_module: ModuleType | None = None
_problem: str | None = None
_reported = False


def load() -> None:
    """Imports probsym_fast._C and registers its kernels. Skips a build for another torch or another source."""
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
        _problem = (
            f"the compiled kernels come from another version of probsym_fast, without {', '.join(missing)}: {MEND}"
        )
    elif module.torch_version != torch.__version__.split("+")[0]:
        _problem = (
            f"the compiled kernels were built for torch {module.torch_version}, this is {torch.__version__}: {MEND}"
        )
    else:
        try:
            module.register_kernels()
        except RuntimeError as error:
            reason = " ".join(map(str.strip, str(error).strip().splitlines()[:2]))  # the op and what differs
            _problem = f"the compiled kernels come from another version of probsym_fast ({reason}): {MEND}"
        else:
            _module = module


def module() -> ModuleType | None:
    """The extension in use, or None."""
    return _module


def problem() -> str | None:
    """What is wrong with the compiled kernels and how to fix it; None if nothing is."""
    return _problem


def cuda_problem() -> str | None:
    """Why the kernels of csrc/cuda are missing and how to fix it; None if they are there."""
    if gpu_architectures() is not None:
        return None
    found = _problem or f"the compiled kernels were built without CUDA: {MEND}"
    return f"{found}, and nvcc of torch's CUDA {torch.version.cuda}"


@constant_in_programs  # warns during tracing, and is not part of the graph
def report_once(device: str) -> None:
    """Warns once, when an op first uses its reference on a device that kernels could serve."""
    global _reported
    if _reported or _problem is None or device != "cpu":
        return
    _reported = True
    warnings.warn(f"probsym_fast: {_problem}. Ops use their slower reference until then.", RuntimeWarning, stacklevel=4)


def gpu_architectures() -> str | None:
    """The architectures that the CUDA kernels are built for, as in TORCH_CUDA_ARCH_LIST; None without such kernels."""
    return getattr(_module, "cuda_architectures", None)


@constant_in_programs
def runs_on_gpu(index: int) -> bool:
    """Whether the CUDA kernels have code for the GPU of that index; warns once if not.

    Called at the first use of a GPU, not at import, which leaves CUDA uninitialised.
    """
    return _runs_on_gpu(index)


@functools.cache
def _runs_on_gpu(index: int) -> bool:
    if _module is None or gpu_architectures() is None or _module.runs_on_gpu(index):
        return True
    if not torch.cuda.is_available():  # traced for a GPU of another machine
        return True
    major, minor = torch.cuda.get_device_capability(index)
    warnings.warn(
        f"probsym_fast: the CUDA kernels were built for the architectures {gpu_architectures()}, this GPU "
        f"({torch.cuda.get_device_name(index)}) has {major}.{minor}: set TORCH_CUDA_ARCH_LIST={major}.{minor} and {MEND}. "
        "Ops use their slower reference until then.",
        RuntimeWarning,
        stacklevel=5,
    )
    return False
