"""Predefined frames: orders of graphs' nodes, and principal axes of clouds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from probsym_fast._checks import as_number, looks_at_values
from probsym_fast._compilers import is_fake
from probsym_fast.batches import check_batch
from probsym_fast.distributions.distribution import Distribution, Penalties
from probsym_fast.distributions.laplacian import laplacian_keys
from probsym_fast.draws import Draws
from probsym_fast.groups import Euclidean, Graphs, Group, Orthogonal, SpecialEuclidean, Symmetric

SMOOTH = 1e-6  # noise that decides between equal axes, of the size of a cloud


class Frame(Distribution):
    """Frame averaging (FA): a few elements that the input itself gives, one of them at random per sample.

    Symmetric(n), graphs: nodes by ascending class `batch.frame`, ties broken at random. A batch without classes gets those
    of the Laplacian's eigenvectors (`distributions.laplacian_keys`). These depend on values: where programs are
    recorded (torch.compile, torch.export) and for fake tensors it raises RuntimeError.

    Orthogonal, SpecialOrthogonal, Euclidean, SpecialEuclidean, clouds with `positions` (B, n, d), of which `num_nodes` are
    valid: the principal axes around the centroid, by descending variance, with random signs: 2^d frames, in the special
    groups 2^(d - 1). Stratified draws run through all of them in that many samples. smooth: the covariance gets symmetric
    normal noise of this size relative to its trace. So axes of equal variance are uniform in the space that they share, and
    p(hg|hx) = p(g|x) for every cloud. A larger value, such as 0.1, makes p(g|x) vary smoothly where variances cross; 0 leaves
    equal ones to rounding. Frames are computed in float64. Gradients: to the positions, through eigenvectors (large where
    variances are close). A GPU waits for the eigenvectors.

    Raises TypeError for other groups, also products, and unless smooth is a number; ValueError unless it is finite and >= 0.
    A call raises ValueError for valid positions that are not finite (on a GPU only in debug mode).
    Source: Puny et al. 2022 (arXiv 2110.03336).
    """

    def __init__(self, group: Group, smooth: float = SMOOTH):
        self.linear = None if isinstance(group, Symmetric) and group.axis == "n" else _linear("Frame", group, True)
        super().__init__(group)
        self.smooth = _checked_smooth("Frame", smooth)

    def draw(self, batch: Any, samples: int, draws: Draws | None = None) -> tuple[Any, Penalties]:
        draws = draws or Draws()
        return (self._ordered if self.linear is None else self._turned)(batch, samples, draws), {}

    def _ordered(self, batch: Graphs, samples: int, draws: Draws) -> Any:
        group = self.group
        assert isinstance(group, Symmetric)
        check_batch("Frame", batch, "frame")
        classes = self._computed(batch) if batch.frame is None else batch.frame
        ties = draws.uniform((batch.size, samples, group.n), "frame", device=batch.device)
        classes = batch.padded(classes[:, None].double(), group.n)  # (B, 1, n)
        return group.sorted(classes + ties, batch)

    @staticmethod
    def _computed(batch: Graphs) -> Tensor:
        if torch.compiler.is_compiling() or is_fake(batch.ptr):
            raise RuntimeError(
                "Frame: batch.frame must hold classes where a program is recorded, got None; compute them before with"
                " distributions.laplacian_keys(edge_index, ptr)"
            )
        return laplacian_keys(batch.edge_index, batch.ptr)

    def _turned(self, batch: Any, samples: int, draws: Draws) -> Any:
        linear = self.linear
        assert linear is not None
        signs = linear.signs(draws.kind)
        y, valid = _centered("Frame", batch, linear.d)
        covariance = y.mT @ y / _counts(valid)
        covariance = covariance[:, None].expand(-1, samples, -1, -1)
        shape, block = tuple(covariance.shape), len(signs)
        if self.smooth:
            noise = draws.fork(0).normal(shape, "frame", device=y.device, block=block)
            size = covariance.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            covariance = covariance + self.smooth * torch.where(size > 0, size, 1) * (noise + noise.mT) / 2
        axes = torch.linalg.eigh(covariance).eigenvectors.flip(-1)  # (B, S, d, d), their signs arbitrary
        if linear.special:
            axes = torch.cat(
                [axes[..., :1] * torch.linalg.det(axes.detach()).sign()[..., None, None], axes[..., 1:]], -1
            )
        every = linear.signs("stratified").to(y)
        u = draws.fork(1).uniform(shape[:2], "signs", device=y.device, block=block)
        place = draws.place(samples, block, y.device)
        axes = axes * (every[(len(every) * u).long()] * signs.to(y)[place])[:, :, None]
        return _element(self.group, axes.to(linear.dtype(batch)), batch)


def _linear(owner: str, group: Any, symmetric: bool) -> Orthogonal:
    """The group's rotations. TypeError unless it is one of clouds."""
    linear = group if isinstance(group, Orthogonal) else getattr(group, "linear", None)
    if not isinstance(group, Orthogonal | Euclidean | SpecialEuclidean) or linear is None:
        some = "Symmetric(n), " if symmetric else ""
        wanted = f"{some}Orthogonal, SpecialOrthogonal, Euclidean or SpecialEuclidean"
        raise TypeError(f"{owner}: group must be {wanted}, got {group!r}")
    return linear


