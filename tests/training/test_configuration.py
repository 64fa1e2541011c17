"""Configurations and the command line: what is refused, and how."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import yaml

from probsym_fast import cli, tasks
from probsym_fast.data._store import save_arrays
from probsym_fast.tasks import configuration
from probsym_fast.tasks.exp_classify import ExpClassifyConfig
from probsym_fast.tasks.nbody import Backbone
from probsym_fast.training.run import run_folder


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


def test_what_one_parse_adds_to_or_changes_is_not_in_the_next():
    """Though parses of a kind share a parser, and with it the defaults."""
    kind = tasks.TASKS["comparison"][0]
    expected = configuration.parse(kind, {}, []).seeds
    assert configuration.parse(kind, {}, ["--seeds+", "9"]).seeds == [*expected, 9]
    configuration.parse(kind, {}, []).seeds.append(7)
    assert configuration.parse(kind, {}, []).seeds == expected
    values = {"seeds": [4]}
    configuration.parse(kind, values, []).seeds.append(5)
    assert configuration.parse(kind, values, []).seeds == [4]


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
        ({"sede": 1}, [], r"config: unknown key 'sede', expected one of .*did you mean seed"),
        (
            {"training": {"learning": 1}},
            [],
            r"unknown key 'training.learning', expected one of epochs, batch",
        ),
        ({"training": 3}, [], r"config: training must hold keys and values, got 3"),
        ({"training": {"lr": "fast"}}, [], r"config: training.lr must be a number, got fast, in .*c.yaml$"),
        ({"symmetry": "O4"}, [], r"config: symmetry must be one of S5xO3, S5xSO3, O3, SO3, S5, got O4, in .*c.yaml$"),
        ({}, ["--trainng.lr", "1"], r"unknown key 'trainng', expected one of .*did you mean training"),
        ({}, ["--samples.train", "2.5"], r"^config: samples.train must be an int, got 2.5$"),
        ({}, ["--samples.train", "null"], r"^config: samples.train must be an int, got null$"),
        ({}, ["--samples.memory", "x"], r"^config: samples.memory must be a number or null, got x$"),
        ({}, ["--training.compile", "7"], r"^config: training.compile must be true or false, got 7$"),
        ({}, ["--training.logger", "csv"], r"^config: training.logger must be a list, got csv$"),
        ({}, ["--seed.deep", "1"], r"config: seed is a single value, got the key 'seed.deep' under it"),
        ({"symmetry": "S5"}, [], r"config: symmetry must be O3 or SO3 for the gnn, .* got S5"),
        ({"method": "canonical", "samples": {"test": 2}}, [], r"config: method canonical takes 1 sample, got Samples"),
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
    assert "already exists" in refused(capsys, "fit", "-c", "nbody/gnn_O3_ps", "--folder", str(tmp_path))
    names = "nbody, graph8c, exp, pattern, md_ethanol, md_aspirin, md_alanine_dipeptide, g2, published_pattern"
    names += ", peptides-func, peptides-struct, pcqm-contact"
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
    assert "data: list must come without other arguments, got 'extra'" in refused(capsys, "data", "list", "extra")
    assert "data: list must come without other arguments, got '--force'" in refused(capsys, "data", "list", "--force")


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


BOMB = "".join(f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: nbody\nseed: 1\nseed: 2\n", "expected every key once, got 'seed' in lines 2 and 3"),
        ("training:\n  lr: 1\n  lr: 2\n", "expected every key once, got 'lr' in lines 2 and 3"),
        ("a0: &a0 [1]\n" + BOMB, "more than 20000 values with aliases expanded, line"),
        ("a: &a [*a]", "an alias inside its own anchor, line 1"),
        ("a: " + "[" * 5000 + "]" * 5000, "more than 32 levels, line 1"),
        ("{a: " * 40 + "1" + "}" * 40, "more than 32 levels, line 1"),
        ("1: a", "expected keys that are strings, got 1 in line 1"),
        ("no: a", "expected keys that are strings, got False in line 1"),
        ("? [a]\n: b", "expected keys that are strings, got ['a'] in line 1"),
        ("name: 2024-01-01", "name must be a string, a number or a boolean, got date in line 1"),
        ("name: !!binary aGk=", "name must be a string, a number or a boolean, got bytes in line 1"),
        ("name: !!set {a}", "expected plain values, got tag:yaml.org,2002:set in line 1"),
        ("name: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("seeds: [2024-99-99]", "month must be in 1..12"),
        (
            "seed: " + "9" * 5000,
            "seed must be a number without a leading 0 or a colon, or a string in quotes, got 9999",
        ),
        ('name: "a\\0b"', "name must hold no NUL character, got one in line 1"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("", "expected keys and values, got NoneType"),
        ("just text", "expected keys and values, got str"),
        (b"name: gr\xf6\xdfe", "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xf6"),
        ("#" * (1 << 19), "expected at most 262144 bytes, got 524288"),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        tasks.load(str(path))
    assert str(error.value).startswith(f"config: {path} must be readable YAML, got ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_and_merges_within_bounds_are_read(tmp_path):
    (tmp_path / "c.yaml").write_bytes("\ufeffa: &a {x: ü, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\n".encode())
    assert configuration.read(tmp_path / "c.yaml") == {
        "a": {"x": "ü", "y": 2},
        "b": {"x": "ü", "y": 3},
        "c": {"x": "ü", "y": 2},
    }


def test_extends(tmp_path):
    files = [tmp_path / f"{k}.yaml" for k in range(20)]

    def extend(path, base):
        path.write_text(f"extends: {base}\nseed: 1\n", encoding="utf-8")

    def refusal(path):
        with pytest.raises(ValueError) as error:
            configuration.read(path)
        return str(error.value)

    extend(files[0], files[0])
    assert refusal(files[0]).startswith(f"config: extends in {files[0]} must not form a cycle, got")
    (tmp_path / "link.yaml").symlink_to(files[0])
    extend(files[0], tmp_path / "link.yaml")
    assert f"config: extends in {files[0]} must not form a cycle" in refusal(files[0])
    for path, base in zip(files[:3], (*files[1:3], files[0]), strict=True):
        extend(path, base)
    assert refusal(files[0]).startswith(f"config: extends in {files[2]} must not form a cycle")
    for path, base in zip(files, (*files[1:], "nbody/demo"), strict=True):
        extend(path, base)
    assert f"extends in {files[15]} must lead through at most 16 files" in refusal(files[0])
    assert configuration.read(files[10])["task"] == "nbody"
    extend(files[0], "none")
    assert refusal(files[0]).startswith(f"config: extends in {files[0]} must be a file or one of")
    extend(files[0], "[nbody/demo]")
    assert refusal(files[0]) == (
        f"config: extends in {files[0]} must be a file or a configuration's name, got ['nbody/demo']"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: fast}", "training.lr"),
        ("training: 3", "training must hold keys and values, got 3"),
        ("sede: 1", "unknown key 'sede'"),
        ("seed: [1]", "seed"),
        ("folder: {a: 1}", "folder"),
    ],
)
def test_wrong_values_name_key_and_file(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"task: nbody\n{text}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tasks.load(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["[nbody]", "{a: b}", "3", "null"])
def test_a_task_of_the_wrong_type(tmp_path, capsys, task):
    path = tmp_path / "c.yaml"
    path.write_text(f"task: {task}\n", encoding="utf-8")
    for more in ([], ["--keys"]):
        assert f"config: task in {path} must be one of" in refused(capsys, "fit", "-c", str(path), *more)


def test_a_group_of_keys_takes_no_value_at_once(capsys, tmp_path):
    """What reads it is not the reader of configurations: files of others would be read without its bounds."""
    (file := tmp_path / "samples.yaml").write_text("train: 7\ntrain: 9\n")
    for given in (
        ["--samples", str(file)],
        [f"--samples={file}"],
        ["--samples", "{train: 1, train: 2}"],
        ["--training", "x"],
    ):
        error = refused(capsys, "fit", "-c", "nbody/gnn_O3_ps", *given)
        key = given[0][2:].split("=")[0]
        assert f"config: {key} must be set key by key, such as --{key}." in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: null", "config: name must not be null"),
        ("training: {lr: null}", "config: training.lr must not be null"),
        ("seed: 010", "seed must be a number without a leading 0 or a colon, or a string in quotes, got 010 in line 2"),
        ("seed: 1:30", "got 1:30 in line 2"),
        ("seed: -1", "config: seed must be in 0..4294967295, got -1, in"),
    ],
)
def test_values_that_mean_something_else(capsys, tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"task: nbody\n{text}\n")
    error = refused(capsys, "fit", "-c", str(path))
    assert message in error and str(path) in error


def test_numbers_as_one_writes_them(tmp_path):
    (path := tmp_path / "c.yaml").write_text("a: [1_000, 0x1F, -3, +2, 0, 1e3, 1.5e-3, .5, 2., .inf, -.inf, 0.0]")
    expected = [1000, 31, -3, 2, 0, "1e3", 1.5e-3, 0.5, 2.0, float("inf"), -float("inf"), 0.0]  # as YAML 1.1 has it
    assert configuration.read(path) == {"a": expected}


def test_an_absurd_name_to_extend(tmp_path):
    (path := tmp_path / "c.yaml").write_text(f"extends: {'x' * 5000}\n")
    with pytest.raises(
        ValueError, match=r"^config: extends in .* must be a file or .*, got 'x+'\.\.\.: File name too long$"
    ):
        configuration.read(path)


RECORD = Path(__file__).parents[1] / "tasks" / "configurations.json"


def test_packaged_configurations_have_the_recorded_values():
    """Every key of every one, as it was when its row was published or measured; the record is changed by hand only."""
    record = json.loads(RECORD.read_text())
    assert sorted(record["configurations"]) == configuration.available()
    for task, (kind, _) in tasks.TASKS.items():
        assert configuration.flat(asdict(kind())) == record["defaults"][task]
    for name, own in record["configurations"].items():
        defaults = record["defaults"][own["task"]]
        expected = {key: x for key, x in defaults.items() if not any(k.startswith(f"{key}.") for k in own)} | own
        config = tasks.load(name).config
        assert configuration.flat(asdict(config)) == expected, name
        assert replace(config) == config, name  # what a class makes of its values it makes once


def test_a_method_brings_its_samples(tmp_path):
    """Over the values of the configuration that is extended, and under those beside it."""
    assert tasks.load("nbody/transformer_O3_ps").config.samples.test == 200
    for overrides in (["--method", "canonical"], ["--method=canonical", "--samples.trials", "2"]):
        samples = tasks.load("nbody/transformer_O3_ps", overrides).config.samples
        assert (samples.train, samples.valid, samples.test) == (1, 1, 1)
    (path := tmp_path / "own.yaml").write_text(
        "extends: nbody/transformer_O3_ps\nmethod: canonical\nsamples: {test: 2}\n"
    )
    with pytest.raises(ValueError, match="method canonical takes 1 sample"):
        tasks.load(str(path))
    assert tasks.load("exp/mlp_ps", ["--method", "canonical"]).config.samples == 1


def test_methods_without_randomness_take_one_sample():
    """More would be copies: in every task, and refused where they are asked for. Images train a canonical one with two."""
    found = {
        (task, method): kind.of_method.get(method, {}).get("samples")
        for task, (kind, _) in tasks.TASKS.items()
        for method in get_args(get_type_hints(kind).get("method", None))
        if method in ("canonical", "none")
    }
    assert len(found) > 10
    assert found.pop(("rotated_mnist", "canonical")) == {"train": 2, "valid": 1, "test": 1}
    for where, samples in found.items():
        counts = samples if isinstance(samples, dict) else {"test": samples}
        assert set(counts.values()) == {1}, where
    with pytest.raises(ValueError, match="method none takes 1 sample"):
        tasks.load("nbody/gnn_O3_ps", ["--method=none", "--samples.train=2"])


def test_keys_of_groups_are_not_offered(capsys):
    assert cli.main(["fit", "-c", "nbody/demo", "--keys"]) == 0
    out = capsys.readouterr().out
    assert "--samples.train" in out and "Path to a configuration file" not in out


def test_leaving_a_method_leaves_its_samples(tmp_path):
    for name in ("nbody/gnn_O3_canonical", "exp_classify/mlp_canonical"):
        bare = tasks.load(name.replace("canonical", "ps")).config
        assert tasks.load(name, ["--method", "ps"]).config.samples == bare.samples
    (path := tmp_path / "own.yaml").write_text("extends: nbody/gnn_O3_canonical\nmethod: ga\n")
    assert tasks.load(str(path)).config.samples.train == 20


def test_errors_of_overrides_name_no_file(capsys):
    error = refused(capsys, "fit", "-c", "nbody/gnn_O3_canonical", "--samples.train", "4")
    assert "takes 1 sample" in error and ".yaml" not in error


def test_keys_show_the_values_of_the_configuration(capsys):
    assert cli.main(["fit", "-c", "nbody/demo", "--keys", "--seed", "5"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "default: 80)" in out and "default: 5)" in out
    assert "unknown key 'nonsense'" in refused(capsys, "fit", "-c", "nbody/demo", "--keys", "--nonsense", "3")
    for command in ("fit", "sweep"):
        assert cli.main([command, "-c", "tables/exp_classify_short", "--keys", "--common.dataset", "wl_pairs"]) == 0
        out = capsys.readouterr().out
        assert f"probsym {command} -c CONFIG" in out and "'dataset': 'wl_pairs'" in " ".join(out.split())
