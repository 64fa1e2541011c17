"""Language backbones: equal to transformers on inputs_embeds, weights, what is refused. Nothing is fetched."""

import sys

import pytest
import torch

from probsym_fast.models import hf_backbone
from tests.conftest import GRADIENT, assert_near

transformers = pytest.importorskip("transformers")


def sizes(*names, **more):
    """Small sizes under the names of a config, in the order vocabulary, width, layers, heads, feed-forward."""
    return dict(zip(names, (30, 12, 2, 2, 20), strict=True)) | more


USUAL = sizes("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OF_11 = {"max_position_embeddings": 11}
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
KINDS = {  # config, arguments, whether it is causal
    "ALBERT": ("AlbertConfig", {**USUAL, **OF_11, "embedding_size": 8}, False),
    "BART": (
        "BartConfig",
        sizes("vocab_size", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", **OF_11)
        | {"decoder_layers": 1, "decoder_attention_heads": 2},
        False,
    ),
    "BERT": ("BertConfig", {**USUAL, **OF_11}, False),
    "BLOOM": ("BloomConfig", {"vocab_size": 30, "hidden_size": 12, "n_layer": 2, "n_head": 2}, True),
    "DeBERTa": (
        "DebertaV2Config",
        {**USUAL, **OF_11, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        False,
    ),
    "DistilBERT": ("DistilBertConfig", sizes("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", **OF_11), False),
    "ELECTRA": ("ElectraConfig", {**USUAL, **OF_11, "embedding_size": 8}, False),
    "Gemma 3": ("Gemma3TextConfig", {**USUAL, "num_key_value_heads": 1, "head_dim": 6}, True),
    "GPT-2": ("GPT2Config", sizes("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", n_positions=11), True),
    "GPT-NeoX": ("GPTNeoXConfig", USUAL, True),
    "Llama": ("LlamaConfig", {**USUAL, **OF_11, "num_key_value_heads": 1}, True),
    "Mistral": ("MistralConfig", {**USUAL, "num_key_value_heads": 1}, True),
    "ModernBERT": ("ModernBertConfig", {**USUAL, **OF_11, **SPECIAL}, False),
    "MPNet": ("MPNetConfig", {**USUAL, **OF_11}, False),
    "OPT": (
        "OPTConfig",
        sizes(
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", word_embed_proj_dim=8
        ),
        True,
    ),
    "Qwen2": ("Qwen2Config", {**USUAL, "num_key_value_heads": 1}, True),
    "RoBERTa": ("RobertaConfig", {**USUAL, **OF_11}, False),
    "T5": ("T5Config", sizes("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", d_kv=6), False),
}


def kind(name):
    config, arguments, causal = KINDS[name]
    return getattr(transformers, config)(**arguments), causal


CONFIGS = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}
CONFIGS["xlm-roberta"] = transformers.XLMRobertaConfig
SIZES = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def config(family, **changes):
    return CONFIGS[family](**{**SIZES, "max_position_embeddings": 11, "type_vocab_size": 2, **changes})


def saved(family, folder, **changes):
    """A folder as the hub holds one, and the model, all of whose parameters are away from 0 and 1."""
    model = transformers.AutoModel.from_config(config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + 0.1)
    model.save_pretrained(folder)
    return model.double().eval()


def tokens(*lead, L=7):
    return torch.randn(*lead, L, 12, dtype=torch.float64)


@pytest.mark.parametrize("L", [7, 9])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_transformers_on_inputs_embeds(family, L, tmp_path):
    model, x = saved(family, tmp_path), tokens(2, L=L)
    expected = model(inputs_embeds=x).last_hidden_state
    net = hf_backbone(str(tmp_path), tokens=L, read="tokens").double().eval()
    assert_near(net(x), expected)
    assert_near(hf_backbone(tmp_path, tokens=L).double().eval()(x), expected[:, 0])


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name):
    """Equal to transformers, for each read, with lengths as on their own; and every parameter gets a gradient."""
    given, causal = kind(name)
    torch.manual_seed(1)
    net = hf_backbone(given, False, tokens=7, read="tokens").double().eval()
    assert net.causal == causal and getattr(given, "use_cache", True) is True  # the given config stays as it is
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(given).double().eval()
    model = model.get_encoder() if given.is_encoder_decoder else model
    x = torch.randn(2, 3, 7, net.width, dtype=torch.float64)
    expected = model(inputs_embeds=x.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 3))
    assert expected.shape == (2, 3, 7, net.out_width)
    outputs = {"tokens": expected, "mean": expected.mean(2), "first": expected[:, :, 0], "last": expected[:, :, -1]}
    outputs["pooled"] = outputs["last" if causal else "first"]
    for net.read, y in outputs.items():
        assert_near(net(x), y)
    x[0, 1, 4:] = torch.nan  # not read
    lengths = torch.tensor([[7, 4, 7], [7, 7, 1]])
    alone = model(inputs_embeds=x[0, 1:2, :4]).last_hidden_state[0]
    for net.read, y in (("tokens", alone), ("mean", alone.mean(0)), ("first", alone[0]), ("last", alone[-1])):
        found = net(x, lengths)[0, 1]
        assert_near(found[:4] if net.read == "tokens" else found, y)
        assert net.read != "tokens" or not found[4:].any()
    y = net(x, lengths)
    (y * torch.randn_like(y)).sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    assert not any(key.endswith("word_embeddings.weight") or "pooler" in key for key in net.state_dict())


