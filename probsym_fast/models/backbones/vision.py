"""timm's vision transformers on given tokens, computed only where they are read."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.backbones.blocks import known, read_block
from probsym_fast.models.backbones.on_tokens import OnTokens, constants

POOLED = "pooled", "features"  # what is read of the tokens together


class VisionBackbone(OnTokens):
    """The blocks of a timm model on tokens (..., L, D), any leading axes; built by `timm_backbone`.

    `h = norm_pre([prefix + its positions, x + positions])`, the blocks, then `norm(h)` of the tokens read, and the model's
    pool. The parameters have timm's names. The last block computes its feed-forward only for the tokens read, and in a ViT
    or BEiT also queries and attention projection (keys and values for all). This changes nothing but rounding and, if they
    are on, the random numbers of proj_drop and attn_drop. Parallel blocks and those with norms after the layers compute
    all tokens.

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
        super().__init__(tokens, model.embed_dim, read, checkpointing)
        self.grid, self.patch_dropout, self.drops_always = grid, patch_dropout, drops_always
        plain, self.splits = known(model.blocks[-1])
        self.all_tokens = all_tokens or not plain
        self.prefix_tokens = model.num_prefix_tokens
        self.distilled = hasattr(model, "dist_token")
        self.cls_token = model.cls_token
        self.dist_token = getattr(model, "dist_token", None)
        self.reg_token = None if self.distilled else getattr(model, "reg_token", None)  # timm ignores it too
        self.pos_embed = getattr(model, "pos_embed", None)
        self.prefix_has_positions = not getattr(model, "no_embed_class", False)
        self.rel_pos_bias = getattr(model, "rel_pos_bias", None)
        self.shared_rel_pos = getattr(model, "shared_rel_pos", None)
        self.rope = getattr(model, "rope", None)
        self.rope_by_block = getattr(model, "rope_mixed", False)
        eva = hasattr(model, "rope_mixed")
        without = self.pos_embed is None and hasattr(model, "norm_pre") and not eva  # then timm's ViT drops nothing
        self.pos_drop = nn.Identity() if without else getattr(model, "pos_drop", nn.Identity())
        self.norm_pre = getattr(model, "norm_pre", nn.Identity())
        self.blocks, self.norm = model.blocks, model.norm
        self.pool = model.global_pool
        pooled = read in POOLED
        self.attn_pool = getattr(model, "attn_pool", None) if pooled else None
        self.fc_norm = model.fc_norm if pooled and not self.distilled else nn.Identity()
        self.head_drop = model.head_drop if pooled else nn.Identity()
        self.rows = self._rows(getattr(model, "pool_include_prefix", eva and self.attn_pool is not None))

    def _rows(self, with_prefix: bool) -> slice:
        """The tokens to read, among prefix and patches."""
        P = self.prefix_tokens
        if self.read == "diagonal":
            assert self.grid is not None  # `timm_backbone` refuses it for a sequence
            return slice(P, None, self.grid[1] + 1)
        if self.read in POOLED and self.pool == "token":
            return slice(0, 2 if self.distilled else 1)
        return slice(0 if self.read in POOLED and with_prefix else P, None)

    def restore(self, module: nn.Module) -> None:
        set_constants(module)

    def bare(self) -> VisionBackbone:
        """A copy that computes all tokens of the last block, as timm does."""
        copy = deepcopy(self)
        copy.all_tokens = True
        return copy

    def forward(self, x: Tensor) -> Tensor:
        """x (..., L, D) -> "pooled" or "features" (..., [2,] D), "tokens" (..., L, D) or "diagonal" (..., grid, D).

        Raises ValueError for another shape, TypeError for integers and for a wider dtype than that of the weights
        (under autocast only for float64, which autocast does not cast).
        """
        return self.folded(self._sequences, x, next(self.blocks[0].parameters()).dtype)

    def _sequences(self, x: Tensor) -> Tensor:
        h, rotary = self._drop_patches(self.pos_drop(self._with_prefix(x)), self._rotary())
        return every_derivative(lambda h: self._encoded(h, rotary), self.norm_pre(h))

    def _encoded(self, h: Tensor, rotary: Tensor | None) -> Tensor:
        """(M, tokens, D) -> (M, tokens read, D), or pooled (M, D)."""
        *blocks, last = self.blocks
        positions = self._positions(rotary)
        for block, named in zip(blocks, positions, strict=False):
            h = self.run(block, h, **named)
        # some of the tokens as queries would bind an exported program to more than one sequence
        if self.all_tokens or self.rows == slice(0, None) or torch.compiler.is_exporting():
            h = self.run(last, h, **positions[-1])[:, self.rows]
        else:
            h = self.run(read_block, last, h, self.rows, self.splits, **positions[-1])
        h = self.norm(h)
        return self._pooled(h) if self.read in POOLED else h

    def _rotary(self) -> Tensor | None:
        """Sines and cosines of the patches, (L, 2 d) or by block and head (depth, heads, L, 2 d)."""
        if self.rope is None:
            return None
        return self.rope.get_embed() if getattr(self.rope, "feat_shape", None) else self.rope.get_embed(shape=self.grid)

    def _positions(self, rotary: Tensor | None) -> list[dict[str, Tensor]]:
        """What each block takes besides the tokens."""
        depth = len(self.blocks)
        if rotary is not None:
            return [{"rope": rotary[k] if self.rope_by_block else rotary} for k in range(depth)]
        if self.rel_pos_bias is not None:  # (heads, 1 + L, 1 + L)
            return [{"shared_rel_pos_bias": self.rel_pos_bias()}] * depth
        if self.shared_rel_pos is not None:
            return [{"shared_rel_pos": self.shared_rel_pos.get_bias()}] * depth
        return [{}] * depth

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

    def _drop_patches(self, h: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens kept, and their rotary positions, which then have an axis M."""
        low, high = self.patch_dropout
        if high == 0 or not (self.training or self.drops_always):
            return h, rotary
        M, L, P = len(h), self.tokens, self.prefix_tokens
        rate = low if low == high else low + (high - low) * torch.rand(()).item()
        keep = max(1, int(L * (1 - rate)))
        kept = torch.rand(M, L, device=h.device).topk(keep, sorted=False).indices  # (M, keep)
        patches = h[:, P:].gather(1, kept[:, :, None].expand(-1, -1, self.width))
        if rotary is not None:  # (M, 1, keep, 2 d), or (depth, M, heads, keep, 2 d)
            rotary = rotary[:, :, kept].transpose(1, 2) if self.rope_by_block else rotary[kept][:, None]
        return torch.cat([h[:, :P], patches], 1), rotary

    def _pooled(self, h: Tensor) -> Tensor:
        """(M, tokens read, D) -> (M, D), or the features of a distilled model (M, 2, D)."""
        if self.attn_pool is not None:
            h = self.attn_pool(h)
        elif self.distilled:
            h = self.head_drop(h)
            return h if self.read == "features" else h.mean(1)
        elif self.pool == "token":
            h = h[:, 0]
        elif self.pool == "avg":
            h = h.mean(1)
        else:
            h = h.amax(1) if self.pool == "max" else 0.5 * (h.amax(1) + h.mean(1))
        return self.head_drop(self.fc_norm(h))


@torch.no_grad()
def set_constants(module: Any) -> None:
    """Sets the buffers of a timm module that no state dict holds, such as rotary positions."""
    if hasattr(module, "init_non_persistent_buffers"):
        module.init_non_persistent_buffers()
        return
    outside = constants(module)  # of an older timm's BEiT
    if (index := outside.get("relative_position_index")) is not None:
        from timm.models.beit import gen_relative_position_index

        index.copy_(gen_relative_position_index(module.window_size))
    if (bias := outside.get("k_bias")) is not None:
        bias.zero_()
