"""Language backbones: equal to transformers on inputs_embeds, weights, what is refused. Nothing is fetched."""

import sys

import pytest
import torch

from probsym_fast.models import hf_backbone
from tests.conftest import GRADIENT, assert_near

transformers = pytest.importorskip("transformers")

CONFIGS = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}
CONFIGS["xlm-roberta"] = transformers.XLMRobertaConfig
SIZES = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
POSITIONS = {"bert": 0, "roberta": 2, "xlm-roberta": 2}  # place of the first token, with padding 1 in the RoBERTas


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
    first = POSITIONS[family]
    table = model.embeddings.position_embeddings.weight[first : first + L]
    assert torch.equal(net.positions, table) and torch.equal(
        net.types, model.embeddings.token_type_embeddings.weight[0]
    )
    assert_near(hf_backbone(tmp_path, tokens=L).double().eval()(x), expected[:, 0])


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_gets_a_gradient(family):
    for read in ("pooled", "tokens"):
        net = hf_backbone(config(family), False, tokens=7, read=read).double().eval()
        y = net(tokens(3))
        (y * torch.randn_like(y)).sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert not any("word" in name or "pooler" in name for name in net.state_dict())


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
        net.encoder.layer[0].attention.register_forward_hook(lambda *arguments, calls=calls: calls.append(0))
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
    assert net.dropout.p == 0 and torch.equal(net.train()(x := tokens(2).float()), net(x))
    drawn = hf_backbone(str(tmp_path), False, tokens=7, num_hidden_layers=1)
    assert len(drawn.encoder.layer) == 1 and not torch.equal(drawn.positions, net.positions)
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
        (config("bert"), {"tokens": 0}, "tokens must be 1..11, the positions of bert, got 0"),
        (config("bert"), {"read": "diagonal"}, "read must be one of pooled, tokens, got 'diagonal'"),
        (config("bert", is_decoder=True), {}, "the model must be an encoder, got a config with is_decoder"),
        (transformers.GPT2Config(), {}, "the model must be one of bert, roberta, xlm-roberta, got gpt2"),
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


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'transformers must be installed, .*"probsym_fast\[train\]"'
    ) as error:
        hf_backbone("roberta-base", tokens=7)
    assert error.value.name == "transformers"
