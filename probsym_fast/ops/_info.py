"""Versions, builds and chosen backends."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from probsym_fast.ops import OPS, _extension
from probsym_fast.ops._op import BACKENDS, KERNEL_BACKENDS


def info() -> dict[str, Any]:
    """Versions, what is built, and the backend that "auto" uses for each op and device.

    Keys: versions, extension (built, built_for_torch, gradients, gpu_architectures, instruction_set, problem), devices,
    ops: {op: {device: [backends, the one in use first]}}.
    """
    module = _extension.module()
    return {
        "versions": {
            "probsym_fast": _version("probsym_fast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "lightning": _version("lightning"),
        },
        "extension": {
            "built": module is not None,
            "built_for_torch": module.torch_version if module else None,
            "gradients": "C++" if _extension.make_differentiable() else "Python",
            "gpu_architectures": _extension.gpu_architectures(),
            "instruction_set": module.instruction_set() if module else None,
            "problem": _extension.problem(),
        },
        "devices": {
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "not visible",
        },
        "ops": {name: {device: list(BACKENDS[name, device]) for device in KERNEL_BACKENDS} for name in sorted(OPS)},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
