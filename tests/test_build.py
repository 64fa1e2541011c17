"""Without compiled kernels everything works, and is reported once; other versions of torch; what setup.py builds."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import pytest
import torch

import probsym_fast
from probsym_fast.ops import OPS, _extension, act_orthogonal, orthogonal_frame, permutation_entropy, soft_permutation
from probsym_fast.ops._op import BACKENDS
from tests.conftest import assert_near

ROOT = Path(__file__).parents[1]
TORCH = torch.__version__.split("+")[0]
MODULE = _extension.module()


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


# --- an installation whose kernels are not there, or do not load ---

FIRST_USE = """
import sys  # an editable install would find the kernels of the checkout
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{getattr(f, '__module__', '')}{f}".lower()]
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import probsym_fast as psf
    ops = psf.ops
    assert not [w for w in caught if "probsym_fast" in str(w.message)], "reported before it matters"
    torch.manual_seed(5)
    results = []
    for _ in range(2):
        scores = torch.randn(2, 3, 5, requires_grad=True)
        matrices = torch.randn(2, 3, 3, 3, requires_grad=True)
        p = ops.soft_permutation(scores, torch.tensor([5, 3]), tau=0.1)
        entropy = ops.permutation_entropy(p)
        frames = ops.orthogonal_frame(matrices)
        moved = ops.act_orthogonal(torch.randn(2, 3, 4, 3, 1), frames, mean=True)
        (entropy + p.log_r.sum() + moved.pow(3).sum()).backward()
        results += [p.order, p.log_r, entropy, frames, moved, scores.grad, matrices.grad]
torch.save([x.detach() for x in results], "results.pt")
caught = [w for w in caught if "probsym_fast" in str(w.message)]
assert [w.category for w in caught] == [RuntimeWarning], [str(w.message) for w in caught]
print(caught[0].message)
assert all(backends["cpu"] == ["reference"] for backends in psf.info()["ops"].values())
assert psf.info()["extension"]["built"] is False
assert psf.info()["extension"]["problem"] in str(caught[0].message)
try:
    ops.soft_permutation(torch.randn(1, 1, 2), backend="cpu")
except RuntimeError as error:
    print(error)
"""


def results_of_the_reference() -> list[torch.Tensor]:
    torch.manual_seed(5)
    results = []
    for _ in range(2):
        scores, matrices = (
            torch.randn(2, 3, 5, requires_grad=True),
            torch.randn(2, 3, 3, 3, requires_grad=True),
        )
        p = soft_permutation(scores, torch.tensor([5, 3]), tau=0.1, backend="reference")
        entropy = permutation_entropy(p, "reference")
        frames = orthogonal_frame(matrices, backend="reference")
        moved = act_orthogonal(torch.randn(2, 3, 4, 3, 1), frames, mean=True, backend="reference")
        (entropy + p.log_r.sum() + moved.pow(3).sum()).backward()
        results += [p.order, p.log_r, entropy, frames, moved, scores.grad, matrices.grad]
    return results


EXTENSIONS = {  # the file that stands for the extension, what it holds, what is said of it
    "absent": (None, "", "the compiled kernels are not built: "),
    "not a library": (
        "_C.so",
        "nothing",
        f"the compiled kernels do not load under torch {torch.__version__} (",
    ),
    "library not found": (
        "_C.py",
        'raise OSError("libcudart.so.13: cannot open shared object file")',
        f"the compiled kernels do not load under torch {torch.__version__} (libcudart.so.13: cannot open",
    ),
    "older source": (
        "_C.py",
        f"torch_version = {TORCH!r}",
        "the compiled kernels come from another version of probsym_fast, "
        "without kernels, register_kernels, instruction_set, bf16_products: ",
    ),
    "without a torch version": (
        "_C.py",
        "instruction_set = register_kernels = kernels = bf16_products = None",
        "the compiled kernels come from another version of probsym_fast, without torch_version: ",
    ),
    "another version of an op": (
        "_C.py",
        "torch_version = '2.11.0'\ninstruction_set = register_kernels = bf16_products = None\n"
        "def kernels(): return [('CPU', 'orthogonal_frame', 'Tensor -> Tensor')]",
        "the compiled kernels come from another version of probsym_fast (orthogonal_frame is Tensor, bool -> Tensor, "
        "its kernel Tensor -> Tensor): ",
    ),
}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_everything_works_without_the_extension(tmp_path, extension):
    file, content, problem = EXTENSIONS[extension]
    ignored = shutil.ignore_patterns("_*.so", "__pycache__")
    shutil.copytree(ROOT / "probsym_fast", tmp_path / "probsym_fast", ignore=ignored)
    if file:
        (tmp_path / "probsym_fast" / file).write_text(content)
    done = python(FIRST_USE, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    warning, refusal = done.stdout.strip().splitlines()
    assert warning.startswith(f"probsym_fast: {problem}")
    assert warning.endswith(f"{_extension.MEND}. Ops use their slower reference until then.")
    there = "soft_permutation: backend must be one of ('auto', 'reference') on cpu, got 'cpu'"
    assert refusal.startswith(f"{there} ({problem}") and refusal.endswith(f"{_extension.MEND})")
    for found, expected in zip(torch.load(tmp_path / "results.pt"), results_of_the_reference(), strict=True):
        assert_near(found, expected, {found.dtype: 1e-6})


OTHER_SCHEMA = """
import torch
define = torch.library.Library.define
def changed(self, schema, *rest, **more):
    return define(self, schema.replace("aggregate(Tensor x", "aggregate(int k, Tensor x"), *rest, **more)
