"""The symmetrization tax: time of a full training step over that of the bare backbone on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness import Row, chosen, compare, limit
from benchmarks.operations import countable, operations_of
from probsym_fast import tasks
from probsym_fast.models import timm_backbone
from probsym_fast.profiling.cases import prepared
from probsym_fast.profiling.steps import Steps, inference_steps, move, training_steps
from probsym_fast.training.allocator import keep_freed_memory


def case(
    name: str,
    device: str,
    overrides: list[str] | None = None,
    autocast: torch.dtype | None = None,
    compiled: str | None = None,
    mode: str | None = None,
    counted: bool = False,
    change: Callable[[torch.nn.Module], object] = lambda model: None,
) -> Steps:
    """The `training_steps` of a configuration. counted: by modules, for `operations_of`. change: what to do
    to the model before."""
    keep_freed_memory()  # as training does, for both sides
    torch.manual_seed(0)
    task = tasks.load(name, overrides)
    config = task.config
    model = task.model().to(device)
    model = countable(model) if counted else model
    change(model)
    batch, target = task.inputs(move(task.dataset("train")[torch.arange(config.training.batch)], device))

    def loss(prediction: Any, penalties: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return task.total(task.loss(prediction, target), penalties)

    settings = {"clip": config.training.clip, "autocast": autocast, "compiled": compiled, "mode": mode}
    return training_steps(model, batch, config.samples.train, loss, **settings)


VISION = {"PATTERN": "pattern", "Peptides-func": "peptides_func", "PCQM-Contact": "pcqm_contact"}


def vision(
    name: str,
    device: str,
    samples: int,
    autocast: torch.dtype | None = None,
    rows: int = 4,
    compiled: str | None = None,
) -> Steps:
    """ViT-B/16 with about `rows` sampled graphs per step; molecules with random features, no patch dropped."""
    dataset = "pattern" if name == "PATTERN" else f"random_{VISION[name]}"
    changes = {
        "dataset": dataset,
        "backbone.pretrained": "false",
        "backbone.patch_dropout": "[0, 0]",
        "graphs.train": rows,
        "training.batch": rows // samples,
        "samples.train": samples,
    }
    overrides = [f"--{key}={value}" for key, value in changes.items()]
    return case(f"{VISION[name]}/pretrained_ps", device, overrides=overrides, autocast=autocast, compiled=compiled)


NBODY = {"n-body GNN-PS": "nbody/gnn_O3_ps", "n-body Transformer-PS": "nbody/transformer_S5xO3_ps"}
SMALL_MODELS = NBODY | {"EXP-classify MLP-PS": "exp_classify/mlp_ps", "EXP-classify GIN-ID-PS": "exp_classify/gin_ps"}
CASES: dict[str, Callable[..., Steps]] = {
    **{name: partial(case, path) for name, path in SMALL_MODELS.items()},
    **{
        f"{name} ViT-B/16-PS, S = {samples}": partial(vision, name, samples=samples)
        for name in VISION
        for samples in (1, 4)
    },
    "PATTERN ViT-B/16-PS, S = 1, bf16": partial(vision, "PATTERN", samples=1, autocast=torch.bfloat16),
}
ROWS = 128  # sampled graphs per step on a GPU
SMALL = {"n-body Transformer-PS": "nbody/transformer_S5xO3_ps", "EXP-classify MLP-PS": "exp_classify/mlp_ps"}
GPU_CASES: dict[str, Callable[[str], Steps]] = {
    **{name: CASES[name] for name in CASES if "ViT" not in name},
    **{
        f"{name}, whole model {label}": partial(case, path, compiled="model", mode=mode)
        for name, path in SMALL.items()
        for label, mode in (("compiled", None), ("compiled with CUDA graphs", "reduce-overhead"))
    },
    **{
        f"{name} ViT-B/16-PS, S = {samples}, bf16, {ROWS // samples} graphs, {'compiled' if compiled else 'eager'}": partial(
            vision, name, samples=samples, autocast=torch.bfloat16, rows=ROWS, compiled=compiled
        )
        for name in VISION
        for samples in (1, 10)
        for compiled in (None, "backbone")
    },
}
OF = {"cpu": CASES, "cuda": GPU_CASES}


@pytest.mark.parametrize("name", CASES | GPU_CASES)
def test_training_step(name, device, seconds, record):
    if name not in OF[device]:
        pytest.skip(f"no case of {device}")
    this = OF[device][name](device)
    variants = {"step": this.step, "bare backbone": this.bare, "distribution and embedding": this.distribution}
    dtype, counted = torch.bfloat16 if "bf16" in name else torch.float32, this
    if name in SMALL_MODELS:
        counted = case(SMALL_MODELS[name], device, counted=True)
        if device == "cpu":
            variants["bare backbone, compiled"] = case(SMALL_MODELS[name], device, compiled="backbone").bare
    settings = {"reference": "bare backbone", "seconds": 3 * seconds, "whole": True}
    rows = compare(f"{name}, training step", chosen(variants), device=device, **settings)
    rows[0].extra = taxes(rows)
    if name in SMALL_MODELS or device == "cuda":
        with_shares(rows, [counted.step, counted.bare, counted.distribution, counted.bare], device, dtype)
    record(rows, this.bare)


@pytest.mark.parametrize("samples", [1, 64])
@pytest.mark.parametrize("name", NBODY)
def test_inference(name, samples, device, seconds, record):
    """A forward pass without gradients. tax: time over that of the bare backbone by modules."""

    def steps(compiled: bool = False, counted: bool = False) -> Steps:
        case = prepared(tasks.load(NBODY[name], []), None, device)
        model = countable(case.model) if counted else case.model
        return inference_steps(model, case.batch, samples, compiled=compiled)

    this, counted = steps(), steps(counted=True)
    variants = {
        "step": this.step,
        "bare backbone": this.bare,
        "distribution and embedding": this.distribution,
        "bare backbone, compiled": steps(compiled=True).bare,
    }
    settings = {"reference": "bare backbone", "seconds": seconds, "whole": True}
    rows = compare(f"{name}, inference, S = {samples}", chosen(variants), device=device, **settings)
    rows[0].extra = taxes(rows)
    with_shares(rows, [counted.step, counted.bare, counted.distribution, counted.bare], device, torch.float32)
    record(rows, this.bare)


def taxes(rows: list[Row]) -> dict[str, Any]:
    """Time of the first row, the step, over that of the bare backbone, plain and compiled."""
    found = {"tax": round(1 / rows[0].ratio, 2)}
    if rows[3:]:
        found["of compiled"] = round(rows[0].median / rows[3].median, 2)
    return found


def with_shares(rows: list[Row], counted: list[Callable], device: str, dtype: torch.dtype) -> None:
    """Operations of every row, and its share of the rate of products."""
    seconds_of_one = limit(device, dtype, 0, 1)
    for row, function in zip(rows, counted, strict=False):
        row.operations = operations_of(function)
        row.share = row.operations * seconds_of_one / row.median
    rows[0].extra["share of"] = f"the rate of products in {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("name", VISION)
def test_dead_tokens(name, device, seconds, record):
    """Bare ViT-B/16, forward and backward, with the last block on the tokens that are read or on all; 4 rows of tokens."""
    read = {"PATTERN": "diagonal", "Peptides-func": "pooled", "PCQM-Contact": "tokens"}[name]
    if read == "tokens":
        pytest.skip("reads all tokens")
    variants, x = {}, torch.randn(4, 196, 768, device=device)
    for label, all_tokens in (("read tokens", False), ("all tokens", True)):
        torch.manual_seed(0)
        backbone = timm_backbone("vit_base_patch16_224", grid=14, read=read, all_tokens=all_tokens).to(device).train()
        variants[label] = lambda backbone=backbone: backbone(x).sum().backward()
    case = f"last block of ViT-B/16 where {read} tokens are read, forward and backward"
    record(compare(case, variants, device=device, reference="all tokens", seconds=3 * seconds), variants["read tokens"])


@pytest.mark.parametrize("name", VISION)
def test_batches(name, device, seconds, record):
    """Loading and collating a batch of 128 graphs."""
    dataset = "pattern" if name == "PATTERN" else f"random_{VISION[name]}"
    task = tasks.load(f"{VISION[name]}/pretrained_ps", [f"--dataset={dataset}", "--graphs.train=512"])
    graphs = task.dataset("train")
    load = lambda: graphs[torch.randperm(512)[:128]]  # noqa: E731
    record(
        compare(f"batch of 128 graphs, {name}", {"load": load}, device="cpu", reference="load", seconds=seconds), load
    )
