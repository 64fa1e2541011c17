"""Every test here runs with atomics and in deterministic mode, on fresh memory full of garbage, its programs in an order of
their own."""

import os

import pytest
import torch

from tests.helpers.interpreter import Programs, index_by_one_element, round_products, scan_whole_blocks
from tests.ops.triton.interpreted.memory import Fences, garbage

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/ops/triton/interpreted: TRITON_INTERPRET must be 1 before triton is imported")


@pytest.fixture(autouse=True, params=["atomics", "deterministic"])
def mode(request, monkeypatch):
    if "embed_matrix" in request.node.originalname:  # makes no lists, or fails here
        for module in ("aggregate", "items", "soft_rows"):
            monkeypatch.delattr(f"probsym_fast.ops.triton.{module}.group")
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if request.param == "deterministic":
        if dtype != torch.float32:
            pytest.skip("the lists do not depend on the dtype")
        if request.node.callspec.params.get("N", 6) != 6:
            pytest.skip("nor on the padding")
        name = request.node.originalname.replace("embed_matrix", "")
        if not any(x in name for x in ("aggregate", "embed", "readout", "entries")):
            pytest.skip("no lists, nothing that the mode changes")
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def garbage_in_fresh_memory(monkeypatch):
    def poisoned(make):
        def call(*arguments, **settings):
            x = make(*arguments, **settings)
            return x.fill_(garbage(x.dtype))

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """In an order of their own, not that of their numbers."""
    round_products(monkeypatch)
    index_by_one_element(monkeypatch)
    scan_whole_blocks(monkeypatch)
    return Programs(monkeypatch)


@pytest.fixture
def fences(monkeypatch):
    """What the launchers allocate stands between fences; in the end all fences stand."""
    fences = Fences()
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, make=make, **kind: fences(make(*size, **kind)))
    yield fences
    fences.stand()
