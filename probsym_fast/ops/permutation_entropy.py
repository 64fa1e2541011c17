"""The entropy penalty of the soft permutation in linear time."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import check_devices
from probsym_fast.ops.permutation import SoftPermutation
from probsym_fast.ops.reference.permutation_entropy import permutation_entropy as reference

OP = Op(
    "permutation_entropy",
    "(Tensor t, Tensor log_r, Tensor log_c, Tensor? num_nodes, float tau) -> Tensor entropy",
    reference=reference,
    shapes=lambda t, *_: t.new_empty(()),
)
OP.gradient(
    "(Tensor d_entropy, Tensor t, Tensor log_r, Tensor log_c, Tensor? num_nodes, float tau)"
    " -> (Tensor d_t, Tensor d_log_r, Tensor d_log_c)",
    shapes=lambda d_entropy, t, *_: (t.new_empty(t.shape), t.new_empty(t.shape), t.new_empty(t.shape)),
)


def permutation_entropy(permutation: SoftPermutation, backend: str = "auto") -> Tensor:
    """How far the soft permutation is from a hard one: 0 if every row and column is one-hot.

    With `p_ij = P_ij / sum_j P_ij` and `q_ij = P_ij / sum_i P_ij` over the valid nodes,

        mean over graphs of (1 / num_nodes) mean over samples of
            - sum_ij (p_ij log p_ij + q_ij log q_ij).

    Args:
        permutation: from `soft_permutation` (float32 or float64): one graph per entry of the first leading axis.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns: a scalar of the permutation's dtype, in nats per node.

    Gradients: to scores, log_r, log_c. Cost, kernels: O(N) per sample. Raises TypeError for a permutation without scores,
    ValueError for shapes that differ, RuntimeError (devices, missing backend).
    Source: Kim et al. 2023 (arXiv 2306.02866), there with p clamped at 1e-12.
    """
    if not isinstance(permutation, SoftPermutation):
        raise TypeError(f"permutation_entropy: permutation must be a SoftPermutation, got {type(permutation).__name__}")
    if permutation.scores.ndim != 3:
        permutation = cast(SoftPermutation, permutation.of_samples())
    t = permutation.scores
    for name in ("log_r", "log_c"):
        shape = tuple(getattr(permutation, name).shape)
        if shape != tuple(t.shape):
            raise ValueError(f"permutation_entropy: {name} must be {tuple(t.shape)} as scores is, got {shape}")
    others = {"log_r": permutation.log_r, "log_c": permutation.log_c, "num_nodes": permutation.num_nodes}
    check_devices("permutation_entropy", t.device, **{name: x for name, x in others.items() if x is not None})
    run = OP.select(backend, t.device, t.dtype)
    return run(t, permutation.log_r, permutation.log_c, permutation.num_nodes, permutation.tau)
