"""Where the weights of vision backbones come from: timm's, local files, runs; other grids; what is refused."""

import math
import re
import sys

import pytest
import torch
from torch import nn

from probsym_fast.models import timm_backbone
from probsym_fast.models.backbones import timm as module
from tests.conftest import assert_near
from tests.models.backbones.test_vision import BEIT, SMALL, VIT, scatter

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")
layers = pytest.importorskip("timm.layers")

BOTH = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}
DROPPED = ("patch_embed.", "head.", "head_dist.")


def full(name, grid=3, **arguments):
    """timm's own model with all its parts, parameters scattered."""
    return scatter(timm.create_model(name, img_size=16 * grid, **SMALL, **arguments))


def save(state, path):
    safetensors.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def run_folder(state, folder, prefix="model.backbone."):
    """As `probsym fit` leaves one, whose model has other parts too."""
    (folder / "checkpoints").mkdir(parents=True)
    state = {prefix + name: value for name, value in state.items()}
    checkpoint = {"state_dict": state | {"model.embed.weight": torch.ones(2)}, "epoch": 3, "optimizer_states": [{}]}
    torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
    return folder


def assert_same(net, state):
    own = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    assert {name for name in state if not name.startswith(DROPPED)} == own.keys()


@pytest.mark.parametrize("name", [VIT, "deit_tiny_distilled_patch16_224", BEIT])
@pytest.mark.parametrize("form", ["a.safetensors", "a.pth", "state_dict", "model"])
def test_local_weights(tmp_path, name, form):
    state = full(name).state_dict()
    if form in ("state_dict", "model"):
        path = save({form: state, "epoch": 3}, tmp_path / "a.pt")
    else:
        path = save(state, tmp_path / form)
    assert_same(timm_backbone(name, grid=3, weights=path, **SMALL), state)
    assert_same(timm_backbone(name, grid=3, weights=str(path), **SMALL), state)


@pytest.mark.parametrize("prefix", ["model.backbone.", "model.backbone._orig_mod."])
def test_weights_of_a_run(tmp_path, prefix):
    net = scatter(timm_backbone(VIT, grid=3, **SMALL))
    folder = run_folder(net.state_dict(), tmp_path / "run", prefix)
    for path in (folder, folder / "checkpoints" / "best.ckpt"):
        assert_same(timm_backbone(VIT, grid=3, weights=path, **SMALL), net.state_dict())


def test_weights_for_another_read(tmp_path):
    state = full(VIT, global_pool="avg").state_dict()
    path = save(state, tmp_path / "a.safetensors")
    net = timm_backbone(VIT, grid=3, weights=path, read="tokens", global_pool="avg", **SMALL)
    assert "fc_norm.weight" in state and "fc_norm.weight" not in net.state_dict()
    torch.save(net.state_dict(), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"with missing fc_norm.bias, fc_norm.weight$"):
        timm_backbone(VIT, grid=3, weights=tmp_path / "b.pt", global_pool="avg", **SMALL)


@pytest.mark.parametrize(
    ("name", "arguments"), [(VIT, {"reg_tokens": 2}), (VIT, {"no_embed_class": True}), (BEIT, BOTH)]
)
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_another_grid_as_timm_resizes(tmp_path, name, arguments, grid):
    model = full(name, **arguments)
    path = save(model.state_dict(), tmp_path / "a.safetensors")
    model.set_input_size(16 * grid)
    for given in ({"weights": path}, {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}):
        net = timm_backbone(name, grid=grid, **given, **SMALL, **arguments)
        assert net.tokens == grid**2 and net.grid == (grid, grid)
        for key, value in net.state_dict().items():
            assert_near(value, model.state_dict()[key])
    model.patch_embed = nn.Identity()
    x = torch.randn(2, grid**2, 12)
    assert_near(net.eval()(x), model.eval().forward_head(model.forward_features(x), pre_logits=True))


