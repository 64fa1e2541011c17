"""Every python block of README.md and docs/ runs, the blocks of a page in order and in one namespace.

A block that cannot run has the comment `<!-- not run: REASON -->` on the line above it, and is listed in NOT_RUN.
Other tests: code fits the page's column, links lead somewhere, and the API pages name what the package exports.
"""

import importlib
import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from probsym_fast import tasks

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
NOT_RUN = {  # page -> reasons, in order
    "docs/deploy.md": ["compiles for minutes", "needs onnxscript"],
    "docs/your-model.md": ["downloads weights"],
}
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```python[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)
MARKER = re.compile(r"<!-- not run: (.+?) -->")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
COLUMN = 87  # characters of code in the column of a page, in a window of 1280 pixels
MODULES = ("", "ops", "groups", "distributions", "models", "profiling", "tasks")


class Block(NamedTuple):
    line: int  # of its first line of code
    code: str
    reason: str | None  # why it is not run


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"])
        for found in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROBSYM_CACHE", str(tmp_path / "cache"))
    # everything is recorded as by default, and run as recorded: Inductor's C++ would take a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(tasks.TASKS, "_added", {})  # a page may register a task of its own
    torch.manual_seed(0)
    namespace = {"__name__": "document"}
    for block in blocks(page):
        code = compile("\n" * (block.line - 1) + block.code, str(PAGES[page]), "exec")
        if block.reason is None:
            exec(code, namespace)


def test_blocks_that_do_not_run_are_listed():
    found = {page: [block.reason for block in blocks(page) if block.reason] for page in PAGES}
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN
    marked = {page: MARKER.findall(path.read_text(encoding="utf-8")) for page, path in PAGES.items()}
    assert marked == found, "a marker must be on the line above its block"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_code_fits_the_column(page):
    text = PAGES[page].read_text(encoding="utf-8")
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S))
    indented = "\n".join(re.findall(r"(?<=\n\n)(?: {4}.*\n)+", text)).replace("\n    ", "\n")
    assert [line for line in f"{fenced}\n{indented}".splitlines() if len(line) > COLUMN] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, _ in LINK.findall(PAGES[page].read_text(encoding="utf-8")):
        assert not target or (PAGES[page].parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_names_what_is_public(name):
    qualified = f"probsym_fast.{name}".rstrip(".")
    module = importlib.import_module(qualified)
    text = (ROOT / "docs" / "api" / f"{name or 'probsym_fast'}.md").read_text(encoding="utf-8")
    # a function that has the name of its module is named twice
    named = re.findall(rf"^::: {re.escape(qualified)}\.(?:(\w+)\.)?(?P<name>\w+)$", text, re.M)
    folder = Path(module.__file__).parent
    assert all(
        not module_name or ((folder / f"{own}.py").exists() and module_name == own) for module_name, own in named
    )
    public = [x for x in module.__all__ if not isinstance(getattr(module, x), ModuleType)]
    assert sorted(own for _, own in named) == sorted(public)
