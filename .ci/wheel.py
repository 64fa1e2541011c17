"""Builds a wheel from the source distribution and tests it, each in its own folder outside the checkout.

Run with the checkout's .venv/bin/python. Compiles the CPU kernels once more, from the files of the distribution, without
optimisation: that takes a minute on two cores, a third of the time. The tests before it run the optimised kernels.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_DISTRIBUTED = (".ci/", ".gitignore")
USE = """
import pathlib, sys
import torch
import probsym_fast as psf
from probsym_fast.ops import OPS
from probsym_fast.training import configuration

assert pathlib.Path(psf.__file__).is_relative_to(sys.prefix), psf.__file__
assert psf.info()["extension"]["problem"] is None, psf.info()["extension"]
lacking = [name for name, op in OPS.items() if not op.has_kernel("cpu")]
assert not lacking, lacking
scores = torch.randn(2, 3, 20, requires_grad=True)
entropy = psf.ops.permutation_entropy(psf.ops.soft_permutation(scores, tau=0.1, backend="cpu"), backend="cpu")
entropy.backward()
assert entropy.isfinite() and scores.grad.abs().sum() > 0 and scores.grad.isfinite().all()
assert len(configuration.available()) > 60
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(x) for x in command], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked(*under: str) -> set[str]:
    names = run("git", "ls-files", *under, cwd=ROOT).splitlines()
    return {name for name in names if not name.startswith(NOT_DISTRIBUTED)}


def main(folder: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    (source,) = (x for x in folder.iterdir() if x.is_dir())
    held = {str(x.relative_to(source)) for x in source.rglob("*") if x.is_file()}
    made = {x for x in held if ".egg-info/" in x or x in ("PKG-INFO", "setup.cfg")}
    assert held - made == tracked(), held - made ^ tracked()

    pip, settings = (sys.executable, "-m", "pip"), {"PROBSYM_BUILD": "1", "PROBSYM_CUDA": "0", "PROBSYM_OPTIMISE": "0"}
    run(*pip, "wheel", "-qq", "--no-build-isolation", "--no-deps", "-w", folder, source, cwd=folder, **settings)
    (wheel,) = folder.glob("*.whl")
    held = {x for x in zipfile.ZipFile(wheel).namelist() if not re.match(r"probsym_fast-[^/]+\.dist-info/", x)}
    built = {f"probsym_fast/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_autograd")}
    assert held == tracked("probsym_fast") | built, held

    # a new environment with this one's packages, but without its .pth files, one of which points to the checkout
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", python, "install", "-qq", "--no-deps", "--no-index", wheel, cwd=folder)
    run(python, "-c", USE, cwd=folder)
    assert "nbody/demo" in run(folder / "env" / "bin" / "probsym", "info", cwd=folder)
    print(f"{wheel.name}, built from {path.name}, works")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