@pytest.mark.parametrize("name", ["Gemma 3", "GPT-2", "Llama", "OPT"])
def test_decoders_that_see_all_tokens(name):
    net = hf_backbone(kind(name)[0], False, tokens=7, read="tokens", bidirectional=True).double().eval()
    x = torch.randn(2, 7, net.width, dtype=torch.float64)
    y, lengths = net(x, torch.tensor([7, 4])), torch.tensor([4])
    x[:, -1] += torch.randn(net.width)
    changed = (net(x, torch.tensor([7, 4])) - y).abs().amax(-1) > 1e-9
    assert net.causal is False and changed[0].all() and not changed[1].any()
    x[:, 4] += 1
    assert_near(net(x[1:], lengths)[0], y[1])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)])
def test_any_leading_axes(lead):
    for read, shape in (("pooled", (12,)), ("tokens", (7, 12))):
        net, x = hf_backbone(config("roberta"), False, tokens=7, read=read).double().eval(), tokens(*lead)
        y = net(x)
        assert y.shape == (*lead, *shape)
        if y.numel():
            assert_near(y, net(x.reshape(-1, 7, 12)).reshape(y.shape))
        else:
            y.sum().backward()


def test_dropout_in_training_only():
    net, x = hf_backbone(config("bert", hidden_dropout_prob=0.5), False, tokens=7), tokens(2).float()
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


def test_checkpointing_computes_again_with_equal_gradients():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = hf_backbone(config("bert"), False, tokens=7, checkpointing=checkpointing).double().train()
        calls = []
        net.model.encoder.layer[0].attention.register_forward_hook(lambda *arguments, calls=calls: calls.append(0))
        torch.manual_seed(1)
        y = net(torch.ones(2, 7, 12, dtype=torch.float64))
        weight = torch.linspace(-1, 1, 12, dtype=torch.float64)  # the sum of a LayerNorm is constant
        found.append([y, *torch.autograd.grad((y * weight).sum(), list(net.parameters()))])
        assert len(calls) == 1 + checkpointing
    for a, b in zip(*found, strict=True):
        assert_near(a, b, GRADIENT)


def test_autocast_and_compile():
    net = hf_backbone(config("bert"), False, tokens=7).eval()
    x = tokens(4).float()
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.bfloat16())
    assert y.isfinite().all() and (y - expected).abs().max() < 0.1 * expected.abs().max()
    assert_near(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected)


