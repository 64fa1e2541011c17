"""Full steps of a symmetrized model and of its bare backbone, for profiles and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._inputs import embedded
from probsym_fast.models import Symmetrized
from probsym_fast.models.backbones.fused import OnePass, by_modules
from probsym_fast.models.predictions import real_leaves

Inputs = tuple[tuple, dict[str, Any]]  # positional and keyword arguments
Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]  # (prediction, penalties) -> scalar


@dataclass
class Steps:
    """A full step, one of the bare backbone on random inputs of the same shapes, and one of distribution and embedding.

    The bare step uses the model's chunks at its first call; run a full step before it, so that "auto" has found a size.
    """

    step: Callable[[], Any]
    bare: Callable[[], Any]
    distribution: Callable[[], Any]


def training_steps(
    model: Symmetrized,
    batch: Any,
    samples: int,
    loss: Loss,
    *,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    compiled: str | None = None,
    mode: str | None = None,
) -> Steps:
    """Steps of forward, loss, backward, gradient clipping and Adam, with the model's chunks and out-of-memory retries.

    compiled: "backbone" compiles the backbone in both steps; "model" compiles the whole model as one graph, and the bare
    backbone. mode: of torch.compile, such as "reduce-overhead" (CUDA graphs).
    """
    device = batch.device
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def begin(some: torch.optim.Optimizer) -> None:
        if mode is not None:  # frees the memory of the last step's graphs
            torch.compiler.cudagraph_mark_step_begin()
        some.zero_grad()

    def gradients() -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            value = loss(*model(batch, samples))
        value.backward()

    def step() -> None:
        begin(optimizer)
        if model.chunks.size == "auto":
            model.step_with_smaller_chunks(gradients, samples)
        else:
            gradients()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    def distribution() -> None:
        model.zero_grad()
        g, penalties = model.distribution(batch, samples)
        arguments, keywords = embedded(model.embed, batch, model.distribution.group, g)
        tokens = (*arguments, *keywords.values())
        sums = [x.sum() for x in tokens if isinstance(x, Tensor) and x.requires_grad]
        sum([*penalties.values(), *sums], torch.zeros((), device=device)).backward()

    if compiled == "model":
        model.compile(mode=mode, fullgraph=True)
    elif compiled:
        model.backbone.compile(mode=mode)

    @cache
    def made() -> tuple[nn.Module, list[tuple[Inputs, int]], dict[int, list[Tensor]], torch.optim.Optimizer]:
        backbone, parts = bare_backbone(model, batch, samples)
        if compiled == "model":
            backbone = deepcopy(backbone)  # the model's own is part of its compiled graph
        with torch.no_grad():
            outputs = {count: real_leaves(backbone(*given, **named)) for (given, named), count in parts}
            wanted = {count: [torch.randn_like(x) for x in some] for count, some in outputs.items()}
        if compiled and backbone is not model.backbone:
            backbone.compile(mode=mode)
        return backbone, parts, wanted, torch.optim.Adam(backbone.parameters(), lr=1e-4, fused=True)

    def bare() -> None:
        backbone, parts, wanted, bare_optimizer = made()
        begin(bare_optimizer)
        for (given, named), count in parts:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                pairs = zip(real_leaves(backbone(*given, **named)), wanted[count], strict=True)
                value: Any = sum(nn.functional.mse_loss(x.float(), y) for x, y in pairs)
            value.backward()
        if clip:
            nn.utils.clip_grad_norm_(backbone.parameters(), clip)
        bare_optimizer.step()

    return Steps(step, bare, distribution)


def inference_steps(
    model: Symmetrized, batch: Any, samples: int, *, autocast: torch.dtype | None = None, compiled: bool = False
) -> Steps:
    """Steps of a forward pass in eval mode, without gradients. compiled: torch.compile of the bare backbone."""
    model.eval()

    @cache
    def made() -> tuple[nn.Module, list[tuple[Inputs, int]]]:
        backbone, parts = bare_backbone(model, batch, samples)
        if compiled:
            backbone.compile()
        return backbone, parts

    def within(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad(), torch.autocast(batch.device.type, autocast, enabled=autocast is not None):
                return function()

        return run

    def distribution() -> None:
        g, _ = model.distribution(batch, samples)
        model.embed(batch, model.distribution.group, g)

    def bare() -> None:
        backbone, parts = made()
        for (given, named), _ in parts:
            backbone(*given, **named)

    return Steps(within(lambda: model(batch, samples)[0]), within(bare), within(distribution))


def bare_backbone(model: Symmetrized, batch: Any, samples: int) -> tuple[nn.Module, list[tuple[Inputs, int]]]:
    """The bare backbone, and for every chunk random inputs and its number of samples; chunks of equal size share inputs.

    A part with a method `bare` is replaced by its result: a backbone by its form without symmetrization, an embedding that
    absorbed the backbone's first layer by that layer, which takes (B, S, in_features). What runs in one pass runs by modules.
    """
    backbone: Any = model.backbone
    embed: Any = model.embed
    inputs: dict[int, Inputs] = {}
    if hasattr(backbone, "bare"):
        backbone = backbone.bare()
    elif any(isinstance(part, OnePass) for part in backbone.modules()):
        backbone = by_modules(backbone)
    dense = embed.bare().to(batch.device) if hasattr(embed, "bare") else None
    if dense is not None:
        backbone = nn.Sequential(dense, backbone)
    size = model.chunks.size_for(samples)
    counts = [min(size, samples - first) for first in range(0, samples, size)]
    for count in set(counts):
        if dense is not None:
            inputs[count] = (torch.randn(batch.size, count, dense.in_features, device=batch.device),), {}
            continue
        with torch.no_grad():
            g, _ = model.distribution(batch, count)
            arguments, keywords = embedded(model.embed, batch, model.distribution.group, g)
        inputs[count] = tuple(map(random_like, arguments)), {name: random_like(x) for name, x in keywords.items()}
    return backbone, [(inputs[count], count) for count in counts]


def random_like(x: Any) -> Any:
    """Normal noise in the shape of a floating-point Tensor; returns anything else (indices, a batch) unchanged."""
    return torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def move(batch: Any, device: torch.device | str) -> Any:
    """Moves a batch, or a nested tuple of batches and tensors, to the device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, (tuple, list)):
        parts = [move(x, device) for x in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch
