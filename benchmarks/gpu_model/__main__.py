"""Makes the table: see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

import triton

from benchmarks.gpu_model import around, check, cuda, measured, page, table
from benchmarks.gpu_model.devices import DEVICES
from probsym_fast._files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write gpu-predicted.json and gpu-predicted.md")
    parser.add_argument("--folder", type=Path, default=table.RESULTS, help="for --write, and with measured results")
    parser.add_argument("--architectures", type=int, nargs="+", choices=list(DEVICES), default=list(DEVICES))
    arguments = parser.parse_args()
    calls, rows = table.calls(), []
    seen: list[table.Row] = []
    shares: list[around.Share] = []
    for architecture in arguments.architectures:
        compiled = table.compile_all(table.launches(calls), architecture)
        rows += table.rows(calls, architecture, compiled)
        for found in measured.results(arguments.folder, architecture):
            seen += table.rows(calls, architecture, compiled, found)
            seen += table.of_cuda(found) if architecture == cuda.ARCHITECTURE else ()
        if architecture == page.FULL:
            shares = [around.share(samples, architecture) for samples in around.SAMPLES]
        print(f"{DEVICES[architecture].name}: {len(compiled)} kernels", flush=True)
    rows += table.of_cuda()
    text = page.page(rows, seen, shares, triton.__version__)
    if not arguments.write:
        print(text)
        return
    from tests.ops.triton.cases import one_of_each  # the launches that the tests compile in any case

    data = table.as_json(rows + seen, check.checked(one_of_each()), check.checked_cuda(cuda.compiled()))
    for suffix, content in (("json", data), ("md", text)):
        path = arguments.folder / f"gpu-predicted.{suffix}"
        write_atomically(path, lambda file, content=content: file.write(content.encode()))
        print(path)


main()
