"""The tables of docs/programs.md, made from the rows and columns that the tests use.

    python -m tests.programs.matrix

writes the page. A column says what a row's cell holds, and which tests fill it. To add one, add it to TABLES.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.programs import test_deployed, test_inductor
from tests.programs.cases import compiled_by_hand, variant
from tests.programs.rows import ROWS, Row
from tests.programs.runs import seeded

PAGE = Path(__file__).parents[2] / "docs" / "programs.md"
PASSES, NONE, HAND = "yes", "–", " †"


class Column(NamedTuple):
    title: str
    tests: str
    cell: Callable[[str, Row], str]


def recorded(name: str, row: Row) -> str:
    return "refuses" if row.refuses else PASSES


def recorded_strictly(name: str, row: Row) -> str:
    return recorded(name, row) + HAND * variant(name, row)


def trained(name: str, row: Row) -> str:
    return recorded(name, row) if row.trains else NONE


def compilations(most: int) -> Callable[[str, Row], str]:
    def cell(name: str, row: Row) -> str:
        if most == 3 and not row.trains:
            return NONE
        by_hand = compiled_by_hand(row, most == 3)
        return "refuses" if row.refuses else f"≤ {most + row.programs - 1}{HAND * by_hand}"

    return cell


def checked(runs: list[tuple], often: set[tuple]) -> str:
    return PASSES + (HAND if any(run not in often for run in runs) else "")


def inductor(training: bool) -> Callable[[str, Row], str]:
    def cell(name: str, row: Row) -> str:
        if row.refuses or (training and not row.trains):
            return trained(name, row) if training else recorded(name, row)
        program = name if row.whole else row.kind
        return checked([(program, training, dynamic) for dynamic in (False, True)], test_inductor.OFTEN)

    return cell


def deployed(form: str) -> Callable[[str, Row], str]:
    return lambda name, row: checked([(form, name)], {(form, often) for often in test_deployed.OFTEN[form]})


def where(wanted: Callable[[Row], bool]) -> Callable[[str, Row], str]:
    return lambda name, row: PASSES if wanted(row) else NONE


COMPILED = [
    Column("compile, eval", "test_compilations.py", compilations(2)),
    Column("compile, training", "test_compilations.py", compilations(3)),
    Column("Inductor, eval", "test_inductor.py", inductor(False)),
    Column("Inductor, training", "test_inductor.py", inductor(True)),
    Column("export, strict", "test_export.py", recorded_strictly),
    Column("export, not strict", "test_export.py", recorded),
    Column("AOTInductor", "test_deployed.py", deployed("AOTInductor")),
    Column("ONNX", "test_deployed.py", deployed("ONNX")),
    Column("FakeTensor, forward", "test_fake.py", recorded),
    Column("FakeTensor, backward", "test_fake.py", trained),
]
EAGER = [
    Column("eager", "test_fake.py", where(lambda row: True)),
    Column("grad, vjp, jvp", "test_transforms.py", where(lambda row: row.differentiable)),
    Column("vmap", "test_transforms.py", where(lambda row: row.differentiable or seeded(row))),
    Column("vmap over models", "test_transforms.py", where(lambda row: row.learns)),
    Column("double backward", "test_transforms.py", where(lambda row: row.differentiable)),
    Column("checkpoint", "test_state.py", where(lambda row: row.trains or row.differentiable)),
    Column("bfloat16, float16", "test_half.py", where(lambda row: True)),
    Column("autocast", "test_state.py", where(lambda row: True)),
    Column("copy, pickle, state, meta", "test_state.py", where(lambda row: row.part is not None)),
    Column("DDP, FSDP2", "test_parallel.py", where(lambda row: row.learns)),
]
WHOLE = ("AOTInductor", "ONNX")  # columns of whole models

BEFORE = r"""# Programs

Which parts of the package work in which tool of PyTorch. The tests in `tests/programs` check the cells, and
`python -m tests.programs.matrix` makes this page from them.

- **yes**: the same numbers as eager. Close to them in autocast and with bfloat16 or float16 weights.
- **≤ n**: the same, and six batch sizes, six edge counts or six numbers of points compile at most n times. The first program
  is for one size, the second for any size. Training may take a third, and a module with two forms, such as a sparse
  and a dense one, one more for each.
- **refuses**: an error names the way out. See below the tables.
- **†**: at least one of its tests only runs by hand, and did, on a CPU with torch 2.14.
- **–**: it has nothing to train, to differentiate or to store.

Inductor compiles for one size and for any (`dynamic=False` and `True`). DDP has a static graph. Exported programs take any
number of graphs, nodes, edges and points.

"""

AFTER = """
`Frame` computes its classes from values. Compute them first with `laplacian_keys` of `probsym_fast.distributions.laplacian`:
`batch.replace(frame=laplacian_keys(batch.edge_index, batch.ptr))`.

## Good to know

- `GraphTokens` with `dense=None` has two ways. torch.compile compiles each once batches of both densities occur, since
  neither serves both: edge by edge is up to twice as fast for sparse graphs, matrix products are up to 1.8 times as fast for
  complete ones (a training step of the embedding, on a CPU). With `dense=True` or `False` there is one way. An exported
  program works edge by edge unless `dense=True`.
- `VectorNeurons` takes all clouds at once in a recorded program. `model.chunk` bounds the memory.
- One graph, one edge or one cloud compile separately: torch treats sizes 0 and 1 apart.
- Clouds with no more points than `neighbors` compile separately.
- An exported program with a backbone of timm takes two graphs or more (`Guard failed: -1 + ptr.size()[0] >= 2`). Add an empty
  graph to a batch of one, or export an example of one graph with `dynamic=("nodes", "edges")`.
- Batch statistics magnify rounding. `VectorNeurons` with bfloat16 weights is near float32 in eval only.
"""


def table(kind: str, columns: list[Column]) -> str:
    columns = [column for column in columns if column.title not in WHOLE or kind == "whole models"]
    text = "| | " + " | ".join(column.title for column in columns) + " |\n|" + "---|" * (len(columns) + 1) + "\n"
    for name, row in ROWS.items():
        if row.kind == kind:
            text += f"| {name} | " + " | ".join(column.cell(name, row) for column in columns) + " |\n"
    return text + "\n"


def page() -> str:
    text = BEFORE
    for kind in dict.fromkeys(row.kind for row in ROWS.values()):
        text += f"## {kind.capitalize()}\n\n" + table(kind, COMPILED) + table(kind, EAGER)
    text += "## What refuses, and the way out\n\n"
    text += "".join(f"- {name}: `{row.refuses}`.\n" for name, row in ROWS.items() if row.refuses)
    return text + AFTER


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
