"""The table of before and after: what was predicted for the first kernels that the model saw, and what is now.

    python -m benchmarks.gpu_model.before --write    writes benchmarks/results/gpu-before.md, from the history of git

FIRST recorded the first kernels. LAST recorded later ones by nearly the same model, so these two compare kernels. What the
table says today is by a model that also counts conflicts, the second cache and loops that it had missed, of today's kernels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from typing import Any

from benchmarks.gpu_model.check import KEPT
from benchmarks.gpu_model.page import us
from probsym_fast._files import write_atomically

FIRST, LAST = "ffa2062", "32e7334"
DEVICE = "H100 SXM"
CHANGED = {
    "soft_permutation (CUDA C++)": "the sort compares without branches",
    "vector_edge_convolution": "one op with all its launches, forward and backward",
    "gin": "sums over neighbours as in aggregate",
    "embed": "pairs listed in one pass and looked up before the sums; gradients over used tokens",
    "embed_matrix": "patches cut by lines of the matrix and written once, whole steps without masks, products of three tf32",
    "readout": "nodes: every slot's value in one product; pairs find their own entries; gradients over used tokens",
    "aggregate": "several rows a program, entries found once for all features, the grouping kept for the gradient",
}


def recorded(commit: str | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of one device by op and case; None: of the table as it is."""
    path = KEPT.relative_to(KEPT.parents[2])
    if commit is None:
        text = KEPT.read_text()
    else:
        command = ["git", "show", f"{commit}:{path}"]
        text = subprocess.run(command, cwd=KEPT.parents[2], capture_output=True, text=True, check=True).stdout
    rows = [x for x in json.loads(text)["rows"] if x["architecture"] == 90 and x.get("device", DEVICE) == DEVICE]
    return {(x["op"], x["case"]): x for x in rows}


def cell(row: dict[str, Any] | None) -> str:
    """Predicted time of forward and backward, or of forward where there is no other."""
    return "–" if row is None else f"{us(row['both'])} ({row['launches']} + {row['library']})"


def page(first: dict, last: dict, now: dict) -> str:
    lines = [
        "| case | first kernels | later kernels, nearly the same model | today | what changed |",
        "|---|---|---|---|---|",
    ]
    for key, row in now.items():
        if key in first and row["op"] in CHANGED:
            case = row["case"] + (", CUDA C++" if "CUDA" in row["op"] else "")
            cells = [case, cell(first[key]), cell(last.get(key)), cell(row), CHANGED[row["op"]]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(
        [
            "# Predicted times of the GPU kernels, before and after",
            "No figure on this page was measured. Times in µs on an H100, forward and backward; in brackets our launches + "
            "the library's calls. `python -m benchmarks.gpu_model.before --write` makes it from the history of "
            "`gpu-predicted.json`.",
            f"The first two columns are what commits {FIRST} and {LAST} recorded: compare them to see what kernels have "
            "gained. Their model took every access to shared memory as free of conflicts, and missed loops at the end of "
            "a kernel. *Today* is by a model that counts both, so it is larger where nothing has become slower. The "
            "kernels that are not here are as they were.",
            "\n".join(lines),
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model.before", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write gpu-before.md")
    text = page(recorded(FIRST), recorded(LAST), recorded(None))
    if not parser.parse_args().write:
        print(text)
        return
    path = KEPT.with_name("gpu-before.md")
    write_atomically(path, lambda file: file.write(text.encode()))
    print(path)


if __name__ == "__main__":
    main()
