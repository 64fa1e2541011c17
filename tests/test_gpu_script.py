"""benchmarks/gpu.sh where there is no GPU: what it would run, and how it ends, with stubs for torch, pytest and the build.

The stubs answer for a GPU of capability 9.0 and write down each command with what it sees of the environment. That a
benchmark keeps its rows when it is killed is tested for real, in test_benchmarks.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_TRAINING = ["ops", "graph-ops", "graph-ops-bf16", "passes", "passes-others"]
BENCHMARKS = [*WITHOUT_TRAINING, "steps", "vision", "vision-compiled", "samples", "scaling"]
BENCHMARKS.insert(3, "images")
PARTS = ["build", "op-tests", "model-tests", "sanitizer", *BENCHMARKS]
TRAINED = ["model-tests", *(x for x in BENCHMARKS if x not in WITHOUT_TRAINING)]

PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "setup.py build_ext" | "-m pytest" | "-m pip") exec {python} -S {folder}/note.py "$@" ;;
  "-c "*probsym_fast*) echo '{{}}' ;;
  *) PYTHONPATH={folder}/modules:$PYTHONPATH exec {python} "$@" ;;
esac
"""
NOTE = """
import json, os, sys, time
seen = ("TORCH_CUDA_ARCH_LIST", "PROBSYM_BUILD", "PYTHONPATH", "PYTORCH_NO_CUDA_MEMORY_CACHING")
with open(os.environ["NOTES"], "a") as notes:
    print(json.dumps([sys.argv[1:], {x: os.environ.get(x, "") for x in seen}]), file=notes)
time.sleep(60 if any(x in " ".join(sys.argv) for x in os.environ["SLOW"].split()) else 0)
sys.exit(3 if any(x in " ".join(sys.argv) for x in os.environ["FAILING"].split()) else 0)
"""
TORCH = """
from types import SimpleNamespace
__version__, version = "2.11.0+cu130", SimpleNamespace(cuda="13.0")
cuda = SimpleNamespace(is_available=lambda: {available}, get_device_capability=lambda: (9, 0))
"""
# importlib.util as the script asks it: packages in HIDDEN are not installed, all others are
SITE = """
import importlib.util, os
importlib.util.find_spec = lambda name, *_: None if name in os.environ["HIDDEN"].split() else name
"""
TOOL = '#!/usr/bin/env bash\nwhile [ $# -gt 0 ] && [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs the script with some parts; hidden packages and tools are missing, commands that name what is failing fail."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "note.py").write_text(NOTE)
    (tmp_path / "modules" / "sitecustomize.py").write_text(SITE)
    stubs = {"python": PYTHON.format(python=sys.executable, folder=tmp_path), "compute-sanitizer": TOOL}
    stubs |= dict.fromkeys(("nvidia-smi", "nvcc"), "#!/usr/bin/env bash\n")
    for name, text in stubs.items():
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)
    for name in ("bash", "env", "dirname", "mktemp", "ls", "timeout"):  # a PATH without the tools of this machine
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))

    def run(*parts, hidden="", failing="", slow="", available=True, **settings):
        (tmp_path / "modules" / "torch.py").write_text(TORCH.format(available=available))
        for tool in {"nvcc", "compute-sanitizer"} & set(hidden.split()):
            (tmp_path / "tools" / tool).unlink()
        notes = tmp_path / "notes"
        notes.write_text("")
        environment = {
            "PATH": str(tmp_path / "tools"),
            "PYTHON": str(tmp_path / "tools" / "python"),
            "NOTES": str(notes),
        }
        environment |= {
            "HIDDEN": hidden,
            "FAILING": failing,
            "SLOW": slow,
            "CUDA_HOME": str(tmp_path / "none"),
            **settings,
        }
        command = [ROOT / "benchmarks" / "gpu.sh", *parts]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        done.commands = [json.loads(line) for line in notes.read_text().splitlines()]
        return done

    return run


def ending(done) -> dict[str, str]:
    """ran, failed, skipped: what the last lines say."""
    return dict(line.removeprefix("gpu.sh: ").split(": ", 1) for line in done.stdout.splitlines()[-3:])


