"""Figures of a model for a number of samples: spread of outputs, entropy of permutations, gradient norm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from probsym_fast._checkpointing import restored_buffers
from probsym_fast._files import write_atomically
from probsym_fast._progress import announced
from probsym_fast.draws import seed_generators, seeded
from probsym_fast.groups import Draws, Graphs
from probsym_fast.models import Symmetrized
from probsym_fast.tasks.exp_classify import ExpClassify

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Measurement:
    """How to measure the figures.

    test: numbers of inference samples. repeats: outputs per deviation. graphs: number of validation graphs.
    permutations: samples for the mean permutation. gradients: training graphs for the gradient norm. seed: of the noise.
    """

    test: tuple[int, ...]
    repeats: int
    graphs: int
    permutations: int
    gradients: int
    seed: int

    def figures(self, path: Path, model: Symmetrized, task: ExpClassify, samples: int) -> dict[str, Any]:
        """The figures of a model trained with `samples` samples, read from `path` if they are there, else written to it.

        output_variance, loss_variance: (mean over graphs of the deviation over repeats)^2 of the predicted probability and of
        the loss, one number for each of `test`. loss: the mean loss. entropy: `permutation_entropy`. gradient_norm:
        `_gradient_norm`.
        """
        of = {**asdict(self), "test": list(self.test), "samples": samples, "weights": fingerprint(model)}
        of |= {"dataset": task.config.dataset, "data": task.config.data}
        if path.is_file():
            try:
                known = json.loads(path.read_text())
                same, figures = known["of"] == of, known["figures"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"sample_size: {path} must hold figures, got {error!r}; remove it") from error
            if same:
                return figures
        steps = len(self.test) * self.repeats * len(self._batches(task)) + len(self._batches(task))
        with announced(f"{path.stem}: figures", steps + self.gradients) as advance:
            figures = self._spread(model, task, advance)
            figures["entropy"] = self._entropy(model, task, advance)
            figures["gradient_norm"] = self._gradient_norm(model, task, samples, advance)
        text = json.dumps({"of": of, "figures": figures}, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
        return figures

    def _batches(self, task: ExpClassify) -> tuple[Tensor, ...]:
        """Indices of the validation graphs, in batches."""
        return torch.arange(min(self.graphs, len(task.dataset("valid")))).split(task.config.training.batch)

    def _loaded(self, task: ExpClassify, device: torch.device) -> Iterator[tuple[int, Graphs, Tensor]]:
        for number, index in enumerate(self._batches(task)):
            graphs, target = task.dataset("valid")[index]
            yield number, graphs.to(device), target.to(device)

    @torch.no_grad()
    def _spread(self, model: Symmetrized, task: ExpClassify, advance: Advance) -> dict[str, Any]:
        device = next(model.parameters()).device
        rows: dict[str, list[float]] = {"output_variance": [], "loss_variance": [], "loss": []}
        for samples in self.test:
            probability, loss, mean = [], [], []  # per graph
            for number, graphs, target in self._loaded(task, device):
                outputs = []
                for k in range(self.repeats):
                    generator = seeded(self.seed, f"repeat {samples} {number}", k)
                    outputs.append(model(graphs, samples, generator)[0][:, 0])
                    advance(1)
                y = torch.stack(outputs)  # (repeats, graphs)
                losses = binary_cross_entropy_with_logits(y, target[:, 0].expand_as(y), reduction="none")
                probability.append(y.sigmoid().std(0))
                loss.append(losses.std(0))
                mean.append(losses.mean(0))
            rows["output_variance"].append(torch.cat(probability).mean().item() ** 2)
            rows["loss_variance"].append(torch.cat(loss).mean().item() ** 2)
            rows["loss"].append(torch.cat(mean).mean().item())
        return rows

    @torch.no_grad()
    def _entropy(self, model: Symmetrized, task: ExpClassify, advance: Advance) -> float:
        device, found = next(model.parameters()).device, []
        for number, graphs, _ in self._loaded(task, device):
            draws = Draws(seeded(self.seed, "entropy", number))
            found.append(permutation_entropy(model.distribution(graphs, self.permutations, draws)[0].rank, graphs))
            advance(1)
        return torch.cat(found).mean().item()

    def _gradient_norm(self, model: Symmetrized, task: ExpClassify, samples: int, advance: Advance) -> float:
        """Norm of the mean gradient over training graphs, for the backbone including its first layer.

        Each graph has its own pass in training mode, so that batch statistics are over its samples.
        """
        data, device = task.dataset("train"), next(model.parameters()).device
        parameters = [*model.embed.parameters(), *model.backbone.parameters()]
        count = min(self.gradients, len(data))
        model.train().zero_grad()
        with restored_buffers(model):
            for number in range(count):
                graphs, target = data[torch.tensor([number])]
                seed_generators(seeded(self.seed, "gradient dropout", number).initial_seed())
                generator = seeded(self.seed, "gradient", number)
                prediction, _ = model(graphs.to(device), samples, generator)
                (task.loss(prediction, target.to(device)) / count).backward(inputs=parameters)
                advance(1)
        norm = torch.stack([cast(Tensor, parameter.grad).norm() for parameter in parameters]).norm().item()
        model.eval().zero_grad()
        return norm


def fingerprint(model: Symmetrized) -> str:
    """SHA-256 of the model's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def permutation_entropy(rank: Tensor, graphs: Graphs) -> Tensor:
    """Entropy per node of the rows plus columns of each graph's mean permutation matrix: (B,) float64, in nats.

    rank (B, S, N): slots of the nodes in S permutations. 0 if all are equal, 2 log n if they are uniform.
    """
    mean = one_hot(rank, rank.shape[-1]).double().mean(1)  # (B, N nodes, N slots)
    valid = torch.arange(mean.shape[1], device=mean.device) < graphs.num_nodes[:, None]
    entropy = torch.special.entr(mean)
    return (entropy.sum(2) + entropy.sum(1)).where(valid, 0).sum(1) / graphs.num_nodes
