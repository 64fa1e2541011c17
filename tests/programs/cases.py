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


def cases_by_axis(training: bool) -> list:
    """(row, axis): every axis of every row, in training of those that train. Slow: further axes in training, of slow rows.

    By hand: in eval, further axes and variants of rows that are also compiled in training, which has the same forward pass.
    """
    found = []
    for name, row in ROWS.items():
        for axis in row.axes:
            slow = row.slow or (training and (axis != "batch" or "points" in name))
            by_hand = not training and row.trains and (axis != "batch" or "(" in name)
            if row.trains or not training:
                marks = [pytest.mark.slow] * slow + [pytest.mark.exhaustive] * by_hand
                found.append(pytest.param(row, axis, id=f"{name}-{axis}", marks=marks))
    return found


def refused(row: Row) -> AbstractContextManager:
    """Where a program is recorded: expects the row's error, if it has one."""
    return pytest.raises(Exception, match=re.escape(row.refuses)) if row.refuses else nullcontext()
