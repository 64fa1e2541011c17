"""Blocks of timm's vision transformers, computed only for the tokens that are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def known(block: Any) -> tuple[bool, bool]:
    """Whether `read_block` knows the block, and its attention well enough to compute queries for some tokens."""
    from timm.models import beit, eva
    from timm.models import vision_transformer as vit
    from timm.models import vision_transformer_relpos as relpos

    blocks = vit.Block, beit.Block, eva.EvaBlock, relpos.RelPosBlock  # x + attn(norm1(x)), then x + mlp(norm2(x))
    attn = getattr(block, "attn", None)
    split = type(attn) in (vit.Attention, beit.Attention) and getattr(attn, "gate", None) is None
    return type(block) in blocks, split


def read_block(block: Any, x: Tensor, rows: slice, split: bool, **positions: Any) -> Tensor:
    """`block(x, **positions)[:, rows]`, computed only for these tokens: (M, tokens, D) -> (M, read, D).

    split: also the queries and the projection of attention, else all of it is computed.
    """
    h = block.norm1(x)
    if split:
        y = read_attention(block.attn, h, rows, positions.get("shared_rel_pos_bias"))
    else:
        y = block.attn(h, **positions)[:, rows]
    x = x[:, rows] + block.drop_path1(_scaled(block, 1, y))
    return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))


def _scaled(block: Any, k: int, y: Tensor) -> Tensor:
    """LayerScale: a module in timm's ViT; a parameter or None in its BEiT and EVA."""
    if scale := getattr(block, f"ls{k}", None):
        return scale(y)
    gamma = getattr(block, f"gamma_{k}", None)
    return y if gamma is None else gamma * y


def read_attention(attn: Any, x: Tensor, rows: slice, shared: Tensor | None) -> Tensor:
    """`attn(x)[:, rows]` of timm's attention (ViT, BEiT). shared: (heads, tokens, tokens), added to the scores."""
    h = x[:, rows]
    (M, L, _), R, heads, inner = x.shape, h.shape[1], attn.num_heads, attn.proj.in_features
    weight_q, weight_kv = attn.qkv.weight.split([inner, 2 * inner])
    bias_q, bias_kv = None, None
    if getattr(attn, "q_bias", None) is not None:
        bias_q, bias_kv = attn.q_bias, torch.cat([attn.k_bias, attn.v_bias])
    elif attn.qkv.bias is not None:
        bias_q, bias_kv = attn.qkv.bias.split([inner, 2 * inner])
    q = F.linear(h, weight_q, bias_q).view(M, R, heads, inner // heads).transpose(1, 2)
    k, v = F.linear(x, weight_kv, bias_kv).view(M, L, 2, heads, inner // heads).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    scores = None if shared is None else shared[None, :, rows]
    if getattr(attn, "relative_position_bias_table", None) is not None:
        own = attn.relative_position_bias_table[attn.relative_position_index[rows]].permute(2, 0, 1)[None].contiguous()
        scores = own if scores is None else scores + own
    y = F.scaled_dot_product_attention(q, k, v, scores, attn.attn_drop.p if attn.training else 0.0)
    y = y.transpose(1, 2).reshape(M, R, inner)
    if hasattr(attn, "norm"):
        y = attn.norm(y)
    return attn.proj_drop(attn.proj(y))