def _checked_smooth(owner: str, smooth: Any) -> float:
    if (number := as_number(smooth)) is None:
        raise TypeError(f"{owner}: smooth must be a number, got {type(smooth).__name__} {smooth!r}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{owner}: smooth must be finite and >= 0, got {number}")
    return number


def _centered(owner: str, batch: Any, d: int) -> tuple[Tensor, Tensor]:
    """Positions relative to the centroid of the valid ones, float64 (B, n, d), 0 where not valid; and which are (B, n).

    ValueError unless the valid ones and their squares are finite, where values are read.
    """
    check_batch(owner, batch, "positions")
    x = batch.positions.double()
    if x.shape[-1] != d:
        raise ValueError(f"{owner}: positions must be (B, n, {d}), got {tuple(x.shape)}")
    nodes = torch.arange(x.shape[1], device=x.device)
    if batch.num_nodes is None:
        valid = (nodes >= 0).expand(x.shape[:2])
    else:
        valid = nodes < batch.num_nodes[:, None]
    x = torch.where(valid[..., None], x, 0)
    if looks_at_values(x):
        if not x.isfinite().all():
            raise ValueError(f"{owner}: positions must be finite, got NaN or infinity")
        if not x.square().sum().isfinite():
            raise ValueError(f"{owner}: positions must have finite squares, got {float(x.abs().max()):.1e}")
    center = x.sum(1, keepdim=True) / _counts(valid)
    return torch.where(valid[..., None], x - center, 0), valid


def _orientation(frames: Tensor) -> Tensor:
    """The determinant's sign, (..., 1, 1), of orthogonal matrices (..., d, d). A constant."""
    x = frames.detach()
    if x.shape[-1] == 2:
        found = x[..., 0, 0] * x[..., 1, 1] - x[..., 0, 1] * x[..., 1, 0]
    elif x.shape[-1] == 3:  # many small decompositions are slow
        found = (torch.linalg.cross(x[..., 0], x[..., 1]) * x[..., 2]).sum(-1)
    else:
        found = torch.linalg.det(x)
    return found.sign()[..., None, None]


def _counts(valid: Tensor) -> Tensor:
    """(B, 1, 1) how many points are valid, at least 1."""
    return valid.sum(1).clamp(min=1)[:, None, None]


def _element(group: Any, frames: Tensor, batch: Any) -> Any:
    """The group's element with these frames."""
    return frames if isinstance(group, Orthogonal) else group.centered(frames, batch, frames.shape[1])
