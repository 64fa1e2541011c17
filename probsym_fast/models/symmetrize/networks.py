"""What a network takes, and how it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checkpointing import restored_buffers
from probsym_fast.models.backbones.folded import Folded
from probsym_fast.models.backbones.fuse import fuse
from probsym_fast.models.backbones.gin import GINBackbone
from probsym_fast.models.backbones.mlp import MLP
from probsym_fast.models.backbones.on_tokens import OnTokens
from probsym_fast.models.backbones.pyg import PyGBackbone
from probsym_fast.models.backbones.transformer import Transformer

# modules that act on the last axis or entry by entry, and so take any leading axes
ENTRYWISE = (
    *(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)


def run(function: Callable[[], Any], *modules: nn.Module) -> Any:
    """function() in eval mode, without gradients. Leaves modes and buffers as they are."""
    training = [(m, m.training) for module in modules for m in module.modules()]
    with torch.no_grad(), restored_buffers(*modules):
        try:
            for module in modules:
                module.eval()
            return function()
        finally:
            for module, mode in training:
                module.training = mode


def like(part: nn.Module, net: nn.Module, example: Any) -> nn.Module:
    """The part on the device and in the dtype of the example, but for modules inside it that hold what is the network's."""
    kept = {id(x) for x in (*net.parameters(), *net.buffers())}
    if not any(id(x) in kept for x in (*part.parameters(), *part.buffers())):
        return part.to(example.device, example.dtype)
    for child in part.children():
        like(child, net, example)
    return part


def first_linear(net: nn.Module) -> int | None:
    """The inputs of the network's first linear map."""
    return next((m.in_features for m in net.modules() if isinstance(m, nn.Linear)), None)


def takes_edges(net: nn.Module) -> bool:
    """Whether its forward takes edge_index, as networks of PyTorch Geometric do."""
    return "edge_index" in inspect.signature(net.forward).parameters


def takes_any_axes(net: nn.Module) -> bool:
    """Whether it takes inputs of any leading axes: our own backbones, and linear maps with what acts entry by entry."""
    if isinstance(net, MLP | Transformer | OnTokens | GINBackbone):
        return True
    parts = list(net) if isinstance(net, nn.Sequential) else [net]
    return all(type(part) in ENTRYWISE for part in parts)


def inputs_of(net: nn.Module) -> int | None:
    """What the network takes, as far as it says so."""
    if isinstance(net, MLP):
        return net.widths[0]
    if isinstance(net, PyGBackbone):
        return inputs_of(net.net)
    for name in ("in_channels", "in_features", "width"):
        if isinstance(found := getattr(net, name, None), int):
            return found
    return first_linear(net)


class EncoderOnNodes(nn.Module):
    """An `nn.TransformerEncoder` between linear maps of each token: (..., L, in_features) -> (..., L, out_features).

    It runs as one op where it fits (`fuse`), else as it is. lengths (...) int64: the valid tokens.
    """

    def __init__(self, encoder: nn.TransformerEncoder, in_features: int, out_features: int):
        super().__init__()
        width = encoder.layers[0].self_attn.embed_dim
        self.embed = nn.Linear(in_features, width)
        self.reason = ""
        try:
            self.encoder: nn.Module = fuse(encoder)
        except ValueError as error:  # it computes what the op does not
            self.encoder, self.reason = WithLengths(Folded(encoder)), str(error)
        self.head = nn.Linear(width, out_features)

    def extra_repr(self) -> str:
        return f"by modules: {self.reason}" if self.reason else ""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        return self.head(self.encoder(h) if lengths is None else self.encoder(h, lengths))


class WithLengths(nn.Module):
    """A network whose last input may be lengths (B, S): given to a folded one, left out for one that acts node by node.

    Other inputs, features of pairs, have more axes.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        lengths = others[-1] if others and others[-1].ndim == 2 else None
        others = others if lengths is None else others[:-1]
        return self.net(x, *others, lengths=lengths) if isinstance(self.net, Folded) else self.net(x, *others)
