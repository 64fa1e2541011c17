"""Symmetrized models: backbones, embeddings, readouts."""

from probsym_fast.models.graphs import (
    FlatGraph,
    GINBackbone,
    IdentifiedNodes,
    MeanReadout,
    SlotReadout,
    patch_weight,
)
from probsym_fast.models.message_passing import MessagePassing
from probsym_fast.models.mlp import MLP
from probsym_fast.models.point_clouds import NodeReadout, NodeVectors, PairTokens
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.models.transformer import Transformer

__all__ = [
    "MLP",
    "FlatGraph",
    "GINBackbone",
    "IdentifiedNodes",
    "MeanReadout",
    "MessagePassing",
    "NodeReadout",
    "NodeVectors",
    "PairTokens",
    "SlotReadout",
    "Symmetrized",
    "Transformer",
    "patch_weight",
]
