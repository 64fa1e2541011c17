"""timm's own forward pass on given tokens, for models whose parts are not known one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.backbones.on_tokens import OnTokens
from probsym_fast.models.backbones.vision import POOLED, set_constants

STEMS = ("patch_embed", "stem", "encoder.patch_embed")  # where timm's models make tokens of images


@dataclass(frozen=True)
class Stem:
    """What a model's patch embedding returns: tokens (M, L, D), such as "MLD", or on the grid (M, rows, columns, D), "MRCD".

    name: of the module. form: "MLD", "MRCD", "MDRC", or "sides" for a pair of the first and (rows, columns). width: D.
    features: form of the model's features, "MLD" with prefix tokens in front, "MRCD" or "MDRC". stride: of the image.
    """

    name: str
    form: str
    features: str
    width: int
    grid: tuple[int, int]
    stride: tuple[int, int]
    prefix: int


class Given(nn.Module):
    """In place of a patch embedding: tokens (M, L, D) in its form."""

    def __init__(self, stem: Stem):
        super().__init__()
        self.form, self.grid_size = stem.form, stem.grid

    def forward(self, x: Tensor) -> Any:
        if self.form == "sides":
            return x, self.grid_size
        if self.form == "MLD":
            return x
        x = x.unflatten(1, self.grid_size)
        return x if self.form == "MRCD" else x.permute(0, 3, 1, 2).contiguous()


class WholeVisionBackbone(OnTokens):
    """A timm model on tokens (..., L, D) in place of those of its patch embedding; built by `timm_backbone`.

    Runs `forward_features` and `forward_head` of the model, whose parameters keep their names after "model.", and computes
    all tokens. When it is built, it checks that an image and its tokens give the same features.

    tokens: L. width: D. grid: (rows, columns). prefix_tokens: number of class tokens in the features.
    """

    def __init__(self, model: Any, stem: Stem, read: str, checkpointing: bool):
        rows, columns = stem.grid
        super().__init__(rows * columns, stem.width, read)
        self.grid, self.prefix_tokens, self.features, self.stem = stem.grid, stem.prefix, stem.features, stem.name
        expected, tokens = features_of(model, stem)
        parent, _, name = stem.name.rpartition(".")
        setattr(model.get_submodule(parent), name, Given(stem))
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(0)
        self.model = model
        self._check_features(expected, tokens)
        if checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except AssertionError:
                raise ValueError(
                    f"timm_backbone: checkpointing must be False for {type(model).__name__}, got True"
                ) from None

    @torch.no_grad()
    def _check_features(self, expected: Tensor, tokens: Tensor) -> None:
        """ValueError where the tokens give other features than their image, or the features give no pooled vector."""
        model, training, kind = self.model, self.model.training, type(self.model).__name__
        found = model.eval().forward_features(tokens)
        if not (found.is_meta or torch.equal(found, expected)):
            raise ValueError(f"timm_backbone: the model must run on tokens only, got {kind}, which reads the image too")
        self.out_width = found.shape[1 if self.features == "MDRC" else -1]
        if self.read in POOLED:
            try:
                y = model.forward_head(found, pre_logits=True)
            except NotImplementedError as error:
                raise ValueError(
                    f"timm_backbone: read must be tokens or diagonal for {kind}, got {self.read!r}"
                ) from error
            if y.ndim != 2:
                got = tuple(y.shape)
                raise ValueError(f"timm_backbone: global_pool must be one that pools for read {self.read!r}, got {got}")
            self.out_width = y.shape[1]
        model.train(training)
        forget_positions(model)

    def restore(self, module: nn.Module) -> None:
        set_constants(module)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., L, D) -> "pooled" or "features" (..., C), "tokens" (..., L, C) or "diagonal" (..., grid, C).

        Raises ValueError for another shape, TypeError for integers and for a wider dtype than that of the weights.
        """
        return self.folded(self._sequences, x, next(self.model.parameters()).dtype)

    def _sequences(self, x: Tensor) -> Tensor:
        if self.read in POOLED:
            return every_derivative(
                lambda x: self.model.forward_head(self.model.forward_features(x), pre_logits=True), x
            )
        y = every_derivative(self.model.forward_features, x)
        if self.features == "MLD":
            y = y[:, self.prefix_tokens :]
        else:
            y = y.flatten(1, 2) if self.features == "MRCD" else y.flatten(2).transpose(1, 2)
        return y if self.read == "tokens" else y[:, :: self.grid[1] + 1]


