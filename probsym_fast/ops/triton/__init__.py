"""Triton kernels for NVIDIA GPUs: <op>.py has `forward` and `backward` with the arguments of the op's schemas.

Importing this package does not import triton; the modules are loaded at the first call on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch

from probsym_fast._compilers import constant_in_programs

HALF = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {  # op -> dtypes
    "soft_permutation": (torch.float32, torch.float64),
    "permutation_entropy": (torch.float32, torch.float64),
    "aggregate": HALF,
    "embed": HALF,
    "embed_image": HALF,
    "embed_matrix": HALF,
    "embed_turned": HALF,
    "readout": HALF,
    "node_identifiers": HALF,
    "permute": (torch.float32, torch.float64),
    "act_orthogonal": HALF,
    "orthogonal_frame": (torch.float32,),
    "linear_batch_norm_relu": HALF,
    "noise": (torch.float64,),
    "gin": (torch.float32,),
    "message_passing": (torch.float32,),
    "mlp": (torch.float32,),
    "transformer": (torch.float32,),
    "vector_edge_convolution": (torch.float32,),
}
LEAST_CAPABILITY = (8, 0)  # older GPUs spill registers and lack bfloat16


class KernelFailure(RuntimeError):
    """A failed kernel, with its name and shapes; `_lazy` adds the op."""


class Refused(Exception):
    """Invalid arguments, with the error class that `_lazy` raises and its message, to which it adds the op."""


def problem() -> str | None:
    """Why there are no Triton kernels and how to fix it; None if there are."""
    if torch.version.hip:  # ROCm's tensors are CUDA tensors too
        return f"the kernels are for NVIDIA GPUs and this torch is for ROCm {torch.version.hip}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`, in the version that this torch requires"
    return None


@constant_in_programs
def runs_on_gpu(index: int) -> bool:
    """Whether the GPU of that index is new enough; warns once if not. Called at the first use."""
    return _runs_on_gpu(index)


@functools.cache
def _runs_on_gpu(index: int) -> bool:
    if not torch.cuda.is_available():  # traced for a GPU of another machine
        return True
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return True
    least, found = (".".join(map(str, x)) for x in (LEAST_CAPABILITY, capability))
    warnings.warn(
        f"probsym_fast: the Triton kernels need a GPU of compute capability {least} or newer, this one "
        f"({torch.cuda.get_device_name(index)}) has {found}. Its ops use their slower reference.",
        RuntimeWarning,
        stacklevel=5,
    )
    return False


def register(ops: dict) -> None:
    """Registers the kernels for CUDA tensors, unless there is a problem."""
    if problem() is not None:
        return
    for name, dtypes in KERNELS.items():
        backward = None if ops[name].backward is None else _lazy(name, "backward")
        ops[name].implement("cuda", "triton", _lazy(name, "forward"), backward, dtypes)


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
