"""Products of matrices: in tf32 where torch allows it, and in every configuration."""

import pytest
import torch

from probsym_fast.ops.triton import _launch
from tests.helpers.items import batch, weights
from tests.helpers.networks import message_weights
from tests.ops.triton.inputs import axis_of, soft_arguments
from tests.ops.triton.interpreted.checks import BOUND, TF32, check


def products_of_graphs(dtype):
    """Op -> arguments, and the numbers of those with a gradient."""
    data, axis = batch([3, 4], 4, C=3, S=2), axis_of(4, 2)
    ptr, *p = soft_arguments(data)
    matrix = [data.matrix.to(dtype), ptr.diff(), *p, *axis, weights(5, 3, 2, 2).to(dtype), None]
    return {
        "embed_matrix": (matrix, [0, 4, 5, 6, 11]),
        "node_identifiers": ([ptr, *p, weights(4, 5).to(dtype), 7], [3, 4, 5, 7]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2])
def test_other_configurations(number, dtype, monkeypatch, mode):
    """Of products of matrices, where the one that is fixed is not the only one."""
    if mode == "deterministic":
        pytest.skip("there the first is taken")

    def numbered(self, constants):
        return self.configurations[number % len(self.configurations) :]  # of the tensor cores for float32 too

    monkeypatch.setattr(_launch.Kernel, "among", numbered)
    calls = products_of_graphs(dtype)
    check("embed_matrix", *calls["embed_matrix"], BOUND[dtype])  # products with the weight are kept in its dtype
    check("node_identifiers", *calls["node_identifiers"])


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_products_in_tf32(tf32):
    """Where torch allows them in float32, and there only: they do not keep its bound."""
    calls = products_of_graphs(torch.float32)
    x, edges, row = torch.randn(4, 3, 3), torch.randn(2, 3, 3, 2), message_weights(3, 2, 6, 1, 2).float()
    calls["message_passing"] = [x, edges, row, 6, 1, 2, True, False], [0, 1, 2]
    for name, call in calls.items():
        check(name, *call, 10 * TF32)
        with pytest.raises(AssertionError):
            check(name, *call)
