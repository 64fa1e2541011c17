"""Symmetrized models: backbones, embeddings, readouts."""

from probsym_fast.models.graphs import (
    FlatGraph,
    GINBackbone,
    IdentifiedNodes,
    MeanReadout,
    PatchWeight,
    SlotReadout,
)
from probsym_fast.models.language import LanguageBackbone, hf_backbone
from probsym_fast.models.message_passing import MessagePassing
from probsym_fast.models.mlp import MLP
from probsym_fast.models.point_clouds import NodeReadout, NodeVectors, PairTokens
from probsym_fast.models.pretrained import timm_backbone
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.models.tokens import DiagonalReadout, GraphReadout, GraphTokens, NodeTokens, PairReadout
from probsym_fast.models.transformer import Transformer
from probsym_fast.models.vision import VisionBackbone

__all__ = [
    "MLP",
    "DiagonalReadout",
    "FlatGraph",
    "GINBackbone",
    "GraphReadout",
    "GraphTokens",
    "IdentifiedNodes",
    "LanguageBackbone",
    "MeanReadout",
    "MessagePassing",
    "NodeReadout",
    "NodeTokens",
    "NodeVectors",
    "PairReadout",
    "PairTokens",
    "PatchWeight",
    "SlotReadout",
    "Symmetrized",
    "Transformer",
    "VisionBackbone",
    "hf_backbone",
    "timm_backbone",
]
