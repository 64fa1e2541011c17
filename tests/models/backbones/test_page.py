"""docs/backbones.md is up to date. Else run python -m tests.models.backbones.page."""

import pytest

from tests.models.backbones.page import PAGE, REST, TAKEN, WHOLE, counted, page, read, sorted_as

timm = pytest.importorskip("timm")
KINDS = [(kind, name) for kind, names in (TAKEN | WHOLE | REST).items() for name in names.split(", ")]


def test_all_but_the_counts():
    text = PAGE.read_text(encoding="utf-8")
    version, counts, names = read(text)
    assert text == page(version, counts, names) and sum(counts.values()) == names


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_names_that_the_page_shows(kind, name):
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    assert sorted_as(name) == kind


@pytest.mark.exhaustive
def test_the_counts():
    version, counts, names = read(PAGE.read_text(encoding="utf-8"))
    if version != timm.__version__:
        pytest.skip(f"the page is of timm {version}")
    assert counted() == (counts, names)
