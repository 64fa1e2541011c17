"""p(g|x): the group elements to average a batch over."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from probsym_fast._checks import as_number, check_count, check_int, check_type
from probsym_fast.batches import check_batch
from probsym_fast.draws import check_seed
from probsym_fast.groups import Batch, Draws, Group
from probsym_fast.groups.elements import taken
from probsym_fast.ops.permutation import Relaxation, check_relaxation

Penalties = dict[str, Tensor]
AT_ONCE = 2**18  # noise values that a network takes at once, where samples do not depend on each other


def returned(owner: str, method: str, found: Any, names: str = "elements, penalties") -> Any:
    """What the method returned. TypeError unless it is a tuple of these, the penalties a dict."""
    if isinstance(found, tuple) and len(found) == len(names.split(", ")) and isinstance(found[-1], Mapping):
        return found
    kinds = ", ".join(type(x).__name__ for x in found) if isinstance(found, tuple) else ""
    got = f"{type(found).__name__} ({kinds})" if kinds else type(found).__name__
    raise TypeError(f"{owner}: {method} must return a tuple ({names}) with a dict of penalties, got {got}")


class Distribution(nn.Module, ABC):
    """Draws S group elements per graph: forward(batch, samples, draws) -> (elements, penalties). Subclasses define `draw`.

    shares_noise: whether samples of one call share noise, so that more of them do not average it; default False. `estimate`
    then averages calls of their own, whose deviation gives the standard error. Else samples, or blocks of `block` of them,
    must be independent of each other.

    Raises TypeError if group is no `Group`.
    """

    shares_noise: bool = False

    def __init__(self, group: Group):
        super().__init__()
        check_type(type(self).__name__, "group", group, Group, "a Group")
        self.group = group

    def forward(self, batch: Batch, samples: int, draws: Draws | None = None, **given: Any) -> tuple[Any, Penalties]:
        """The elements, batched (B, S), and penalties for the loss (scalars). given: further arguments of `draw`.

        Raises TypeError if samples is no int, and unless `draw` returns such a tuple. ValueError if samples is below 1, and
        what the batch's `check` raises.
        """
        samples = check_count(type(self).__name__, "samples", samples)
        check_batch(type(self).__name__, batch)
        batch.check()
        return returned(type(self).__name__, "draw", self.draw(batch, samples, draws, **given))

    @abstractmethod
    def draw(self, batch: Any, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        """`forward` with checked arguments."""

    def block(self, kind: str) -> int:
        """Number of consecutive samples that depend on each other with this kind of draws (`Draws`)."""
        return self.group.block(kind)

    def is_exact(self, samples: int, weighted: bool) -> bool:
        """Whether the mean over this many samples has no noise: every call gives the same. weighted: with their weights."""
        return False

    @property
    def default_samples(self) -> int:
        """Samples of a model's forward pass where none are given."""
        return 1

    def extra_repr(self) -> str:
        return str(self.group)


