"""Multiplication tables of finite groups: checks, and the group that some elements generate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MOST = 4096  # elements of a generated group; more generators are likely to generate an infinite one
CLOSE = 1e-6  # entries of matrices that differ by less are equal

Actions = Mapping[str, Tensor]  # letters of axes -> (order, d, d) matrices, or (order, n) int64: where each place goes


def checked_table(table: object) -> tuple[Tensor, Tensor, int]:
    """(table, inverses (n,), number of the identity), int64. Raises unless it is the table of a group."""
    try:
        t = torch.as_tensor(table)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Finite: table must be (n, n) integers, got {type(table).__name__}") from error
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"Finite: table must be (n, n) integers, got {t.dtype}")
    if t.ndim != 2 or t.shape[0] != t.shape[1] or not len(t):
        raise ValueError(f"Finite: table must be (n, n), got {tuple(t.shape)}")
    t, n = t.to("cpu", torch.int64), len(t)
    numbers = torch.arange(n)
    if len(bad := ((t < 0) | (t >= n)).nonzero()):
        g, h = bad[0].tolist()
        raise ValueError(f"Finite: table must be closed, entries in 0..{n - 1}, got {int(t[g, h])} at ({g}, {h})")
    neutral = ((t == numbers).all(1) & (t.T == numbers).all(1)).nonzero()
    if not len(neutral):
        raise ValueError("Finite: table must have an identity, a number whose row and column are 0..n-1, got none")
    e = int(neutral[0])
    both = (t == e) & (t.T == e)
    if len(bad := (~both.any(1)).nonzero()):
        raise ValueError(f"Finite: table must have an inverse of every element, got none of {int(bad[0])}")
    for a in _generating(t, e):  # Light's test: enough for the elements that generate the others
        left, right = t[t[:, a]], t[:, t[a]]
        if len(bad := (left != right).nonzero()):
            g, h = bad[0].tolist()
            got = f"({g} {a}) {h} = {int(left[g, h])} and {g} ({a} {h}) = {int(right[g, h])}"
            raise ValueError(f"Finite: table must be associative, got {got}")
    return t, both.to(torch.int64).argmax(1), e


def _generating(table: Tensor, identity: int) -> list[int]:
    """Elements whose products, bracketed from the left, are all elements."""
    reached = torch.arange(len(table)) == identity
    some: list[int] = []
    while not reached.all():
        some.append(int((~reached).nonzero()[0]))
        count = 0
        while count != (count := int(reached.sum())):
            reached[table[reached][:, some]] = True
    return some


def checked_actions(actions: object, table: Tensor) -> dict[str, Tensor]:
    """Matrices as float64 or complex128, permutations as int64. Raises unless they multiply as the table does."""
    given = as_actions(actions, len(table), "order")
    for letters, x in given.items():
        for g, row in enumerate(table):
            products = x[g][x] if x.ndim == 2 else x[g] @ x
            if not equal(products, x[row]):
                h = next(h for h in range(len(table)) if not equal(products[h], x[row[h]]))
                raise ValueError(
                    f"Finite: actions[{letters!r}] must multiply as the table does, got other for {g} and {h}"
                )
    return given


def as_actions(actions: object, count: int | None, name: str) -> dict[str, Tensor]:
    """Matrices (count, d, d) as float64 or complex128, permutations (count, n) as int64, all on the CPU."""
    if not isinstance(actions, Mapping):
        raise TypeError(f"Finite: actions must map letters of axes to Tensors, got {type(actions).__name__}")
    found: dict[str, Tensor] = {}
    for letters, given in actions.items():
        here = f"actions[{letters!r}]"
        if not isinstance(letters, str) or not letters or "c" in letters:
            raise ValueError(f"Finite: letters of actions must be a str without 'c', got {letters!r}")
        if not isinstance(given, Tensor) or given.dtype == torch.bool:
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"Finite: {here} must be a Tensor of matrices or of int64 permutations, got {got}")
        x, count = given.detach().cpu(), len(given) if count is None and given.ndim else count
        matrices = x.is_floating_point() or x.is_complex()
        square = x.ndim == 3 and x.shape[1] == x.shape[2] if matrices else x.ndim == 2
        if not square or x.shape[0] != count or not x.numel():
            wanted = "d, d) matrices" if matrices else "n) permutations"
            raise ValueError(f"Finite: {here} must be ({name}, {wanted}, {name} = {count}, got {tuple(x.shape)}")
        if not matrices and (x.sort(1).values != torch.arange(x.shape[1])).any():
            raise ValueError(f"Finite: {here} must hold each of 0..{x.shape[1] - 1} once in every row")
        kind = torch.complex128 if x.is_complex() else torch.float64 if matrices else torch.int64
        for letter in letters:
            if any(letter in others for others in found):
                raise ValueError(f"Finite: each letter must occur once in actions, got {letter!r} twice")
        found[letters] = x.to(kind)
    return found


def equal(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x, y) if x.dtype == torch.int64 else bool(((x - y).abs() < CLOSE).all())


def generated(generators: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(table, actions) of the group whose elements are all products of the generators; 0 is the identity."""
    count = len(next(iter(generators.values())))
    words = {key: _identity(x) for key, x in generators.items()}  # (1, ...)
    by: list[list[int]] = []  # by[g][a]: the number of g times generator a
    came = [(0, 0)]  # (element, generator) that gave each element first
    while len(by) < len(came):
        g, row = len(by), []
        for a in range(count):
            one = {key: _product(words[key][g], x[a])[None] for key, x in generators.items()}
            same = torch.stack([_same(words[key], one[key]) for key in words]).all(0).nonzero()
            if len(same):
                row.append(int(same[0]))
                continue
            if len(came) == MOST:
                raise ValueError(f"Finite: the generators must generate at most {MOST} elements, got more")
            row.append(len(came))
            came.append((g, a))
            words = {key: torch.cat([words[key], one[key]]) for key in words}
        by.append(row)
    right = torch.tensor(by)  # (order, count)
    table = torch.empty(len(by), len(by), dtype=torch.int64)
    table[:, 0] = torch.arange(len(by))
    for h, (before, a) in enumerate(came[1:], start=1):
        table[:, h] = right[table[:, before], a]
    return table, words


def _identity(x: Tensor) -> Tensor:
    """(1, n) or (1, d, d)."""
    return torch.arange(x.shape[1])[None] if x.ndim == 2 else torch.eye(x.shape[1], dtype=x.dtype)[None]


def _product(x: Tensor, y: Tensor) -> Tensor:
    return x[y] if x.ndim == 1 else x @ y


def _same(many: Tensor, one: Tensor) -> Tensor:
    """(m,) whether each of many (m, ...) equals one (1, ...)."""
    far = (many - one).abs() if many.dtype == torch.int64 else (many - one).abs() >= CLOSE
    return ~far.flatten(1).any(1)
