"""The unitary groups."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups._gram_schmidt import pseudo_orthonormal
from probsym_fast.groups.linear import Linear


class Unitary(Linear):
    """U(d) on the vector ("v") and point ("p") axes of complex tensors. Elements are complex matrices (B, S, d, d).

    Uniform elements come from Gram-Schmidt of complex normal matrices, which follows the Haar measure; antithetic and
    stratified ones come in pairs g and -g. `project` reads complex "matrices" (B, S, d, d), takes complex128 steps and
    returns their dtype; a column that depends on those before it is replaced, as in `ops.orthogonal_frame`.
    `act` raises TypeError for real vectors, `project` for real matrices.
    """

    def dtype(self, batch: Batch) -> torch.dtype:
        """complex64, or complex128 for a batch in double precision."""
        return torch.complex128 if batch.dtype in (torch.float64, torch.complex128) else torch.complex64

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Tensor:
        draws = draws or Draws()
        block = self.block(draws.kind)
        shape = (batch.size, samples, self.d, self.d, 2)
        normal = torch.view_as_complex(draws.normal(shape, "unitary", device=batch.device, block=block))
        sign = 1 - 2 * (draws.place(samples, block, batch.device)[:, None, None])
        return self.frames(normal).to(self.dtype(batch)) * sign

    def frames(self, matrices: Tensor) -> Tensor:
        if not matrices.is_complex():
            raise TypeError(f"{self}: matrices must be complex, got {matrices.dtype}")
        metric = torch.ones(self.d, dtype=torch.float64, device=matrices.device)
        return pseudo_orthonormal(matrices.to(torch.complex128), metric)[0].to(matrices.dtype)

    def inverse(self, g: Tensor) -> Tensor:
        return g.mH
