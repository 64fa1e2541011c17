"""p(g|x) of the rotations of the plane, with reflections or without, by the scores of any network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checks import as_number, check_bool, check_count, check_share
from probsym_fast.batches import Batch
from probsym_fast.distributions._scored import Scored, penalties
from probsym_fast.distributions.distribution import Penalties
from probsym_fast.draws import Draws
from probsym_fast.groups import Group, Orthogonal

FLAT = 0.5  # smallest curvature of log p, per squared radian, that a slope is divided by


class RotationEnergy(Scored):
    """p(g|x) of SO(2) or O(2) by the scores s(g^-1 x) of any network s, at n angles; then the offset of the nearest peak.

    Candidates: the rotations R(t_k) by t_k = u + 2 pi k / n, k = 0..n-1, with one offset u per input, uniform and shared by
    its samples. In O(2) also R(t_k) M, M the reflection that negates the second coordinate: 2 n candidates. log p is the
    log-softmax of their scores. R(a) only adds a to u, and M turns u into -u. So p(hg|hx) = p(g|x) holds for all rotations
    and reflections h, not for n of them, as far as moving x by h and then by g^-1 is moving it by (h^-1 g)^-1. Without
    `refine` the density of the angle is, in SO(2),

        p(t|x) = n / (2 pi) exp s(R(t)^-1 x) / sum_j exp s(R(t + 2 pi j / n)^-1 x),

    which is exp(s) normalised by the trapezoidal rule: for smooth scores n = 16 is close to the limit.

    refine: each candidate's angle moves to the peak, within half a step h = 2 pi / n, of the parabola through its own log p
    and its two neighbours': by d steps, where

        d = clamp((log p_{k+1} - log p_{k-1}) / 2 / max(c, h^2 / 2), -1/2, 1/2),  c = 2 log p_k - log p_{k-1} - log p_{k+1}.

    So peaks are found far finer than a step, nothing moves where p is flat, and between peaks it is half a step uphill. d is
    continuous in the scores, bounded in its gradient by h^2 / 2 (a concentration of 1/2), and equivariant as they are. So the
    elements have a gradient to the network, 0 where d is clamped, which a plain mean over the samples of `forward` has too.
    The probabilities themselves are trained by the penalties and by `elements_and_weights` (`Discrete`, also for
    `replacement`), whose gradients have both parts. `best`: canonicalization by the candidate of the largest p; it depends
    on u by what the parabola leaves.

    Given the seed, results are reproducible: u too comes from `Draws`. Many samples of an input are a mean over the
    candidates of its one u, so they converge to a value that depends on u by the error of the trapezoidal rule.

    network, embed: as in `Energy`; with `embed` scores are (B, n) or (B, n, 1), in O(2) 2 n. Elements are frames (B, S, 2, 2)
    in float32, or float64 as the batch. Works for whatever these groups act on: images, points in the plane.
    prior: the concentration kappa of a von Mises law about the identity, prior(t) proportional to exp(kappa cos t): the
    poses of upright data, and kappa^-1/2 its standard deviation where that is small. It adds the penalty "prior",
    KL(prior | p) over the candidates, beside the "entropy" of p; means over the batch. reflected: the share of the prior on
    reflections, in O(2), where they have the law of the angle t of R(t) M.

    Raises TypeError for a group other than `SpecialOrthogonal` and `Orthogonal` and for parts of another type. ValueError
    unless the group acts on the plane, for n below 3, for a prior that is not finite and >= 0, for reflected without a prior
    or reflections, and for scores of another shape.
    """

    group: Orthogonal
    shares_noise = True  # u: samples of a call are no independent ones, for `estimate`

    def __init__(
        self,
        group: Group,
        network: nn.Module,
        embed: nn.Module | None = None,
        *,
        n: int = 16,
        refine: bool = True,
        prior: float | None = None,
        reflected: float = 0.0,
        replacement: bool = False,
        best: bool = False,
    ):
        owner = "RotationEnergy"
        if not isinstance(group, Orthogonal):
            raise TypeError(f"{owner}: group must be SpecialOrthogonal(2) or Orthogonal(2), got {group!r}")
        if group.d != 2:
            raise ValueError(f"{owner}: group must be SpecialOrthogonal(2) or Orthogonal(2), got {group}")
        super().__init__(group, network, embed, replacement=replacement, best=best)
        self.n, self.refine = check_count(owner, "n", n, least=3), check_bool(owner, "refine", refine)
        self.prior, self.reflected = _concentration(prior), check_share(owner, "reflected", reflected)
        if self.reflected and (group.special or prior is None):
            wanted = "0 without a prior" if prior is None else f"0 for {group}"
            raise ValueError(f"{owner}: reflected must be {wanted}, got {reflected}")

    def extra_repr(self) -> str:
        prior = "" if self.prior is None else f", prior={self.prior}, reflected={self.reflected}"
        return f"{self.group}, n={self.n}, refine={self.refine}{prior}"

    @property
    def number(self) -> int | None:
        return self.n if self.group.special else 2 * self.n

    def candidates(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Penalties]:
        halves, step = 1 if self.group.special else 2, 2 * math.pi / self.n
        u = draws.uniform((batch.size, 1), "offset", device=batch.device)
        angle = step * (u + torch.arange(self.n, device=batch.device)).repeat(1, halves)  # (B, M), float64
        dtype = self.group.dtype(batch)
        axes = "(B, n)" if halves == 1 else "(B, 2 n)"
        log_p = self.scored(batch, self._frames(angle).to(dtype), halves * self.n, axes)
        found = penalties(log_p, None if self.prior is None else self._prior(angle, self.prior))
        if self.refine:
            angle = angle + step * _peak(log_p.unflatten(1, (halves, self.n)), FLAT * step**2).flatten(1)
        return self._frames(angle).to(dtype), log_p, found

    def _frames(self, angle: Tensor) -> Tensor:
        """(B, M, 2, 2): R(t), and in the second half of O(2)'s candidates R(t) M."""
        cos, sin = angle.cos(), angle.sin()
        sign = angle.new_ones(angle.shape[1])
        sign[self.n :] = -1
        return torch.stack([torch.stack([cos, -sin * sign], -1), torch.stack([sin, cos * sign], -1)], -2)

    def _prior(self, angle: Tensor, kappa: float) -> Tensor:
        """(B, M) probabilities of the candidates, sum 1."""
        one = (kappa * angle[:, : self.n].cos()).softmax(1)
        return one if self.group.special else torch.cat([(1 - self.reflected) * one, self.reflected * one], 1)


def _peak(log_p: Tensor, flat: float) -> Tensor:
    """(..., n) the place of the parabola's peak relative to each place of a circle of n, in -1/2..1/2."""
    before, after = log_p.roll(1, -1), log_p.roll(-1, -1)
    curvature = (2 * log_p - before - after).clamp(min=flat)
    return ((after - before) / 2 / curvature).clamp(-0.5, 0.5)


def _concentration(prior: Any) -> float | None:
    if prior is None:
        return None
    if (kappa := as_number(prior)) is None:
        raise TypeError(f"RotationEnergy: prior must be a number or None, got {type(prior).__name__} {prior!r}")
    if not 0 <= kappa < math.inf:
        raise ValueError(f"RotationEnergy: prior must be finite and >= 0, got {kappa}")
    return kappa
