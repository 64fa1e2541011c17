"""Slots as node features."""

from __future__ import annotations

from torch import Tensor

from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import check_devices, check_ptr, common_dtype, count_nodes, soft_parts
from probsym_fast.ops.permutation import Permutation
from probsym_fast.ops.reference.node_identifiers import node_identifiers as reference


def _gradient_shapes(d_features, ptr, rank, order, t, log_r, log_c, tau, weight, needs_t, needs_weight):
    soft = [t.new_empty(t.shape) if needs_t else None for _ in range(3)]
    return *soft, weight.new_empty(weight.shape) if needs_weight else None


OP = Op(
    "node_identifiers",
    "(Tensor ptr, Tensor rank, Tensor order, Tensor? t, Tensor? log_r, Tensor? log_c, float tau, Tensor weight, SymInt nodes)"
    " -> Tensor features",
    reference=reference,
    shapes=lambda ptr, rank, order, t, log_r, log_c, tau, weight, nodes: weight.new_empty(
        nodes, rank.shape[1], weight.shape[1]
    ),
)
OP.gradient(
    "(Tensor d_features, Tensor ptr, Tensor rank, Tensor order, Tensor? t, Tensor? log_r, Tensor? log_c, float tau,"
    " Tensor weight, bool needs_t, bool needs_weight) -> (Tensor d_t, Tensor d_log_r, Tensor d_log_c, Tensor d_weight)",
    shapes=_gradient_shapes,
    others={"nodes": lambda known: known["d_features"].shape[0]},
)


def node_identifiers(
    ptr: Tensor, p: Permutation, weight: Tensor, *, nodes: int | None = None, backend: str = "auto"
) -> Tensor:
    """A row of P times a weight: `features[u, s] = weight[rank_s[u]]`, the identifier of node u's slot.

    Args:
        ptr: (B + 1,) int64. p: permutations (B, S, N). weight: (N, D). nodes: ptr's last entry, for torch.compile, and to
            avoid waiting for a GPU. backend: "auto", "cpu", "triton" or "reference".

    Returns: (nodes, S, D), dtype of the weight.

    Gradients: weight and p. Cost, kernel: one write; gradient to p: n^2 D multiplications per sample.
    Raises: TypeError, ValueError, RuntimeError as `embed_edges`.
    """
    op = "node_identifiers"
    check_ptr(op, ptr, p)
    dtype = common_dtype(op, OP, backend, weight=weight)
    if weight.ndim != 2 or weight.shape[0] != p.shape[-1]:
        raise ValueError(f"{op}: weight must be (N, D) = ({p.shape[-1]}, *), got {tuple(weight.shape)}")
    check_devices(op, weight.device, ptr=ptr)
    nodes = count_nodes(op, ptr, nodes)
    run = OP.select(backend, weight.device, dtype)
    return run(ptr, *soft_parts(p, dtype), weight.to(dtype), nodes).to(weight.dtype)
