"""Compiled kernels that run without a GPU: their PTX, instruction by instruction."""

import pytest
import torch

from benchmarks.gpu_model.launches import Launches, compiled
from probsym_fast.ops.triton import _launch
from tests.helpers import ptx
from tests.ops.triton.soft_permutation import check_soft_permutation


class Emulated(Launches):
    """Takes the place of `_launch.launch`: compiles, and runs the compiled code on CPU tensors."""

    def __call__(self, kernel, grid, arguments, settings):
        super().__call__(kernel, grid, arguments, settings)
        launch = self.every[-1]
        made, (_, constants, _), size = compiled(launch, 90), launch.source, grid(settings)
        given = [x for i, x in enumerate(arguments) if (i,) not in constants]
        ptx.run(made.asm["ptx"], launch.options["num_warps"], made.metadata.shared, size, given)


@pytest.mark.parametrize(("B", "S", "N", "dtype"), [(2, 3, 12, torch.float64), (1, 1, 193, torch.float32)])
def test_compiled_soft_permutation(B, S, N, dtype, monkeypatch):
    """The compiled code: several rows a warp, which take turns in the same memory, and several warps a row."""
    monkeypatch.setattr(_launch, "launch", Emulated())
    monkeypatch.setattr("probsym_fast.ops.triton.soft_permutation.BYTES", 1)
    num_nodes, iterations = torch.tensor([N, N // 2])[:B], 3 if B > 1 else 2
    check_soft_permutation(torch.randn(B, S, N, dtype=dtype), num_nodes, 0.07, iterations, True)