def test_positions_along_the_sequence(tmp_path):
    model = full(VIT)
    path = save(model.state_dict(), tmp_path / "a.safetensors")
    ramp = torch.arange(9.0)[None, :, None].expand(1, 9, 12)
    model.pos_embed.data[:, 1:] = ramp
    ramped = save(model.state_dict(), tmp_path / "b.safetensors")
    same = timm_backbone(VIT, tokens=9, weights=path, **SMALL)
    assert same.grid is None and torch.equal(same.pos_embed[:, 1:], safetensors.load_file(path)["pos_embed"][:, 1:])
    net = timm_backbone(VIT, tokens=17, weights=ramped, **SMALL)
    line = net.pos_embed[0, 1:].detach()
    assert line.shape == (17, 12) and torch.equal(net.pos_embed[:, 0], model.pos_embed[:, 0])
    assert_near(line, line[:, :1].expand(17, 12))
    assert (line[:, 0].diff() > 0).all() and abs(line[8, 0] - 4) < 0.02  # rises from token to token, 4 in the middle
    fewer = timm_backbone(VIT, tokens=3, weights=ramped, **SMALL).pos_embed[0, 1:, 0]
    assert_near(fewer, torch.tensor([1.0, 4.0, 7.0]), {torch.float32: 0.06})


def test_timm_positions_along_the_sequence(tmp_path):
    model = full(VIT, grid=14)
    path = save(model.state_dict(), tmp_path / "a.safetensors")
    net = timm_backbone(VIT, True, tokens=50, pretrained_cfg_overlay={"file": str(path)}, **SMALL)
    line = model.pos_embed.detach()[:, 1:].mT[:, :, None]  # (1, D, 1, 196)
    expected = nn.functional.interpolate(line, (1, 50), mode="bicubic", antialias=True)[:, :, 0].mT
    assert_near(net.pos_embed, torch.cat([model.pos_embed[:, :1], expected], 1))
    assert net(torch.randn(2, 50, 12)).shape == (2, 12)


def test_positions_of_a_sequence_drawn_anew():
    net = timm_backbone(VIT, tokens=50, **SMALL)
    assert net.pos_embed.shape == (1, 51, 12) and 0.015 < net.pos_embed.std() < 0.025
    assert net(torch.randn(2, 50, 12)).shape == (2, 12)
    assert timm_backbone(BEIT, tokens=9, read="diagonal", **SMALL)(torch.randn(2, 9, 12)).shape == (2, 3, 12)


def test_pretrained_goes_to_timm(monkeypatch):
    create, calls = timm.create_model, []

    def created(name, **arguments):
        calls.append((name, dict(arguments)))
        return create(name, **{**arguments, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", created)
    timm_backbone(f"{VIT}.augreg_in21k", pretrained=True, grid=5, drop_path_rate=0.1, **SMALL)
    arguments = {"drop_path_rate": 0.1, **SMALL}
    assert calls[-1] == (f"{VIT}.augreg_in21k", {"pretrained": True, "img_size": 80, **arguments})
    assert all(not call[1].get("pretrained") for call in calls[:-1])


def test_timm_weights_that_do_not_fit_are_refused(tmp_path):
    path = save(full(VIT).state_dict(), tmp_path / "a.safetensors")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "grid": 3}
    for changed in ({"depth": 3}, {"depth": 1}, {"embed_dim": 14}, {"global_pool": "avg"}):
        with pytest.raises(
            ValueError, match=rf"^timm_backbone: {VIT} must load \(a local file: weights=path\), got Runtime"
        ):
            timm_backbone(VIT, **given, **{**SMALL, **changed})
    given["pretrained_cfg_overlay"] = {"file": str(tmp_path / "none.safetensors")}
    with pytest.raises(ValueError, match=r"must load .*, got FileNotFoundError"):
        timm_backbone(VIT, **given, **SMALL)


def refused(message, path, name=VIT, error=ValueError, **arguments):
    with pytest.raises(error, match=message):
        timm_backbone(name, weights=path, **{"grid": 3, **SMALL, **arguments})


def test_weights_that_do_not_fit(tmp_path):
    path = save(full(VIT).state_dict(), tmp_path / "a.safetensors")
    refused(
        "weights must hold the backbone's names, .* with missing blocks.2.attn.proj.bias, .* and 7 more$", path, depth=3
    )
    refused("with unexpected blocks.1.attn.proj.bias, .* and 7 more$", path, depth=1)
    refused("with missing .*ls1.gamma.*, blocks.1.ls2.gamma$", path, init_values=1.0)
    shapes = re.escape("weights must hold cls_token of shape (1, 1, 14), got (1, 1, 12) in ")
    refused(shapes, path, embed_dim=14)
    refused(re.escape("hold blocks.0.mlp.fc1.weight of shape (24, 12), got (48, 12)"), path, mlp_ratio=2)
    refused(re.escape("hold pos_embed of shape (1, 4, 12), got (1, 10, 12)"), path, grid=2, no_embed_class=True)
    sequence = timm_backbone(VIT, tokens=7, **SMALL).state_dict()
    refused(re.escape("hold pos_embed of shape (1, 5, 12), got (1, 8, 12)"), save(sequence, tmp_path / "b.pt"), grid=2)
    state = timm_backbone(BEIT, grid=3, **SMALL).state_dict()
    state["blocks.0.attn.relative_position_bias_table"] = torch.zeros(30, 2)
    message = re.escape("relative_position_bias_table of shape (28, 2), got (30, 2)")
    refused(message, save(state, tmp_path / "c.pt"), BEIT)


def test_values_that_are_no_weights(tmp_path):
    state, path = full(VIT).state_dict(), tmp_path / "a.pt"
    first, second = "pos_embed", "blocks.1.mlp.fc1.bias"
    for value, got in ((state[first].int(), "int32"), (state[first].cfloat(), "complex64"), (state[first] > 0, "bool")):
        save({**state, second: state[second].int(), first: value}, path)
        refused(rf"weights must be floating point, got {first} of torch.{got} in .*a.pt$", path)
        refused(
            rf"weights must be floating point, got {first} of torch.{got} in .*a.pt$", path, grid=2
        )  # not resampled first
    for wrong in (math.nan, math.inf, 1e300):  # the last is infinite in float32
        value = state[second].double()
        value[3:5] = wrong
        save({**state, second: value}, path)
        refused(rf"weights must be finite in torch.float32, got {second} with 2 of 48 NaN or infinite in .*a.pt$", path)
    save({**state, "head.bias": torch.full((3,), math.nan)}, path)  # not read
    assert_same(timm_backbone(VIT, grid=3, weights=path, **SMALL), state)


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "_orig_mod.module.", "module.model.backbone."])
def test_weights_of_parallel_training(tmp_path, prefix):
    state = timm_backbone(VIT, grid=3, **SMALL).state_dict()
    parallel = {prefix + name: value for name, value in state.items()}
    for content in (parallel, {"model": parallel}):
        net = timm_backbone(VIT, grid=3, weights=save(content, tmp_path / "a.pt"), **SMALL)
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    some = {prefix + name if name == "cls_token" else name: value for name, value in state.items()}
    if prefix == "module.":
        refused("with missing cls_token, unexpected module.cls_token$", save(some, tmp_path / "b.pt"))


