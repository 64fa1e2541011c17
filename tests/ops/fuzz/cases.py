"""Every op and the generator of its cases."""

from __future__ import annotations

from collections.abc import Callable

from tests.ops.fuzz import graphs, networks, orthogonal, permutations
from tests.ops.fuzz.draws import Case, Draw

CASES: dict[str, tuple[str | None, Callable[[Draw], Case]]] = {  # public name: the op, its generator
    "Permutation": (None, permutations.permutation_case),
    "act_orthogonal": ("act_orthogonal", orthogonal.act_orthogonal_case),
    "aggregate": ("aggregate", graphs.aggregate_case),
    "embed_edges": ("embed", graphs.embed_edges_case),
    "embed_image": ("embed_image", orthogonal.embed_image_case),
    "embed_image (turns)": ("embed_turned", orthogonal.embed_turned_case),
    "embed_matrix": ("embed_matrix", graphs.embed_matrix_case),
    "embed_nodes": ("embed", graphs.embed_nodes_case),
    "gin": ("gin", graphs.gin_case),
    "linear_batch_norm_relu": ("linear_batch_norm_relu", graphs.linear_batch_norm_relu_case),
    "message_passing": ("message_passing", networks.message_passing_case),
    "mlp": ("mlp", networks.mlp_case),
    "node_identifiers": ("node_identifiers", graphs.node_identifiers_case),
    "noise": ("noise", orthogonal.noise_case),
    "orthogonal_frame": ("orthogonal_frame", orthogonal.orthogonal_frame_case),
    "permutation_entropy": ("permutation_entropy", permutations.permutation_entropy_case),
    "permute": ("permute", graphs.permute_case),
    "readout": ("readout", graphs.readout_case),
    "soft_permutation": ("soft_permutation", permutations.soft_permutation_case),
    "transformer": ("transformer", networks.transformer_case),
    "vector_edge_convolution": ("vector_edge_convolution", networks.vector_edge_convolution_case),
}
