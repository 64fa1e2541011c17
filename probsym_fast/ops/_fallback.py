"""Reports, once, why an op runs its reference on a GPU although backend="auto" prefers a kernel."""

from __future__ import annotations

import warnings

import torch

from probsym_fast._compilers import constant_in_programs
from probsym_fast.ops import triton

_reported: set[tuple] = set()


@constant_in_programs  # runs during tracing, and is not part of the graph
def report(op: str, device: torch.device, backend: str, lacking: str | None) -> None:
    """A RuntimeWarning when this op first uses its reference on this type of device for this reason.

    backend: of the op's kernels for the device type, "reference" without any. lacking: what its kernels do not support
    in this call; None: none of them runs here. A reason that holds for all ops is reported once for all. Silent on a
    CPU, where `_extension.report_once` reports, and for tensors without values.
    """
    if device.type in ("cpu", "meta"):
        return
    key: tuple
    if device.type != "cuda":
        key, text = (device.type,), f"there are no kernels for {device.type}: every op uses its slower reference there"
    elif torch.version.hip:
        key, text = ("ROCm",), f"{triton.problem()}: every op uses its slower reference on this GPU"
    elif lacking is None and backend != "reference":
        return  # no build for this GPU, or it is too old: `runs_on_gpu` has reported it for all ops
    else:
        problem = triton.problem() if op in triton.KERNELS else "it has no kernels for GPUs"
        reason = lacking if lacking is not None else problem
        key, text = (op, device.type, reason), f"{op} uses its slower reference on this GPU: {reason}"
    if key not in _reported:
        _reported.add(key)
        silence = 'backend="reference" selects it without this warning'
        warnings.warn(f"probsym_fast: {text}. {silence}.", RuntimeWarning, stacklevel=4)
