"""Configurations and the command line: what is refused, and how."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from probsym_fast import cli, tasks
from probsym_fast.data._store import save_arrays
from probsym_fast.tasks import configuration
from probsym_fast.tasks.exp_classify import ExpClassifyConfig
from probsym_fast.tasks.nbody import Backbone
from probsym_fast.tasks.training import run_folder


def refused(capsys, *arguments: str) -> str:
    assert cli.main(arguments) == 1
    return capsys.readouterr().err


def test_all_rows_of_the_paper_have_a_file():
    names = set(configuration.available())
    for symmetry in ("S5xO3", "S5xSO3", "O3", "SO3", "S5"):
        for method in ("ps", "ga", "canonical"):
            assert f"nbody/transformer_{symmetry}_{method}" in names
            if symmetry in ("O3", "SO3"):
                assert f"nbody/gnn_{symmetry}_{method}" in names


def test_overrides_and_round_trip(tmp_path):
    task = tasks.load("nbody/gnn_O3_ps", ["--training.lr", "0.5", "--samples.train=3", "--seed", "7"])
    assert (task.config.training.lr, task.config.samples.train, task.config.seed) == (0.5, 3, 7)
    assert task.config.name == "gnn_O3_ps"
    (tmp_path / "again.yaml").write_text(configuration.dump(task.config))
    assert tasks.load(str(tmp_path / "again.yaml")).config == task.config


def test_default_run_folders_are_the_packaged_names(tmp_path):
    """No two configurations share one; a file of one's own is named by its task and itself."""
    kinds = {
        name: tasks.TASKS[configuration.read(configuration.find(name))["task"]][0] for name in configuration.available()
    }
    for name, kind in kinds.items():
        path = configuration.find(name)
        values = configuration.read(path)
        config = configuration.parse(kind, values | {"name": configuration.name_of(path, values["task"])}, [])
        assert run_folder(config) == Path("runs") / name / f"seed{config.seed}"
    task = tasks.load("pattern/small_ps", ["--seed=2"])
    assert task.config.name == "pattern/small_ps" and run_folder(task.config) == Path("runs/pattern/small_ps/seed2")
    (own := tmp_path / "own.yaml").write_text("task: vision\n")
    assert run_folder(tasks.load(str(own)).config) == Path("runs/vision/own/seed42")
    own.write_text(configuration.dump(task.config))  # as a run's folder keeps it
    assert run_folder(tasks.load(str(own)).config) == Path("runs/pattern/small_ps/seed2")
    assert run_folder(tasks.load("pattern/small_ps", ["--name=mine", "--seed=3"]).config) == Path(
        "runs/vision/mine/seed3"
    )
    assert run_folder(tasks.load("pattern/small_ps", ["--folder=x"]).config) == Path("x")


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"sede": 1}, [], r"config: unknown key 'sede', expected one of .*near it: seed"),
        (
            {"training": {"learning": 1}},
            [],
            r"unknown key 'training.learning', expected one of epochs, batch",
        ),
        ({"training": 3}, [], r"config: training must hold keys and values, got 3"),
        ({"training": {"lr": "fast"}}, [], r"training.lr.*Expected a <class 'float'>. Got value: fast"),
        ({"symmetry": "O4"}, [], r"symmetry.*S5xO3.*Got value: O4"),
        ({}, ["--trainng.lr", "1"], r"unknown key 'trainng', expected one of .*near it: training"),
        ({}, ["--samples.train", "2.5"], r"samples.train.*Got value: 2.5"),
        ({}, ["--seed.deep", "1"], r"config: seed is a value, got the key 'seed.deep' below it"),
        ({"symmetry": "S5"}, [], r"config: the gnn is symmetric under permutations itself: .* got S5"),
        ({"method": "canonical"}, [], r"config: method canonical takes 1 sample, got Samples"),
    ],
)
def test_bad_configurations(tmp_path, values, flags, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"task": "nbody", **values}))
    with pytest.raises(ValueError, match=message):
        tasks.load(str(path), flags)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("seed", "-1", "in 0..4294967295, got -1"),
        ("seed", "4294967296", "in 0..4294967295, got 4294967296"),
        ("count", "0", "in 1..10000, got 0"),
        ("count", "10001", "in 1..10000, got 10001"),
        ("training.epochs", "0", "at least 1, got 0"),
        ("training.batch", "0", "at least 1, got 0"),
        ("training.validate_every", "0", "at least 1, got 0"),
        ("training.patience", "0", "at least 1, got 0"),
        ("training.lr", "0", "finite and > 0, got 0.0"),
        ("training.lr", "-.inf", "finite and > 0, got -inf"),
        ("training.lr", ".nan", "finite and > 0, got nan"),
        ("training.weight_decay", "-1", "finite and >= 0, got -1.0"),
        ("training.entropy", ".nan", "finite and >= 0, got nan"),
        ("training.precision", "bf16-true", "one of 32-true, bf16-mixed, 16-mixed, got 'bf16-true'"),
        ("training.precision", "7", "one of 32-true, bf16-mixed, 16-mixed, got '7'"),
        ("training.accelerator", "abacus", "one of auto, cpu, gpu, got 'abacus'"),
        ("training.devices", "0", 'at least 1, or "auto", got 0'),
        ("training.devices", "many", "at least 1, or \"auto\", got 'many'"),
        ("samples.train", "0", "at least 1, got 0"),
        ("samples.valid", "0", "at least 1, got 0"),
        ("samples.test", "-3", "at least 1, got -3"),
        ("samples.trials", "0", "at least 1, got 0"),
        ("backbone.layers", "0", "at least 1, got 0"),
        ("backbone.width", "0", "at least 1, got 0"),
        ("backbone.dropout", "1", "at least 0 and below 1, got 1.0"),
        ("distribution.width", "1", "in 2..10000, got 1"),
        ("distribution.neighbors", "0", "at least 1, got 0"),
        ("distribution.noise", ".inf", "finite and >= 0, got inf"),
        ("distribution.tau", "0", "finite and > 0, got 0.0"),
        ("distribution.iterations", "-1", "in 0..10000, got -1"),
    ],
)
def test_values_out_of_range(capsys, tmp_path, key, value, must):
    folder = tmp_path / "run"
    error = refused(capsys, "fit", "-c", "nbody/gnn_O3_ps", f"--{key}={value}", "--folder", str(folder))
    assert error == f"probsym: error: config: {key} must be {must}\n"
    assert not folder.exists()


