"""Backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import models
from tests.programs.rows.base import Rows, Size
from tests.programs.rows.inputs import GRID, C, D, N, S, graphs, nodes

ROWS = Rows("backbones")


def tiny_vit() -> nn.Module:
    return models.timm_backbone(
        "vit_tiny_patch16_224", grid=GRID, read="diagonal", depth=1, embed_dim=D, num_heads=2, mlp_ratio=2
    )


def tiny_convit() -> nn.Module:
    return models.timm_backbone("convit_tiny", grid=GRID, read="tokens", depth=1, embed_dim=D // 2, num_heads=2)


def tiny_bert() -> nn.Module:
    from transformers import BertConfig

    sizes = {"vocab_size": 5, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, intermediate_size=8, max_position_embeddings=GRID**2)
    return models.hf_backbone(config, False, tokens=GRID**2)


def tokens(*shape: int) -> Callable[[Size], tuple]:
    return lambda size: (torch.randn(size.batch, S, *shape),)


def run(net: nn.Module, *inputs: Any) -> Tensor:
    return net(*inputs)


def in_one_pass(net: models.OnePass) -> models.OnePass:
    """Also for few sequences."""
    net.one_pass = True
    return net


ROWS.add("ImageScores", run, tokens(C, N, N), part=lambda: models.ImageScores(C, 4, 2))
ROWS.add("MLP", run, tokens(D), part=lambda: in_one_pass(models.MLP([D, D, C])))
ROWS.add(
    "FusedMLP",
    run,
    tokens(D),
    covers=("FusedMLP", "fuse"),
    part=lambda: in_one_pass(models.fuse(nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, C)))),
)
ROWS.add(
    "GINBackbone",
    run,
    lambda size: (torch.randn(nodes(size), S, D), graphs(size)),
    part=lambda: models.GINBackbone(D, 2, C, "tanh"),
    axes=("batch", "edges"),
)


class SumOfNeighbours(nn.Module):
    """A network as those of PyTorch Geometric, without it."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(D, C), nn.Linear(D, C, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        return torch.tanh(self.own(x).index_add(0, target, self.others(x)[source]))


ROWS.add(
    "PyGBackbone",
    run,
    lambda size: (torch.randn(nodes(size), S, D), graphs(size)),
    part=lambda: models.PyGBackbone(SumOfNeighbours(), pool="mean"),
    axes=("batch", "edges"),
)
ROWS.add(
    "MessagePassing",
    run,
    lambda size: (
        torch.randn(size.batch, S, size.nodes, 6),
        torch.randn(size.batch, 1, size.nodes, size.nodes, 2),
    ),
    part=lambda: in_one_pass(models.MessagePassing(width=D, layers=1)),
    axes=("batch", "nodes"),
)
ROWS.add(
    "Transformer",
    run,
    tokens(9, 8),
    part=lambda: in_one_pass(models.Transformer(width=8, layers=1, heads=2, feedforward=8, tokens=9, read=[0, 4, 8])),
)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return in_one_pass(models.fuse(nn.TransformerEncoder(layer, 1, nn.LayerNorm(8), enable_nested_tensor=False)))


ROWS.add("Folded", run, tokens(9, 8), part=lambda: models.Folded(nn.Linear(8, C)))
ROWS.add("FusedEncoder", run, tokens(9, 8), covers=("FusedEncoder",), part=encoder)
for name, maker, part in (
    ("VisionBackbone", "timm_backbone", tiny_vit),
    ("LanguageBackbone", "hf_backbone", tiny_bert),
):
    ROWS.add(name, run, tokens(GRID**2, D), covers=(name, maker), part=part)
ROWS.add("WholeVisionBackbone", run, tokens(GRID**2, D), part=tiny_convit, slow=True)
