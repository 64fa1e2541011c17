"""Models of Hugging Face that run on given tokens in place of embedded words."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast.models.backbones.on_tokens import constants

MARK = "_is_hf_initialized"  # transformers' own, on tensors


def read_config(transformers: Any, name_or_config: Any, pretrained: bool, arguments: dict[str, Any]) -> Any:
    """The config of a name or a copy of one, with the arguments."""
    if isinstance(name_or_config, transformers.PretrainedConfig):
        if pretrained or arguments:
            got = f"pretrained={pretrained} and {sorted(arguments)}"
            raise ValueError(
                f"hf_backbone: a config must come with pretrained=False and no config_arguments, got {got}"
            )
        config, unused = copy.deepcopy(name_or_config), dict[str, Any]()
    else:
        config, unused = _found_config(transformers, name_or_config, arguments)
    if unused:
        raise ValueError(f"hf_backbone: config_arguments must be entries of the config, got {sorted(unused)}")
    if getattr(config, "use_cache", False):  # of keys and values, for the next words
        config.use_cache = False
    return config


def _found_config(transformers: Any, name: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        return transformers.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **arguments)
    except Exception as error:  # from the hub, its transport or JSON
        raise ValueError(
            f"hf_backbone: name_or_config must be a model of the hub or a local folder, got {name!r}: {error}"
        ) from error


def base_model(transformers: Any, name: Any, config: Any, pretrained: bool) -> Any:
    """The model, of an encoder-decoder the encoder, without its pooler."""
    if pretrained:
        model = _loaded(transformers, name, config)
    else:
        try:
            model = transformers.AutoModel.from_config(config)
        except Exception as error:  # sizes that do not fit, or a config without a base model
            text = f"{type(error).__name__}: {error}"
            raise ValueError(f"hf_backbone: the config must make a model, got {config.model_type}: {text}") from error
    if config.is_encoder_decoder:
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"hf_backbone: the model must take inputs_embeds, got {type(model).__name__}")
    return model


def _loaded(transformers: Any, name: Any, config: Any) -> Any:
    """The model with its weights; transformers alone would initialise missing ones."""
    try:
        model, report = transformers.AutoModel.from_pretrained(name, config=config, output_loading_info=True)
    except Exception as error:  # from the hub, its transport, safetensors or torch
        raise ValueError(
            f"hf_backbone: the weights of {name!r} must load, got {type(error).__name__}: {error}"
        ) from error
    dropped = ("pooler.", "decoder.") if config.is_encoder_decoder else ("pooler.",)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith(dropped)):
        raise ValueError(f"hf_backbone: the weights of {name!r} must be complete, got no {', '.join(missing[:5])}")
    return model


class _NoWords(nn.Module):
    """In place of the word embeddings."""

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("the model reads words besides inputs_embeds")


def drop_words(model: Any) -> int:
    """Drops the word embeddings and returns their width."""
    try:
        words = model.get_input_embeddings()
        width = words.weight.shape[1]
        model.set_input_embeddings(_NoWords())
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"hf_backbone: the model must embed words, got {type(model).__name__}: {error}") from error
    return width


def positions(model: Any, config: Any) -> int | None:
    """How many tokens the model has positions for, if it says so. RoBERTa's table starts after the padding index."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    tables = [x for key, x in model.named_modules() if "position" in key and isinstance(x, nn.Embedding)]
    return most - max((x.padding_idx + 1 for x in tables if x.padding_idx is not None), default=0)


@torch.no_grad()
def checked(model: Any, tokens: int, width: int) -> tuple[int, bool | None]:
    """Runs the model, in eval mode: its output's width, and whether it is causal. Raises ValueError if it cannot run.

    A model on the meta device has no values, and some look at them: there the config and the attention say it, else None.
    """
    parameter, training, name = next(model.parameters()), model.training, type(model).__name__
    if parameter.is_meta:
        says = [part.is_causal for part in model.modules() if hasattr(part, "is_causal")]
        return model.config.hidden_size, (any(says) and getattr(model.config, "is_causal", True)) if says else None
    x = torch.linspace(-1, 1, tokens * width).sin().view(1, tokens, width)
    y = x.clone()
    y[:, -1] = y[:, -1].flip(-1) + 1
    outputs = []
    for some in (x, y):
        try:
            output = model.eval()(inputs_embeds=some.to(parameter)).last_hidden_state
        except Exception as error:  # anything that the model needs and lacks
            text = f"{type(error).__name__}: {error}"
            raise ValueError(f"hf_backbone: the model must run on inputs_embeds only, got {name}: {text}") from error
        outputs.append(output[:, :-1])
    model.train(training)
    if output.shape[:2] != (1, tokens):
        raise ValueError(f"hf_backbone: the model must return one state a token, got {name} with {tuple(output.shape)}")
    return output.shape[-1], torch.equal(*outputs)


@torch.no_grad()
def set_constants(model: Any, module: nn.Module) -> None:
    """Sets the buffers of a part of the model that no state dict holds, such as rotary frequencies.

    transformers does so in `_init_weights`, which leaves alone what it has marked as initialised.
    """
    marked = [x for x in (*model.parameters(), *model.buffers()) if not hasattr(x, MARK)]
    buffers = {id(x) for x in constants(module).values()}
    try:
        for x in marked:
            if id(x) not in buffers:
                setattr(x, MARK, True)
        model._init_weights(module)
    finally:
        for x in marked:
            if hasattr(x, MARK):
                delattr(x, MARK)
