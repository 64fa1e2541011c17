"""Loads the compiled kernels, or records why it cannot: without them ops are slower, but all work.

Three extensions: _C (CPU kernels) and _cuda run under every torch from 2.11 on, _autograd under the one it was built for.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from probsym_fast._compilers import constant_in_programs

MEND = (
    "build the kernels for this torch with `pip install --no-build-isolation --force-reinstall --no-deps probsym_fast` "
    "(`-e .` in a checkout), which needs a C++ compiler"
)
CUDA_KERNELS = ("soft_permutation", "permutation_entropy")  # the ops of csrc/cuda
NEEDED = {  # what Python uses of each extension
    "_C": ("torch_version", "kernels", "register_kernels", "instruction_set", "bf16_products"),
    "_cuda": ("torch_version", "kernels", "register_kernels", "cuda_architectures", "runs_on_gpu"),
    "_autograd": ("torch_version", "make_differentiable"),
}
ABSENT = {
    "_C": "the compiled kernels are not built",
    "_cuda": "the compiled kernels were built without CUDA",
    "_autograd": "the compiled gradients are not built",
}
_modules: dict[str, ModuleType] = {}
_problems: dict[str, str] = {}
_reported = False


def load(signatures: Mapping[str, str]) -> None:
    """Imports the extensions and registers their kernels, unless they come from another source.

    signatures: of the ops and their gradients, as in `kernels()` of an extension.
    """
    _modules.clear()
    _problems.clear()
    for name in NEEDED:
        try:
            module = importlib.import_module(f"probsym_fast.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"probsym_fast.{name}":
                raise
            _problems[name] = f"{ABSENT[name]}: {MEND}"
        except (ImportError, OSError) as error:
            _problems[name] = f"the compiled kernels do not load under torch {torch.__version__} ({error}): {MEND}"
        else:
            if problem := _misfit(name, module, signatures):
                _problems[name] = f"{problem}: {MEND}"
                continue
            if name != "_autograd":
                module.register_kernels()
            _modules[name] = module


def _misfit(name: str, module: ModuleType, signatures: Mapping[str, str]) -> str | None:
    """Why the extension does not fit this source or this torch."""
    if missing := [x for x in NEEDED[name] if not hasattr(module, x)]:
        return f"the compiled kernels come from another version of probsym_fast, without {', '.join(missing)}"
    if name == "_autograd":  # not on the stable ABI
        if module.torch_version != torch.__version__.split("+")[0]:
            return f"the compiled gradients were built for torch {module.torch_version}, this is {torch.__version__}"
        return None
    for _, op, signature in module.kernels():
        if signature != signatures.get(op):
            reason = f"{op} is {signatures.get(op)}, its kernel {signature}"
            return f"the compiled kernels come from another version of probsym_fast ({reason})"
    return None


def signature(schema: Any) -> str:
    """The types of an operator's schema, as the C++ side writes them: "Tensor, Tensor?, float -> Tensor"."""

    def listed(arguments: Any) -> str:
        names = (re.sub(r"^Optional\[(.*)\]$", r"\1?", str(x.type)) for x in arguments)
        return ", ".join(re.sub(r"List\[(\w+)\]", r"\1[]", name).replace("SymInt", "int") for name in names)

    return f"{listed(schema.arguments)} -> {listed(schema.returns)}"


def module() -> Any:
    """The extension with the CPU kernels, or None."""
    return _modules.get("_C")


@constant_in_programs
def multiplies_bf16() -> bool:
    """Whether CPU kernels multiply bfloat16 values where it is allowed."""
    return "_C" in _modules and _modules["_C"].bf16_products()


def has_kernels(device: str) -> bool:
    """Whether the extension with the kernels for this device type is in use."""
    return {"cpu": "_C", "cuda": "_cuda"}.get(device) in _modules


def make_differentiable() -> Callable[[str, Callable], None] | None:
    """What makes an op differentiable in C++, as `_op.differentiate` in Python; None where it is not built for this torch."""
    found = _modules.get("_autograd")
    return found.make_differentiable if found else None


def problem(name: str = "_C") -> str | None:
    """What is wrong with an extension and how to fix it; None if nothing is."""
    return _problems.get(name)


def cuda_problem() -> str | None:
    """Why the kernels of csrc/cuda are missing and how to fix it; None if they are there."""
    if (found := _problems.get("_cuda")) is None:
        return None
    found = _problems.get("_C", found)  # nothing is built
    return f"{found}, and nvcc of torch's CUDA {torch.version.cuda}"


@constant_in_programs  # warns during tracing, and is not part of the graph
def report_once(device: str) -> None:
    """Warns once, when an op first uses its reference on a device that kernels could serve."""
    global _reported
    if _reported or problem() is None or device != "cpu":
        return
    _reported = True
    warnings.warn(
        f"probsym_fast: {problem()}. Ops use their slower reference until then.", RuntimeWarning, stacklevel=4
    )


def gpu_architectures() -> str | None:
    """The architectures that the CUDA kernels are built for, as in TORCH_CUDA_ARCH_LIST; None without such kernels."""
    return getattr(_modules.get("_cuda"), "cuda_architectures", None)


@constant_in_programs
def runs_on_gpu(index: int) -> bool:
    """Whether the CUDA kernels have code for the GPU of that index; warns once if not.

    Called at the first use of a GPU, not at import, which leaves CUDA uninitialised.
    """
    return _runs_on_gpu(index)


@functools.cache
def _runs_on_gpu(index: int) -> bool:
    if (found := _modules.get("_cuda")) is None or found.runs_on_gpu(index):
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
