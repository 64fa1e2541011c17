"""Backbones in one pass against the same modules one by one and compiled: the same weights, and the same numbers."""

import copy

import pytest
import torch

from benchmarks.harness import chosen, compare
from benchmarks.inputs import molecules
from benchmarks.operations import operations_of
from probsym_fast.groups import Graphs
from probsym_fast.models import MLP, GINBackbone, MessagePassing, OnePass, Transformer
from probsym_fast.models.backbones.fused import by_modules
from probsym_fast.ops._extension import multiplies_bf16

READ = range(0, 25, 6)


def graphs(count: int) -> tuple[torch.Tensor, Graphs]:
    """Features of 10 samples of graphs as large as those of EXP."""
    edge_index, ptr = molecules([45] * count)
    return torch.randn(45 * count, 10, 64), Graphs(torch.zeros(45 * count, 1), edge_index, ptr)


# name -> backbone, inputs for M sequences, sampled graphs or groups of 20 rows
CASES = {
    "n-body Transformer": (lambda: Transformer(read=READ), lambda M: (torch.randn(M, 25, 8),)),
    "n-body GNN": (MessagePassing, lambda M: (torch.randn(M // 20, 20, 5, 6), torch.randn(M // 20, 1, 5, 5, 2))),
    "EXP-classify GIN": (lambda: GINBackbone(64, 3, 10, "relu"), lambda M: graphs(M // 10)),
    "MLP of width 64": (lambda: MLP([64, 64, 64, 64]), lambda M: (torch.randn(M, 20, 64),)),
}
SIZES = 2000, 400, 100


@pytest.mark.parametrize("name", ["n-body Transformer", "n-body GNN"])
def test_one_thread(name, device, seconds, record):
    """The same with one thread, and its rate."""
    if device != "cpu":
        pytest.skip("of CPUs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, step = measure(name, 400, device, seconds, ", one thread")
    finally:
        torch.set_num_threads(threads)
    record(rows, step)


@pytest.mark.parametrize("M", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_passes(name, M, device, seconds, record):
    record(*measure(name, M, device, seconds))


FEW = {  # sequences, graphs or groups of 20 rows: where the modules begin to be slower
    "n-body Transformer": (1, 16),
    "n-body GNN": (20, 320),
    "MLP of width 64": (1, 100),
}


@pytest.mark.parametrize(("name", "M"), [(name, M) for name, some in FEW.items() for M in some])
def test_few(name, M, device, seconds, record):
    record(*measure(name, M, device, seconds))


@pytest.mark.parametrize("name", ["n-body Transformer", "n-body GNN"])
def test_bfloat16(name, device, seconds, record):
    """Forward, and forward and backward, in float32 and under autocast to bfloat16; 2000 at once."""
    if device == "cpu" and not multiplies_bf16():
        pytest.skip("the processor has no AMX")
    torch.manual_seed(0)
    make, inputs = CASES[name]
    backbone, given = make().to(device), tuple(x.to(device) for x in inputs(2000))
    backbone.one_pass = True
    modules, wanted = by_modules(backbone), torch.randn_like(backbone(*given))

    def run(some: OnePass, half: bool, both: bool):
        some.zero_grad()
        with torch.set_grad_enabled(both), torch.autocast(device, torch.bfloat16, enabled=half):
            y = some(*given)
        if both:
            y.float().backward(wanted)

    for label, both in (("forward", False), ("forward and backward", True)):
        variants = {
            "one pass, float32": lambda both=both: run(backbone, False, both),
            "one pass, bfloat16": lambda both=both: run(backbone, True, both),
            "modules, bfloat16": lambda both=both: run(modules, True, both),
        }
        settings = {"reference": "one pass, float32", "seconds": 2 * seconds, "whole": True}
        rows = compare(f"{name}, 2000 at once, {label}, autocast", variants, device=device, **settings)
        record.rows(rows)
    record([], variants["one pass, bfloat16"])


def operations(name: str, M: int) -> int:
    """Operations of the products of forward and backward, by modules."""
    make, inputs = CASES[name]
    with torch.device("meta"):
        modules, given = by_modules(make()), inputs(M)
    return operations_of(lambda: modules(*given).sum().backward())


def measure(name, M, device, seconds, more=""):
    """Forward without gradients, and forward and backward. The share is of the machine's float32 rate."""
    torch.manual_seed(0)
    make, inputs = CASES[name]
    backbone = make().to(device)
    backbone.one_pass = True  # also on a GPU
    given = tuple(x.to(device) for x in inputs(M))
    reason = backbone.why_not(given[0].device, torch.float32)
    if reason is not None:
        pytest.skip(f"no pass: {reason}")
    again, modules, compiled = copy.copy(backbone), by_modules(backbone), by_modules(copy.deepcopy(backbone))
    again.recompute = True
    compiled.compile()
    ways = {"one pass": backbone, "one pass, recomputed": again, "modules": modules, "modules, compiled": compiled}
    wanted = torch.randn_like(backbone(*given))
    torch.testing.assert_close(backbone(*given), modules(*given), rtol=1e-4, atol=1e-4)

    def forward(some: OnePass):
        with torch.no_grad():
            some(*given)

    def step(some: OnePass):
        some.zero_grad()
        some(*given).backward(wanted)

    found = []
    for label, run in (("forward", forward), ("forward and backward", step)):
        variants = {way: lambda some=some, run=run: run(some) for way, some in ways.items()}
        variants = chosen(variants)
        if run is forward:
            del variants["one pass, recomputed"]
        operations = operations_of(variants["modules"])
        settings = {"reference": "modules", "operations": operations, "seconds": 2 * seconds, "whole": True}
        rows = compare(f"{name}, {M} at once, {label}{more}", variants, device=device, **settings)
        medians = {row.variant: row.median for row in rows}
        for row in rows:
            row.extra = {"of modules": round(row.median / medians["modules"], 3)}
            if "modules, compiled" in medians:
                row.extra["of compiled"] = round(row.median / medians["modules, compiled"], 3)
        found += rows
    return found, variants["one pass"]
