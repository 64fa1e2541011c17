"""Language models of Hugging Face on given tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_bool, check_count, check_type, looks_at_values
from probsym_fast.models.backbones.attention import every_derivative
from probsym_fast.models.backbones.checkpoints import train_extra
from probsym_fast.models.backbones.language_models import (
    base_model,
    checked,
    drop_words,
    positions,
    read_config,
    set_constants,
)
from probsym_fast.models.backbones.on_tokens import OnTokens

READS = ("pooled", "tokens", "mean", "first", "last")


class LanguageBackbone(OnTokens):
    """A language model on tokens (..., L, D), any leading axes, in place of embedded words; built by `hf_backbone`.

    Runs `model(inputs_embeds=x)` of transformers, whose parameters keep their names after "model.". Positions, types of
    sentences and attention are the model's. tokens: L. width: D of the inputs. out_width: that of the outputs. causal:
    whether a token sees only those before it (None: unknown, of some models built on the meta device).
    """

    def __init__(self, model: Any, tokens: int, width: int, out_width: int, read: str, causal: bool | None):
        super().__init__(tokens, width, read)
        self.model, self.out_width, self.causal = model, out_width, causal

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, out_width={self.out_width}, causal={self.causal}"

    def restore(self, module: nn.Module) -> None:
        set_constants(self.model, module)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (..., L, D) -> (..., out_width), or with read "tokens" (..., L, out_width).

        lengths (...) int64, each 1 to L: later tokens are not read, and give 0. Raises ValueError for another shape of x
        or lengths, TypeError for integers and for a wider dtype than that of the weights.
        """
        dtype = next(self.model.parameters()).dtype
        if lengths is None:
            return self.folded(self._sequences, x, dtype)
        check_type("LanguageBackbone", "lengths", lengths, Tensor, "a Tensor or None")
        if lengths.shape != x.shape[:-2] or lengths.dtype != torch.int64:
            got = f"{tuple(lengths.shape)} {lengths.dtype}"
            raise ValueError(f"LanguageBackbone: lengths must be {tuple(x.shape[:-2])} int64, got {got}")
        if looks_at_values(lengths) and not ((lengths >= 1) & (lengths <= self.tokens)).all():
            got = f"{int(lengths.min())}..{int(lengths.max())}"
            raise ValueError(f"LanguageBackbone: lengths must be 1..{self.tokens}, got {got}")
        return self.folded(self._sequences, x, dtype, lengths.flatten())

    def _sequences(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        L = self.tokens
        valid = None if lengths is None else torch.arange(L, device=x.device) < lengths[:, None]  # (M, L)
        mask = {}
        if valid is not None:
            mask, x = {"attention_mask": valid.long()}, x.masked_fill(~valid[..., None], 0)
        h = every_derivative(lambda x: self.model(inputs_embeds=x, **mask).last_hidden_state, x)
        if valid is not None:
            h = h.masked_fill(~valid[..., None], 0)
        read = self.read if self.read != "pooled" else "last" if self.causal else "first"
        if read == "first":
            return h[:, 0]
        if read == "last":
            return h[:, -1] if lengths is None else h[torch.arange(len(h), device=h.device), lengths - 1]
        if read == "mean":
            return h.mean(1) if lengths is None else h.sum(1) / lengths[:, None].to(h.dtype)
        return h


def hf_backbone(
    name_or_config: Any,
    pretrained: bool = True,
    *,
    tokens: int,
    read: Literal["pooled", "tokens", "mean", "first", "last"] = "pooled",
    bidirectional: bool = False,
    checkpointing: bool = False,
    **config_arguments: Any,
) -> LanguageBackbone:
    """A transformer of Hugging Face on given tokens (..., L, D), any leading axes, in place of embedded words.

    Encoders (BERT, RoBERTa, DeBERTa, ModernBERT, ...), decoders (GPT-2, Llama, Mistral, Qwen2, ...) and the encoders of
    encoder-decoders (T5, BART): each model that takes `inputs_embeds`. It is run on them once, to check. The word
    embeddings and the model's own pooler are dropped. No token is special.

    Args:
        name_or_config: a model of the hub such as "roberta-base", a local folder of one, or a transformers config.
        pretrained: load the weights; False initialises them. A config has none.
        tokens: L, at most the model's positions, if it declares how many.
        read: "tokens" (..., L, out_width), the last states; else (..., out_width): their "mean", that of the "first" or
            "last" token, or "pooled": the first, and in a causal model the last, which alone has seen all others.
        bidirectional: let each token see all others in a decoder too, where the library can. Else a token sees those
            before it, and predictions depend on the order of the tokens in this too.
        checkpointing: in training, keep only the inputs of the layers and compute the rest again in the backward pass.
        config_arguments: entries of the config to override, such as hidden_dropout_prob; only with a name.

    Raises ValueError for models that do not run on `inputs_embeds`, with cross-attention, for too many tokens, and names or
    weights that do not load; ModuleNotFoundError without transformers. Source: Kim et al. 2023 (arXiv 2306.02866).
    """
    transformers = train_extra("hf_backbone", "transformers")
    if read not in READS:
        raise ValueError(f"hf_backbone: read must be one of {', '.join(READS)}, got {read!r}")
    tokens = check_count("hf_backbone", "tokens", tokens)
    config = read_config(transformers, name_or_config, pretrained, config_arguments)
    if check_bool("hf_backbone", "bidirectional", bidirectional):
        config.is_causal = False
        if hasattr(config, "use_bidirectional_attention"):
            config.use_bidirectional_attention = True
    if getattr(config, "add_cross_attention", False):
        raise ValueError("hf_backbone: the model must have no cross-attention, got a config with add_cross_attention")
    model = base_model(transformers, name_or_config, config, pretrained)
    width = drop_words(model)
    most = positions(model, config)
    if most is not None and tokens > most:
        raise ValueError(f"hf_backbone: tokens must be 1..{most}, the positions of {config.model_type}, got {tokens}")
    out_width, causal = checked(model, tokens, width)
    if causal is None and read == "pooled":
        raise ValueError(f"hf_backbone: read must be one of {', '.join(READS[1:])} on the meta device, got 'pooled'")
    if bidirectional and causal:
        raise ValueError(f"hf_backbone: bidirectional must be False for {type(model).__name__}, got True")
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"hf_backbone: checkpointing must be False for {type(model).__name__}, got True")
        # the newer name first: the older one raises a warning
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return LanguageBackbone(model, tokens, width, out_width, read, causal)
