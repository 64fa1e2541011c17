"""timm's vision transformers on given tokens, computed only where they are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from probsym_fast._checks import transformed
from probsym_fast.models.backbones.attention import every_derivative


class VisionBackbone(nn.Module):
    """The blocks of a timm model on tokens (..., L, D), any leading axes; built by `timm_backbone`.

    `h = norm_pre([prefix + its positions, x + positions])`, the blocks, then `norm(h)` of the tokens read, and the model's
    pool. The parameters have timm's names. The last block computes queries, attention projection and feed-forward only for
    the tokens read (keys and values for all). This changes nothing but rounding and, if they are on, the random numbers of
    proj_drop and attn_drop.

    tokens: L. width: D. grid: (rows, columns) of the tokens, None for a sequence. prefix_tokens: number of class,
    distillation and register tokens. drops_always: drop patches in eval mode too.
    """

    def __init__(
        self,
        model: Any,
        tokens: int,
        grid: tuple[int, int] | None,
        read: str,
        patch_dropout: tuple[float, float],
        checkpointing: bool,
        all_tokens: bool,
        drops_always: bool = False,
    ):
        super().__init__()
        self.drops_always = drops_always
        self.tokens, self.grid, self.width, self.read = tokens, grid, model.embed_dim, read
        self.patch_dropout, self.checkpointing, self.all_tokens = patch_dropout, checkpointing, all_tokens
        self.prefix_tokens = model.num_prefix_tokens
        self.distilled = hasattr(model, "dist_token")
        self.cls_token = model.cls_token
        self.dist_token = getattr(model, "dist_token", None)
        self.reg_token = None if self.distilled else getattr(model, "reg_token", None)  # timm ignores it too
        self.pos_embed = model.pos_embed
        self.prefix_has_positions = not getattr(model, "no_embed_class", False)
        self.rel_pos_bias = getattr(model, "rel_pos_bias", None)
        without = model.pos_embed is None and hasattr(model, "norm_pre")  # then timm's ViT drops nothing
        self.pos_drop = nn.Identity() if without else model.pos_drop
        self.norm_pre = getattr(model, "norm_pre", nn.Identity())
        self.blocks, self.norm = model.blocks, model.norm
        self.pool = model.global_pool
        pooled = read == "pooled"
        self.attn_pool = getattr(model, "attn_pool", None) if pooled else None
        self.fc_norm = model.fc_norm if pooled and not self.distilled else nn.Identity()
        self.head_drop = model.head_drop if pooled else nn.Identity()
        self.rows = self._rows(getattr(model, "pool_include_prefix", False))

    def _rows(self, with_prefix: bool) -> slice:
        """The tokens to read, among prefix and patches."""
        P = self.prefix_tokens
        if self.read == "diagonal":
            assert self.grid is not None  # `timm_backbone` refuses it for a sequence
            return slice(P, None, self.grid[1] + 1)
        if self.read == "pooled" and self.pool == "token":
            return slice(0, 2 if self.distilled else 1)
        return slice(0 if self.read == "pooled" and with_prefix else P, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionBackbone:
        """Moves the model; after `to_empty` the constants outside the state dict would be undefined."""
        super()._apply(fn, recurse)
        for module in self.modules():
            set_constants(module)
        return self

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, width={self.width}, read={self.read!r}"

    def bare(self) -> VisionBackbone:
        """A copy that computes all tokens of the last block, as timm does."""
        copy = deepcopy(self)
        copy.all_tokens = True
        return copy

    def forward(self, x: Tensor) -> Tensor:
        """x (..., L, D) -> "pooled" (..., D), "tokens" (..., L, D) or "diagonal" (..., grid, D).

        Raises ValueError for another shape, TypeError for integers and for a wider dtype than that of the weights
        (under autocast only for float64, which autocast does not cast).
        """
        self._check(x)
        lead, M = x.shape[:-2], math.prod(x.shape[:-2])
        h = (
            x.reshape(M, self.tokens, self.width) if M else x.new_zeros(1, self.tokens, self.width)
        )  # BEiT fails on 0 rows
        h = self.norm_pre(self._drop_patches(self.pos_drop(self._with_prefix(h))))
        y = every_derivative(self._encoded, h)
        return y[:M].reshape(*lead, *y.shape[1:])

    def _encoded(self, h: Tensor) -> Tensor:
        """(M, tokens, D) -> (M, tokens read, D), or pooled (M, D)."""
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()  # (heads, 1 + L, 1 + L)
        *blocks, last = self.blocks
        for block in blocks:
            h = self._run(block, h, bias)
        if self.all_tokens or self.rows == slice(0, None):
            h = self._run(last, h, bias)[:, self.rows]
        else:
            h = self._run(read_block, last, h, self.rows, bias)
        h = self.norm(h)
        return self._pooled(h) if self.read == "pooled" else h

    def _run(self, function: Any, *arguments: Any) -> Tensor:
        # torch.func takes no checkpoints
        if self.checkpointing and torch.is_grad_enabled() and not transformed():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[-2:] != (self.tokens, self.width):
            raise ValueError(f"VisionBackbone: x must be (..., {self.tokens}, {self.width}), got {tuple(x.shape)}")
        dtype = self.blocks[0].norm1.weight.dtype
        cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        fits = cast or torch.promote_types(x.dtype, dtype) == dtype
        if not x.is_floating_point() or not fits:
            raise TypeError(f"VisionBackbone: x must be {dtype} as the weights are, got {x.dtype}")

    def _with_prefix(self, x: Tensor) -> Tensor:
        """(M, L, D) -> (M, prefix + L, D), with positions."""
        P = self.prefix_tokens
        tokens = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        if self.pos_embed is not None:
            x = x + self.pos_embed[:, P if self.prefix_has_positions else 0 :]
        if not tokens:
            return x
        prefix = torch.cat(tokens, 1)  # (1, prefix, D)
        if self.pos_embed is not None and self.prefix_has_positions:
            prefix = prefix + self.pos_embed[:, :P]
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)

    def _drop_patches(self, h: Tensor) -> Tensor:
        low, high = self.patch_dropout
        if high == 0 or not (self.training or self.drops_always):
            return h
        M, L, P = len(h), self.tokens, self.prefix_tokens
        rate = low if low == high else low + (high - low) * torch.rand(()).item()
        keep = max(1, int(L * (1 - rate)))
        kept = torch.rand(M, L, device=h.device).topk(keep, sorted=False).indices  # (M, keep)
        patches = h[:, P:].gather(1, kept[:, :, None].expand(-1, -1, self.width))
        return torch.cat([h[:, :P], patches], 1)

    def _pooled(self, h: Tensor) -> Tensor:
        """(M, tokens read, D) -> (M, D)."""
        if self.attn_pool is not None:
            h = self.attn_pool(h)
        elif self.distilled:
            return self.head_drop(h).mean(1)
        elif self.pool == "token":
            h = h[:, 0]
        elif self.pool == "avg":
            h = h.mean(1)
        else:
            h = h.amax(1) if self.pool == "max" else 0.5 * (h.amax(1) + h.mean(1))
        return self.head_drop(self.fc_norm(h))


@torch.no_grad()
def set_constants(module: Any) -> None:
    """Sets the buffers of a BEiT's attention that no state dict holds: indices of relative positions, a bias of 0."""
    outside = {name: module.get_buffer(name) for name in module._non_persistent_buffers_set}
    if (index := outside.get("relative_position_index")) is not None:
        from timm.models.beit import gen_relative_position_index

        index.copy_(gen_relative_position_index(module.window_size))
    if (bias := outside.get("k_bias")) is not None:
        bias.zero_()


def read_block(block: Any, x: Tensor, rows: slice, bias: Tensor | None) -> Tensor:
    """`block(x, bias)[:, rows]`, computed only for these tokens: (M, tokens, D) -> (M, read, D)."""
    y = block.drop_path1(_scaled(block, 1, read_attention(block.attn, block.norm1(x), rows, bias)))
    x = x[:, rows] + y
    return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))


def _scaled(block: Any, k: int, y: Tensor) -> Tensor:
    """LayerScale: a module in timm's ViT; a parameter or None in its BEiT."""
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
