"""Symmetrized models: backbones, embeddings, readouts."""

from probsym_fast.models.backbones.fuse import fuse
from probsym_fast.models.backbones.fused import OnePass
from probsym_fast.models.backbones.fused_encoder import FusedEncoder
from probsym_fast.models.backbones.fused_mlp import FusedMLP
from probsym_fast.models.backbones.gin import GINBackbone
from probsym_fast.models.backbones.language import LanguageBackbone, hf_backbone
from probsym_fast.models.backbones.message_passing import MessagePassing
from probsym_fast.models.backbones.mlp import MLP
from probsym_fast.models.backbones.pyg import PyGBackbone
from probsym_fast.models.backbones.timm import timm_backbone
from probsym_fast.models.backbones.transformer import Transformer
from probsym_fast.models.backbones.vision import VisionBackbone
from probsym_fast.models.graphs import FlatGraph, IdentifiedNodes, MeanReadout, PatchWeight, SlotReadout
from probsym_fast.models.point_clouds import NodeReadout, NodeVectors, PairTokens
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.models.tokens import DiagonalReadout, GraphReadout, GraphTokens, NodeTokens, PairReadout

__all__ = [
    "MLP",
    "DiagonalReadout",
    "FlatGraph",
    "FusedEncoder",
    "FusedMLP",
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
    "OnePass",
    "PairReadout",
    "PairTokens",
    "PatchWeight",
    "PyGBackbone",
    "SlotReadout",
    "Symmetrized",
    "Transformer",
    "VisionBackbone",
    "fuse",
    "hf_backbone",
    "timm_backbone",
]
