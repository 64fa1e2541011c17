"""The pattern of every op: schema, shape function, gradient, and one implementation per backend, chosen at each call.

`reference` is the definition in plain torch. A kernel registers itself for a device under the op's schema, from C++
(csrc/<device>/<op>.cpp) or Python (ops/triton/<op>.py). So everything imports, traces and runs without compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from probsym_fast._autocast import autocasts, without_autocast
from probsym_fast._checks import debugging, transformed
from probsym_fast.ops import _extension, _fallback, triton
from probsym_fast.ops._second_gradient import SecondGradient

NAMESPACE = "probsym_fast"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPS: dict[str, Op] = {}
KERNEL_BACKENDS = {"cpu": "cpu", "cuda": "cuda"}  # device type -> name of its C++ kernels
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
UNDER_TRANSFORMS = "FuncTorchDynamicLayerFrontMode"  # the dispatch key that torch.func puts before all others
RUNS_ON_GPU = {"cuda": _extension.runs_on_gpu, "triton": triton.runs_on_gpu}  # backend -> check of a GPU's index
_instead_of_auto = "auto"


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Within it, ops called with backend="auto", as all modules call them, use the named backend.

    name: "auto", "cpu", "cuda", "triton" or "reference". Raises ValueError for another name; an op without the backend
    raises RuntimeError. A backward pass uses the backend of its forward pass and may run outside.
    """
    global _instead_of_auto
    if name not in (known := ("auto", "cpu", "cuda", "triton", "reference")):
        raise ValueError(f"using_backend: name must be one of {known}, got {name!r}")
    before, _instead_of_auto = _instead_of_auto, name
    try:
        yield
    finally:
        _instead_of_auto = before


