"""The symmetric group: permutations of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast._checks import check_count
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.group import Group, check_layout, sample_axis, wanted
from probsym_fast.ops import Permutation, SoftPermutation
from probsym_fast.ops.permutation import Relaxation

TIE_NOISE = 1e-6


class Symmetric(Group):
    """S_n on node axes: `(g . y)[u] = y[rank[u]]`, `(g^-1 . x)[j] = x[order[j]]`. Elements are `ops.Permutation`s."""

    moves, outputs = "n", ("scores",)

    def __init__(self, n: int):
        self.n = check_count("Symmetric", "n", n)

    def __repr__(self) -> str:
        return f"Symmetric({self.n})"

    def identity(self, batch: Batch, samples: int) -> Permutation:
        slots = torch.arange(self.n, device=batch.device).expand(batch.size, samples, self.n)
        return Permutation(slots, batch.num_nodes, slots)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Permutation:
        """Uniform over the permutations of the valid nodes; the other slots stay in place."""
        shape = (batch.size, samples, self.n)
        return self.sorted((draws or Draws()).uniform(shape, "permutation", device=batch.device), batch)

    def sorted(self, key: Tensor, batch: Batch) -> Permutation:
        """Sorts the valid nodes by ascending key (B, S, n); ties by node number."""
        if batch.num_nodes is not None:
            key = key.masked_fill(torch.arange(self.n, device=key.device) >= batch.num_nodes[:, None, None], torch.inf)
        return Permutation(key.argsort(dim=-1, stable=True), batch.num_nodes)

    def compose(self, g: Permutation, h: Permutation) -> Permutation:
        """A hard permutation. RuntimeError if g or h requires a gradient, ValueError unless they have one shape.

        It has the valid nodes of g, or all n nodes if g or h permutes all n.
        """
        if g.shape != h.shape:
            raise ValueError(f"{self}: h must be (B, S, n) = {tuple(g.shape)} as g is, got {tuple(h.shape)}")
        g.check_detached("compose")
        h.check_detached("compose")
        num_nodes = None if h.num_nodes is None else g.num_nodes
        return Permutation(g.order.gather(-1, h.order), num_nodes, h.rank.gather(-1, g.rank))

    def inverse(self, g: Permutation) -> Permutation:
        """A hard permutation. RuntimeError if g requires a gradient."""
        return g.inverse()

    def act(self, g: Permutation, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        has_samples = sample_axis(x, layout, g.shape)
        x = x if has_samples else x[:, None]
        for axis, letter in enumerate(layout, start=2):
            if letter != "n":
                continue
            if x.shape[axis] != self.n:
                got = (*g.shape[:2], *x.shape[2:])
                raise ValueError(f"Symmetric({self.n}): axis {axis} of x must have size {self.n}, got {got}")
            x = ops.permute(g, x.movedim(axis, 2), inverse=inverse).movedim(2, axis)
        x = x.expand(g.shape[0], g.shape[1], *x.shape[2:])
        return x.mean(1) if mean else x

    def project(
        self,
        outputs: Mapping[str, Tensor],
        batch: Batch,
        *,
        relaxation: Relaxation = Relaxation(),
        draws: Draws | None = None,
    ) -> tuple[SoftPermutation, dict[str, Tensor]]:
        """Scores with ties broken by noise U(0, 1e-6) -> soft permutation and its "entropy".

        "scores" are (B, S, n), or (nodes, S) for a ragged batch. They are sorted in float64, and relaxed in their dtype or
        float32: the permutation's vectors and the entropy have this one.
        """
        scores = wanted(outputs, "scores", repr(self))
        if scores.ndim == 2 and hasattr(batch, "padded"):
            scores = batch.padded(scores, self.n)
        if scores.shape[-1] != self.n:
            raise ValueError(f"{self}: scores must be (B, S, {self.n}), got {tuple(scores.shape)}")
        names = getattr(batch, "key", None)  # where noise goes by the graph's key, ties do too
        ties = (draws or Draws()).uniform(tuple(scores.shape), "ties", rows=names, device=scores.device)
        # float32 would round the noise to a few values or to none, and node numbers would break the ties
        key = scores.double() + TIE_NOISE * ties
        del ties  # the tensors of all samples are large
        hard = ops.soft_permutation(key, batch.num_nodes, iterations=0)
        t = hard.scores.to(torch.promote_types(scores.dtype, torch.float32))  # sorted in any dtype: it keeps its order
        order, rank = hard.order, hard.rank
        del key, hard
        soft = ops.soft_permutation(t, batch.num_nodes, *relaxation, normalize=False)
        p = replace(soft, order=order, rank=rank, checked=True)
        return p, {"entropy": ops.permutation_entropy(p)}
