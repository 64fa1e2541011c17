"""The soft permutation in linear time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probsym_fast._checks import check_bool, check_float, check_num_nodes
from probsym_fast.ops._op import Op
from probsym_fast.ops.permutation import SoftPermutation, check_relaxation
from probsym_fast.ops.reference.soft_permutation import check_values
from probsym_fast.ops.reference.soft_permutation import soft_permutation as reference


def _shapes(scores, *_):
    index = scores.new_empty(scores.shape, dtype=torch.int64)
    value = scores.new_empty(scores.shape)
    return value, torch.empty_like(value), torch.empty_like(value), index, torch.empty_like(index)


OP = Op(
    "soft_permutation",
    "(Tensor scores, Tensor? num_nodes, float tau, int iterations, bool normalize, bool presorted)"
    " -> (Tensor t, Tensor log_r, Tensor log_c, Tensor order, Tensor rank)",
    reference=reference,
    values=check_values,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor? d_t, Tensor? d_log_r, Tensor? d_log_c, Tensor scores, Tensor order, Tensor t, Tensor? num_nodes,"
    " float tau, int iterations, bool normalize) -> Tensor d_scores",
    shapes=lambda d_t, d_log_r, d_log_c, scores, *_: scores.new_empty(scores.shape),
    others={"presorted": lambda known: False},  # scores that are sorted already keep their order
)


def soft_permutation(
    scores: Tensor,
    num_nodes: Tensor | None = None,
    tau: float = 0.01,
    iterations: int = 20,
    normalize: bool = True,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> SoftPermutation:
    """Sorts nodes by score, and relaxes the permutation to give it a gradient.

    `s = scores / max(||scores||, 1e-6)` over the valid nodes (if `normalize`), `order` sorts s in descending order
    (ties: the lower index first; to break them at random add noise to the scores), `K[i, j] = exp(-|t_i - t_j| / tau)`
    with `t = s[order]`. Each of `iterations` steps divides every row, then every column of K by its sum. The result `P
    = diag(r) K diag(c)` is stored as three vectors (rows in sorted order).

    Args:
        scores: (..., N), one score per node; for models (B, S, N), S samples per graph. float16 and bfloat16 compute in
            float32.
        num_nodes: (B,) int, valid nodes along the first leading axis, 1..N; None: all N. Entries beyond are ignored.
        tau: temperature > 0, in units of the (normalised) scores.
        iterations: Sinkhorn iterations, 0..10,000.
        normalize: divide by the Euclidean norm, so that tau means the same for every graph.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        dtype: float32 or float64, of t, log_r, log_c and the iterations; None: that of the scores. Scores are normalised
            and sorted in their own dtype: float64 scores with dtype float32 are sorted exactly and relaxed fast.

    Returns:
        SoftPermutation: order, rank (..., N) int64, identity beyond num_nodes; scores t, log_r, log_c (..., N), 0 beyond
        num_nodes.

    Gradients: from t, log_r, log_c to scores, exact through all iterations. At tied scores |t_i - t_j| is
    differentiated with the sign of the slots' order. Cost, kernels: O(iterations N) operations, and only t and order
    are saved; reference: O(iterations N^2) operations and memory.

    Raises: TypeError (scores or num_nodes of the wrong dtype, tau or iterations no number, another dtype), ValueError
    (shapes, tau, iterations, num_nodes beyond 1..N, scores that are not finite), RuntimeError (devices, missing backend). On
    a GPU values are checked only in debug mode (`probsym_fast.debug`).

    Source: SoftSort (Prillo and Eisenschlos 2020, arXiv 2006.16038) with the Sinkhorn scaling of Kim et al. 2023
    (arXiv 2306.02866); linear time as in Liao et al. 2022 (arXiv 2202.10042).
    """
    check_float("soft_permutation", scores=scores)
    if scores.ndim < 1 or scores.shape[-1] < 1:
        raise ValueError(f"soft_permutation: scores must be (..., N) with N >= 1, got {tuple(scores.shape)}")
    tau, iterations = check_relaxation("soft_permutation", tau, iterations)
    shape = scores.shape
    if scores.ndim != 3:
        B = shape[0] if len(shape) > 1 else 1
        scores = scores.reshape(B, math.prod(shape[1:-1]), shape[-1])
    B, _, N = scores.shape
    num_nodes = check_num_nodes("soft_permutation", num_nodes, B, N, scores.device)
    if scores.dtype not in OP.dtypes:
        scores = scores.float()
    if dtype not in (None, *OP.dtypes):
        raise TypeError(f"soft_permutation: dtype must be float32, float64 or None, got {dtype!r}")
    run = OP.select(backend, scores.device, scores.dtype)
    normalize, tau = check_bool("soft_permutation", "normalize", normalize), float(tau)
    if dtype in (None, scores.dtype):
        t, log_r, log_c, order, rank = run(scores, num_nodes, tau, iterations, normalize, False)
    else:
        relax = OP.select(backend, scores.device, dtype)
        hard = run(scores, num_nodes, tau, 0, normalize, False)
        t, order, rank = hard[0].to(dtype), hard[3], hard[4]  # rounding keeps the order
        del scores, hard  # of all samples: large
        t, log_r, log_c, _, _ = relax(t, num_nodes, tau, iterations, False, True)
    p = SoftPermutation(order, num_nodes, rank, t, log_r, log_c, tau, checked=True)
    return p if len(shape) == 3 else p.with_lead(shape[:-1])