class Op:
    """A fused computation with a schema, a gradient, and implementations per device.

    schema: arguments and results as for `torch.library.define`. reference: plain torch with the same arguments. shapes:
    the kernel's results as empty tensors (for tracing). dtypes: those of the C++ kernels. values: raises for invalid
    values where checks may read them; the reference calls it, CPU kernels check for themselves. opaque: compilers see
    one call of the reference, not its arithmetic (integer products that wrap); transforms see the arithmetic, `plain`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable,
        shapes: Callable,
        values: Callable | None = None,
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
        opaque: bool = False,
    ):
        self.name, self.values, self.dtypes = name, values, tuple(dtypes)
        self.from_python: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {}  # device type -> backend, dtypes
        self.qualified = f"{NAMESPACE}::{name}"
        self.kernel = self._defined(name, schema, shapes)
        LIBRARY.impl(name, self._refuse_transform, UNDER_TRANSFORMS)
        self.reference = self.plain = reference
        if opaque:
            self.reference = self._defined(f"{name}_reference", schema, shapes)
            LIBRARY.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
        self.backward: torch._ops.OpOverload | None = None
        self.second: SecondGradient | None = None
        OPS[name] = self

    @staticmethod
    def _defined(name: str, schema: str, shapes: Callable) -> torch._ops.OpOverload:
        LIBRARY.define(name + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def gradient(
        self,
        schema: str,
        *,
        shapes: Callable,
        others: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
        results: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        """Declares the kernel `<op>_backward`; the names in its schema define its arguments and results (`differentiate`).

        others, results: for second derivatives, the op's arguments that the backward does not take, and a definition of
        its results that uses what the backward knows (`SecondGradient`).
        """
        self.backward = self._defined(f"{self.name}_backward", schema, shapes)
        self.second = SecondGradient(self, self.backward._schema, shapes, others or {}, results)

    def implement(
        self, device: str, backend: str, forward: Callable, backward: Callable | None, dtypes: Sequence[torch.dtype]
    ) -> None:
        """Registers Python kernels for a device type, unless C++ kernels exist there."""
        if self.has_kernel(device):
            return
        LIBRARY.impl(self.name, forward, DISPATCH_KEYS[device])
        if backward is not None:
            LIBRARY.impl(f"{self.name}_backward", backward, DISPATCH_KEYS[device])
        self.from_python[device] = backend, tuple(dtypes)

    def has_kernel(self, device: str) -> bool:
        """Whether this device type has a kernel, from Python or from the loaded extension."""
        if device in self.from_python:
            return True
        if not _extension.has_kernels(device):
            return False
        return torch._C._dispatch_has_kernel_for_dispatch_key(self.qualified, DISPATCH_KEYS[device])

    def kernel_dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """The dtypes that the kernels for this device type support."""
        return self.from_python[device][1] if device in self.from_python else self.dtypes

    def backends(self, device: str) -> tuple[str, ...]:
        """The backends for this device type, fastest first."""
        if device in self.from_python:
            return self.from_python[device][0], "reference"
        return (KERNEL_BACKENDS[device], "reference") if self.has_kernel(device) else ("reference",)

    def compute_dtype(self, backend: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype to compute in: the inputs' own if the kernels support it, else float32 for those below float32."""
        if dtype in (torch.float32, torch.float64):
            return dtype
        backend = self._asked_for(backend)
        taken = backend != "reference" and self.available(device)[0] != "reference"
        return dtype if taken and dtype in self.kernel_dtypes(device.type) else torch.float32

    def available(self, device: torch.device) -> tuple[str, ...]:
        """`backends` of the device type, without kernels that this GPU cannot run."""
        listed = BACKENDS[self.name, device.type] if (self.name, device.type) in BACKENDS else ("reference",)
        if device.type == "cuda" and listed[0] != "reference" and not RUNS_ON_GPU[listed[0]](device.index or 0):
            return listed[1:]
        return listed

    def has_kernel_for(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether "auto" is a kernel for tensors like these, here and now."""
        if (backend := self._asked_for("auto")) == "reference":
            return False
        if dtype not in self.kernel_dtypes(device.type):
            return False
        return self.available(device)[0] != "reference" if backend == "auto" else backend in self.available(device)

    def _asked_for(self, backend: str) -> str:
        """Resolves "auto": the backend of `using_backend`, or the reference under a torch.func transform."""
        backend = _instead_of_auto if backend == "auto" else backend
        return "reference" if backend == "auto" and transformed() else backend

    def select(self, backend: str, device: torch.device, dtype: torch.dtype) -> Callable:
        """The implementation to call with the schema's arguments.

        Under a torch.func transform "auto" is the reference: plain torch, on which every transform works. Raises
        RuntimeError for a named backend that the device lacks, and for a named kernel under a transform; TypeError for
        a dtype that the backend does not support.
        """
        backend = self._asked_for(backend)
        if backend == "reference":
            return self._definition(device)
        available = self.available(device)
        if backend == "auto":
            if available[0] == "reference":
                _extension.report_once(device.type)
                self._report(device)
                return self._definition(device)
            if dtype in self.kernel_dtypes(device.type):
                return self._checked(available[0])
            self._report(device, f"its kernels take {self._dtype_names(device)}, got {dtype}; convert the inputs")
            return self._definition(device)
        if backend not in available:
            compiled = _extension.cuda_problem() if device.type == "cuda" else _extension.problem()
            problem = triton.problem() if backend == "triton" else compiled
            raise RuntimeError(
                f"{self.name}: backend must be one of {('auto', *available)} on {device.type}, got {backend!r}"
                + (f" ({problem})" if problem else "")
            )
        if transformed():
            self._refuse_transform(backend=backend)
        if dtype not in self.kernel_dtypes(device.type):
            raise TypeError(f"{self.name}: backend {backend!r} takes {self.kernel_dtypes(device.type)}, got {dtype}")
        return self._checked(backend)

    def _refuse_transform(self, *_: object, backend: str | None = None) -> None:
        got = "a direct call" if backend is None else f"backend {backend!r}"
        raise RuntimeError(
            f"{self.name}: the kernels support neither torch.func transforms (grad, vjp, jvp, vmap) nor forward mode, "
            f'got {got} under one; use backend="reference"'
        )

    def without_kernel(self, backend: str, device: torch.device, lacking: str) -> Callable:
        """The reference, for a call that no kernel supports; `lacking` is the reason, reported on a GPU."""
        if self._asked_for(backend) != "reference":
            self._report(device, lacking)
        return self._definition(device)

    def _definition(self, device: torch.device) -> Callable:
        """The reference without autocast, which does not change kernels either.

        Of an opaque one its arithmetic under a transform: vmap would call the op for every example.
        """
        reference = self.plain if transformed() and not torch.compiler.is_compiling() else self.reference
        if not autocasts(device):
            return reference

        def run(*arguments):
            with without_autocast(device):
                return reference(*arguments)

        return run

    def _report(self, device: torch.device, lacking: str | None = None) -> None:
        """Reports that the reference runs on a GPU: there is no kernel, or it does not support the call (`lacking`)."""
        listed = BACKENDS[self.name, device.type] if (self.name, device.type) in BACKENDS else ("reference",)
        _fallback.report(self.name, device, listed[0], lacking)

    def _dtype_names(self, device: torch.device) -> str:
        return ", ".join(str(x).removeprefix("torch.") for x in self.kernel_dtypes(device.type))

    def _checked(self, backend: str) -> Callable:
        """The kernel; in debug mode preceded by the checks that it does not make itself."""
        if self.values is None or backend == "cpu" or not debugging():
            return self.kernel

        def run(*arguments):
            self.values(*arguments)
            return self.kernel(*arguments)

        return run


BACKENDS: dict[tuple[str, str], tuple[str, ...]] = {}


def fill_table() -> None:
    """Once, at import: makes the ops differentiable and records the backends of each op and device."""
    kernels = [kernel for op in OPS.values() for kernel in (op.kernel, op.backward) if kernel is not None]
    _extension.load({x._schema.name.split("::")[1]: _extension.signature(x._schema) for x in kernels})
    in_cpp = _extension.make_differentiable()
    triton.register(OPS)
    for name, op in OPS.items():
        if op.second is not None:
            in_cpp(name, op.second) if in_cpp else differentiate(op)
        for device in KERNEL_BACKENDS:
            BACKENDS[name, device] = op.backends(device)


def differentiate(op: Op) -> None:
    """Makes an op differentiable by its backward, as csrc/autograd.cpp does where it is built for this torch.

    The backward's schema defines how. Argument d_<result>: the gradient of that result (None if there is none; if the
    argument is not optional, the backward is then not called). Argument needs_<argument>: whether the result
    d_<argument> is needed. Any other argument: the op's argument or result of that name. Result d_<argument>: the
    gradient of that argument. The gradient itself is differentiated by `op.second`.
    """
    second = op.second
    assert op.backward is not None and second is not None  # `fill_table`
    arguments = [x.name for x in op.kernel._schema.arguments]
    results = [x.name for x in op.kernel._schema.returns]
    takes = [x.name for x in op.backward._schema.arguments]
    gives = [x.name.removeprefix("d_") for x in op.backward._schema.returns]
    given = [x for x in takes if x in arguments or x in results]
    required = [x.name for x in op.backward._schema.arguments if x.name not in given and str(x.type) == "Tensor"]
    meaning = {*given, *(f"d_{x}" for x in results), *(f"needs_{x}" for x in arguments)}
    if unknown := set(takes) - meaning | set(gives).difference(arguments):
        raise ValueError(f"{op.name}_backward: names must be those of {op.name}, got {sorted(unknown)}")

    def save(ctx, inputs, output):
        output = output if isinstance(output, tuple) else (output,)
        known = dict(zip(results, output, strict=True)) | dict(zip(arguments, inputs, strict=True))
        kept = {x: known[x] for x in given if isinstance(known[x], Tensor)}
        ctx.names, ctx.values = list(kept), {x: known[x] for x in given if x not in kept}
        ctx.save_for_backward(*kept.values())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))

    def backward(ctx, *gradients):
        known = {f"d_{x}": d for x, d in zip(results, gradients, strict=True)}
        if any(known[x] is None for x in required):
            return (None,) * len(arguments)
        known |= ctx.values | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        known |= {f"needs_{x}": needed for x, needed in zip(arguments, ctx.needs_input_grad, strict=True)}
        found = op.backward(*(known[x] for x in takes))
        found = dict(zip(gives, found if isinstance(found, tuple) else (found,), strict=True))
        return tuple(
            found.get(x) if needed else None for x, needed in zip(arguments, ctx.needs_input_grad, strict=True)
        )

    def save_arguments(ctx, inputs, output):
        ctx.values = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.tensors = [isinstance(x, Tensor) for x in inputs]
        ctx.set_materialize_grads(False)

    def second_backward(ctx, *gradients):
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if tensor else x for tensor, x in zip(ctx.tensors, ctx.values, strict=True)]
        return tuple(second(values, gradients))

    torch.library.register_autograd(op.qualified, backward, setup_context=save, lib=LIBRARY)
    torch.library.register_autograd(
        f"{op.qualified}_backward", second_backward, setup_context=save_arguments, lib=LIBRARY
    )
