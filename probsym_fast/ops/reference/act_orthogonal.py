"""act_orthogonal: the definition."""

from __future__ import annotations

from torch import Tensor


def act_orthogonal(vectors: Tensor, frames: Tensor, inverse: bool, mean: bool) -> Tensor:
    """vectors (B, [S,] n, d, C), frames (B, S, d, d) -> (B, S, n, d, C), or its mean over S."""
    g = (frames.mT if inverse else frames)[:, :, None]  # (B, S, 1, d, d)
    out = g @ (vectors if vectors.ndim == 5 else vectors[:, None])
    return out.mean(1) if mean else out
