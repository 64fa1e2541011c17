"""What a row is, and the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class Size(NamedTuple):
    """batch: graphs or clouds. edges: of all graphs together. nodes: of a cloud."""

    batch: int = 3
    edges: int = 13
    nodes: int = 5


# axis -> six sizes that differ in it; with more graphs there are more nodes and edges
SIZES = {
    "batch": [Size(batch, 4 * batch + 1) for batch in (3, 2, 4, 7, 5, 6)],
    "edges": [Size(edges=edges) for edges in (13, 9, 2, 40, 17, 29)],
    "nodes": [Size(nodes=nodes) for nodes in (5, 6, 8, 9, 7, 11)],  # more than the neighbours that VectorNeurons joins
}


class Program(nn.Module):
    """call(part, *inputs), of one module or none."""

    def __init__(self, call: Callable[..., Any], part: nn.Module | None):
        super().__init__()
        self.call, self.part = call, part

    def forward(self, inputs: tuple) -> Any:
        return self.call(*inputs) if self.part is None else self.call(self.part, *inputs)


@dataclass(frozen=True)
class Row:
    """call(part(), *inputs(size)), which returns tensors.

    kind: its heading in the table. covers: the public names that it shows. axes: those of SIZES that its inputs have. trains:
    whether there is something to train. differentiable: whether its outputs have derivatives by its inputs. refuses: what the
    error says wherever a program is recorded. slow: it takes long to trace, so only the slow tests do it. programs: how many
    of any size there are, since it works in two ways.
    """

    kind: str
    covers: tuple[str, ...]
    call: Callable[..., Any]
    inputs: Callable[[Size], tuple]
    part: Callable[[], nn.Module] | None = None
    axes: tuple[str, ...] = ("batch",)
    trains: bool = True
    differentiable: bool = True
    refuses: str | None = None
    slow: bool = False
    programs: int = 1

    def program(self, training: bool) -> Program:
        torch.manual_seed(0)
        return Program(self.call, self.part() if self.part else None).train(training)

    def sample(self, size: Size, training: bool, dtype: torch.dtype = torch.float32) -> tuple:
        """Its inputs. In training those of a row without weights need gradients."""
        torch.manual_seed(1)
        leaves = training and self.part is None
        inputs = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, self.inputs(size))
        return tree_map(lambda x: x.requires_grad_() if leaves and x.is_floating_point() else x, inputs)

    @property
    def learns(self) -> bool:
        """Whether it has weights to train."""
        return self.part is not None and self.trains

    @property
    def whole(self) -> bool:
        return self.kind == "whole models"

    def leaves(self, size: Size) -> list[Tensor]:
        return tree_leaves(self.sample(size, False))


class Rows(dict[str, Row]):
    """Those of one kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, name: str, call: Callable, inputs: Callable[[Size], tuple], **settings: Any) -> None:
        """Unless it says so, it covers the public name that its own name begins with."""
        self[name] = Row(self.kind, settings.pop("covers", (name.split()[0],)), call, inputs, **settings)


def step(run: Callable, inputs: tuple, training: bool) -> list[Tensor]:
    """The outputs; in training after a backward pass of the sum of their squares."""
    with torch.set_grad_enabled(training):
        found = tree_leaves(run(inputs))
    if training:
        sum(x.square().sum() for x in found if x.requires_grad).backward()
    return [x.detach() for x in found]


def varying(row: Row, *axes: str) -> tuple:
    """`dynamic_shapes` of the row's inputs for torch.export: Dim.DYNAMIC for every axis that differs along these axes."""
    first = row.sample(SIZES["batch"][0], False)
    others = [row.sample(SIZES[axis][1], False) for axis in axes]

    def of(*tensors: Tensor) -> dict[int, Any]:
        return {
            i: torch.export.Dim.DYNAMIC
            for i, sizes in enumerate(zip(*(x.shape for x in tensors), strict=True))
            if len(set(sizes)) > 1
        }

    def shapes(*inputs: Any) -> Any:
        if isinstance(inputs[0], Tensor):
            return of(*inputs)
        return [of(*tensors) for tensors in zip(*map(tree_leaves, inputs), strict=True)]  # torch takes batches as lists

    return tuple(shapes(*inputs) for inputs in zip(first, *others, strict=True))
