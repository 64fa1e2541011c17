"""`probsym profile`: what it writes, weights of a checkpoint, profiles that are joined."""

import json
import re

import pytest
import torch

import probsym_fast as psf
from probsym_fast import cli, tasks
from probsym_fast.distributions import Identity
from probsym_fast.groups import Symmetric
from probsym_fast.ops import OPS
from probsym_fast.profiling.results import read_profiles
from tests.models.test_symmetrized import clouds
from tests.profiling.test_profile import PAIRS, N, clouds_model, graphs, model


def test_command(tmp_path, capsys):
    arguments = ["profile", "-c", "exp_classify/gin_ps", "--samples", "1", "2", "--chunks", "all", "1"]
    arguments += ["--seconds", "0.01", "--device", "cpu", "--output", str(tmp_path / "out"), "--trace", *PAIRS]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "exp_classify/gin_ps, batch 4" in out
    assert len(re.findall(r"^ *(training|inference) ", out, re.MULTILINE)) == 8
    assert "trace.json (training step, S = 1, chunk all, backend auto, independent draws; open it in ui.perf" in out
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        "profile.json",
        "profile.pdf",
        "profile.png",
        "trace.json",
    ]
    assert cli.main(["profile", "-c", "exp_classify/gin_ps", "--samples", "0", *PAIRS]) == 1
    assert "profile: samples must be at least 1, got 0" in capsys.readouterr().err
    absent = "profile: backends must be of ('auto', 'cpu', 'reference') on cpu, got 'cuda'"
    nowhere = "profile: device must be one of ('cpu',), got 'cuda:99'"
    if len(OPS["embed"].backends("cpu")) == 1:
        absent = absent.replace("'cpu', 'ref", "'ref")
    if torch.cuda.is_available():
        nowhere = "got 'cuda:99'"
    for flags, message in ((["--backends", "cuda", "--device", "cpu"], absent), (["--device", "cuda:99"], nowhere)):
        assert cli.main(["profile", "-c", "exp_classify/gin_ps", *flags, "--output", str(tmp_path), *PAIRS]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["profile", "-c", "exp_classify/gin_ps", "--output", str(tmp_path / "file"), *PAIRS]) == 1
    told = capsys.readouterr()
    assert "File exists" in told.err and "rows ..." not in told.err
    assert cli.main(["profile", "-c", "automorphism/ps"]) == 1
    assert (
        "profile: what must be a Symmetrized or a task that trains a model, got Automorphism" in capsys.readouterr().err
    )


FIT = ["--training.epochs=1", "--training.validate_every=1", "--training.progress=false", "--samples.trials=1"]


def test_weights_of_a_checkpoint(tmp_path, capsys):
    """A run's model is profiled in its place: with a last layer that is constant its predictions do not vary."""
    run = tmp_path / "run"
    assert cli.main(["fit", "-c", "exp_classify/gin_ps", "--folder", str(run), *PAIRS, *FIT]) == 0
    path, task = run / "checkpoints" / "best.ckpt", tasks.load(str(run / "config.yaml"))
    settings = {"samples": [2], "modes": ["variance"], "device": "cpu", "repeats": 4}
    new, trained = (psf.profile(task, weights=w, **settings) for w in (None, path))
    assert (new.weights, trained.weights) == ("new", str(path))
    assert new.rows[0].variance > 0 and trained.rows[0].variance > 0
    state = torch.load(path, weights_only=True)
    names = [name for name in state["state_dict"] if name.startswith("model.backbone.")]
    last = [name for name in names if name.endswith(".weight")][-1]
    state["state_dict"][last].zero_()
    torch.save(state, constant := tmp_path / "constant.ckpt")
    assert psf.profile(task, weights=constant, **settings).rows[0].variance == 0
    capsys.readouterr()
    command = ["profile", "-c", str(run / "config.yaml"), "--modes", "variance", "--samples", "2", "--device", "cpu"]
    out = tmp_path / "out"
    assert cli.main([*command, "--weights", str(path), "--repeats", "2", "--output", str(out)]) == 0
    assert f"exp_classify/gin_ps, batch 4, weights: {path}" in capsys.readouterr().out
    (kept,) = read_profiles(out / "profile.json")
    assert kept.weights == str(path) and kept.state() == "trained" and kept.repeats == 2
    assert cli.main([*command, "--weights", str(tmp_path / "none.ckpt")]) == 1
    assert f"checkpoint: {tmp_path / 'none.ckpt'} must exist, found nothing there" in capsys.readouterr().err
    assert cli.main([*command, "--weights", str(path), "--distribution.width=16"]) == 1
    assert f"checkpoint: {path} must match the configured model, got" in capsys.readouterr().err
    with pytest.raises(
        TypeError, match=r"profile: weights must be None with a model, which has its own, got 'x\.ckpt'"
    ):
        psf.profile(model(), graphs(), weights="x.ckpt")


