"""Readouts of images: classes, maps of tokens, and masks, turned back to the image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._autocast import without_autocast
from probsym_fast._checks import check_counts, check_type
from probsym_fast.groups import Group
from probsym_fast.models.backbones.timm_given import classifier_of
from probsym_fast.models.images import checked_pad_mode, moved, sides

AVERAGES = "logits", "probabilities"


class ClassReadout(nn.Module):
    """Scores of classes, averaged over samples: features (B, S, D) -> (B, classes).

    head: from features to logits, such as nn.Linear(D, classes) or the classifier of a trained model. None: the outputs are
        logits already.
    average: "logits", or "probabilities", the mean of their softmax, for a loss such as `F.nll_loss(p.log(), labels)`.

    Logits of an nn.Linear are averaged as features, before the head: the same mean, for 1 / S of the work. Any other head,
    and softmax, take each sample. (Features are not averaged for these: the prediction would then depend on chunks.)
    Computed and returned in the weights' dtype, also under autocast. Raises ValueError for another average.
    """

    layout = "c"  # of the prediction, for `equivariance_error`

    def __init__(self, head: nn.Module | None = None, *, average: str = "logits"):
        super().__init__()
        check_type("ClassReadout", "head", head, nn.Module | None, "an nn.Module or None")
        if average not in AVERAGES:
            raise ValueError(f"ClassReadout: average must be one of {AVERAGES}, got {average!r}")
        self.head, self.average = nn.Identity() if head is None else head, average

    @classmethod
    def of(cls, model: nn.Module, *, average: str = "logits") -> ClassReadout:
        """The classifier of a timm model, its own parameters, on a `timm_backbone` with read="features".

        Raises ValueError where the model has no classifier on its pooled features.
        """
        check_type("ClassReadout", "model", model, nn.Module, "an nn.Module")
        return cls(classifier_of(model), average=average).train(model.training)

    def extra_repr(self) -> str:
        return f"average={self.average!r}"

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        with without_autocast(outputs.device):
            weight = next(self.head.parameters(), outputs)  # a head of no weights takes what there is
            x = outputs.to(weight.dtype)
            if self.average == "probabilities":
                return self.head(x).softmax(-1).mean(1)
            return self.head(x.mean(1)) if self._is_linear() else self.head(x).mean(1)

    def _is_linear(self) -> bool:
        return type(self.head) in (nn.Linear, nn.Identity) or getattr(self.head, "linear", False) is True


class TokenReadout(nn.Module):
    """Tokens on their grid, turned back to the image and averaged over samples: (B, S, L, D) -> (B, D, rows, columns).

    grid: (rows, columns) of the L tokens, or the number of both. None: L is a square.
    pad_mode: what a turned grid shows where it ends, unless the turns are by 90 degrees: "replicate", the nearest token of
        its border, or "zeros".

    With "zeros", a place that some turned grids do not reach has a smaller mean. It is not divided by the share of those
    that do: a ratio of means has a bias, and depends on chunks. Raises ValueError for another number of tokens.
    """

    layout = "chw"  # of the prediction, for `equivariance_error`

    def __init__(self, grid: int | tuple[int, int] | None = None, *, pad_mode: str = "replicate"):
        super().__init__()
        self.grid = None if grid is None else sides("TokenReadout", "grid", grid)
        self.pad_mode = checked_pad_mode("TokenReadout", pad_mode)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, pad_mode={self.pad_mode!r}"

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        maps = on_grid("TokenReadout", outputs, self.grid).permute(0, 1, 4, 2, 3)
        return moved(group, g, maps, self.pad_mode).mean(1)


class MaskReadout(nn.Module):
    """Maps of classes, turned back to the image and averaged over samples: (B, classes, H, W).

    Without arguments for a network of dense outputs (B, S, classes, H, W). With them for tokens (B, S, L, width): a linear
    map makes of each token the classes of its patch's pixels.

    width, classes: D and the outputs of a pixel. patch: pixels along each side of a patch, or (rows, columns). grid and
    pad_mode: as in `TokenReadout`. By default each sample so has a say at each pixel, at the corners of a turned map that
    of its border; all turns see the disc inside the image.

    Raises ValueError where only some of width, classes and patch are given, and for outputs of another shape.
    """

    layout = "chw"  # of the prediction, for `equivariance_error`

    def __init__(
        self,
        width: int | None = None,
        classes: int | None = None,
        patch: int | tuple[int, int] | None = None,
        *,
        grid: int | tuple[int, int] | None = None,
        pad_mode: str = "replicate",
    ):
        super().__init__()
        owner, given = "MaskReadout", (width, classes, patch)
        self.head: nn.Linear | None = None
        if width is not None and classes is not None and patch is not None:
            width, classes = check_counts(owner, width=width, classes=classes)
            self.patch = sides(owner, "patch", patch)
            self.head = nn.Linear(width, classes * math.prod(self.patch))
        elif any(x is not None for x in given):
            raise ValueError(f"{owner}: width, classes and patch must be given together, got {given}")
        self.grid = None if grid is None else sides(owner, "grid", grid)
        self.pad_mode = checked_pad_mode(owner, pad_mode)

    def extra_repr(self) -> str:
        return f"pad_mode={self.pad_mode!r}"

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        return moved(group, g, self._maps(outputs), self.pad_mode).mean(1)

    def _maps(self, outputs: Tensor) -> Tensor:
        """(B, S, classes, H, W) of each sample."""
        if self.head is None:
            if outputs.ndim != 5:
                raise ValueError(f"MaskReadout: outputs must be (B, S, classes, H, W), got {tuple(outputs.shape)}")
            return outputs
        with without_autocast(outputs.device):
            y = self.head(outputs.to(self.head.weight.dtype))
        P, Q = self.patch
        y = on_grid("MaskReadout", y, self.grid).unflatten(4, (-1, P, Q))  # (B, S, rows, columns, classes, P, Q)
        return y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def on_grid(owner: str, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(B, S, L, D) -> (B, S, rows, columns, D)."""
    if tokens.ndim != 4:
        raise ValueError(f"{owner}: outputs must be tokens (B, S, L, D), got {tuple(tokens.shape)}")
    L = tokens.shape[2]
    rows, columns = grid or (_root(L),) * 2
    if rows * columns != L:
        wanted = "a square number" if grid is None else f"{rows} x {columns} = {rows * columns}"
        raise ValueError(f"{owner}: the number of tokens must be {wanted}, got {L}")
    return tokens.unflatten(2, (rows, columns))


def _root(count: int) -> int:
    """The square root, rounded; also of a size that a program leaves open, which `math.isqrt` does not take."""
    return math.isqrt(count) if type(count) is int and not torch.compiler.is_compiling() else int(count**0.5 + 0.5)
