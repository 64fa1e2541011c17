"""Tasks by name: registered ones, those of installed packages, and what is refused."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from probsym_fast import tasks
from probsym_fast.training.settings import Run

MODULE = '''
from dataclasses import dataclass
from probsym_fast import tasks
from probsym_fast.training.settings import Run


@dataclass
class {config}(Run):
    """A sum.

    Args:
        task: the name.
        terms: what is summed.
    """

    task: str = "{name}"
    terms: int = 3


{decorator}class Sum(tasks.Computation):
    Config = {config}

    def __init__(self, config):
        self.config = config

    def run(self, folder):
        return {{"sum": sum(range(self.config.terms))}}
'''


@dataclass
class Config(Run):
    """Nothing.

    Args:
        task: the name.
    """

    task: str = "mine"


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(tasks.TASKS, "_added", {})


def package(folder, points, module=""):
    """A package with entry points, as pip installs one."""
    (folder / "theirs.py").write_text(module)
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in points)
    (info / "entry_points.txt").write_text(f"[probsym_fast.tasks]\n{lines}\n")


def test_a_registered_task():
    class Mine(tasks.Computation):
        Config = Config

        def run(self, folder):
            return {}

    assert tasks.register("mine")(Mine) is Mine
    assert tasks.TASKS["mine"] == (Config, Mine) and "mine" in list(tasks.TASKS)
    tasks.register("mine")(Mine)  # its module ran again

    class Other(Mine): ...

    taken = f"'mine', which is {Mine.__module__}.{Mine.__qualname__}"
    with pytest.raises(ValueError, match=f"^{re.escape(f'register: name must be new, got {taken}')}$"):
        tasks.register("mine")(Other)
    with pytest.raises(
        ValueError, match=r"^register: name must be new, got 'nbody', which is probsym_fast\.tasks\.nbody"
    ):
        tasks.register("nbody")(Mine)
    with pytest.raises(ValueError, match=r"^register: name must be letters, digits and underscores, got 'a b'$"):
        tasks.register("a b")
    with pytest.raises(TypeError, match=r"^register: task must be a task class with the dataclass Config, or a pair"):
        tasks.register("other")(lambda config: None)
    tasks.register("other", Config)(make := lambda config: Mine())
    assert tasks.TASKS["other"] == (Config, make)


def test_in_a_fresh_process(tmp_path):
    """By an entry point, beside a broken one and one whose name is the package's own; and by --import."""
    points = [("total", "theirs:Sum"), ("broken", "theirs_gone:Sum"), ("nbody", "theirs:Sum")]
    package(tmp_path, points, MODULE.format(decorator="", config="SumConfig", name="total"))
    (tmp_path / "ours.py").write_text(
        MODULE.format(decorator='@tasks.register("here")\n', config="HereConfig", name="here")
    )
    for name in ("total", "here"):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\nterms: 5\n")
    code = """
from probsym_fast.cli import main
statuses = [main(["fit", "-c", f"{name}.yaml", "--folder", name, *more]) for name, *more in
            [("total",), ("here", "--import", "ours"), ("here", "--import", "gone")]]
print(statuses)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        check=True,
    )
    assert "[0, 0, 1]" in done.stdout and done.stdout.count("sum  10") == 2
    assert "probsym: error: --import must name a module that can be imported, got 'gone'" in done.stderr


def test_entry_points_that_are_refused(tmp_path, monkeypatch):
    points = [("broken", "theirs_gone:Sum"), ("odd", "theirs:odd"), ("nbody", "theirs:odd")]
    package(tmp_path, points, "odd = 3")
    monkeypatch.syspath_prepend(tmp_path)
    start = "tasks: the entry point broken = theirs_gone:Sum of theirs must load, got ModuleNotFoundError"
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        tasks.TASKS["broken"]
    with pytest.raises(ValueError, match=r"must load, got TypeError: tasks: task must be .*, got 3$"):
        tasks.TASKS["odd"]
    assert tasks.TASKS["nbody"][0].__name__ == "NBodyConfig"
    text = "tasks: the entry point nbody = theirs:odd of theirs is ignored: the name 'nbody' is taken"
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(text)}$"):
        assert {"broken", "odd", "nbody"} <= set(tasks.TASKS)
    with pytest.raises(KeyError):
        tasks.TASKS["unknown"]
