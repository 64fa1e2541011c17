"""A pre-norm Transformer over tokens with positions, or over a set of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probsym_fast import ops
from probsym_fast._autocast import allows_bf16
from probsym_fast._checks import check_count, check_counts, check_int, check_share, check_type
from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.backbones.fused import HALF_WIDTH, OnePass, fewest_sequences, row
from probsym_fast.ops.reference.transformer import check_values
from probsym_fast.ops.transformer import beyond_kernels

TOKENS, WIDTH, FEEDFORWARD = 64, 256, 1024  # up to these sizes all layers run in one pass
SHORT = 40  # tokens; for longer sequences the fused kernel is faster


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, inside: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head width)) v, all (M, heads, L, head width), over the keys inside (M, 1, 1, L); None: all.

    Short sequences on the CPU use plain products: at L = 25 half the time of the fused kernel, whose tiles stay mostly
    empty.
    """
    if q.device.type != "cpu" or q.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inside, dropout_p=dropout)
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    weights = (scores if inside is None else scores.masked_fill(~inside, -math.inf)).softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


def faster_than_half(width: int, feedforward: int) -> bool:
    """See `OnePass`."""
    return width <= HALF_WIDTH and width * feedforward <= HALF_WIDTH**2


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)

    def parts(self) -> list[nn.Module]:
        """In the order of `ops.transformer`."""
        return [self.norm1, self.qkv, self.out, self.norm2, self.up, self.down]

    def forward(self, x: Tensor, inside: Tensor | None = None) -> Tensor:
        M, L, width = x.shape
        drop = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm1(x)).view(M, L, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v, drop, inside)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(M, L, width)), drop, self.training)
        y = F.dropout(F.gelu(self.up(self.norm2(x))), drop, self.training)
        return x + F.dropout(self.down(y), drop, self.training)


