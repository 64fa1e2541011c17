"""benchmarks/experiments.py: the finished runs of a sweep in one file, which keeps what it had."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import experiments


def finished(folder, name, seed, accuracy, epochs):
    run = folder / name / f"seed{seed}"
    (run / "logs").mkdir(parents=True)
    (run / "results.json").write_text(json.dumps({"test_accuracy": accuracy}))
    rows = "".join(f"{e},{8 * e + 7},{e / 7},{e / 3}\n" for e in range(epochs))
    (run / "logs" / "metrics.csv").write_text(f"epoch,step,train/bce,valid/bce\n{rows}")


def gathered(monkeypatch, folder, output):
    arguments = ["experiments", "gather", str(folder), "-c", "tables/x", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    experiments.main()
    return json.loads(output.read_text())


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    finished(folder, "PS S=2", 1, 0.9123456, 3)
    (folder / "PS S=2" / "seed2").mkdir()  # begun, not finished
    costs = {"PS S=2/seed1": {"seconds": 9.0, "cpu_seconds": 7.0, "memory": 900, "status": 0, "commit": "abc"}}
    (folder / "costs.json").write_text(json.dumps(costs))
    return folder


def test_figures_costs_and_validation_curves(monkeypatch, tmp_path, sweep):
    assert gathered(monkeypatch, sweep, tmp_path / "x.json") == {
        "configuration": "tables/x",
        "runs": {
            "PS S=2": {
                "seed1": {
                    "test_accuracy": 0.91235,
                    "seconds": 9.0,
                    "cpu_seconds": 7.0,
                    "memory": 900,
                    "commit": "abc",
                    "curves": {"valid/bce": {"epochs": [1, 2, 3], "values": [0.0, 0.33333, 0.66667]}},
                }
            }
        },
    }


def test_a_second_sweep_keeps_the_runs_of_the_first(monkeypatch, tmp_path, sweep):
    gathered(monkeypatch, sweep, tmp_path / "x.json")
    other = tmp_path / "other"
    finished(other, "PS S=2", 2, 0.5, 1)
    finished(other, "GA", 1, 0.25, 1)
    (other / "costs.json").write_text("{}")
    runs = gathered(monkeypatch, other, tmp_path / "x.json")["runs"]
    assert {name: list(seeds) for name, seeds in runs.items()} == {"PS S=2": ["seed1", "seed2"], "GA": ["seed1"]}
    assert runs["PS S=2"]["seed1"]["test_accuracy"] == 0.91235


def test_only_what_the_sweep_has_still(monkeypatch, tmp_path, sweep):
    """And what the costs do not know."""
    finished(sweep, "dropped", 1, 0.5, 1)
    finished(sweep, "PS S=2", 3, 0.5, 1)
    finished(sweep, "PS S=2", 4, 0.5, 1)
    (sweep / "config.yaml").write_text('task: comparison\nruns: {"PS S=2": {config: x}}\nseeds: [1, 3]\n')
    costs = json.loads((sweep / "costs.json").read_text())
    costs["PS S=2/seed3"] = costs["PS S=2/seed1"] | {"complete": False}
    (sweep / "costs.json").write_text(json.dumps(costs))
    runs = gathered(monkeypatch, sweep, tmp_path / "x.json")["runs"]
    assert {name: list(seeds) for name, seeds in runs.items()} == {"PS S=2": ["seed1", "seed3"]}
    assert runs["PS S=2"]["seed3"]["complete"] is False and "complete" not in runs["PS S=2"]["seed1"]


def test_runs_of_another_configuration_are_not_mixed_in(monkeypatch, tmp_path, sweep, capsys):
    output = tmp_path / "x.json"
    output.write_text(before := json.dumps({"configuration": "tables/y", "runs": {}}))
    with pytest.raises(SystemExit):
        gathered(monkeypatch, sweep, output)
    assert "must be of tables/x, got runs of tables/y" in capsys.readouterr().err
    assert output.read_text() == before


def test_long_curves_keep_their_last_value(monkeypatch, tmp_path, sweep):
    finished(sweep, "long", 1, 0.5, 1001)
    curve = gathered(monkeypatch, sweep, tmp_path / "x.json")["runs"]["long"]["seed1"]["curves"]["valid/bce"]
    assert len(curve["epochs"]) == len(curve["values"]) <= experiments.POINTS
    assert curve["epochs"][-1] == 1001
    assert curve["values"][-1] == pytest.approx(1000 / 3, rel=1e-4)
    assert {b - a for a, b in pairwise(curve["epochs"])} == {11}


def test_table_of_costs(monkeypatch, tmp_path, sweep, capsys):
    gathered(monkeypatch, sweep, tmp_path / "x.json")
    record = json.loads((tmp_path / "x.json").read_text())
    run = record["runs"]["PS S=2"]["seed1"]
    record["runs"]["GA"] = {
        "seed1": run | {"cpu_seconds": 3700.0, "memory": 2048, "commit": "abd abc", "complete": False}
    }
    (tmp_path / "y.json").write_text(json.dumps(record))
    (tmp_path / "z.json").write_text(json.dumps([{"rows": []}]))  # not of a sweep
    monkeypatch.setattr(sys, "argv", ["experiments", "costs", *(str(tmp_path / f"{x}.json") for x in "zyx")])
    experiments.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `x.json` | 1 | 7 s | 9 s | 0.9 | abc |",
        "| `y.json` | 2 | ≥ 7 s to 1 h 01 min | 9 s | 0.9 to 2.0 | abc, abd |",
    ]


def test_the_table_of_costs_in_the_readme_is_that_of_the_records():
    folder = Path(experiments.__file__).parent / "results" / "experiments"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.endswith("\n\n" + experiments.costs(folder.glob("*.json")))
