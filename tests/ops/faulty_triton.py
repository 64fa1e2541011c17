"""Runs tests of triton/interpreted/ on kernels with a fault each, for tests/test_faults.py.

    TRITON_INTERPRET=1 python -m tests.ops.faulty_triton FOLDER

writes FOLDER/outcomes.json: {fault: [pytest's status, its output]}, and under "" that of all the tests without a fault. Every
fault has a process of its own, forked when the packages are imported.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from tests.helpers.faults import replaced

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    file: str  # in probsym_fast/ops/triton
    text: str
    instead: str
    test: str  # in tests/ops/triton/interpreted


PRODUCT = "tl.dot(b_d, b_w, b_g, input_precision=PRECISION)"
CHANNELS = "channels(p_weight, p_bias, p_mean, p_variance, o_c, o_c < C, eps)"
ZEROS = "b_y = tl.zeros((BLOCK_S, BLOCK), tl.float32)\n"
ACT = "test_orthogonal.py::test_act_orthogonal[atomics-dtype1-60-2-9"
BATCH_NORM = "test_linear_batch_norm_relu.py::test_linear_batch_norm_relu[atomics-70-1-dtype0]"
FAULTS = {
    "a wrong mask": Fault(
        "aggregate.py",
        "m_x = (b_row >= 0)[:, None]",
        "m_x = (b_row > 0)[:, None]",
        "test_aggregate.py::test_aggregate[atomics-False-shape0-dtype0]",
    ),
    "an accumulator that is not reset": Fault(
        "act_orthogonal.py",
        f"for i in range(d):\n        {ZEROS}",
        f"{ZEROS}    for i in range(d):\n",
        f"{ACT}-False-False]",
    ),
    "swapped pointers": Fault(
        "linear_batch_norm_relu.py", CHANNELS, CHANNELS.replace("p_weight, p_bias", "p_bias, p_weight"), BATCH_NORM
    ),
    "products in tf32": Fault(
        "node_identifiers.py",
        PRODUCT,
        "tl.dot(b_d, b_w, b_g)",
        "test_node_identifiers.py::test_node_identifiers[atomics-sizes0-7-3-20-dtype0]",
    ),
    "nodes beyond the last slot": Fault(
        "node_identifiers.py",
        "tl.minimum(tl.maximum(end, 0), first + N)",
        "tl.maximum(end, 0)",
        "test_node_identifiers.py::test_nodes_beyond_the_last_slot_have_no_features",
    ),
    "a part that begins at another image": Fault(
        "embed_turned.py",
        "first // S + tl.program_id(0) // blocks",
        "tl.program_id(0) // blocks",
        "test_images.py::test_images_in_parts[atomics]",
    ),
    "what a later program writes over": Fault(
        "act_orthogonal.py",
        "m_v = o_v < n * C\n",
        "m_v = o_v < n * C + (tl.program_id(0) + blocks < tl.num_programs(0))\n",
        f"{ACT}-False-False]",
    ),
}


def run(tests: list[str], output: Path, folder: Path | None = None) -> list:
    """pytest's status and output in a forked process, which finds the files of `folder` before the package's."""
    child = os.fork()
    if not child:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if folder:
            package.__path__.insert(0, str(folder))
        names = [f"tests/ops/triton/interpreted/{x}" for x in tests]
        status = pytest.main(["-qx", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", *names])
        sys.stdout.flush()
        os._exit(int(status))
    _, status = os.waitpid(child, 0)
    return [os.waitstatus_to_exitcode(status), output.read_text()]


def main(folder: Path) -> None:
    outcomes = {"": run(sorted({x.test for x in FAULTS.values()}), folder / "output")}
    for i, (name, fault) in enumerate(FAULTS.items()):
        copy = folder / str(i) / fault.file
        copy.parent.mkdir()
        shutil.copy(Path(package.__file__).parent / fault.file, copy)
        replaced(copy, fault.text, fault.instead)
        assert f"{package.__name__}.{copy.stem}" not in sys.modules
        outcomes[name] = run([fault.test], folder / "output", copy.parent)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    import pytest
    import torch._dynamo  # noqa: F401 - here once, not in every process
    import triton.runtime.interpreter  # noqa: F401

    import probsym_fast.ops.triton as package

    main(Path(sys.argv[1]))