class Uniform(Distribution):
    """Group averaging (GA): elements from the Haar measure; translation by the centroid."""

    def draw(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        return self.group.uniform(batch, samples, draws), {}


class Identity(Distribution):
    """No symmetrization: the identity element, for the bare backbone."""

    def draw(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        return self.group.identity(batch, samples), {}

    def is_exact(self, samples: int, weighted: bool) -> bool:
        return True


class Orbit(Distribution):
    """All elements of a finite group: samples = `group.order` takes each exactly once, in the order of `group.elements`.

    So does any multiple of it. A model takes `group.order` where no samples are given. Other numbers of samples are drawn
    without replacement: a random element, times these in turn. Raises TypeError if group is no `Group`, ValueError unless it
    is finite.
    """

    def __init__(self, group: Group):
        super().__init__(group)
        if group.order is None:
            raise ValueError(f"Orbit: group must be finite, with an order, got {group}")

    def block(self, kind: str) -> int:
        return cast(int, self.group.order)

    def is_exact(self, samples: int, weighted: bool) -> bool:
        return samples % cast(int, self.group.order) == 0

    @property
    def default_samples(self) -> int:
        return cast(int, self.group.order)

    def draw(self, batch: Batch, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        order = cast(int, self.group.order)
        if samples % order:
            return self.group.in_turn(batch, samples, draws), {}
        number = (draws or Draws(seed=0)).place(samples, order, batch.device)
        return taken(self.group.elements(batch), number.expand(batch.size, samples)), {}


class Noise(ABC):
    """Noise for a distribution's network. With scale 0 it draws nothing.

    fixed: a seed. Every call then gives the same noise, which depends only on the graphs' `key` (default: their position in
    the batch) and the node numbers within each graph.
    Raises TypeError if scale is no number or fixed no int, ValueError unless scale is finite and >= 0.
    """

    def __init__(self, scale: float = 1.0, fixed: int | None = None):
        owner, number = type(self).__name__, as_number(scale)
        if number is None:
            raise TypeError(f"{owner}: scale must be a number, got {type(scale).__name__} {scale!r}")
        if not 0 <= number < math.inf:
            raise ValueError(f"{owner}: scale must be finite and >= 0, got {number}")
        self.scale, self.fixed = (
            number,
            None if fixed is None else check_seed(owner, "fixed", check_int(owner, "fixed", fixed)),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scale})"

    def __call__(self, shape: tuple[int, ...], batch: Batch, draws: Draws | None = None) -> Tensor:
        """(rows, S, ...), one row per graph or node; float32 or better."""
        dtype = batch.dtype if batch.dtype == torch.float64 else torch.float32
        if self.scale == 0:
            return torch.zeros(shape, device=batch.device, dtype=dtype)
        if self.fixed is None:
            draws, rows = draws or Draws(), None
        else:
            draws, rows = (draws or Draws(seed=0)).seeded(self.fixed), batch.names(shape[0])
        return self.scale * self.draw(draws, shape, rows, batch.device).to(dtype)

    @abstractmethod
    def draw(self, draws: Draws, shape: tuple[int, ...], rows: Tensor | None, device: torch.device) -> Tensor:
        """The noise at scale 1."""


class Normal(Noise):
    """N(0, scale^2): invariant under rotations and permutations."""

    def draw(self, draws: Draws, shape: tuple[int, ...], rows: Tensor | None, device: torch.device) -> Tensor:
        return draws.normal(shape, "noise", rows=rows, device=device)


class UniformNoise(Noise):
    """U(0, scale)."""

    def draw(self, draws: Draws, shape: tuple[int, ...], rows: Tensor | None, device: torch.device) -> Tensor:
        return draws.uniform(shape, "noise", rows=rows, device=device)


class Learned(Distribution):
    """Probabilistic symmetrization (PS): g = project(network(x, z)) with invariant noise z, so p(hg|hx) = p(g|x).

    network: an equivariant module with `noise_shape(batch, samples)` and `forward(batch, noise)`, which returns the
    outputs that the group's `project` reads (VectorNeurons for S_n x O(d)), with the samples on axis 1. Where it lists
    their names in an attribute `outputs`, they are compared with `Group.outputs`. noise: Normal(scale); scale 0 with one
    sample is canonicalization. tau, iterations: as in `ops.soft_permutation`.

    In eval mode the samples must not depend on each other in the network. Without gradients samples then run in parts of at
    most AT_ONCE noise values, which bounds the memory. In training and in recorded programs all samples run together.
    Raises TypeError if group is no `Group`, network no module, noise no `Noise`, tau no number or iterations no int;
    ValueError if tau or iterations are out of range, or if the network lacks an output that the group reads.
    Source: Kim et al. 2023 (arXiv 2306.02866).
    """

    network: Any  # an nn.Module with `noise_shape`

    def __init__(
        self,
        group: Group,
        network: nn.Module,
        noise: Noise | None = None,
        tau: float = 0.01,
        iterations: int = 20,
    ):
        super().__init__(group)
        check_type("Learned", "network", network, nn.Module, "an nn.Module")
        check_type("Learned", "noise", noise, Noise | None, "a Noise or None")
        self.network = network
        self.noise = Normal(1.0) if noise is None else noise
        self.tau, self.iterations = check_relaxation("Learned", tau, iterations)
        given, read = getattr(network, "outputs", None), group.outputs
        if given is not None and read is not None and not set(read) <= set(given):
            got = f"{type(network).__name__}, which gives {given}"
            raise ValueError(f"Learned: network must give {read} for {group}, got {got}")

    def extra_repr(self) -> str:
        return f"{self.group}, noise={self.noise}, tau={self.tau}, iterations={self.iterations}"

    def draw(
        self,
        batch: Batch,
        samples: int,
        draws: Draws | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Any, Penalties]:
        """noise: given instead of drawn, of shape `network.noise_shape(batch, samples)`."""
        shape = tuple(self.network.noise_shape(batch, samples))
        draws = draws or Draws()
        if noise is not None and tuple(noise.shape) != shape:
            raise ValueError(f"Learned: noise must be {shape}, got {tuple(noise.shape)}")
        size = samples
        recorded = torch.compiler.is_compiling()  # a number of parts would fix the program's number of nodes
        if not (self.network.training or torch.is_grad_enabled() or recorded):
            size = min(samples, max(1, AT_ONCE * samples // max(1, math.prod(shape))))
        parts = []
        for first in range(0, samples, size):
            count = min(size, samples - first)
            if noise is None:
                some = tuple(self.network.noise_shape(batch, count))
                z = self.noise(some, batch, draws.starting(draws.first + first))
            else:
                z = noise.narrow(1, first, count)
            parts.append(self.network(batch, z))
        outputs = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]} if parts[1:] else parts[0]
        if self.noise.fixed is not None:  # fixes the ties too
            draws = draws.seeded(self.noise.fixed)
        found = self.group.project(outputs, batch, relaxation=Relaxation(self.tau, self.iterations), draws=draws)
        return returned(str(self.group), "project", found)
