"""An `nn.Sequential` of linear maps and activations run as one op."""

from __future__ import annotations

from torch import nn

from probsym_fast.models.backbones.mlp import Layers

ACTIVATIONS = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}
SILENT = (nn.Identity, nn.Dropout)  # dropout that is on makes the modules run one by one


class FusedMLP(Layers):
    """An `nn.Sequential` of linear maps with one activation between them in one pass, made by `fuse`."""

    def __init__(self, layers: nn.Sequential, recompute: bool = False):
        super().__init__("fuse", recompute)
        parts = [part for part in layers if type(part) not in SILENT]
        self.first, self.last, self.activation = _read(parts)
        self.layers = layers
        maps = [part for part in parts if isinstance(part, nn.Linear)]
        self.widths = [maps[0].in_features, *(part.out_features for part in maps)]
        self.built()
        if reason := self.why_not_as_built():
            raise ValueError(f"fuse: {reason}")


def _read(parts: list[nn.Module]) -> tuple[bool, bool, str]:
    """Whether the activation stands before the first linear map, and after the last; its name."""
    names: dict[str, None] = {}
    for k, part in enumerate(parts):
        if type(part) is nn.Linear:
            if part.bias is None:
                raise ValueError("fuse: every linear map must have a bias, got one without")
        elif type(part) in ACTIVATIONS and getattr(part, "approximate", "none") == "none":
            names[ACTIVATIONS[type(part)]] = None
        else:
            raise ValueError(
                f"fuse: module must hold linear maps and Tanh, ReLU, GELU (with erf) or SiLU between them, got {part}"
            )
        if k and (type(part) is nn.Linear) == (type(parts[k - 1]) is nn.Linear):
            raise ValueError(f"fuse: linear maps and activations must alternate, got {part} after {parts[k - 1]}")
    if not any(type(part) is nn.Linear for part in parts):
        raise ValueError("fuse: module must have linear maps, got none")
    if len(names) > 1:
        raise ValueError(f"fuse: all activations must be the same, got {' and '.join(names)}")
    return type(parts[0]) is not nn.Linear, type(parts[-1]) is not nn.Linear, next(iter(names), "relu")
