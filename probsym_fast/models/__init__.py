"""Symmetrized models: backbones, embeddings, readouts."""

from probsym_fast.models.message_passing import MessagePassing
from probsym_fast.models.point_clouds import NodeReadout, NodeVectors, PairTokens
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.models.transformer import Transformer

__all__ = ["MessagePassing", "NodeReadout", "NodeVectors", "PairTokens", "Symmetrized", "Transformer"]
