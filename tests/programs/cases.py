"""The rows as parameters of tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import pytest

from tests.programs.rows import ROWS, Row

BY_HAND = [pytest.mark.slow, pytest.mark.exhaustive]


def cases(
    wanted: Callable[[Row], bool] = lambda row: True, traced: bool = True, often: Collection[str] | None = None
) -> list:
    """The rows to parametrise a test with.

    Where it traces them, those that are slow have the mark. often: the names of those that are not left to a run by hand.
    """
    found = []
    for name, row in ROWS.items():
        by_hand = often is not None and name not in often
        marks = BY_HAND if by_hand else [pytest.mark.slow] if traced and row.slow else []
        if wanted(row):
            found.append(pytest.param(row, id=name, marks=marks))
    return found


def variant(name: str, row: Row) -> bool:
    """Whether it is a module of which another row shows the plain form: "GraphTokens (dense)"."""
    return row.learns and " (" in name and name.partition(" (")[0] in ROWS


def compiled_by_hand(row: Row, training: bool) -> bool:
    """Slow whole models, whose parts have rows of their own.

    In eval also modules: they are compiled in training and exported in eval, which trace the same code.
    """
    return row.slow if row.whole else row.learns and not training


def cases_of_compilation(training: bool) -> list:
    """The rows. In training those that train; those with several axes are slow."""
    found = []
    for name, row in ROWS.items():
        slow = row.slow or len(row.axes) > 1 or (training and "points" in name)
        marks = BY_HAND if compiled_by_hand(row, training) else [pytest.mark.slow] * slow
        if row.trains or not training:
            found.append(pytest.param(row, id=name, marks=marks))
    return found


def cases_by_axis() -> list:
    """(row, axis), of the rows that have several."""
    found = [(name, row, axis) for name, row in ROWS.items() for axis in row.axes if len(row.axes) > 1]
    return [pytest.param(row, axis, id=f"{name}-{axis}") for name, row, axis in found]


def cases_of_export() -> list:
    """(row, strict): variants are strict by hand, as strict is Dynamo's trace, which is also that of a compilation."""
    found = []
    for name, row in ROWS.items():
        for strict in (True, False):
            marks = BY_HAND if strict and variant(name, row) else [pytest.mark.slow] * row.slow
            case = f"{name}-{'strict' if strict else 'not-strict'}"
            found.append(pytest.param(row, strict, id=case, marks=marks))
    return found


def refused(row: Row) -> AbstractContextManager:
    """Where a program is recorded: expects the row's error, if it has one."""
    return pytest.raises(Exception, match=re.escape(row.refuses)) if row.refuses else nullcontext()