def forget_positions(model: nn.Module) -> None:
    """Those that an older timm's ConViT keeps from its first pass, and does not move to another device."""
    for module in model.modules():
        if "rel_indices" in vars(module):
            module.rel_indices = torch.zeros(1, 1, 1, 3)


def features_of(model: Any, stem: Stem | str) -> tuple[Tensor, Any]:
    """The features of an image in eval mode, and what the patch embedding made of it: for a Stem, tokens (1, L, D)."""
    name = stem if isinstance(stem, str) else stem.name
    module, seen = model.get_submodule(name), []
    parameter, training = next(model.parameters()), model.training
    size = _image(model, module)
    if isinstance(stem, Stem):
        size = stem.grid[0] * stem.stride[0], stem.grid[1] * stem.stride[1]
    channels = getattr(model, "in_chans", None) or model.pretrained_cfg["input_size"][0]
    image = torch.linspace(-1, 1, channels * size[0] * size[1]).mul(1e4).sin().view(1, channels, *size).to(parameter)
    handle = module.register_forward_hook(lambda _, given, made: seen.append((given[0] is image, made)))
    try:
        with torch.no_grad():
            features = model.eval().forward_features(image)
    finally:
        handle.remove()
        model.train(training)
    if len(seen) != 1 or not seen[0][0]:
        raise ValueError("its patch embedding does not take the image")
    made = seen[0][1]
    if isinstance(stem, Stem):
        made = made[0] if stem.form == "sides" else made
        made = made.permute(0, 2, 3, 1) if stem.form == "MDRC" else made
        made = made if made.ndim == 3 else made.flatten(1, 2)
    return features, made


def stem_of(model: Any) -> Stem | str:
    """The model's stem, or why it has none that tokens could replace."""
    kind = type(model).__name__
    modules = dict(model.named_modules())
    name = next((name for name in STEMS if name in modules), None)
    if name is None or not callable(getattr(model, "forward_features", None)):
        return f"{kind} has no patch embedding"
    try:
        features, made = features_of(model, name)
    except Exception as error:  # whatever the model does not find in a plain image
        return f"{kind} does not run on a plain image: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    owner = model.get_submodule(name.rpartition(".")[0])
    form, grid, width = _form(made, owner, modules[name])
    if not form:
        return f"{kind} makes no plain tokens of an image"
    shape, L = tuple(features.shape) if isinstance(features, Tensor) else (), grid[0] * grid[1]
    if len(shape) == 3 and 0 <= shape[1] - L <= 1:
        found = "MLD"
    elif len(shape) == 4 and grid in (shape[1:3], shape[2:]):
        found = "MRCD" if grid == shape[1:3] else "MDRC"
    else:
        return f"{kind} does not keep its tokens"
    size = _image(model, modules[name])
    stride = size[0] // grid[0], size[1] // grid[1]
    return Stem(name, form, found, width, grid, stride, shape[1] - L if found == "MLD" else 0)


def _image(model: Any, module: Any) -> tuple[int, int]:
    """(height, width) of its images."""
    return getattr(module, "img_size", None) or tuple(model.pretrained_cfg["input_size"][1:])


def _form(made: Any, owner: Any, module: Any) -> tuple[str, tuple[int, int], int]:
    """Form, grid and width of a patch embedding's output; "" if it is none of those known."""
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple)
    x = made[0] if pair else made
    if not isinstance(x, Tensor) or x.ndim not in (3, 4) or (pair and x.ndim == 4):
        return "", (0, 0), 0
    if x.ndim == 3:
        grid = made[1] if pair else getattr(module, "grid_size", (0, 0))
        fits = grid[0] * grid[1] == x.shape[1]
        return ("sides" if pair else "MLD") if fits else "", (int(grid[0]), int(grid[1])), x.shape[2]
    width = getattr(owner, "embed_dim", None) or owner.num_features
    if x.shape[3] == width != x.shape[1]:
        return "MRCD", (x.shape[1], x.shape[2]), width
    return ("MDRC", (x.shape[2], x.shape[3]), width) if x.shape[1] == width != x.shape[3] else ("", (0, 0), 0)