torch.library.Library.define = changed
import probsym_fast as psf
print(psf.info()["extension"]["problem"])
assert all(backends["cpu"] == ["reference"] for backends in psf.info()["ops"].values())
print(psf.ops.soft_permutation(torch.randn(1, 2, 3)).order.shape)
"""


@pytest.mark.skipif(_extension.module() is None, reason="the extension is not built")
def test_kernels_of_another_schema_are_not_used_and_end_no_process():
    done = python(OTHER_SCHEMA, ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    problem, shape = done.stdout.strip().splitlines()
    assert (
        problem.startswith("the compiled kernels come from another version of probsym_fast (")
        and "aggregate" in problem
    )
    assert shape == "torch.Size([1, 2, 3])"


@pytest.fixture
def loader(monkeypatch):
    """Loads again with given extensions, None: absent; afterwards all is as before."""
    monkeypatch.setattr(_extension, "_modules", {})
    monkeypatch.setattr(_extension, "_problems", {})
    monkeypatch.setattr(_extension, "_reported", False)

    def load(**modules):
        for name in _extension.NEEDED:
            monkeypatch.setitem(sys.modules, f"probsym_fast.{name}", modules.get(name))  # None: there is no such module
        _extension.load({})

    return load


def extension(**changed: object) -> types.SimpleNamespace:
    """A stand-in for any of the three extensions."""
    given = dict.fromkeys(x for names in _extension.NEEDED.values() for x in names)
    given |= {"torch_version": TORCH, "kernels": list, "register_kernels": lambda: None}
    return types.SimpleNamespace(**given | changed)


def test_gradients_built_for_another_torch_are_made_in_python(loader):
    """The kernels are on torch's stable ABI; only what makes them differentiable in C++ is not."""
    old = extension(torch_version="2.11.0")
    loader(_C=old, _autograd=old)
    assert _extension.module() is old and _extension.problem() is None
    expected = f"the compiled gradients were built for torch 2.11.0, this is {torch.__version__}: {_extension.MEND}"
    assert _extension.make_differentiable() is None and _extension.problem("_autograd") == expected
    new = extension(make_differentiable=print)
    loader(_C=old, _autograd=new)
    assert _extension.make_differentiable() is print and _extension.problem("_autograd") is None


GRADIENTS_IN_PYTHON = """
import sys
sys.modules["probsym_fast._autograd"] = None
import torch
import probsym_fast as psf
assert psf.info()["extension"]["gradients"] == "Python" and psf.info()["extension"]["problem"] is None
assert psf.info()["ops"]["act_orthogonal"]["cpu"][0] == "cpu"
vectors, frames = torch.randn(2, 4, 3, 1, requires_grad=True), torch.randn(2, 5, 3, 3, requires_grad=True)
found = []
for backend in ("cpu", "reference"):
    loss = psf.ops.act_orthogonal(vectors, frames, mean=True, backend=backend).square().sum()
    found.append(torch.autograd.grad(loss, (vectors, frames)))
for x, y in zip(*found, strict=True):
    torch.testing.assert_close(x, y)
"""


