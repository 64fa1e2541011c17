"""Every row on a GPU: the numbers of the CPU, forward and backward; under autocast finite ones."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.programs.cases import cases
from tests.programs.runs import SIZE, floats, leaves

# largest error of a tensor relative to its largest entry, or to a hundredth of that of all outputs, or all gradients
BOUND = {torch.float64: 1e-8, torch.float32: 2e-3}


def run(program: torch.nn.Module, inputs: tuple, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of weights and inputs, from the same gradients of the outputs."""
    used = copy.deepcopy(program).to(device)
    there = tree_map(lambda x: x.detach().to(device).requires_grad_(x.requires_grad), inputs)
    out = floats(used(there))
    torch.manual_seed(0)
    terms = [(x * torch.randn(x.shape, dtype=x.dtype).to(device)).sum() for x in out if x.requires_grad]
    if terms:
        sum(terms).backward()
    torch.cuda.synchronize()
    assert all(x.device.type == device.type for x in out)
    return out, [x.grad for x in (*used.parameters(), *floats(there)) if x.grad is not None]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    scales = [y.abs().max().item() if y.numel() else 0.0 for y in wanted]
    least = max(1e-2 * max(scales, default=1.0), 1e-6)
    pairs = [(x.cpu() - y, scale) for x, y, scale in zip(found, wanted, scales, strict=True) if y.numel()]
    return max((off.abs().max().item() / max(scale, least) for off, scale in pairs), default=0.0)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("row", [case for case in cases(traced=False) if case.id != "Frame (points)"])  # any signs
def test_the_numbers_of_the_cpu(row, training, dtype, gpu):
    program, inputs = row.program(training).to(dtype), leaves(row.sample(SIZE, False, dtype), dtype)
    (out, gradients), (expected, of_cpu) = (run(program, inputs, x) for x in (gpu, torch.device("cpu")))
    assert error(out, expected) < BOUND[dtype]
    assert error(gradients, of_cpu) < BOUND[dtype]


@pytest.mark.parametrize("row", cases(lambda row: row.whole and row.learns, traced=False))
def test_whole_models_train_under_autocast(row, gpu):
    program = row.program(True).to(gpu)
    inputs = tree_map(lambda x: x.to(gpu), row.sample(SIZE, False))
    with torch.autocast("cuda", torch.bfloat16):
        out = floats(program(inputs))
        sum(x.float().square().mean() for x in out if x.requires_grad).backward()
    torch.cuda.synchronize()
    gradients = [x.grad for x in program.parameters() if x.grad is not None]
    assert gradients and all(x.isfinite().all() for x in (*out, *gradients))
