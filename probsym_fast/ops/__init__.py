"""Fused operations: differentiable, traceable functions on tensors, with one implementation per backend.

Under torch.func transforms (grad, vjp, jvp, vmap) and in forward mode backend="auto" is the reference. It is plain torch,
so all of them work, at its cost. A named kernel, or a direct call of one, raises RuntimeError there.
"""

from probsym_fast._checks import debug
from probsym_fast.ops._op import OPS, fill_table, using_backend
from probsym_fast.ops.act_orthogonal import act_orthogonal
from probsym_fast.ops.aggregate import aggregate
from probsym_fast.ops.embed import embed_edges, embed_nodes
from probsym_fast.ops.embed_image import embed_image
from probsym_fast.ops.embed_matrix import embed_matrix
from probsym_fast.ops.gin import gin
from probsym_fast.ops.linear_batch_norm_relu import linear_batch_norm_relu
from probsym_fast.ops.message_passing import message_passing
from probsym_fast.ops.mlp import mlp
from probsym_fast.ops.node_identifiers import node_identifiers
from probsym_fast.ops.noise import noise
from probsym_fast.ops.orthogonal_frame import orthogonal_frame
from probsym_fast.ops.permutation import Permutation, Relaxation, SoftPermutation
from probsym_fast.ops.permutation_entropy import permutation_entropy
from probsym_fast.ops.permute import permute
from probsym_fast.ops.readout import readout
from probsym_fast.ops.soft_permutation import soft_permutation
from probsym_fast.ops.transformer import transformer
from probsym_fast.ops.vector_edge_convolution import vector_edge_convolution

fill_table()

__all__ = [
    "OPS",
    "Permutation",
    "Relaxation",
    "SoftPermutation",
    "act_orthogonal",
    "aggregate",
    "debug",
    "embed_edges",
    "embed_image",
    "embed_matrix",
    "embed_nodes",
    "gin",
    "linear_batch_norm_relu",
    "message_passing",
    "mlp",
    "node_identifiers",
    "noise",
    "orthogonal_frame",
    "permutation_entropy",
    "permute",
    "readout",
    "soft_permutation",
    "transformer",
    "using_backend",
    "vector_edge_convolution",
]
