"""Backbones in one pass against the same modules one by one and compiled: the same weights, and the same numbers."""

import copy

import pytest
import torch

from benchmarks.harness import compare, operations_of
from probsym_fast.models import MessagePassing, OnePass, Transformer

READ = range(0, 25, 6)
# name -> backbone, inputs for M sequences or graphs
CASES = {
    "n-body Transformer": (lambda: Transformer(read=READ), lambda M: (torch.randn(M, 25, 8),)),
    "n-body GNN": (MessagePassing, lambda M: (torch.randn(M // 20, 20, 5, 6), torch.randn(M // 20, 1, 5, 5, 2))),
}
SIZES = 2000, 400, 100


@pytest.mark.parametrize("M", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_passes(name, M, device, seconds, record):
    """Forward without gradients, and forward and backward. The share is of the machine's float32 rate."""
    torch.manual_seed(0)
    make, inputs = CASES[name]
    backbone = make().to(device)
    given = tuple(x.to(device) for x in inputs(M))
    reason = backbone.why_modules(given[0].device, torch.float32)
    if reason is not None:
        pytest.skip(f"no pass: {reason}")
    again, modules, compiled = copy.copy(backbone), backbone.bare(), copy.deepcopy(backbone.bare())
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
        if run is forward:
            del variants["one pass, recomputed"]
        operations = operations_of(variants["modules"])
        settings = {"reference": "modules", "operations": operations, "seconds": 2 * seconds, "whole": True}
        rows = compare(f"{name}, {M} at once, {label}", variants, device=device, **settings)
        medians = {row.variant: row.median for row in rows}
        for row in rows:
            row.extra = {"of modules": round(row.median / medians["modules"], 3)}
            row.extra["of compiled"] = round(row.median / medians["modules, compiled"], 3)
        found += rows
    record(found, variants["one pass"])