def test_profiles_are_joined(tmp_path, capsys):
    f, kinds = clouds_model(), ("independent", "antithetic")
    found = psf.profile(f, clouds(3, torch.float32), samples=(2, 8), draws=kinds, modes=["variance"])
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        found.save(path)
    out = tmp_path / "out"
    assert cli.main(["profile", "--join", *map(str, paths), "--output", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "experiment weights draws S = 2 S = 8 pooled".split()
    gain = found.rows[2].variance and found.rows[0].variance / found.rows[2].variance
    assert f"antithetic  {gain:.3g} +- " in lines[1] and lines[1] == lines[2]
    assert read_profiles(out / "averages.json") == [found, found]
    assert (out / "averages.png").read_bytes().startswith(b"\x89PNG") and (out / "averages.pdf").is_file()
    psf.profile(model(Identity(Symmetric(N))), graphs(), samples=[1], modes=["variance"]).save(tmp_path / "zero.json")
    assert cli.main(["profile", "--join", str(tmp_path / "zero.json"), "--output", str(tmp_path / "zero")]) == 0
    capsys.readouterr()
    assert cli.main(["profile", "--join", str(tmp_path / "d.json"), "--output", str(out)]) == 1
    assert "d.json must exist" in capsys.readouterr().err
    psf.profile(f, clouds(3, torch.float32), samples=[1], chunks=[None, 1], modes=["variance"]).save(paths[0])
    assert cli.main(["profile", "--join", str(paths[0]), "--output", str(out)]) == 1
    told = capsys.readouterr().err
    assert (
        "model must have variances of one mode, backend and chunk, got ['variance auto 1', 'variance auto None']"
        in told
    )
    assert cli.main(["profile", "--join", str(paths[1]), "--seed", "2", "--output", str(out)]) == 1
    assert "--join must be used without configuration keys, got --seed 2" in capsys.readouterr().err
    for flags in (["--trace"], ["--modes", "training", "--repeats", "16"], ["--weights", "x.ckpt"]):
        assert cli.main(["profile", "--join", str(paths[1]), *flags, "--output", str(tmp_path / "no")]) == 1
        names = " ".join(x for x in flags if x.startswith("--"))
        assert f"--join must be used without measurement options, got {names}\n" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_two_predictions_tell_no_error(tmp_path, capsys):
    settings = {"samples": [2], "draws": ["independent", "antithetic"], "modes": ["variance"], "repeats": 2}
    found = psf.profile(clouds_model(), clouds(3, torch.float32), **settings)
    assert [row.error for row in found.rows] == [None, None] and found.rows[1].gain > 0
    found.save(tmp_path / "two.json")
    assert cli.main(["profile", "--join", str(tmp_path / "two.json"), "--output", str(tmp_path / "out")]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["model", "own", "weights", "antithetic", f"{found.rows[1].gain:.3g}", "-"]
    assert (tmp_path / "out" / "averages.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: [], "got an empty list"),
        (lambda whole: [1], "got TypeError: expected keys and values, got int"),
        (lambda whole: {}, "got KeyError: 'rows'"),
        (lambda whole: whole | {"rows": [5]}, "got TypeError"),
        (lambda whole: whole | {"rows": [whole["rows"][0] | {"samples": "2"}]}, "samples of a row must be .*got '2'"),
        (lambda whole: whole | {"rows": [whole["rows"][0] | {"draws": "mirrored"}]}, "kind must be one of"),
    ],
)
def test_what_is_no_profile_is_not_joined(tmp_path, capsys, change, message):
    path = tmp_path / "some.json"
    found = psf.profile(clouds_model(), clouds(3, torch.float32), samples=[1], modes=["variance"], repeats=2)
    path.write_text(json.dumps(change(json.loads(found.json()))))
    assert cli.main(["profile", "--join", str(path), "--output", str(tmp_path / "out")]) == 1
    assert re.search(f"profile: {path} must hold a profile, .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_chunks_of_the_command_are_numbers_or_words(capsys):
    with pytest.raises(SystemExit):
        cli.main(["profile", "-c", "exp_classify/gin_ps", "--chunks", "4", "foo"])
    assert "argument --chunks: must be a number, auto or all, got 'foo'" in capsys.readouterr().err
