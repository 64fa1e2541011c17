"""Forces: minus the gradient of a symmetrized energy with respect to the positions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor

from probsym_fast.batches import PointClouds, check_batch
from probsym_fast.models.symmetrized import Symmetrized


def energy_and_forces(
    model: Symmetrized,
    batch: PointClouds,
    samples: int | None = None,
    generator: torch.Generator | numpy.random.Generator | None = None,
    *,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The energy E (B, 1), the forces -dE/dx (B, n, d) and the penalties of a model with one output per cloud.

    samples, generator, seed: as in `Symmetrized.forward`.

    The gradient goes through everything that depends on positions: the tokens, and the group elements where the distribution
    learns them. Its noise counts as given, so the forces are exactly those of the energy with that noise, and conserve it.
    Forces of nodes that are not valid are 0. With gradients on, forces can be differentiated again, for a loss on them.
    Also runs under torch.no_grad and torch.inference_mode.

    To train by forces, set `one_pass = False` on parts that would run as one op (`OnePass`, the edge convolutions of Vector
    Neurons): second derivatives cost less step by step. Any part may use torch's fused attention (see `Symmetrized`).
    Calls `Symmetrized.forward` of the model, so that a subclass may call this function in its own.

    In training mode, where clouds of a batch share statistics (Vector Neurons), it is the gradient of the sum of the batch's
    energies. Raises ValueError for another prediction, RuntimeError where a program is recorded, and as the model.
    """
    owner = "energy_and_forces"
    check_batch(owner, batch, "positions")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{owner}: must not be compiled, which cannot differentiate inside; compile the backbone")
    create = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), torch.enable_grad():
        positions = batch.positions.detach().clone().requires_grad_()
        inputs = _usable(batch).replace(positions=positions)
        energy, penalties = Symmetrized.forward(model, inputs, samples, generator, seed=seed)
        if tuple(energy.shape) != (batch.size, 1):
            raise ValueError(f"{owner}: model must predict (B, 1) = ({batch.size}, 1), got {tuple(energy.shape)}")
        (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=create)
    if not create:
        energy, penalties = energy.detach(), {name: value.detach() for name, value in penalties.items()}
    return energy, -slope, penalties


def _usable(batch: Any) -> Any:
    """The batch with copies of tensors made in inference mode, which autograd refuses."""
    made = {name: x.clone() for name, x in vars(batch).items() if isinstance(x, Tensor) and x.is_inference()}
    return batch.replace(**made) if made else batch
