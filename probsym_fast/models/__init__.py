"""Symmetrized models: backbones, embeddings, readouts."""

from probsym_fast.models.backbones.folded import Folded
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
from probsym_fast.models.backbones.whole import WholeVisionBackbone
from probsym_fast.models.forces import energy_and_forces
from probsym_fast.models.graphs import FlatGraph, IdentifiedNodes, MeanReadout, PatchWeight, SlotReadout
from probsym_fast.models.image_readouts import ClassReadout, MaskReadout, TokenReadout
from probsym_fast.models.image_scores import ImageScores
from probsym_fast.models.images import ImageTokens, MovedImages
from probsym_fast.models.point_clouds import (
    FlatCloud,
    LayoutReadout,
    NodeReadout,
    NodeVectors,
    PairTokens,
    PooledReadout,
)
from probsym_fast.models.scores import ScoredReadout, confidence
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.models.tokens import DiagonalReadout, GraphReadout, GraphTokens, NodeTokens, PairReadout

__all__ = [
    "MLP",
    "ClassReadout",
    "DiagonalReadout",
    "FlatCloud",
    "FlatGraph",
    "Folded",
    "FusedEncoder",
    "FusedMLP",
    "GINBackbone",
    "GraphReadout",
    "GraphTokens",
    "IdentifiedNodes",
    "ImageScores",
    "ImageTokens",
    "LanguageBackbone",
    "LayoutReadout",
    "MaskReadout",
    "MeanReadout",
    "MessagePassing",
    "MovedImages",
    "NodeReadout",
    "NodeTokens",
    "NodeVectors",
    "OnePass",
    "PairReadout",
    "PairTokens",
    "PatchWeight",
    "PooledReadout",
    "PyGBackbone",
    "ScoredReadout",
    "SlotReadout",
    "Symmetrized",
    "TokenReadout",
    "Transformer",
    "VisionBackbone",
    "WholeVisionBackbone",
    "confidence",
    "energy_and_forces",
    "fuse",
    "hf_backbone",
    "timm_backbone",
]
