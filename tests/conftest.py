"""Shared by the tests: devices, backends, and the one table of tolerances."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = (
    "1"  # it would replay code compiled for another version of our schemas
)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else no products in deterministic mode on a GPU
os.environ.pop("PROBSYM_DEBUG", None)  # read at import

import torch

from probsym_fast.ops import OPS

# A cluster's job or a launcher says with these that there are other processes, which Lightning would look for.
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "PL_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CACHES = ("PROBSYM_CACHE", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME")  # in the home folder unless given
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# largest allowed error against the float64 reference, relative to the largest entry of the tensor compared
VALUE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
GRADIENT = {
    torch.float64: 1e-11,
    torch.float32: 5e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-2,
}  # rounded to the dtype


def pytest_configure(config):
    """The tests are the same in any shell, and without a home folder."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    if not os.access(Path.home(), os.W_OK):
        folder = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        for name in CACHES:
            os.environ.setdefault(name, f"{folder}/{name}")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Marks what uses a GPU by its fixture or its device; other tests that do so bear the mark themselves."""
    for item in items:
        given = item.callspec.params.get("device") if hasattr(item, "callspec") else None
        if "gpu" in item.fixturenames or given in ("cuda", torch.device("cuda")):
            item.add_marker("gpu")


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """For what the kernels of a GPU alone take."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def as_if_first():
    """Each test starts from one seed, and what it sets for the whole process is undone after it, so that their order does
    not matter: a training in deterministic mode leaves torch in it, and Lightning's seeds in the environment."""
    torch.manual_seed(0)
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.get_deterministic_debug_mode()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    torch.set_deterministic_debug_mode(deterministic)
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def assert_near(found: torch.Tensor, expected: torch.Tensor, table: dict = VALUE, dtype: torch.dtype | None = None):
    """Elementwise against the largest entry, and by direction."""
    if found.is_complex():
        found, expected = torch.view_as_real(found.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    bound = table[dtype or found.dtype]
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape
    assert found.isfinite().all()
    scale = expected.abs().max().clamp(min=1.0 if table is VALUE else 1e-3)  # values here are of order 1
    assert (found - expected).abs().max() <= bound * scale
    if expected.norm() > 1e-6 and (table is not VALUE or expected.abs().max() > 100 * bound):  # else it is rounding
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
        assert cosine > 1 - 1e-4


def implementations(op: str, dtype: torch.dtype | None = None) -> list:
    """Every (device, backend) there is for an op, to parametrise with; dtype: those that take it."""
    return [
        pytest.param(torch.device(device), backend, id=f"{device}-{backend}")
        for device in DEVICES
        for backend in OPS[op].backends(device)
        if dtype is None or backend == "reference" or dtype in OPS[op].kernel_dtypes(device)
    ]


def kernels_of(op: str, dtype: torch.dtype | None = None) -> list:
    """Every (device, backend) of an op that is compiled."""
    return [case for case in implementations(op, dtype) if case.values[1] != "reference"]
