"""Comparisons: what they refuse, and what they take up again."""

import json
import shutil
from dataclasses import replace

import pytest

from probsym_fast import cli
from probsym_fast.tasks import comparison, configuration, plots
from probsym_fast.tasks.comparison import Comparison, ComparisonConfig
from probsym_fast.tasks.molecules import Molecules
from probsym_fast.training import run as training
from tests.helpers.tiny import Tiny, TinyConfig

SMALL = {"training": {"epochs": 1, "batch": 8, "accelerator": "cpu", "progress": False}}


def load(name, flags):
    """The tiny task whatever the name; its key `name` stands for one that may hold "@first"."""
    return Tiny(configuration.parse(TinyConfig, SMALL | {"name": name}, flags))


@pytest.fixture
def config(tmp_path):
    runs = {"A": {"config": "tiny"}, "B": {"config": "tiny", "dropout": 0.5}}
    return ComparisonConfig(runs=runs, seeds=[1, 2], measure="test_mse", folder=str(tmp_path / "runs"))


def compute(config):
    return training.compute(Comparison(config, load))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"runs": {"A": {"config": "t", "name": "@first"}}}, r"runs.A.name must be a value \(`first` is not there\)"),
        ({"common": {"name": "@first"}}, r"common.name must be a value .* got '@first'"),
        ({"first": {"config": "t", "name": "@first"}}, "first.name must be a value"),
        ({"first": {"config": "t"}, "common": {"name": "@frist"}}, "common.name must be .*@first .* got '@frist'"),
        ({"first": {"config": "t"}, "common": {"backbone": {"weights": "@first"}}}, "common.backbone must be a value"),
        ({"common": {"seed": 3}}, "common must be without seed and folder, which the comparison sets, got seed"),
        ({"runs": {"A": {"config": "t", "folder": "x"}}}, "runs.A must be without seed and folder, .* got folder"),
        ({"first": {"config": "t", "seed": 3}}, "first must be without seed and folder, .* got seed"),
        *(({"runs": {name: {"config": "t"}}}, "runs must have plain folder names")
          for name in ("", " ", ".", "..", "first", "plots", "table.md", "costs.json", "logs", "a/b", "a\\b", "/a", "a|b",
                       "a\n", "a\nb", " a", "\ud800", "x" * 201)),
    ],
)  # fmt: skip
def test_refused_at_construction(config, change, text):
    with pytest.raises(ValueError, match=f"^config: {text}"):
        Comparison(replace(config, **change), load)


def test_values_reach_the_runs_as_they_are_and_a_runs_own_win(config):
    seen = []

    def noted(name, flags):
        seen.append(dict(flag.removeprefix("--").split("=", 1) for flag in flags))
        return load("t", [])

    common = {"a": {"b": None, "c": [None, True]}, "d": None, "e": "text", "dropout": 0.25}
    Comparison(replace(config, common=common), noted)
    first = seen[0]
    assert json.loads(first["a"]) == common["a"] and first["d"] == "null" and first["e"] == "text"
    assert [run["dropout"] for run in seen] == ["0.25", "0.5"] * 2


def test_entries_of_common_on_the_command_line():
    values = {"common": {"training.epochs": 3, "dataset": "exp"}, "runs": {"A": {"config": "t"}}}
    flags = ["--common.training.precision", "32-true", "--seeds", "[4]", "--common.training.epochs=7"]
    config = configuration.parse(ComparisonConfig, values, flags)
    assert config.common == {"training.epochs": 7, "dataset": "exp", "training.precision": "32-true"}
    assert config.seeds == [4] and values["common"]["training.epochs"] == 3
    for flags, text in (
        (["--common.dataset"], "common.dataset must have a value, got none"),
        (["--common.dataset", "--seeds", "[1]"], "common.dataset must have a value, got none"),
        (
            ["--common.a=1", "--common", "{}"],
            "common must be given whole or by its entries, got --common and --common.a",
        ),
        (["--common.dataset", "[1"], "common.dataset must be readable YAML, got '\\[1'"),
        (["--runs.A.x", "1"], "runs is a single value, got the key 'runs.A.x' under it"),
    ):
        with pytest.raises(ValueError, match=f"^config: {text}$"):
            configuration.parse(ComparisonConfig, values, flags)
    with pytest.raises(ValueError, match=r"^config: common must be a mapping, got 3$"):
        configuration.parse(ComparisonConfig, {"common": 3}, ["--common.a", "1"])


