"""Triton kernels for NVIDIA GPUs: <op>.py holds `forward` and `backward` with the arguments of the op's schemas.

Nothing here imports triton before a kernel is called: the modules are loaded at the first call on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

HALF = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {  # op -> dtypes
    "aggregate": HALF,
    "embed": HALF,
    "embed_matrix": HALF,
    "readout": HALF,
    "node_identifiers": HALF,
    "act_orthogonal": HALF,
    "orthogonal_frame": (torch.float32,),
    "linear_batch_norm_relu": HALF,
}


class KernelFailure(RuntimeError):
    """Of a kernel, with its name and shapes; `_lazy` adds the op."""


class Refused(Exception):
    """Of arguments, with the kind of the error that `_lazy` raises and its message, to which it adds the op."""


def register(ops: dict) -> None:
    """Registers the kernels for CUDA tensors, where triton can be imported."""
    if importlib.util.find_spec("triton") is None:
        return
    for name, dtypes in KERNELS.items():
        ops[name].implement("cuda", "triton", _lazy(name, "forward"), _lazy(name, "backward"), dtypes)


def _lazy(op: str, direction: str) -> Callable:
    def call(*arguments):
        module = importlib.import_module(f"{__name__}.{op}")
        try:
            return getattr(module, direction)(*arguments)
        except KernelFailure as failure:
            raise RuntimeError(f"{op}: {failure}") from failure
        except Refused as error:
            kind, message = error.args
            raise kind(f"{op}: {message}") from None

    return call
