"""Why a GPU runs an op's reference where backend="auto" was to take a kernel, and how to mend it: said once."""

from __future__ import annotations

import warnings

import torch

from probsym_fast import _extension
from probsym_fast.ops import triton

_reported: set[tuple] = set()


@torch.compiler.assume_constant_result  # said while a graph is traced, and no part of it
def report(op: str, device: torch.device, backend: str, lacking: str | None) -> None:
    """A RuntimeWarning the first time that this op takes its reference on this type of device for this reason.

    backend: of the op's kernels for the device type, "reference" without any. lacking: what its kernels do not take of the
    call; None: none of them runs here. A reason that holds for all ops is given once for all. Silent for a CPU, where
    `_extension.report_once` speaks, and for devices without values.
    """
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        key, reason = (
            (device.type,),
            f"there are no kernels for {device.type}: every op uses its slower reference there",
        )
    elif torch.version.hip:
        key, reason = ("ROCm",), f"{triton.problem()}: every op uses its slower reference on this GPU"
    elif op not in triton.KERNELS and op not in _extension.CUDA_KERNELS:
        return  # its reference is all that a GPU needs
    elif lacking is not None:
        key, reason = (op, device.type, lacking), f"{op}: {lacking}; it uses its slower reference"
    elif backend == "reference":
        problem = triton.problem() if op in triton.KERNELS else _extension.cuda_problem()
        key, reason = (op, device.type, problem), f"{op} uses its slower reference on this GPU, for {problem}"
    else:
        return  # the GPU is not one that the kernels run on: said by who was asked, once for the GPU
    if key not in _reported:
        _reported.add(key)
        warnings.warn(
            f'probsym_fast: {reason}. backend="reference" asks for it in silence.', RuntimeWarning, stacklevel=4
        )
