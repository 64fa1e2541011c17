"""An `nn.TransformerEncoder` run as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from probsym_fast import ops
from probsym_fast._autocast import allows_bf16, autocasts
from probsym_fast._checks import check_type, transformed
from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.backbones.fused import OnePass, fewest_sequences, row
from probsym_fast.models.backbones.transformer import FEEDFORWARD, TOKENS, WIDTH, faster_than_half
from probsym_fast.ops.reference.transformer import check_values
from probsym_fast.ops.transformer import beyond_kernels

NORM, LINEAR, DROPOUT = (nn.LayerNorm,), (nn.Linear, NonDynamicallyQuantizableLinear), (nn.Dropout, nn.Identity)
PARTS = {  # of a layer, and their types
    "norm1": NORM,
    "self_attn": (nn.MultiheadAttention,),
    "self_attn.out_proj": LINEAR,
    "dropout1": DROPOUT,
    "norm2": NORM,
    "linear1": LINEAR,
    "dropout": DROPOUT,
    "linear2": LINEAR,
    "dropout2": DROPOUT,
}


class FusedEncoder(OnePass):
    """An `nn.TransformerEncoder` in one pass, made by `fuse`."""

    op = "transformer"

    def __init__(self, encoder: nn.TransformerEncoder, recompute: bool = False):
        super().__init__("fuse", recompute)
        layers = list(encoder.layers)
        if not layers:
            raise ValueError("fuse: module must have layers, got none")
        for layer in layers:
            if problem := _problem(layer) or _difference(layer, layers[0]):
                raise ValueError(f"fuse: {problem}")
        self.encoder = encoder
        self.built()
        if reason := self.why_not_as_built():
            raise ValueError(f"fuse: {reason}")

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        layer, lead = self.encoder.layers[0], x.shape[:-2]
        width = layer.linear1.in_features
        if x.ndim < 2 or x.shape[-1] != width or not x.shape[-2]:
            raise ValueError(f"FusedEncoder: x must be (..., L, {width}) with L >= 1, got {tuple(x.shape)}")
        if lengths is not None:
            check_type("FusedEncoder", "lengths", lengths, Tensor, "a Tensor or None")
        if lengths is not None and (lengths.shape != lead or lengths.dtype != torch.int64):
            raise ValueError(
                f"FusedEncoder: lengths must be {tuple(lead)} int64, got {tuple(lengths.shape)} {lengths.dtype}"
            )
        x, lengths = x.reshape(-1, *x.shape[-2:]), None if lengths is None else lengths.flatten()
        if self.why_modules(x) is not None:
            y = every_derivative(lambda x: self._by_modules(x, lengths), x)
        else:
            y = ops.transformer(
                x.float() if autocasts(x.device) and x.dtype != torch.float64 else x,
                row(self._parts()),
                width=width,
                layers=len(self.encoder.layers),
                heads=layer.self_attn.num_heads,
                feedforward=layer.linear1.out_features,
                lengths=lengths,
                activation="relu" if _is_relu(layer.activation) else "gelu",
                eps=layer.norm1.eps,
                recompute=self.recompute,
                allow_bf16=allows_bf16(x.device),
            ).to(x.dtype)
            y = y if self.encoder.norm is None else self._ended(y, lengths)
        return y.reshape(*lead, *y.shape[1:])

    def _by_modules(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None or not x.shape[0]:  # its attention cannot mask no sequences
            return self.encoder(x)
        check_values(x, x, lengths)
        after = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        x = x.masked_fill(after[..., None], 0)
        return self.encoder(x, src_key_padding_mask=after).masked_fill(after[..., None], 0)

    def _ended(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        y = self.encoder.norm(y)  # type: ignore[misc]  # there is one
        if lengths is None:
            return y
        return y.masked_fill((torch.arange(y.shape[1], device=y.device) >= lengths[:, None])[..., None], 0)

    def too_large(self) -> str | None:
        width, feedforward = self.encoder.layers[0].linear1.in_features, self.encoder.layers[0].linear1.out_features
        return f"width {width}, feedforward {feedforward}" if width > WIDTH or feedforward > FEEDFORWARD else None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        # under a transform the op is its reference, which has every derivative; the encoder has not
        return self.why_not_as_built() if transformed() else super().why_not(device, dtype)

    def unfit(self, x: Tensor, lengths: Tensor | None = None) -> str | None:
        return f"{x.shape[-2]} tokens" if x.shape[-2] > TOKENS else self.too_few(x.shape[:-2])

    def fewest(self) -> int:
        return fewest_sequences(self.encoder.layers[0].linear1.in_features)

    def faster_than_half(self, bf16: bool) -> bool:
        layer: Any = self.encoder.layers[0]
        return bf16 or faster_than_half(layer.linear1.in_features, layer.linear1.out_features)

    def beyond_kernels(self, device: str) -> str | None:
        layer: Any = self.encoder.layers[0]
        heads, feedforward = layer.self_attn.num_heads, layer.linear1.out_features
        sizes = 0, layer.linear1.in_features, len(self.encoder.layers), heads, feedforward, 0
        return beyond_kernels(device, TOKENS, sizes)

    def _parts(self) -> list[nn.Module | Tensor]:
        return [
            part
            for layer in self.encoder.layers
            for part in (
                layer.norm1,
                layer.self_attn.in_proj_weight,
                layer.self_attn.in_proj_bias,
                layer.self_attn.out_proj,
                layer.norm2,
                layer.linear1,
                layer.linear2,
            )
        ]


def _is_relu(activation: object) -> bool:
    return activation in (F.relu, torch.relu) or type(activation) is nn.ReLU


def _is_gelu(activation: object) -> bool:
    return activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none")


def _problem(layer: Any) -> str | None:
    """What a layer does that the pass does not."""
    if type(layer) is not nn.TransformerEncoderLayer:
        return f"every layer must be an nn.TransformerEncoderLayer, got {type(layer).__name__}"
    for name, kinds in PARTS.items():
        part = layer.get_submodule(name)
        if type(part) not in kinds:
            return f"{name} must be an nn.{kinds[0].__name__}, got {type(part).__name__}"
    if not layer.norm_first:
        return "norm_first must be True, got False"
    attention = layer.self_attn
    if not attention.batch_first:
        return "batch_first must be True, got False"
    if not _is_relu(layer.activation) and not _is_gelu(layer.activation):
        return f"activation must be F.gelu or F.relu, got {layer.activation}"
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return "self_attn must have one in_proj_weight, no bias_k and no add_zero_attn"
    if attention.in_proj_bias is None:
        return "bias must be True, got False"
    for part in (layer.norm1, attention.out_proj, layer.norm2, layer.linear1, layer.linear2):
        if part.weight is None or part.bias is None:
            return f"every part must have a weight and a bias, got {part} without"
    if layer.norm1.eps != layer.norm2.eps:
        return f"norm1 and norm2 must have the same eps, got {layer.norm1.eps} and {layer.norm2.eps}"
    drops = [attention.dropout, *(part.p for part in layer.modules() if isinstance(part, nn.Dropout))]
    if layer.training and max(drops):
        return f"dropout must be 0 in training, got {max(drops)}"
    return None


def _difference(layer: Any, first: Any) -> str | None:
    """The first setting in which a layer differs from the first layer."""
    settings: dict[str, Callable[[Any], Any]] = {
        "heads": lambda x: x.self_attn.num_heads,
        "feedforward": lambda x: x.linear1.out_features,
        "eps": lambda x: x.norm1.eps,
        "activation": lambda x: _is_relu(x.activation),
    }
    for name, of in settings.items():
        if of(layer) != of(first):
            return f"{name} must be that of the first layer, {of(first)}, got {of(layer)}"
    return None
