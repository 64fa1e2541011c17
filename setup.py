"""Builds the compiled kernels: csrc/*.cpp and csrc/cpu/*.cpp always, csrc/cuda/ if nvcc and a CUDA build of torch exist.

Without a working compiler the package still installs, and every op runs its reference (`probsym info` reports it).
PROBSYM_BUILD=0 skips the kernels, PROBSYM_BUILD=1 makes a failed build an error, PROBSYM_CUDA=0 leaves out csrc/cuda/.
PROBSYM_ISA=native builds for the instruction set of this machine's processor only, in less than half the time.
TORCH_CUDA_ARCH_LIST selects the GPUs to build for; the newest default also includes PTX, which later GPUs can compile.
PROBSYM_SANITIZE=1 builds with the address and undefined-behaviour sanitizers of the C++ compiler (`make sanitize`).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

WANTED = os.environ.get("PROBSYM_BUILD", "auto")
ROOT = Path(__file__).parent


def toolkit():
    """The folder of nvcc's headers and libraries. nvcc on the path may be a script elsewhere, and torch would look there."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1].strip() for line in output.splitlines() if "TOP=" in line), None)
    return top and os.path.realpath(top)


def instruction_sets():
    """The flags that select the kernels' instruction sets (csrc/cpu/isa.h): none for all of them."""
    wanted = os.environ.get("PROBSYM_ISA", "all")
    if wanted not in ("all", "native"):
        sys.exit(f"PROBSYM_ISA must be all or native, got {wanted!r}")
    if wanted == "all" or platform.machine() not in ("x86_64", "AMD64"):
        return []
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    try:
        macros = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError):
        return []  # a build for every processor runs here too
    avx2 = macros >= {"__AVX2__", "__FMA__"}
    avx512 = avx2 and macros >= {f"__AVX512{name}__" for name in ("F", "DQ", "VL", "BW")}
    return [f"-DPSF_ISAS={4 if avx512 else 2 if avx2 else 1}"]


def extension():
    """The extension and its build command, or None if torch's build tools cannot be imported."""
    if WANTED == "0":
        return None
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and (found := toolkit()):
        os.environ["CUDA_HOME"] = found  # read by torch at import
    try:
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
                    (folder / self.get_ext_filename("probsym_fast._C")).unlink(missing_ok=True)
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
        defined = [f'-DPSF_CUDA_ARCHITECTURES="{architectures}"']
    else:
        defined = []
    # without OpenMP the inlined at::parallel_for is serial; torch brings the runtime, so it is not linked again
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    checked = []
    if os.environ.get("PROBSYM_SANITIZE", "0") != "0":  # vptr needs type information that torch does not export
        checked = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
        optimised = ["-O1", "-g", "-fno-omit-frame-pointer"]
    else:
        optimised = ["-O3"]
    kind = CUDAExtension if cuda else CppExtension
    return kind(
        "probsym_fast._C",
        sources("*.cpp") + sources("cpu/*.cpp") + (cuda or []),
        depends=sources("**/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*optimised, "-Wno-psabi", *openmp, *defined, *instruction_sets(), *checked], "nvcc": ["-O3"]},
        extra_link_args=checked,
    ), Build


built = extension()
setup(**({"ext_modules": [built[0]], "cmdclass": {"build_ext": built[1]}} if built else {}))