def test_every_part_in_its_order(gpu_sh, tmp_path):
    """The build is for the GPU that is there; tests are of the GPU, in processes; results go where they are wanted."""
    done = gpu_sh(OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert ending(done) == {"ran": ",".join(PARTS), "failed": "none", "skipped": "none"}
    (build, environment), ops, models, memory, race, *benchmarks = done.commands
    assert build == ["setup.py", "build_ext", "--inplace"]
    assert (environment["TORCH_CUDA_ARCH_LIST"], environment["PROBSYM_BUILD"]) == ("9.0", "1")
    for (command, _), folder in ((ops, "tests/ops"), (models, "tests/models")):
        assert command[:7] == ["-m", "pytest", "-q", "-m", "gpu", "-n", "8"] and folder in command
    for command, environment in (memory, race):
        assert (
            command[-1] == "tests/ops/test_sanitizer_case.py" and environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        )
    for (command, environment), part in zip(benchmarks, BENCHMARKS, strict=True):
        options = " ".join(command)
        assert f"--device cuda --seconds 1.5 --save-results --results {tmp_path}/out/benchmarks/results" in options
        assert command[command.index("--part") + 1] == part and environment["PYTHONPATH"].split(":")[0] == str(ROOT)
    for command, _ in done.commands[1:]:
        for path in (x for x in command if x.endswith(".py") or x.startswith("tests/")):
            assert (ROOT / path).exists()


def test_named_parts_and_settings(gpu_sh, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some-1-py3-none-any.whl").touch()
    settings = {"SELECT": "pattern and not bf16", "SECONDS_EACH": "0.2", "WHEELS": str(tmp_path / "wheels")}
    settings |= {"COMPILED": "0"}
    done = gpu_sh("ops", "build", hidden="xdist", TORCH_CUDA_ARCH_LIST="8.0", **settings)
    assert done.returncode == 0 and ending(done)["ran"] == "build,ops"
    (install, _), (_, built_with), (benchmark, environment) = done.commands
    carried = install[install.index("--target") + 1]
    assert install[:2] == ["-m", "pip"] and "--no-index" in install and install[-1].endswith("some-1-py3-none-any.whl")
    assert environment["PYTHONPATH"].split(":")[:2] == [str(ROOT), carried]
    assert built_with["TORCH_CUDA_ARCH_LIST"] == "8.0"
    assert (
        benchmark[-3:] == ["-k", "(pattern and not bf16)", "--without-compiled"]
        and benchmark[benchmark.index("--seconds") + 1] == "0.2"
    )
    assert benchmark[benchmark.index("--results") + 1] == "benchmarks/results"
    ((command, _),) = gpu_sh("op-tests", hidden="xdist").commands
    assert "-n" not in command and "-k" not in command
    ((command, _),) = gpu_sh("vision-compiled", SELECT="PATTERN or Peptides").commands
    assert command[-2:] == ["-k", "(ViT and compiled) and (PATTERN or Peptides)"]
    ((command, _),) = gpu_sh("model-tests", PROCESSES="15").commands
    assert command[command.index("-n") + 1] == "15" and "tests/programs" in command


def test_a_part_that_takes_too_long_is_stopped_and_the_others_run(gpu_sh):
    done = gpu_sh("ops", "passes", slow="test_ops", LIMIT="1")
    assert done.returncode == 1
    assert ending(done) == {"ran": "passes", "failed": "ops", "skipped": "none"}
    assert "gpu.sh: stopped after 1 s" in done.stdout


def test_each_part_has_its_predicted_minutes_and_fits():
    """docs/gpu.md: a row for each part, of at most ten minutes."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    minutes = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", page, re.M))
    assert list(minutes) == PARTS and all(0 < int(x) <= 10 for x in minutes.values())


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("jsonargparse compute-sanitizer", {"sanitizer": "compute-sanitizer"} | dict.fromkeys(TRAINED, "jsonargparse")),
        ("pytest_benchmark ninja nvcc", {"build": "ninja nvcc"} | dict.fromkeys(BENCHMARKS, "pytest_benchmark")),
    ],
)
def test_a_part_that_lacks_something_is_a_failure_and_the_others_run(gpu_sh, missing, lost):
    done = gpu_sh(hidden=missing)
    assert done.returncode == 1
    skipped = ",".join(f"{part} ({lost[part]})" for part in PARTS if part in lost)
    assert ending(done) == {"ran": ",".join(x for x in PARTS if x not in lost), "failed": "none", "skipped": skipped}


def test_a_part_that_fails_is_named_and_the_others_run(gpu_sh):
    done = gpu_sh("build", "sanitizer", "ops", "steps", failing="setup.py sanitizer_case test_steps")
    assert done.returncode == 1
    assert ending(done) == {"ran": "ops", "failed": "build,sanitizer,steps", "skipped": "none"}


def test_what_it_refuses(gpu_sh):
    for parts in (("tests",), ("ops", "everything"), ("",)):
        done = gpu_sh(*parts)
        assert done.returncode == 2 and not done.commands
        assert done.stderr == f"gpu.sh: a part must be one of {' '.join(PARTS)}, got {parts[-1]}\n"
    done = gpu_sh(available=False)
    assert done.returncode == 1 and not done.commands
    assert "needs torch with CUDA and a visible NVIDIA GPU, found none" in done.stderr
