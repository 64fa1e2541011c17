"""Backbones whose layers run as one op, in one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from probsym_fast._autocast import allows_bf16, autocasts
from probsym_fast._checks import check_bool
from probsym_fast.ops._extension import multiplies_bf16
from probsym_fast.ops._op import OPS

SETTINGS = (
    "eps",
    "approximate",
    "heads",
    "num_heads",
    "norm_first",
    "batch_first",
    "activation",
    "add_zero_attn",
)  # of modules, that change the numbers
Structure = dict[str, tuple]
HALF = torch.bfloat16, torch.float16
NARROW = 64  # of this width four sequences are enough for the op to be faster, else a vector of them
HALF_WIDTH = (
    128  # for wider maps the modules in bfloat16 are faster than an op in float32, on processors with its products
)


class OnePass(nn.Module):
    """A backbone whose layers run as one op where it has a kernel and nothing has to happen between them.

    The op takes the place of the modules as they were built. A part that is replaced, resized, hooked, sharded or otherwise
    not as it was makes the modules run one by one, as do active dropout and torch.func. On a CPU the op computes in float32
    for weights below it and under autocast, up to the sizes where that is faster than the modules in bfloat16; under
    autocast to bfloat16 the linear maps of `Transformer` and `MessagePassing` multiply in it where the processor has AMX.

    recompute: the backward pass of the op computes the layers again instead of keeping their inputs: a fifth slower, and
    memory does not grow with the layers. `chunk="auto"` sets it where all samples fit then. one_pass: None; set it to False
    to run the modules one by one, or to True to take the op for few sequences too, and on a GPU, where the modules of a
    `Transformer` are faster and the others were not measured. For training by forces set it to False: second derivatives
    of the op go through its reference, after its own gradient, which takes about a third longer than the modules do.
    """

    op: str  # the name of the op

    def __init__(self, owner: str, recompute: bool):
        super().__init__()
        self.recompute = check_bool(owner, "recompute", recompute)
        self.one_pass: bool | None = None
        self._structure: Structure = {}

    def built(self) -> None:
        """Called once all parts are there: remembers them."""
        self._structure = structure(self)

    def why_modules(self, *inputs: Any, **named: Any) -> str | None:
        """Why a call with these inputs runs the modules one by one; None: it runs all layers as one op."""
        first = inputs[0] if inputs else next(iter(named.values()))
        return self.why_not(first.device, first.dtype) or self.unfit(*inputs, **named)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why inputs of this device and dtype, whatever their sizes, never run as one op; None: some do."""
        if (reason := self.why_not_as_built()) is not None:
            return reason
        autocast = autocasts(device) and dtype != torch.float64  # which it leaves as it is
        half = autocast or dtype in HALF
        bf16 = allows_bf16(device) and multiplies_bf16()
        slower = half and (device.type != "cpu" or not self.faster_than_half(bf16))
        if autocast and slower:
            return "autocast is on"
        if slower and device.type == "cpu":
            return f"in {_name(dtype)} the modules are faster"
        if slower or not OPS[self.op].has_kernel_for(device, torch.float32 if half else dtype):
            return f"no kernel for {device.type}, {_name(dtype)}"
        if (reason := self.beyond_kernels(device.type)) is not None:
            return reason
        if device.type != "cpu" and not self.one_pass:
            return f"one_pass is not True on {device.type}"
        wanted = torch.float32 if autocast else dtype
        for module in self.modules():  # half the time of parameters()
            for p in module._parameters.values():
                if p is not None and p.dtype != wanted:
                    return f"a weight is {_name(p.dtype)}"
        return None

    def as_autocast(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """run(*inputs); under autocast in float32, and then in the dtype of autocast, as a linear map would be."""
        device = inputs[0].device
        if not autocasts(device) or inputs[0].dtype == torch.float64:
            return run(*inputs)
        return run(*(x.float() for x in inputs)).to(torch.get_autocast_dtype(device.type))

    def why_not_as_built(self) -> str | None:
        """Why the modules, as they are now, compute something other than the op."""
        if self.one_pass is False:
            return "one_pass is False"
        if (reason := self.too_large()) is not None:
            return reason
        if _has_any_global_hook():
            return "there are hooks on all modules"
        found = dict(self.named_modules())
        if other := found.keys() ^ self._structure.keys():
            name = next(iter(other))
            return f"{name} is {'new' if name in found else 'gone'}"
        if [*found] != [*self._structure]:
            return "the parts have another order"
        for name, module in found.items():
            if module is not self and (reason := _change(module, self._structure[name])) is not None:
                return f"{name} {reason}"
        return None

    def too_large(self) -> str | None:
        """Why the op would not be faster."""
        raise NotImplementedError

    def fewest(self) -> int:
        """From how many sequences on the op is faster: a vector of 16 takes as long for one."""
        return 1

    def unfit(self, *inputs: Any, **named: Any) -> str | None:
        """Why inputs of these sizes do not run as one op."""
        raise NotImplementedError

    def asked(self) -> bool:
        """Whether to take the op also where it is not faster, for few inputs: in a program, and with one_pass = True."""
        return bool(self.one_pass) or torch.compiler.is_compiling()

    def too_few(self, shape: Sequence[int], what: str = "sequences") -> str | None:
        """Why inputs with these leading axes are too few for the op to be faster."""
        if self.asked():
            return None
        count, fewest = math.prod(shape), self.fewest()
        return f"{count} {what}, fewer than {fewest}" if count < fewest else None

    def faster_than_half(self, bf16: bool) -> bool:
        """Whether the op is faster on a CPU than the modules in bfloat16; bf16: it multiplies in bfloat16 too."""
        raise NotImplementedError

    def beyond_kernels(self, device: str) -> str | None:
        """What the op's kernels for a device type do not take of this backbone."""
        return None

    def extra_repr(self) -> str:
        weight = next(self.parameters(), None)
        reason = "no weights" if weight is None else self.why_not(weight.device, weight.dtype)
        return "one pass" if reason is None else f"by modules: {reason}"


@contextmanager
def paths_of(module: nn.Module) -> Iterator[list[str]]:
    """How the backbones in one pass within the module run meanwhile: "one pass" or "modules: <reason>", each once."""
    found: list[str] = []

    def before(backbone: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        reason = backbone.why_modules(*inputs, **named)  # type: ignore[operator]
        path = "one pass" if reason is None else f"modules: {reason}"
        if path not in found:
            found.append(path)

    inner = {
        id(part) for one in module.modules() if isinstance(one, OnePass) for part in one.modules() if part is not one
    }
    outer = [one for one in module.modules() if isinstance(one, OnePass) and id(one) not in inner]
    hooks = [one.register_forward_pre_hook(before, with_kwargs=True) for one in outer]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def fewest_sequences(width: int) -> int:
    """See `OnePass`."""
    return 4 if width <= NARROW else 16


def by_modules(module: nn.Module) -> nn.Module:
    """A copy that shares the weights and runs all its parts module by module, for benchmarks."""
    shared = {id(x): x for x in (*module.parameters(), *module.buffers())}
    plain = copy.deepcopy(module, shared)
    for part in plain.modules():
        if isinstance(part, OnePass):
            part.one_pass = False
    return plain


def row(parts: Iterable[nn.Module | Tensor]) -> Tensor:
    """(P,) the weight and bias of every module, and tensors as they are, one after the other."""
    tensors = [x for part in parts for x in ([part] if isinstance(part, Tensor) else [part.weight, part.bias])]
    return torch.cat([x.flatten() for x in tensors])  # type: ignore[operator, union-attr]


def structure(module: nn.Module) -> Structure:
    """name -> type, shapes of its own weights and settings, of the module and all within it."""
    return {name: _signature(part) for name, part in module.named_modules()}


def _signature(module: nn.Module) -> tuple:
    shapes = {name: None if p is None else p.shape for name, p in module._parameters.items()}
    own = module.__dict__  # getattr takes as long as all else here for what a module lacks
    return type(module), shapes, {name: own[name] for name in SETTINGS if name in own}


def _change(module: nn.Module, before: tuple) -> str | None:
    """What keeps a part from being what it was when it was built."""
    (kind, shapes, settings), own, weights = before, module.__dict__, module._parameters
    if type(module) is not kind:
        return f"is {type(module).__name__}, not {kind.__name__}"
    if settings and any(name not in own or own[name] != value for name, value in settings.items()):
        return "has other weights or settings"
    if weights.keys() != shapes.keys():
        return "has other weights or settings"
    for name, p in weights.items():
        if (None if p is None else p.shape) != shapes[name]:
            return "has other weights or settings"
        if type(p).__name__ == "DTensor":
            return "is sharded"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has a hook"
    if "forward" in module.__dict__:
        return "has another forward"
    dropout = own.get("p" if kind is nn.Dropout else "dropout", 0)
    if module.training and isinstance(dropout, (int, float)) and dropout:
        return f"drops {dropout}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