def test_a_square_sequence_counts_as_a_plane(tmp_path):
    net = scatter(timm_backbone(VIT, tokens=9, **SMALL))
    path = save(net.state_dict(), tmp_path / "a.pt")
    plane = layers.resample_abs_pos_embed(net.pos_embed.data, new_size=[2, 2], old_size=[3, 3])
    assert_near(timm_backbone(VIT, grid=2, weights=path, **SMALL).pos_embed, plane)


def test_files_that_are_no_weights(tmp_path):
    refused("found no file .*none.pt", tmp_path / "none.pt", error=FileNotFoundError)
    refused(r"found no file .*best\.ckpt", tmp_path, error=FileNotFoundError)
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"\x00not weights")
        refused(rf"weights must be an intact checkpoint, got .*{re.escape(name)}: \w+: ", tmp_path / name)
    refused("must hold tensors by name, got .* with list", save([1], tmp_path / "b.pt"))
    refused("must hold tensors by name, got .* with dict", save({}, tmp_path / "c.pt"))
    refused("must hold tensors, got epoch of int", save({"epoch": 3}, tmp_path / "d.pt"))
    torch.save({"cls_token": nn.Linear(2, 2)}, tmp_path / "e.pt")  # code
    refused("weights must be an intact checkpoint", tmp_path / "e.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 0}, "grid must be at least 1, got 0"),
        ({"tokens": -2}, "tokens must be at least 1, got -2"),
        ({"grid": 3, "tokens": 9}, "grid or tokens must be None, got 3 and 9"),
        ({"read": "all"}, "read must be one of pooled, features, tokens, diagonal, got 'all'"),
        ({"tokens": 9, "read": "diagonal"}, "grid must be square for read 'diagonal', got 9 tokens in a sequence"),
        ({"img_size": (32, 48), "read": "diagonal"}, r"square for read 'diagonal', got \(2, 3\)"),
        ({"patch_dropout_always": True}, "patch_dropout_always must be False where patch_dropout is 0, got True"),
        ({"patch_dropout": 1.0}, r"patch_dropout must be 0 <= low <= high < 1, got \(1.0, 1.0\)"),
        ({"patch_dropout": (0.5, 0.2)}, r"patch_dropout must be 0 <= low <= high < 1, got \(0.5, 0.2\)"),
        ({"patch_dropout": 0.5, "read": "tokens"}, "patch_dropout must be 0 with read 'tokens'"),
        ({"patch_dropout": (0.0, 0.5), "read": "diagonal"}, "patch_dropout must be 0 with read 'diagonal'"),
        ({"pretrained": True, "weights": "a"}, "pretrained must be False with weights, got True and 'a'"),
        ({"num_classes": 3}, "timm_arguments must be without num_classes, .*, got .'num_classes'"),
        ({"grid": 3, "img_size": 48}, "timm_arguments must be without .*img_size, got .'img_size'"),
        ({"colour": 3}, "vit_tiny_patch16_224 must take the arguments, got {'depth': 2, .*'colour': 3}: TypeError"),
        ({"global_pool": ""}, "global_pool must be given for read 'pooled', got ''"),
        ({"depth": 0}, "it has no blocks"),
        ({"name": "vit_tny_patch16_224"}, "got 'vit_tny_patch16_224'; did you mean vit_tiny_patch16_224"),
        (
            {"name": f"{VIT}.nonsense"},
            f"must be {VIT}, with or without a tag of timm, got '{VIT}.nonsense'; did you mean {VIT}.augreg_in21k, {VIT}.aug",
        ),
        ({"name": f"{VIT}."}, f"got '{VIT}.'; did you mean {VIT}.augreg_in21k"),
        ({"name": ""}, "name must be a model of timm, got ''"),
        ({"patch_dropout": (0.1, 0.2, 0.3)}, r"patch_dropout must be a number or two, got 3: \(0.1, 0.2, 0.3\)"),
        ({"patch_dropout": []}, r"patch_dropout must be a number or two, got 0: \[\]"),
        ({"patch_dropout": math.nan}, r"patch_dropout must be 0 <= low <= high < 1, got \(nan, nan\)"),
        ({"name": BEIT, "tokens": 8}, "tokens must be a square for beit_base_patch16_224, .* got 8"),
        (
            {"name": BEIT, "patch_dropout": 0.5},
            "patch_dropout must be 0 for beit_base_patch16_224, whose positions are relative, got 0.5",
        ),
    ],
)
def test_settings_that_are_refused(arguments, message):
    arguments = {"name": VIT, **SMALL, **arguments}
    with pytest.raises(ValueError, match=f"^timm_backbone: .*{message}"):
        timm_backbone(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": "4"}, "grid must be an int, got str '4'"),
        ({"grid": 2.5}, "grid must be an int, got float 2.5"),
        ({"tokens": True}, "tokens must be an int, got bool True"),
        ({"patch_dropout": "0.5"}, "patch_dropout must be a number or two, got '0.5'"),
        ({"patch_dropout": (0.1, "0.5")}, r"patch_dropout must be a number or two, got \(0.1, '0.5'\)"),
        ({"patch_dropout": True}, "patch_dropout must be a number or two, got True"),
        ({"name": None}, "name must be a str, got NoneType None"),
    ],
)
def test_settings_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=f"^timm_backbone: {message}$"):
        timm_backbone(**{"name": VIT, **SMALL, **arguments})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "ResNet has no patch embedding"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer does not keep its tokens"),
        ("naflexvit_base_patch16_gap", "NaFlexVit has no patch embedding"),
    ],
)
def test_unsuitable_models(name, reason):
    message = f"^timm_backbone: name must be a model of timm that runs on tokens, got '{name}': {reason}$"
    with pytest.raises(ValueError, match=message):
        timm_backbone(name)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'timm must be installed, .* pip install "probsym_fast\[train\]"'
    ) as e:
        timm_backbone(VIT)
    assert e.value.name == "timm"


def test_native_grid_and_arguments():
    net = timm_backbone(VIT, img_size=(32, 48), **SMALL)
    assert net.tokens == 6 and net.grid == (2, 3) and net.width == 12 and math.prod(net.grid) == net.tokens
    assert not any(name.startswith(("patch_embed", "head.")) for name in net.state_dict())
    assert module.timm_backbone is timm_backbone and timm_backbone(VIT, **SMALL).grid == (14, 14)
