"""No call of `torch.ops.probsym_fast` ends the process: it works, or it raises. And what the errors say."""

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from probsym_fast.ops import OPS, _extension, soft_permutation, triton
from tests.ops.raw_calls import valid_calls

ROOT = Path(__file__).parents[2]
COUNT = int(os.environ.get("PROBSYM_RAW_CALLS", "3000"))
SEED = int(os.environ.get("PROBSYM_RAW_SEED", "1"))
PROCESSES = 2
built = pytest.mark.skipif(_extension.module() is None, reason="the extension is not built")
OPERATORS = {*OPS, *(f"{name}_backward" for name, op in OPS.items() if op.backward is not None)}


def repeat(seed: int, first: int, count: int, progress: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.ops.raw_calls", *map(str, (seed, first, count)), str(progress)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="pages without access are made as Linux makes them")
def test_random_calls_work_or_raise(tmp_path):
    part = -(-COUNT // PROCESSES)
    with ThreadPoolExecutor(PROCESSES) as pool:
        runs = [pool.submit(repeat, SEED, i * part, part, tmp_path / str(i)) for i in range(PROCESSES)]
    found = Counter()
    for i, run in enumerate(runs):
        done = run.result()
        if done.returncode:
            last = int((tmp_path / str(i)).read_text())
            pytest.fail(
                f"the process ended with {done.returncode}; again: python -m tests.ops.raw_calls {SEED} {last} 1\n"
                f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        for number, name, end in re.findall(r"^ *(\d+) (\w+) (\w+)$", done.stdout, re.MULTILINE):
            found[name, "worked" if end == "worked" else "raised"] += int(number)
    assert sum(found.values()) == PROCESSES * part
    for name in OPERATORS:  # neither side is empty, for any operator
        assert min(found[name, "worked"], found[name, "raised"]) > COUNT / len(OPERATORS) / 20, (name, found)


# --- every tensor of every operator: its size, its dtype ---

# (operator, argument, what is other of it) that is another valid call
FREE = {
    *(("soft_permutation", "scores", what) for what in ("size",)),
    *(("orthogonal_frame", "matrices", what) for what in ("axes",)),
    *(("act_orthogonal", "vectors", what) for what in ("size", "empty")),
    *(
        (name, "edge_index", what)
        for name in ("aggregate", "aggregate_backward", "gin", "gin_backward")
        for what in ("size", "empty")
    ),
    *(("aggregate", "x", what) for what in ("size", "empty")),
    ("vector_edge_convolution", "x", "size"),
    ("embed_image", "pixels", "size"),
    *(("embed_turned", "turns", what) for what in ("size", "empty")),
    *(("readout", "items", what) for what in ("size", "empty")),
    *(("node_identifiers", "weight", what) for what in ("size", "empty")),
    *(("permute", "x", what) for what in ("size", "empty")),
}


def names_of(operator: str) -> list[str]:
    op = OPS[operator.removesuffix("_backward")]
    return [x.name for x in (op.backward if operator.endswith("_backward") else op.kernel)._schema.arguments]


def other_tensors():
    """(operator, argument, what, arguments): valid calls, but for one tensor of which `what` is other."""
    seen = set()
    for operator, arguments in valid_calls():
        for i, (name, x) in enumerate(zip(names_of(operator), arguments, strict=True)):
            if not isinstance(x, torch.Tensor) or (operator, name) in seen:
                continue
            seen.add((operator, name))
            changes = {"axes": x[None, None], "dtype": x.to(torch.complex64)}
            if x.ndim:
                changes |= {"size": torch.cat([x, x], -1), "empty": x[..., :0]}
            for what, y in changes.items():
                yield operator, name, what, (*arguments[:i], y, *arguments[i + 1 :])
    assert {operator for operator, _ in seen} == OPERATORS


@built
def test_every_tensor_is_checked():
    for operator, name, what, arguments in other_tensors():
        call = getattr(torch.ops.probsym_fast, operator)
        if (operator, name, what) in FREE:
            call(*arguments)
            continue
        print(f"{operator}: another {what} of {name}")
        with pytest.raises(TypeError if what == "dtype" else ValueError, match=rf"^{operator}: \w+ must .*, got "):
            call(*arguments)


def test_every_shape_is_checked_before_a_triton_kernel(monkeypatch):
    pytest.importorskip("triton")
    launched = []
    module = importlib.import_module("probsym_fast.ops.triton._launch")
    monkeypatch.setattr(module, "launch", lambda kernel, *_: launched.append(kernel))
    for operator, name, what, arguments in other_tensors():
        op = operator.removesuffix("_backward")
        if op not in triton.KERNELS or what == "dtype":
            continue
        call = triton._lazy(op, "forward" if op == operator else "backward")
        unread = (operator, name) == ("aggregate", "x") or (operator, name, what) in (
            ("gin", "ptr", "size"),
            ("embed_turned", "pixels", "size"),  # which turns are odd
        )
        if (operator, name, what) in FREE or unread:  # node numbers, offsets and turns are not read
            launched.clear()
            call(*arguments)
            assert launched or what == "empty" or operator == "permute"  # where torch gathers
            continue
        print(f"{operator}: another {what} of {name}")
        with pytest.raises(ValueError, match=rf"^{op}: \w+ must .*, got "):
            call(*arguments)


# --- values that change where autograd does not see it ---


@built
@pytest.mark.parametrize("change", [10**9, -1, -(2**63)])
def test_an_order_that_changes_reaches_no_memory(change):
    scores = torch.randn(2, 3, 7, requires_grad=True)
    p = soft_permutation(scores, torch.tensor([7, 4]))
    p.order.numpy()[1, 2, 3] = change
    with pytest.raises(
        ValueError, match=rf"^soft_permutation_backward: order must hold 0 to 3, got {change} for graph 1$"
    ):
        p.log_r.sum().backward()


@built
def test_an_order_that_is_no_permutation_leaves_no_memory_unset():
    scores = torch.randn(1, 1, 64, requires_grad=True)
    p = soft_permutation(scores)
    p.order.numpy()[...] = 5
    (gradient,) = torch.autograd.grad(p.log_r.sum(), scores)
    assert gradient.count_nonzero() <= 1