class Transformer(OnePass):
    """(..., L, in_features) -> (..., L or len(read), out_features), any leading axes.

    Linear embedding, learned positions initialised from N(0, 1), `layers` pre-norm blocks with GELU, LayerNorm, and a
    two-layer head with ReLU. tokens: L; None: any number of tokens and no positions, so that permuted tokens give permuted
    outputs. read: indices of the tokens to output, negative ones from the end (norm and head run only for these).

    forward(x, lengths=None): lengths (...) int64, the valid tokens of each sequence, each 1 to L. Later ones are not read,
    and give 0. Not with read.

    Up to 64 tokens, width 256 and feedforward 1024, all layers run as one op, `ops.transformer`, where it has a kernel and
    nothing has to happen between them: no dropout, hook or replaced part (`why_modules` names what does). The
    numbers are those of the modules up to rounding. recompute: see `OnePass`.

    Raises ValueError for another number of tokens or features and for settings out of range, TypeError for settings
    of another type.
    """

    op = "transformer"

    def __init__(
        self,
        in_features: int = 8,
        width: int = 64,
        layers: int = 8,
        heads: int = 4,
        feedforward: int = 64,
        tokens: int | None = 25,
        out_features: int = 3,
        dropout: float = 0.0,
        read: Sequence[int] | None = None,
        recompute: bool = False,
    ):
        owner = "Transformer"
        super().__init__(owner, recompute)
        in_features, width, heads = check_counts(owner, in_features=in_features, width=width, heads=heads)
        feedforward, out_features = check_counts(owner, feedforward=feedforward, out_features=out_features)
        tokens = None if tokens is None else check_count(owner, "tokens", tokens)
        layers, dropout = check_count(owner, "layers", layers, least=0), check_share(owner, "dropout", dropout)
        if width % heads:
            raise ValueError(f"Transformer: width must be a multiple of heads = {heads}, got {width}")
        self.embed = nn.Linear(in_features, width)
        self.positions = None if tokens is None else nn.Parameter(torch.randn(tokens, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, out_features),
        )
        if tokens is None and read is not None:
            raise ValueError(f"Transformer: read must be None for any number of tokens, got {read}")
        most = TOKENS if tokens is None else tokens
        self.read = None if read is None else _slices(read, most)
        self._size = most, width, feedforward, layers
        self.built()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        L, features = None if self.positions is None else len(self.positions), self.embed.in_features
        if x.ndim < 2 or x.shape[-1] != features or not x.shape[-2] or L not in (None, x.shape[-2]):
            wanted = f"(..., {'L' if L is None else L}, {features})" + (" with L >= 1" if L is None else "")
            raise ValueError(f"Transformer: x must be {wanted}, got {tuple(x.shape)}")
        lead = x.shape[:-2]
        x = x.reshape(math.prod(lead), *x.shape[-2:])
        if lengths is not None:
            lengths = self._checked(lengths, lead).flatten()
        if self.why_modules(x) is None:
            y = self.as_autocast(lambda x: self._in_one_pass(x, lengths), x)
        else:
            y = every_derivative(lambda x: self._by_modules(x, lengths), x)
        return y.reshape(*lead, *y.shape[1:])

    def _checked(self, lengths: Tensor, lead: torch.Size) -> Tensor:
        check_type("Transformer", "lengths", lengths, Tensor, "a Tensor or None")
        if lengths.shape != lead or lengths.dtype != torch.int64:
            got = f"{tuple(lengths.shape)} {lengths.dtype}"
            raise ValueError(f"Transformer: lengths must be {tuple(lead)} int64, got {got}")
        if self.read is not None:
            raise ValueError("Transformer: read must be None where lengths are given, got both")
        return lengths

    def too_large(self) -> str | None:
        if self._size[0] <= TOKENS and self._size[1] <= WIDTH and self._size[2] <= FEEDFORWARD and self._size[3]:
            return None
        return "{} tokens, width {}, feedforward {}, {} layers".format(*self._size)

    def fewest(self) -> int:
        return fewest_sequences(self._size[1])

    def unfit(self, x: Tensor, lengths: Tensor | None = None) -> str | None:
        if self.positions is None and x.shape[-2] > TOKENS:
            return f"{x.shape[-2]} tokens"
        return self.too_few(x.shape[:-2])

    def faster_than_half(self, bf16: bool) -> bool:
        return bf16 or faster_than_half(*self._size[1:3])

    def beyond_kernels(self, device: str) -> str | None:
        tokens, width, feedforward, layers = self._size
        block: Any = self.blocks[0]
        last: Any = self.head[5]
        sizes = self.embed.in_features, width, layers, block.heads, feedforward, last.out_features
        return beyond_kernels(device, tokens, sizes)

    def _parts(self, tokens: int) -> list[nn.Module | Tensor]:
        blocks: Any = self.blocks
        parts = [part for block in blocks for part in block.parts()]
        weight = self.embed.weight
        positions = weight.new_zeros(tokens, len(weight)) if self.positions is None else self.positions
        return [self.embed, positions, *parts, self.norm, self.head[2], self.head[5]]

    def _tokens_read(self, tokens: int) -> list[int]:
        return [token for some in self.read or () for token in range(tokens)[some]]

    def _in_one_pass(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        block: Any = self.blocks[0]
        last: Any = self.head[5]
        return ops.transformer(
            x,
            row(self._parts(x.shape[1])),
            width=self.embed.out_features,
            layers=len(self.blocks),
            heads=block.heads,
            feedforward=block.up.out_features,
            in_features=self.embed.in_features,
            out_features=last.out_features,
            lengths=lengths,
            read=None if self.read is None else self._tokens_read(x.shape[1]),
            eps=self.norm.eps,
            recompute=self.recompute,
            allow_bf16=allows_bf16(x.device),
        )

    def _by_modules(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        inside = None
        if lengths is not None:
            check_values(x, x, lengths)
            inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (M, L)
            x = torch.where(inside[..., None], x, 0)
        h = self.dropout(self.embed(x))
        h = h if self.positions is None else self.dropout(h + self.positions)
        for block in self.blocks:
            h = block(h) if inside is None else block(h, inside[:, None, None])
        if self.read is not None:
            parts = [h[:, some] for some in self.read]
            h = torch.cat(parts, 1) if parts[1:] else parts[0]
        y = self.head(self.norm(h))
        return y if inside is None else torch.where(inside[..., None], y, 0)


def _slices(read: Sequence[int], tokens: int) -> list[slice]:
    """The token indices as slices, in order: plain Python data, independent of devices and state dicts.

    TypeError unless they are ints, ValueError if there are none and for indices out of range.
    """
    read = read.tolist() if hasattr(read, "tolist") else read  # of a tensor or an array
    check_type("Transformer", "read", read, Iterable, "a sequence of token numbers or None")
    given = [check_int("Transformer", "each of read", token) for token in read]
    if not given:
        raise ValueError("Transformer: read must hold one token or more, or be None, got none")
    if bad := [token for token in given if not -tokens <= token < tokens]:
        raise ValueError(f"Transformer: read must be in {-tokens}..{tokens - 1}, got {bad[0]}")
    numbers, slices = [token % tokens for token in given], []
    while numbers:
        step = max(numbers[1] - numbers[0], 1) if numbers[1:] else 1
        count = 1
        while count < len(numbers) and numbers[count] == numbers[0] + count * step:
            count += 1
        slices.append(slice(numbers[0], numbers[count - 1] + 1, step))
        numbers = numbers[count:]
    return slices
