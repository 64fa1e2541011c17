"""The table of docs/programs.md, made from the rows and columns that the tests use.

    python -m tests.programs.matrix

writes the page. A column says what a row's cell holds, and which tests fill it. To add one, add it to COLUMNS: cells that
depend on the row are a function of its name and the row, and raise KeyError for a row that nobody tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.programs.rows import ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "programs.md"
PASSES, NONE = "yes", "–"


class Column(NamedTuple):
    title: str
    tests: str
    cell: Callable[[str, Row], str]


def recorded(name: str, row: Row) -> str:
    return "refuses" if row.refuses else PASSES


def starred(row: Row) -> str:
    return " *" if row.slow else ""


def exported(name: str, row: Row) -> str:
    return recorded(name, row) + starred(row)


def compilations(most: int) -> Callable[[str, Row], str]:
    def cell(name: str, row: Row) -> str:
        if most == 3 and not row.trains:
            return NONE
        return "refuses" if row.refuses else f"≤ {most + row.programs - 1}" + starred(row)

    return cell


def trained(name: str, row: Row) -> str:
    return recorded(name, row) if row.trains else NONE


COLUMNS = [
    Column("compile, eval", "test_compilations.py", compilations(2)),
    Column("compile, training", "test_compilations.py", compilations(3)),
    Column("export, strict", "test_export.py", exported),
    Column("export, not strict", "test_export.py", exported),
    Column("FakeTensor, forward", "test_fake.py", recorded),
    Column("FakeTensor, backward", "test_fake.py", trained),
]

BEFORE = r"""# Programs

Which parts of the package work in which tool of PyTorch. The tests in `tests/programs` check the cells, and
`python -m tests.programs.matrix` makes this page from them.

- **yes**: the same numbers as eager.
- **≤ 2**: the same, and six batch sizes, six edge counts or six numbers of points compile at most that often. The first
  program is for one size, the second for any.
- **refuses**: an error names the way out. See below the table.
- **–**: it has nothing to train.
- **\***: its test is marked slow, and has not been run since it was written.

Exported programs take any number of graphs, nodes, edges and points.

"""


def page() -> str:
    head = [column.title for column in COLUMNS]
    text = BEFORE
    for kind in dict.fromkeys(row.kind for row in ROWS.values()):
        text += f"## {kind.capitalize()}\n\n"
        text += "| | " + " | ".join(head) + " |\n|" + "---|" * (len(head) + 1) + "\n"
        for name, row in ROWS.items():
            if row.kind == kind:
                text += f"| {name} | " + " | ".join(column.cell(name, row) for column in COLUMNS) + " |\n"
        text += "\n"
    text += "## What refuses, and the way out\n\n"
    text += "".join(f"- {name}: `{row.refuses}`.\n" for name, row in ROWS.items() if row.refuses)
    text += """
`Frame` computes its classes from values. Compute them first with `laplacian_keys` of `probsym_fast.distributions.laplacian`:
`batch.replace(frame=laplacian_keys(batch.edge_index, batch.ptr))`.

## Good to know

- `GraphTokens` with `dense=None` works in two ways. torch.compile makes a program for each once batches of both densities
  occur. An exported program has one way, edge by edge; set `dense=True` for dense graphs.
- `VectorNeurons` takes all clouds at once in a recorded program. `model.chunk` bounds the memory.
- One graph, one edge or one cloud are programs of their own: torch treats sizes 0 and 1 apart.
- Clouds with no more points than `neighbors` are a program of their own.
"""
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