def test_settings_of_the_config(tmp_path):
    saved("bert", tmp_path)
    net = hf_backbone(str(tmp_path), tokens=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert net.model.embeddings.dropout.p == 0 and torch.equal(net.train()(x := tokens(2).float()), net(x))
    drawn = hf_backbone(str(tmp_path), False, tokens=7, num_hidden_layers=1)
    tables = [x.model.embeddings.position_embeddings.weight for x in (drawn, net)]
    assert len(drawn.model.encoder.layer) == 1 and not torch.equal(*tables)
    with pytest.raises(ValueError, match=r"config_arguments must be entries of the config, got \['colour'\]"):
        hf_backbone(str(tmp_path), tokens=7, colour=3)


def test_weights_that_do_not_load(tmp_path):
    saved("bert", tmp_path)
    with pytest.raises(ValueError, match=r"must be complete, got no encoder\.layer\.2\..*"):
        hf_backbone(str(tmp_path), tokens=7, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"the weights of .* must load, got "):
        hf_backbone(str(tmp_path), tokens=7, hidden_size=16)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"the weights of .* must load, got "):
        hf_backbone(str(tmp_path), tokens=7)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="name_or_config must be a model of the hub or a local folder, got "):
        hf_backbone(str(tmp_path), tokens=7)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (config("bert"), {"tokens": 12}, "tokens must be 1..11, the positions of bert, got 12"),
        (config("roberta"), {"tokens": 10}, "tokens must be 1..9, the positions of roberta, got 10"),
        (config("bert"), {"tokens": 0}, "tokens must be at least 1, got 0"),
        (config("bert"), {"read": "diagonal"}, "read must be one of pooled, tokens, mean, first, last, got 'diagonal'"),
        (
            config("bert", add_cross_attention=True),
            {},
            "the model must have no cross-attention, got a config with add_",
        ),
        (transformers.CLIPTextConfig(**USUAL), {}, "the model must take inputs_embeds, got CLIPTextModel"),
        (
            transformers.LongformerConfig(**USUAL, attention_window=4),
            {},
            "the model must run on inputs_embeds only, got LongformerModel: RuntimeError: the model reads words besides",
        ),
        (
            transformers.MambaConfig(hidden_size=12, num_hidden_layers=1),
            {"bidirectional": True},
            "bidirectional must be False for MambaModel, got True",
        ),
        (transformers.BertConfig(hidden_size=7), {}, "the config must make a model, got bert: ValueError: "),
        (kind("GPT-2")[0], {"tokens": 12}, "tokens must be 1..11, the positions of gpt2, got 12"),
        (config("bert"), {"pretrained": True}, "a config must come with pretrained=False .*, got pretrained=True"),
        (
            config("bert"),
            {"hidden_size": 16},
            r"a config must come with .* no config_arguments, got .*\['hidden_size'\]",
        ),
    ],
)
def test_settings_that_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=f"^hf_backbone: {message}"):
        hf_backbone(model, **{"pretrained": False, "tokens": 7, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 8, 12), ValueError, r"x must be \(..., 7, 12\), got \(2, 8, 12\)"),
        (torch.zeros(2, 7, 11), ValueError, r"x must be \(..., 7, 12\), got \(2, 7, 11\)"),
        (torch.zeros(12), ValueError, r"x must be \(..., 7, 12\), got \(12,\)"),
        (
            torch.zeros(7, 12, dtype=torch.long),
            TypeError,
            "x must be torch.float32 as the weights are, got torch.int64",
        ),
        (
            torch.zeros(7, 12, dtype=torch.float64),
            TypeError,
            "x must be torch.float32 as the weights are, got torch.float64",
        ),
    ],
)
def test_wrong_inputs(x, error, message):
    with pytest.raises(error, match=f"^LanguageBackbone: {message}"):
        hf_backbone(config("bert"), False, tokens=7)(x)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3], TypeError, r"lengths must be a Tensor or None, got list"),
        (torch.ones(2, 1), ValueError, r"lengths must be \(2,\) int64, got \(2, 1\) torch.float32$"),
        (torch.tensor([3, 8]), ValueError, r"lengths must be 1..7, got 3..8$"),
        (torch.tensor([0, 7]), ValueError, r"lengths must be 1..7, got 0..7$"),
    ],
)
def test_wrong_lengths(lengths, error, message):
    with pytest.raises(error, match=f"^LanguageBackbone: {message}"):
        hf_backbone(config("bert"), False, tokens=7)(torch.zeros(2, 7, 12), lengths)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'transformers must be installed, .*"probsym_fast\[train\]"'
    ) as error:
        hf_backbone("roberta-base", tokens=7)
    assert error.value.name == "transformers"
