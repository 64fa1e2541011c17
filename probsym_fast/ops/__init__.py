"""Fused operations: functions on tensors, differentiable, traceable, one implementation a backend."""

from probsym_fast.ops._op import OPS, fill_table
from probsym_fast.ops.act_orthogonal import act_orthogonal
from probsym_fast.ops.orthogonal_frame import orthogonal_frame
from probsym_fast.ops.permutation import Permutation, SoftPermutation
from probsym_fast.ops.permutation_entropy import permutation_entropy
from probsym_fast.ops.soft_permutation import soft_permutation

fill_table()

__all__ = [
    "OPS",
    "Permutation",
    "SoftPermutation",
    "act_orthogonal",
    "orthogonal_frame",
    "permutation_entropy",
    "soft_permutation",
]
