"""Hugging Face language transformers, BERT and RoBERTa, on given tokens."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_int
from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.backbones.checkpoints import train_extra

FAMILIES = ("bert", "roberta", "xlm-roberta")


class LanguageBackbone(nn.Module):
    """The encoder of a BERT on tokens (..., L, D), any leading axes; built by `hf_backbone`.

    `h = LayerNorm(x + types + positions)`, dropout, then the encoder. positions (L, D) and types (D,): the rows of the
    model's tables for L tokens of the first type.
    """

    def __init__(self, model: Any, tokens: int, read: str):
        super().__init__()
        self.tokens, self.width, self.read = tokens, model.config.hidden_size, read
        embeddings = model.embeddings
        first = first_position(model.config)
        self.positions = nn.Parameter(embeddings.position_embeddings.weight.detach()[first : first + tokens].clone())
        self.types = nn.Parameter(embeddings.token_type_embeddings.weight.detach()[0].clone())
        self.norm, self.dropout, self.encoder = embeddings.LayerNorm, embeddings.dropout, model.encoder

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, width={self.width}, read={self.read!r}"

    def forward(self, x: Tensor) -> Tensor:
        """x (..., L, D) -> "pooled" (..., D) or "tokens" (..., L, D).

        Raises ValueError for another shape, TypeError for integers and for a wider dtype than that of the weights.
        """
        if x.ndim < 2 or x.shape[-2:] != (self.tokens, self.width):
            raise ValueError(f"LanguageBackbone: x must be (..., {self.tokens}, {self.width}), got {tuple(x.shape)}")
        dtype = self.types.dtype
        fits = torch.is_autocast_enabled(x.device.type) or torch.promote_types(x.dtype, dtype) == dtype
        if not x.is_floating_point() or not fits:
            raise TypeError(f"LanguageBackbone: x must be {dtype} as the weights are, got {x.dtype}")
        lead, M = x.shape[:-2], math.prod(x.shape[:-2])
        h = (
            x.reshape(M, self.tokens, self.width) if M else x.new_zeros(1, self.tokens, self.width)
        )  # BERT fails on 0 rows
        h = self.dropout(self.norm(h + self.types + self.positions))
        y = every_derivative(lambda h: self.encoder(h).last_hidden_state, h)[:M]
        y = y[:, 0] if self.read == "pooled" else y
        return y.reshape(*lead, *y.shape[1:])


def first_position(config: Any) -> int:
    """Index of the first token's position: RoBERTa's table starts after the padding index."""
    return 0 if config.model_type == "bert" else config.pad_token_id + 1


def hf_backbone(
    name_or_config: Any,
    pretrained: bool = True,
    *,
    tokens: int,
    read: Literal["pooled", "tokens"] = "pooled",
    checkpointing: bool = False,
    **config_arguments: Any,
) -> LanguageBackbone:
    """BERT, RoBERTa or XLM-RoBERTa of Hugging Face on given tokens (..., L, D), any leading axes.

    Skips the word embeddings, and adds positions and the type of the first sentence. No token is special, and every token
    attends to every other.

    Args:
        name_or_config: a model of the hub such as "roberta-base", a local folder of one, or a transformers config.
        pretrained: load the weights; False initialises them. A config has none.
        tokens: L, at most the model's positions (512 in both families' base models).
        read: "tokens" (..., L, D), the last states; "pooled" (..., D), the last state of the first token. The linear map
            and tanh of the models' own pooler, which only BERT is pretrained with, are dropped.
        checkpointing: in training, keep only the inputs of the layers and compute the rest again in the backward pass.
        config_arguments: entries of the config to override, such as hidden_dropout_prob; only with a name.

    Raises ValueError for other architectures, decoders, too many tokens, and names or weights that do not load;
    ModuleNotFoundError without transformers. Source: Kim et al. 2023 (arXiv 2306.02866).
    """
    transformers = train_extra("hf_backbone", "transformers")
    config = _config(transformers, name_or_config, pretrained, config_arguments)
    if config.model_type not in FAMILIES:
        raise ValueError(f"hf_backbone: the model must be one of {', '.join(FAMILIES)}, got {config.model_type}")
    if config.is_decoder or config.add_cross_attention:
        raise ValueError(
            "hf_backbone: the model must be an encoder, got a config with is_decoder or add_cross_attention"
        )
    if read not in ("pooled", "tokens"):
        raise ValueError(f"hf_backbone: read must be one of pooled, tokens, got {read!r}")
    most, tokens = config.max_position_embeddings - first_position(config), check_int("hf_backbone", "tokens", tokens)
    if not 1 <= tokens <= most:
        raise ValueError(f"hf_backbone: tokens must be 1..{most}, the positions of {config.model_type}, got {tokens}")
    if pretrained:
        model = _loaded(transformers, name_or_config, config)
    else:
        model = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    if checkpointing:
        # the newer name first: the older one raises a warning
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return LanguageBackbone(model, tokens, read)


def _config(transformers: Any, name_or_config: Any, pretrained: bool, arguments: dict[str, Any]) -> Any:
    if isinstance(name_or_config, transformers.PretrainedConfig):
        if pretrained or arguments:
            got = f"pretrained={pretrained} and {sorted(arguments)}"
            raise ValueError(
                f"hf_backbone: a config must come with pretrained=False and no config_arguments, got {got}"
            )
        return name_or_config
    try:
        config, unused = transformers.AutoConfig.from_pretrained(name_or_config, return_unused_kwargs=True, **arguments)
    except Exception as error:  # from the hub, its transport or JSON
        raise ValueError(
            f"hf_backbone: name_or_config must be a model of the hub or a local folder, got {name_or_config!r}: {error}"
        ) from error
    if unused:
        raise ValueError(f"hf_backbone: config_arguments must be entries of the config, got {sorted(unused)}")
    return config


def _loaded(transformers: Any, name: Any, config: Any) -> Any:
    """The model with its weights; transformers alone would initialise missing ones."""
    try:
        model, report = transformers.AutoModel.from_pretrained(
            name, config=config, add_pooling_layer=False, output_loading_info=True
        )
    except Exception as error:  # from the hub, its transport, safetensors or torch
        raise ValueError(
            f"hf_backbone: the weights of {name!r} must load, got {type(error).__name__}: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"hf_backbone: the weights of {name!r} must be complete, got no {', '.join(missing[:5])}")
    return model
