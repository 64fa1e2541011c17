"""Builds the compiled kernels.

probsym_fast._C: the CPU kernels. _cuda: those of csrc/cuda/, if nvcc and a CUDA build of torch exist. Both use torch's
stable ABI: one build runs with every torch from OLDEST on. _autograd: their gradients' fast path, for this torch only.

Without a working compiler the package still installs, and every op runs its reference (`probsym info` reports it).
PROBSYM_BUILD=0 skips the kernels, PROBSYM_BUILD=1 makes a failed build an error, PROBSYM_CUDA=0 leaves out csrc/cuda/.
TORCH_CUDA_ARCH_LIST selects the GPUs to build for; the newest default also includes PTX, which later GPUs can compile.
PROBSYM_OPTIMISE is the optimisation level, 3 unless given: a lower one compiles faster, for kernels that are slower.
PROBSYM_SANITIZE=1 builds with the address and undefined-behaviour sanitizers of the C++ compiler (`make sanitize`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

WANTED = os.environ.get("PROBSYM_BUILD", "auto")
ROOT = Path(__file__).parent
OLDEST = (2, 11)  # the torch whose stable ABI the kernels use


def toolkit():
    """The folder of nvcc's headers and libraries. nvcc on the path may be a script elsewhere, and torch would look there."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1].strip() for line in output.splitlines() if "TOP=" in line), None)
    return top and os.path.realpath(top)


def extension():
    """The extensions and their build command, or None if torch's build tools cannot be imported."""
    if WANTED == "0":
        return None
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and (found := toolkit()):
        os.environ["CUDA_HOME"] = found  # read by torch at import
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if WANTED == "1":
            raise
        print(f"probsym_fast: kernels are not built ({error}); use pip --no-build-isolation", file=sys.stderr)
        return None

    class Build(BuildExtension):
        """torch's build, except that a missing or failing compiler leaves a package without kernels."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                if WANTED == "1":
                    raise
                for folder in (ROOT, Path(self.build_lib)):  # else an older build would be loaded
                    for name in ("_C", "_cuda", "_autograd"):
                        (folder / self.get_ext_filename(f"probsym_fast.{name}")).unlink(missing_ok=True)
                print(
                    f"probsym_fast: the kernels did not build, ops use their reference: {error}",
                    file=sys.stderr,
                )

    def sources(pattern):
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))

    wanted = os.environ.get("PROBSYM_CUDA", "1") != "0" and torch.version.cuda
    cuda = wanted and CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists() and sources("cuda/*.cu")
    if cuda:
        cuda += sources("cuda/*.cpp")
        newest = "9.0+PTX" if tuple(map(int, torch.version.cuda.split(".")[:2])) < (12, 8) else "9.0;10.0;12.0+PTX"
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;{newest}")
    checked = []
    if os.environ.get("PROBSYM_SANITIZE", "0") != "0":  # vptr needs type information that torch does not export
        checked = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
        optimised = ["-O1", "-g", "-fno-omit-frame-pointer"]
    else:
        level = os.environ.get("PROBSYM_OPTIMISE", "3")
        if level not in ("0", "1", "2", "3"):
            sys.exit(f"PROBSYM_OPTIMISE must be 0, 1, 2 or 3, got {level!r}")
        optimised = [f"-O{level}", "-g0"]  # Python asks for debug information, half of the library
    stable = [f"-DTORCH_TARGET_VERSION=0x{OLDEST[0]:02x}{OLDEST[1]:02x}000000000000"]
    cxx = [*optimised, "-Wno-psabi", *checked]
    common = ["csrc/check.cpp", "csrc/errors.cpp", "csrc/kernels.cpp", "csrc/tensor.cpp"]

    def module(name, files, flags, kind=CppExtension, **more):
        return kind(
            f"probsym_fast.{name}",
            files,
            depends=sources("**/*.h"),
            include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],  # torch's own copy may refuse the stable ABI
            extra_compile_args={"cxx": [*cxx, *flags], "nvcc": ["-O3", "--threads=2"]},
            extra_link_args=checked,
            **more,
        )

    modules = [
        module("_C", [*common, "csrc/module.cpp", *sources("cpu/*.cpp")], stable),
        module("_autograd", ["csrc/autograd.cpp"], []),
    ]
    if cuda:
        flags = [*stable, "-DUSE_CUDA", f'-DPSF_CUDA_ARCHITECTURES="{architectures}"']
        modules.append(module("_cuda", [*common, *cuda], flags, CUDAExtension))
    return modules, Build


built = extension()
setup(**({"ext_modules": built[0], "cmdclass": {"build_ext": built[1]}} if built else {}))
