"""Networks made of torch's modules, run as one op."""

from __future__ import annotations

from torch import nn

from probsym_fast.models.backbones.fused import OnePass
from probsym_fast.models.backbones.fused_encoder import FusedEncoder
from probsym_fast.models.backbones.fused_mlp import FusedMLP


def fuse(module: nn.Module, *, recompute: bool = False) -> OnePass:
    """Runs a network with all layers in one pass: the same weights, and the same numbers up to rounding.

    The result holds the module and runs it as it is wherever `why_modules` gives a reason. recompute: as in `OnePass`.

    - `nn.TransformerEncoder` (kept as `encoder`): takes x (..., L, width), and lengths (...) int64 where the sequences differ
      in length, each 1 to L: later tokens are not read, and give 0. Also runs as it is where L exceeds 64.
    - `nn.Sequential` (kept as `layers`) of linear maps with one activation between them (Tanh, ReLU, GELU or SiLU), and
      perhaps before the first and after the last: takes x (..., in_features). Identity and Dropout may stand anywhere.

    Raises TypeError for another module, and ValueError for one that computes something other than the op or would not be
    faster: an encoder with norms after the layers (norm_first=False), an activation other than GELU and ReLU, no biases,
    batch_first=False, parts of other types, width above 256 or feedforward above 1024; a Sequential of other parts, of
    linear maps without bias, of one linear map or with a width above 128; dropout in training.
    """
    if type(module) is nn.TransformerEncoder:
        return FusedEncoder(module, recompute)
    if type(module) is nn.Sequential:
        return FusedMLP(module, recompute)
    raise TypeError(f"fuse: module must be an nn.TransformerEncoder or nn.Sequential, got {type(module).__name__}")