@pytest.mark.skipif(MODULE is None, reason="the extension is not built")
def test_kernels_with_gradients_in_python():
    done = python(GRADIENTS_IN_PYTHON, ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_kernels_that_fit_are_no_problem(loader):
    loader(_C=extension())
    assert _extension.problem() is None and _extension.has_kernels("cpu") and not _extension.has_kernels("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _extension.report_once("cpu")


def test_only_the_cpu_is_reported_and_only_once(loader):
    loader()
    assert _extension.module() is None and _extension.problem().startswith("the compiled kernels are not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _extension.report_once("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _extension.report_once("cpu")
        _extension.report_once("cpu")
    assert [w.category for w in caught] == [RuntimeWarning]


@pytest.mark.skipif(MODULE is None, reason="the extension is not built")
def test_the_signatures_are_those_of_the_schemas():
    """Written by two sides: C++ from its functions' types, Python from the schemas."""
    ops = [x for op in OPS.values() for x in (op.kernel, op.backward) if x is not None]
    expected = {x._schema.name.split("::")[1]: _extension.signature(x._schema) for x in ops}
    assert {op: signature for _, op, signature in MODULE.kernels()} == expected


@pytest.fixture
def gpu(loader, monkeypatch):
    """An extension built for other GPUs than the one that is there, which op calls see as if it were the CPU."""
    _extension._runs_on_gpu.cache_clear()
    asked = []
    runs = lambda index: asked.append(index) or index == 1  # noqa: E731
    loader(_C=extension(), _cuda=extension(cuda_architectures="8.0;9.0;10.0+PTX", runs_on_gpu=runs))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    yield asked
    _extension._runs_on_gpu.cache_clear()


def test_a_build_for_other_gpus_is_said_once_and_not_used(gpu, monkeypatch):
    op = OPS["soft_permutation"]
    monkeypatch.setitem(BACKENDS, (op.name, "cuda"), ("cuda", "reference"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert op.select("auto", torch.device("cuda", 0), torch.float32) is op.reference
            assert op.select("auto", torch.device("cuda"), torch.float32) is op.reference
        assert op.select("auto", torch.device("cuda", 1), torch.float32) is op.kernel
    assert gpu == [0, 1] and [w.category for w in caught] == [RuntimeWarning]
    expected = (
        "probsym_fast: the CUDA kernels were built for the architectures 8.0;9.0;10.0+PTX, this GPU (Tesla T4) has 7.5: "
        f"set TORCH_CUDA_ARCH_LIST=7.5 and {_extension.MEND}. Ops use their slower reference until then."
    )
    assert str(caught[0].message) == expected
    there = "soft_permutation: backend must be one of ('auto', 'reference') on cuda, got 'cuda'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(there)}$"):
        op.select("cuda", torch.device("cuda", 0), torch.float32)


def test_the_question_for_the_gpu_does_not_break_a_graph(gpu):
    function = torch.compile(lambda x: x + 1 if _extension.runs_on_gpu(1) else x, fullgraph=True, backend="eager")
    assert function(torch.zeros(1)).item() == 1


@pytest.mark.skipif(os.environ.get("PROBSYM_BUILD") == "0", reason="PROBSYM_BUILD=0")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_this_installation_has_its_kernels():
    assert probsym_fast.info()["extension"]["problem"] is None
    assert all(op.has_kernel("cpu") for op in OPS.values())


# --- what setup.py builds ---


@pytest.fixture
def tree(tmp_path) -> Path:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "module.cpp").write_text("#error never compiled here\n")
    (tmp_path / "csrc" / "cpu" / "op.cpp").touch()
    (tmp_path / "csrc" / "cpu" / "op.h").touch()
    (tmp_path / "probsym_fast").mkdir()
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_failing_compiler_leaves_the_package_without_kernels(tree):
    """Without those of an older build, too; another interpreter's stay."""
    older = tree / "probsym_fast" / f"_autograd{sysconfig.get_config_var('EXT_SUFFIX')}"
    other = tree / "probsym_fast" / "_C.cpython-27.so"
    older.touch()
    other.touch()
    done = build(tree, CXX="false", CC="false", PROBSYM_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "probsym_fast: the kernels did not build, ops use their reference: " in done.stderr
    assert not older.exists()
    assert other.exists()


def test_a_failing_compiler_is_an_error_where_kernels_are_wanted(tree):
    done = build(tree, CXX="false", CC="false", PROBSYM_BUILD="1")
    assert done.returncode != 0
    assert "the kernels did not build" not in done.stderr


# Prints, for each setting, the sources that setup() is called with (None where there is no extension), and the GPUs.
DECISIONS = """
import json, os, pathlib, runpy, sys
import setuptools, torch
COMMON = ["csrc/check.cpp", "csrc/errors.cpp", "csrc/kernels.cpp", "csrc/tensor.cpp"]
import torch.utils.cpp_extension as tools
calls = []
setuptools.setup = lambda **arguments: calls.append(arguments)

def optimised(level=None):
    os.environ.pop("PROBSYM_OPTIMISE", None)
    if level is not None:
        os.environ["PROBSYM_OPTIMISE"] = level
    sources(home=None)
    os.environ.pop("PROBSYM_OPTIMISE", None)
    return [[x for x in module.extra_compile_args["cxx"] if x.startswith("-O")] for module in calls[-1]["ext_modules"]]

def sources(wanted="auto", cuda="13.2", home="toolkit", gpus=None):
    os.environ["PROBSYM_BUILD"], torch.version.cuda = wanted, cuda
    tools.CUDA_HOME = str(pathlib.Path(home).absolute()) if home else None
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    if gpus:
        os.environ["TORCH_CUDA_ARCH_LIST"] = gpus
    runpy.run_path("setup.py")
    modules = calls[-1].get("ext_modules")
    assert ("build_ext" in calls[-1].get("cmdclass", {})) == (modules is not None)
    if modules:
        defined = [x for x in modules[-1].extra_compile_args["cxx"] if "ARCHITECTURES" in x]
        built = {module.name.split(".")[1]: [x for x in module.sources if x not in COMMON] for module in modules}
        assert all(set(COMMON) <= set(module.sources) for module in modules if module.name != "probsym_fast._autograd")
        return built, defined, os.environ.get("TORCH_CUDA_ARCH_LIST")

answer = {}
answer["no cuda files"] = sources()
pathlib.Path("csrc/cuda").mkdir()
for kind in ("cu", "torch.cpp", "h"):
    pathlib.Path(f"csrc/cuda/op.{kind}").touch()
answer["toolkit"] = sources()
answer["chosen"] = sources(gpus="7.5 9.0a")
answer["older toolkit"] = sources(cuda="12.6")
answer["no toolkit"] = sources(home=None)
answer["no nvcc"] = sources(home="empty")
answer["torch without cuda"] = sources(cuda=None)
answer["not wanted"] = sources("0")
answer["optimised"] = [optimised(), optimised("0")]
try:
    optimised("fast")
except SystemExit as error:
    answer["optimised unknown"] = str(error)
os.environ.pop("PROBSYM_OPTIMISE")
sys.modules["torch.utils.cpp_extension"] = None
answer["no build tools"] = sources()
try:
    sources("1")
except ImportError:
    answer["no build tools, wanted"] = "ImportError"
print(json.dumps(answer))
"""


def test_what_is_built_where(tree):
    (tree / "toolkit" / "bin").mkdir(parents=True)
    (tree / "toolkit" / "bin" / "nvcc").touch()
    (tree / "empty").mkdir()
    done = python(DECISIONS, tree)
    assert done.returncode == 0, done.stderr
    modules = {"_C": ["csrc/module.cpp", "csrc/cpu/op.cpp"], "_autograd": ["csrc/autograd.cpp"]}
    cpu = [modules, [], None]

    def with_gpus(names):
        cuda = {"_cuda": ["csrc/cuda/op.cu", "csrc/cuda/op.torch.cpp"]}
        return [modules | cuda, [f'-DPSF_CUDA_ARCHITECTURES="{names}"'], names]

    assert json.loads(done.stdout.splitlines()[-1]) == {
        "no cuda files": cpu,
        "toolkit": with_gpus("8.0;9.0;10.0;12.0+PTX"),
        "chosen": with_gpus("7.5 9.0a"),
        "older toolkit": with_gpus("8.0;9.0+PTX"),
        "no toolkit": cpu,
        "no nvcc": cpu,
        "torch without cuda": cpu,
        "not wanted": None,
        "optimised": [[["-O3"]] * 2, [["-O0"]] * 2],
        "optimised unknown": "PROBSYM_OPTIMISE must be 0, 1, 2 or 3, got 'fast'",
        "no build tools": None,
        "no build tools, wanted": "ImportError",
    }
    assert "probsym_fast: kernels are not built" in done.stderr
    assert "use pip --no-build-isolation" in done.stderr
