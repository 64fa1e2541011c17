"""The symmetric group: permutations of nodes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast._autocast import promoted
from probsym_fast._checks import check_count, check_type
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups.group import Group, check_layout, sample_axis, wanted
from probsym_fast.ops import Permutation, SoftPermutation
from probsym_fast.ops.permutation import Relaxation

TIE_NOISE = 1e-6


class Symmetric(Group):
    """S_n on node axes: `(g . y)[u] = y[rank[u]]`, `(g^-1 . x)[j] = x[order[j]]`. Elements are `ops.Permutation`s.

    axis: letter of the axes that it permutes, "n" nodes, or one of your own such as "m": `Symmetric(5) * Symmetric(7, "m")`
    permutes rows and columns of a tensor "nm". For another letter than "n" all names end in it: `project` reads "scores_m"
    and gives "entropy_m", and a batch with padding along the axis has an attribute `num_m` in place of `num_nodes`.
    Raises TypeError unless n is an int and axis a str. ValueError for n below 1, and unless axis is one letter but "c".
    """

    moves, outputs = "n", ("scores",)

    def __init__(self, n: int, axis: str = "n"):
        self.n = check_count("Symmetric", "n", n)
        check_type("Symmetric", "axis", axis, str, "a str")
        if len(axis) != 1 or axis == "c":
            raise ValueError(f"Symmetric: axis must be one letter but 'c', got {axis!r}")
        self.axis, self._ending = axis, "" if axis == "n" else f"_{axis}"
        if axis != "n":
            self.moves, self.outputs = axis, (f"scores_{axis}",)

    def __repr__(self) -> str:
        return f"Symmetric({self.n})" if self.axis == "n" else f"Symmetric({self.n}, {self.axis!r})"

    def valid(self, batch: Batch) -> Tensor | None:
        """(B,) how many of the n are valid, or None: all."""
        return batch.num_nodes if self.axis == "n" else getattr(batch, f"num_{self.axis}", None)

    def identity(self, batch: Batch, samples: int) -> Permutation:
        slots = torch.arange(self.n, device=batch.device).expand(batch.size, samples, self.n)
        return Permutation(slots, self.valid(batch), slots)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Permutation:
        """Uniform over the permutations of the valid nodes; the other slots stay in place."""
        shape = (batch.size, samples, self.n)
        return self.sorted((draws or Draws()).uniform(shape, "permutation", device=batch.device), batch)

    def sorted(self, key: Tensor, batch: Batch) -> Permutation:
        """Sorts the valid nodes by ascending key (B, S, n); ties by node number."""
        valid = self.valid(batch)
        if valid is not None:
            key = key.masked_fill(torch.arange(self.n, device=key.device) >= valid[:, None, None], torch.inf)
        return Permutation(key.argsort(dim=-1, stable=True), valid)

    def compose(self, g: Permutation, h: Permutation) -> Permutation:
        """A hard permutation. RuntimeError if g or h requires a gradient, ValueError unless they have one shape.

        It has the valid nodes of g, or all n nodes if g or h permutes all n.
        """
        if g.shape != h.shape:
            raise ValueError(f"{self}: h must be (B, S, n) = {tuple(g.shape)} as g is, got {tuple(h.shape)}")
        return g @ h

    def inverse(self, g: Permutation) -> Permutation:
        """A hard permutation. RuntimeError if g requires a gradient."""
        return g.inverse()

    def act(self, g: Permutation, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        check_type(str(self), "g", g, Permutation, "a Permutation")
        has_samples = sample_axis(x, layout, g.shape)
        x = x if has_samples else x[:, None]
        for axis, letter in enumerate(layout, start=2):
            if letter != self.axis:
                continue
            if x.shape[axis] != self.n:
                got = (*g.shape[:2], *x.shape[2:])
                raise ValueError(f"{self}: axis {axis} of x must have size {self.n}, got {got}")
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

        "scores" are (B, S, n), or (nodes, S) for the nodes of a ragged batch. They are sorted in float64, and relaxed in
        their dtype or float32: the permutation's vectors and the entropy have this one.
        """
        scores, valid = wanted(outputs, *self.outputs, repr(self)), self.valid(batch)
        if scores.ndim == 2 and self.axis == "n" and hasattr(batch, "padded"):
            scores = batch.padded(scores, self.n)
        if scores.shape[-1] != self.n:
            raise ValueError(f"{self}: {self.outputs[0]} must be (B, S, {self.n}), got {tuple(scores.shape)}")
        names = getattr(batch, "key", None)  # where noise goes by the graph's key, ties do too
        ties = (draws or Draws()).uniform(tuple(scores.shape), "ties", rows=names, device=scores.device)
        # float32 would round the noise to a few values or to none, and node numbers would break the ties
        keys = [scores.double() + TIE_NOISE * ties]
        del ties  # the tensors of all samples are large: popped, so that the op frees the keys
        p = ops.soft_permutation(keys.pop(), valid, *relaxation, dtype=promoted(scores.dtype, torch.float32))
        return p, {f"entropy{self._ending}": ops.permutation_entropy(p)}