def test_an_interrupted_comparison_goes_on_as_it_was_begun(config, tmp_path, monkeypatch):
    folder, fit = tmp_path / "runs", comparison.fit

    def stopped(task, *, resume):
        assert (folder / "config.yaml").is_file(), "recorded before the first training"
        if task.config.folder.endswith("B/seed1"):
            raise training.Stopped(2, folder)
        return fit(task, resume=resume)

    monkeypatch.setattr(comparison, "fit", stopped)
    with pytest.raises(training.Stopped):
        compute(config)
    monkeypatch.setattr(comparison, "fit", fit)
    assert not (folder / "results.json").exists() and (folder / "A" / "seed1" / "results.json").is_file()
    before = (folder / "config.yaml").read_text()
    other = replace(config, common={"training.epochs": 2})
    with pytest.raises(ValueError, match=r"training.epochs must be 1 as in .*A/seed1/config.yaml, got 2$"):
        compute(other)
    assert (folder / "config.yaml").read_text() == before and not (folder / "B").exists()
    again = folder.rename(tmp_path / "moved")
    values = configuration.read(again / "config.yaml")
    assert values["folder"] == "."
    done = (again / "A" / "seed1" / "results.json").stat().st_mtime_ns
    results = compute(configuration.parse(ComparisonConfig, values | {"folder": str(again)}, []))
    assert [len(x) for x in results["values"].values()] == [2, 2]
    assert (again / "A" / "seed1" / "results.json").stat().st_mtime_ns == done
    more = compute(replace(config, folder=str(again), seeds=[1, 2, 3]))
    assert more["values"]["A"][:2] == results["values"]["A"] and len(more["values"]["A"]) == 3


def test_the_first_run_and_what_starts_from_it(config, tmp_path):
    runs = {"A": {"config": "tiny", "name": "@first"}}
    config = replace(config, first={"config": "tiny"}, runs=runs, seeds=[1])
    folder = tmp_path / "runs"
    results = compute(config)
    assert configuration.read(folder / "A" / "seed1" / "config.yaml")["name"] == str(folder / "first")
    with pytest.raises(ValueError, match=r"dropout must be 0.0 as in .*first/config.yaml, got 0.5"):
        compute(replace(config, first={"config": "tiny", "dropout": 0.5}))
    with pytest.raises(ValueError, match=r"name must be .*first' as in .*A/seed1/config.yaml, got 'tiny'"):
        compute(replace(config, runs={"A": {"config": "tiny", "name": "tiny"}}))
    moved = folder.rename(tmp_path / "moved")
    assert compute(replace(config, folder=str(moved))) == results
    shutil.copyfile(moved / "A" / "seed1" / "results.json", tmp_path / "kept")
    (moved / "A" / "seed1" / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"A/seed1/config.yaml must exist"):
        compute(replace(config, folder=str(moved)))


def test_recorded_paths_hold_from_anywhere(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("task: tiny\n")
    runs = {"A": {"config": "mine.yaml", "backbone.weights": "@first"}, "B": {"config": "nbody/demo", "data": "d"}}
    made = Comparison(replace(config, first={"config": "t"}, runs=runs), lambda *_: load("t", [])).config
    assert made.runs["A"] == {"config": str(tmp_path / "mine.yaml"), "backbone.weights": "@first"}
    assert made.runs["B"] == {"config": "nbody/demo", "data": str(tmp_path / "d")}


def test_resume_is_refused_where_it_would_be_ignored(tmp_path, monkeypatch, capsys):
    arguments = ["fit", "-c", "graph8c/mlp_ps", "--resume", f"--folder={tmp_path / 'run'}"]
    assert cli.main(arguments) == 1
    assert "fit: --resume must be left out where" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setattr(training, "compute", lambda experiment: {"measure": "m", "seeds": [], "mean": {}})
    assert cli.main(["fit", "-c", "pattern/small_methods", "--resume", f"--folder={tmp_path / 'run'}"]) == 0


class WithUnit(Tiny):
    def unit(self, figure):
        return {"test_mse": "Å²"}.get(figure, "")


@pytest.mark.parametrize(("task", "expected"), [(Tiny, "test mse"), (WithUnit, "test mse, Å²")])
def test_the_plot_names_the_measure_and_its_unit(config, monkeypatch, task, expected):
    labels = []
    monkeypatch.setattr(plots, "save", lambda figure, path: labels.append(figure.axes[0].get_ylabel()))
    some = lambda name, flags: task(configuration.parse(TinyConfig, SMALL | {"name": name}, flags))  # noqa: E731
    training.compute(Comparison(replace(config, seeds=[1]), some))
    assert labels == [expected]


def test_units_of_molecules():
    figures = ("test_energy_mae", "test_force_mae")
    assert [Molecules.unit(None, name) for name in figures] == ["meV", "meV/Å"]
