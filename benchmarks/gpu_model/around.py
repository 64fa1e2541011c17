"""How much of a training step of ViT-B/16 is not its backbone: PATTERN-PS in bfloat16, on tensors without data.

The step runs twice on fake tensors: with the backbone, and with one that only knows the shape of its output. What the
second launches is what is around the backbone: distribution, permutation, tokens, readout, loss, and Adam for their weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partialmethod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_model.cases import used
from benchmarks.gpu_model.devices import DEVICES, Device
from benchmarks.gpu_model.dispatches import paths_of_a_gpu
from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.model import Compiled, library, predict
from benchmarks.gpu_model.record import Call, everything
from benchmarks.gpu_model.table import compile_all
from probsym_fast import draws, tasks
from probsym_fast._autocast import autocasts
from probsym_fast.models import tokens
from probsym_fast.ops._op import Op
from probsym_fast.profiling.steps import training_steps

GRAPHS = 128
SAMPLES = 1, 10  # of each graph


@dataclass
class Step:
    """What a step launches, with and without its backbone. facts: what the data would say, for `source.HINTS`."""

    samples: int
    whole: list[Launch | Call]
    around: list[Launch | Call]
    facts: dict[str, float]


@dataclass
class Share:
    """On one device, in seconds. kernels: of the time around the backbone, the longest first."""

    samples: int
    whole: float
    ours: float
    library: float
    kernels: list[tuple[str, float]]

    @property
    def share(self) -> float:
        return (self.ours + self.library) / self.whole


class Mode(FakeTensorMode):
    """Copies of fake tensors stay in it."""

    def __deepcopy__(self, memo: dict) -> Mode:
        return self


MODE = Mode()  # one: the package keeps constant tensors from call to call


class Hollow(torch.autograd.Function):
    """An output of the backbone's shape, and gradients of its input's, without a launch."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.like = x.detach()
        return x.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.empty_like(ctx.like), None, None


def step(samples: int, graphs: int = GRAPHS) -> Step:
    """Of PATTERN-PS with ViT-B/16, under autocast to bfloat16."""
    settings = {"dataset": "pattern", "backbone.pretrained": "false", "graphs.train": graphs, "training.batch": graphs}
    task = tasks.load("pattern/pretrained_ps", [f"--{k}={v}" for k, v in settings.items()])
    batch, target = task.inputs(task.dataset("train")[torch.arange(graphs)])
    nodes = batch.num_nodes.double()
    facts = {
        "used": used(batch.num_nodes.tolist(), task.graph_set.N, 2),
        "filled": nodes.mean().item() / task.graph_set.N,
        "mean_nodes": nodes.mean().item(),
        "channels": task.graph_set.outputs,
    }
    with without_data(task.model(), batch, target) as (model, batch, target):
        loss = lambda prediction, penalties: task.total(task.loss(prediction, target), penalties)  # noqa: E731
        run = training_steps(model, batch, samples, loss, autocast=torch.bfloat16).step
        shapes: list[Tensor] = []
        with model.backbone.register_forward_hook(lambda module, given, out: shapes.append(out)):
            run()  # Adam makes its state
        whole, out = everything(run), shapes[-1]
        model.backbone.forward = lambda x, *_, **__: Hollow.apply(x, out.shape, out.dtype)
        return Step(samples, whole, everything(run), facts)


@contextlib.contextmanager
def without_data(model: nn.Module, batch: Any, target: Tensor) -> Iterator[tuple]:
    """All three with fake tensors; inside, modules and ops choose as on a GPU, and seeds are constant.

    The tensors are of the CPU, since torch has no backward pass of CUDA tensors where there is no GPU.
    """
    of_a_gpu = partialmethod(
        lambda op, device, kernel_dtypes: kernel_dtypes(op, "cuda"), kernel_dtypes=Op.kernel_dtypes
    )
    product_dtype = lambda weight: torch.get_autocast_dtype("cpu") if autocasts(weight.device) else weight.dtype  # noqa: E731
    batch = copy.copy(batch)
    for name, x in vars(batch).items():
        if isinstance(x, Tensor):
            object.__setattr__(batch, name, MODE.from_tensor(x))
    for part in model.modules():
        for kept in (part._parameters, part._buffers):
            kept |= {name: MODE.from_tensor(x) for name, x in kept.items() if x is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(paths_of_a_gpu())
        stack.enter_context(mock.patch.object(draws, "_drawn_seed", return_value=1))
        stack.enter_context(mock.patch.object(Op, "kernel_dtypes", of_a_gpu))
        stack.enter_context(mock.patch.object(tokens, "product_dtype", product_dtype))
        stack.enter_context(MODE)
        yield model, batch, MODE.from_tensor(target)


def share(samples: int, architecture: int) -> Share:
    """Of a step on the device of the architecture."""
    found = step(samples)
    compiled = compile_all((x for x in found.whole if isinstance(x, Launch)), architecture)
    return predicted(found, compiled, DEVICES[architecture])


def predicted(step: Step, compiled: dict[tuple[str, str], Compiled], device: Device) -> Share:
    """compiled: every launch of the step."""

    def seconds(some: Iterable[Launch | Call]) -> Iterator[tuple[str, float]]:
        for x in some:
            if isinstance(x, Call):
                yield "", library(x, device)
            elif (one := predict(x, compiled[x.key], device, step.facts)).seconds is None:
                raise RuntimeError(f"around: {x.kernel} has a loop of unknown turns: {one.unknown}")
            else:
                yield one.kernel, one.seconds

    kernels: Counter[str] = Counter()
    for name, each in seconds(step.around):
        kernels[name] += each
    calls = kernels.pop("", 0.0)
    whole = sum(each for _, each in seconds(step.whole))
    return Share(step.samples, whole, sum(kernels.values()), calls, kernels.most_common())
