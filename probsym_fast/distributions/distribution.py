"""p(g|x): which group elements a batch is averaged over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.groups import Batch, Group

Penalties = dict[str, Tensor]


class Distribution(nn.Module, ABC):
    """Draws S group elements a graph: forward(batch, samples, generator) -> (elements, penalties)."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group

    @abstractmethod
    def forward(self, batch: Batch, samples: int, generator: torch.Generator | None = None) -> tuple[Any, Penalties]:
        """The elements, batched (B, S), and penalties for the loss (scalars)."""


class Uniform(Distribution):
    """Group averaging (GA): elements from the Haar measure; translation by the centroid."""

    def forward(self, batch: Batch, samples: int, generator: torch.Generator | None = None) -> tuple[Any, Penalties]:
        return self.group.uniform(batch, samples, generator), {}


class Identity(Distribution):
    """No symmetrization: the neutral element, for the bare backbone."""

    def forward(self, batch: Batch, samples: int, generator: torch.Generator | None = None) -> tuple[Any, Penalties]:
        return self.group.identity(batch, samples), {}


class Normal:
    """Noise N(0, scale^2), the same under rotations and permutations; scale 0 draws nothing."""

    def __init__(self, scale: float = 1.0):
        if not scale >= 0:
            raise ValueError(f"Normal: scale must be >= 0, got {scale}")
        self.scale = scale

    def __repr__(self) -> str:
        return f"Normal({self.scale})"

    def __call__(self, shape: tuple[int, ...], like: Batch, generator: torch.Generator | None = None) -> Tensor:
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        if self.scale == 0:
            return torch.zeros(shape, device=like.device, dtype=dtype)
        return self.scale * torch.randn(shape, generator=generator, device=like.device, dtype=dtype)


class Learned(Distribution):
    """Probabilistic symmetrization (PS): g = project(network(x, z)) with invariant noise z, so p(hg|hx) = p(g|x).

    network: an equivariant module with `noise_shape(batch, samples)` and `forward(batch, noise)`, which returns the
    outputs that the group's `project` wants (VectorNeurons for S_n x O(d)). noise: Normal(scale); with scale 0 and one
    sample this is canonicalization. tau, iterations: as in `ops.soft_permutation`.
    Source: Kim et al. 2023 (arXiv 2306.02866).
    """

    def __init__(
        self,
        group: Group,
        network: nn.Module,
        noise: Normal | None = None,
        tau: float = 0.01,
        iterations: int = 20,
    ):
        super().__init__(group)
        if not tau > 0:
            raise ValueError(f"Learned: tau must be > 0, got {tau}")
        self.network = network
        self.noise = Normal(1.0) if noise is None else noise
        self.tau, self.iterations = tau, iterations

    def forward(
        self,
        batch: Batch,
        samples: int,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Any, Penalties]:
        """noise: given by hand instead of drawn, of shape `network.noise_shape(batch, samples)`."""
        shape = tuple(self.network.noise_shape(batch, samples))
        if noise is None:
            noise = self.noise(shape, batch, generator)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"Learned: noise must be {shape}, got {tuple(noise.shape)}")
        outputs = self.network(batch, noise)
        return self.group.project(outputs, batch, tau=self.tau, iterations=self.iterations, generator=generator)