def test_heads_must_divide_the_width(capsys):
    error = refused(capsys, "fit", "-c", "nbody/transformer_O3_ps", "--backbone.heads", "5")
    assert error == "probsym: error: config: backbone.heads must divide backbone.width = 64, got 5\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be readable YAML, got ValueError: expected keys and values, got list"),
        ("a: [", "must be readable YAML, got ParserError"),
        ("\x00", "must be readable YAML, got ReaderError"),
        ("task: unknown", f"must be one of {', '.join(tasks.TASKS)}, got 'unknown'"),
        ("seed: 1", f"must be one of {', '.join(tasks.TASKS)}, got None"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load(str(tmp_path / "c.yaml"))


def test_command_line_refuses_with_one_line(capsys, tmp_path):
    error = refused(capsys, "fit", "-c", "nbody/gnn_O3")
    assert error.startswith("probsym: error: config: must be a file or one of")
    assert "nbody/gnn_O3_ps" in error
    (tmp_path / "something").touch()
    assert "exists already" in refused(capsys, "fit", "-c", "nbody/gnn_O3_ps", "--folder", str(tmp_path))
    names = "nbody, graph8c, exp, pattern, published_pattern, peptides-func, peptides-struct, pcqm-contact"
    assert f"must be one of {names}, got 'mnist'" in refused(capsys, "data", "get", "mnist")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fit"])


def test_info_and_data_list(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path))
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("soft_permutation", "reference", "torch", "nbody/transformer_S5xO3_ps"):
        assert word in out
    assert cli.main(["data", "list"]) == 0
    assert "generated on first use" in capsys.readouterr().out
    file = tmp_path / "nbody" / "charged5-30-40.npz"
    save_arrays(file, {"positions": np.ones(3)}, {})
    assert cli.main(["data", "list"]) == 0
    assert f"cached in {file}" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:100])
    assert cli.main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "damaged: " in out and "probsym data get nbody --force" in out and "cached" not in out
    assert "data: list must stand alone, got 'extra'" in refused(capsys, "data", "list", "extra")
    assert "data: list must stand alone, got '--force'" in refused(capsys, "data", "list", "--force")


def test_keys_lists_the_documented_keys(capsys):
    assert cli.main(["fit", "-c", "nbody/gnn_O3_ps", "--keys"]) == 0
    out = capsys.readouterr().out
    assert "--training.lr" in out
    assert "learning rate of Adam" in out


def test_truncated_data_file_is_refused(capsys, tmp_path):
    (tmp_path / "charged5-30-40.npz").write_bytes(b"PK\x03\x04 half a file")
    error = refused(capsys, "fit", "-c", "nbody/gnn_O3_ps", "--data", str(tmp_path), "--folder", str(tmp_path / "run"))
    assert "charged5-30-40.npz: expected a readable .npz file" in error


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("nbody", {"symmetry": "O4"}, "symmetry must be one of S5xO3, S5xSO3, O3, SO3, S5, got 'O4'"),
        ("nbody", {"backbone": Backbone(kind="mlp")}, "backbone.kind must be one of transformer, gnn, got 'mlp'"),
        ("nbody", {"task": "separation"}, "task must be one of nbody, got 'separation'"),
        ("separation", {"dataset": "EXP"}, "dataset must be one of graph8c, exp, wl_pairs, got 'EXP'"),
        ("separation", {"method": None}, "method must be one of ps, ga, fa, canonical, got None"),
        ("exp_classify", {"backbone": "transformer"}, "backbone must be one of mlp, gin, got 'transformer'"),
        (
            "sample_size",
            {"classify": ExpClassifyConfig(method="none")},
            "classify.method must be one of ps, ga, fa, canonical, got 'none'",
        ),
        ("sample_size", {"train": [2.5]}, "train must be numbers of samples >= 1, got [2.5]"),
        ("automorphism", {"method": "none"}, "method must be one of ps, ga, fa, canonical, got 'none'"),
        ("automorphism", {"seed": -1}, "seed must be in 0..4294967295, got -1"),
    ],
)
def test_configurations_built_in_python_are_checked_too(task, settings, message):
    kind, make = tasks.TASKS[task]
    make(kind())
    with pytest.raises(ValueError, match=f"^{re.escape(f'config: {message}')}$"):
        make(kind(**settings))
