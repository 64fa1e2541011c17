"""The command line."""

import argparse
import sys

from rich.progress import Progress

from tests.ops import fuzz
from tests.ops.fuzz import CASES, failure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=fuzz.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=CASES, help="one op (default: all in turn)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, help="how many (default: 1 of an op, 2000 of all)")
    asked = parser.parse_args(arguments)
    names = [asked.op] if asked.op else list(CASES)
    cases = asked.cases or (1 if asked.op else 2000)
    failures = 0
    with Progress() as progress:
        task = progress.add_task("cases", total=cases)
        for i in range(cases):
            line = failure(names[i % len(names)], asked.seed + i // len(names))
            if line:
                failures += 1
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    print(f"{cases} cases, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
