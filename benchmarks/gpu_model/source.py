"""How often the loops of a Triton kernel run: their ranges, evaluated for the arguments of a launch.

What the arguments do not say (lists of edges, of entries) is in `HINTS`: means over the programs of a launch, for data
spread evenly. A loop that neither says is unknown, and its launch gets no prediction.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

LANGUAGE = SimpleNamespace(cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max)


@dataclass
class SourceLoop:
    """A `for` of a kernel or of a function that it calls. trips: iterations each time it is entered, None if unknown. full:
    the share of its accesses that are not masked off, as far as the length of a list says."""

    file: str
    line: int
    last: int
    text: str  # what it runs over
    trips: float | None
    full: float = 1.0

    def holds(self, frame: tuple[str, int]) -> bool:
        return frame[0] == self.file and self.line <= frame[1] <= self.last


class Facts(dict):
    """The arguments of a launch by name, and the facts of its case; `rows(x)` is the first size of a tensor."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Turns(float):
    """How often a loop runs, where its blocks are `full` to that share."""

    full = 1.0

    def __mul__(self, other: float) -> Turns:
        return turns(float(self) * other, self.full)


def turns(count: float, full: float) -> Turns:
    found = Turns(count)
    found.full = full
    return found


def _per(total: float, programs: float, block: float = 1) -> Turns:
    """Turns of a loop over `total` things in all programs, a block at a time: full blocks, and one that is not."""
    each = total / max(1, programs) / block
    return turns(math.ceil(each), each / max(1, math.ceil(each)))


def _virtual(x: Any) -> float:
    """Of the programs of `sum_rows` those that take the virtual node of a graph."""
    return x.graphs * math.ceil(x.width / x.BLOCK_W) / x.launched[0]


def _pairs(x: Any, tokens: float = math.inf) -> float:
    """Of lists of pairs, those by token or by weight row: half where one launch has made both."""
    both = x.p_begin.storage_offset() > 0 or x.p_begin.shape[0] > tokens + 1
    return x.p_row.shape[0] / (2 if both else 1)


def _used(x: Any) -> float:
    """The share of a product's programs that have rows of used tokens."""
    return x.used * (x.last - x.first) * x.L / (x.launched[0] // -(-x.X // x.BLOCK_X) * x.BLOCK_M)


# (kernel, what its loop runs over) -> trips; the arguments of the launch are attributes, tensors included,
# and `launched` is its grid
HINTS: dict[tuple[str, str], list[Callable[[Any], float]]] = {
    ("sum_rows", "range(i_column * BLOCK_W, width, BLOCK_W * programs)"): [
        lambda x: _per(x.width, x.programs, x.BLOCK_W) * (1 - _virtual(x))
    ],
    ("sum_rows", "range(AHEAD, b_most, AHEAD)"): [lambda x: _per(max(0, x.p_entry.shape[0] / x.nodes - 4), 1, 4)],
    ("sum_rows", "range(b_first, b_last, AHEAD * BLOCK_R)"): [
        lambda x: _per(x.nodes, x.graphs, 4 * x.TILE // x.BLOCK_W) * _virtual(x)
    ],
    ("pool", "range(b_first, b_last, BLOCK_E)"): [lambda x: _per(x.nodes, x.p_ptr.shape[0] - 1, x.BLOCK_E)],
    ("iterate_backward", "range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0))"): [
        lambda x: -(-x.rows // x.ROWS) / x.launched[0]
    ],
    **{(name, "range(0, b_n, BLOCK)"): [lambda x: -(-x.N // x.BLOCK)] * 3 for name in ("keys", "to_scores")},
    ("places", "range(tl.program_id(0) * BLOCK_P, keys + 1, tl.num_programs(0) * BLOCK_P)"): [
        lambda x: _per(x["keys"] + 1, x.launched[0], x.BLOCK_P)
    ],
    ("gather_one", "range(0, tl.where(tl.max(m_left.to(tl.int32), 0) > 0, places, 0), BLOCK_P)"): [lambda x: 0] * 2,
    ("rows_of_nodes", "range(clear * S, stop, BLOCK_R)"): [lambda x: 0],  # of nodes of no graph
    # of lists of (entry, channel) pairs: one channel of each entry is not zero
    ("scatter", "range(b_first, b_last, BLOCK_E)"): [
        lambda x: _per(_pairs(x, x.launched[0]) / x.p_weight.shape[1], x.launched[0], x.BLOCK_E)
    ],
    ("weight_gradient", "range(b_first, b_last, BLOCK_E)"): [
        lambda x: _per(_pairs(x) / x.channels, x.rows * x.splits, x.BLOCK_E)
    ],
    ("reduce_rows", "range(i_part * BLOCK_R, b_rows, parts * BLOCK_R)"): [
        lambda x: _per(x.mean_nodes, x.parts, x.BLOCK_R) * x.mean_nodes / x.N
    ],
    ("reduce_rows", "range(0, tl.max(b_last - b_first, 0), BLOCK_K)"): [
        lambda x: _per(x.ends / x.C, x.graphs * x.mean_nodes, x.BLOCK_K)
    ],
    ("list_tokens", "range(b_round, tl.minimum(b_round + part, rounds))"): [lambda x: min(x.part, x.rounds)],
    ("cut", "range(0, tl.where(m_used, patch, 0), BLOCK_O)"): [lambda x: x.used**0.5 * -(-x.patch // x.BLOCK_O)],
    ("cut", "range(0, b_width, BLOCK_X)"): [lambda x: -(-x.grid * x.patch * x.C // x.BLOCK_X)],
    ("cut", "range(0, tl.where(m_used & (b_full < row), b_cells, 0), BLOCK_T)"): [
        lambda x: x.used**0.5 * -(-(x.used**0.5) * x.grid // x.BLOCK_T) * (x.patch**2 * x.C < x.row)
    ],
    ("find_slots", "range(0, tl.where(tl.program_id(1) == 0, S, 0), BLOCK)"): [
        lambda x: math.ceil(x.S / x.BLOCK) / x.launched[1]  # of a row of programs the first
    ],
    ("multiply", "range(0, tl.where(m_used, K // BLOCK_K, 0))"): [lambda x: _used(x) * (x.K // x.BLOCK_K)],
    ("multiply", "range(K // BLOCK_K * BLOCK_K, tl.where(m_used, K, 0), TAIL)"): [
        lambda x: _used(x) * math.ceil(x.K % x.BLOCK_K / x.TAIL)
    ],
    ("multiply_transposed", "range(i_part.to(tl.int32) * b_part, b_last, BLOCK_M)"): [
        lambda x: _per(x.used * x.p_rows.shape[0] * (x.last - x.first) / (x.S * x.graphs), x.splits, x.BLOCK_M)
    ],
    ("reduce_matrix", "range(0, 2 * b_steps)"): [
        lambda x: 2 * x.filled**2 * -(-x.filled * x.N * x.words * x.WORD // x.BLOCK_K)
    ],
    ("reduce_identifiers", "range(0, tl.where((i_block * BLOCK_I < b_nodes) & (j < b_nodes), D, 0), BLOCK_K)"): [
        lambda x: x.filled**2 * -(-x.D // x.BLOCK_K)
    ],
    **{
        (name, "range(tl.maximum(i_image * S, first), tl.minimum((i_image + 1) * S, last))"): [
            lambda x: min(x.S, x.last - x.first)
        ]
        for name in ("pull_moved", "pull_turned")
    },
    ("pull_moved", "range(0, b_rows * b_columns, BLOCK_N)"): [lambda x: math.ceil(9 / x.BLOCK_N)],  # of a rotation
    ("add_samples", "range(tl.maximum(i_graph * S, first), tl.minimum((i_graph + 1) * S, last))"): [
        lambda x: min(x.S, x.last - x.first)
    ],
}

# (kernel, argument) -> the share of a tensor's bytes that is touched: memory is for all tokens, and some are used
TOUCHED: dict[tuple[str, str], Callable[[Any], float]] = {
    ("cut", "p_matrix"): lambda x: x.filled**2,
    ("cut", "p_out"): lambda x: x.used,
    ("multiply", "p_a"): lambda x: x.used,
    ("multiply", "p_out"): lambda x: 1 if x.COMPACT else x.used,
    ("multiply_transposed", "p_a"): lambda x: x.used,
    ("multiply_transposed", "p_d"): lambda x: x.used,
}


def touched(kernel: str, argument: str, facts: dict[str, Any]) -> float:
    """The share of the bytes of an argument of a launch that is read or written."""
    try:
        return float(TOUCHED[kernel, argument](Facts(facts)))
    except KeyError:
        return 1.0


def loops(function: JITFunction, name: str, facts: dict[str, Any]) -> dict[tuple[str, int], SourceLoop]:
    """Every loop of a kernel that the compiler keeps or unrolls by itself, by its file and line."""
    reader = _Reader(name, facts)
    reader.function(function, {k: v for k, v in facts.items() if not hasattr(v, "shape")})
    return reader.found


class _Reader:
    def __init__(self, kernel: str, facts: dict[str, Any]):
        self.kernel, self.facts, self.found = kernel, Facts(facts), {}
        self.hinted: dict[str, int] = {}

    def function(self, function: JITFunction, given: dict[str, Any]) -> None:
        lines, first = inspect.getsourcelines(function.fn)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        self.file, before = Path(inspect.getsourcefile(function.fn) or "").name, getattr(self, "file", "")
        self.offset, offset = first - 1, getattr(self, "offset", 0)
        self.globals, outer = function.fn.__globals__, getattr(self, "globals", {})
        (body,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
        self.block(body.body, dict(given))
        self.file, self.offset, self.globals = before, offset, outer

    def block(self, statements: list[ast.stmt], known: dict[str, Any]) -> None:
        for node in statements:
            if isinstance(node, ast.For):
                self.calls(node.iter, known)
                self.loop(node, known)
            elif isinstance(node, ast.If):
                test = self.value(node.test, known)
                for body, taken in ((node.body, True), (node.orelse, False)):
                    if test is None or bool(test) == taken:
                        self.block(body, known)
            else:
                self.calls(node, known)
                self.assign(node, known)

    def loop(self, node: ast.For, known: dict[str, Any]) -> None:
        assert isinstance(node.iter, ast.Call)
        text, kind = ast.unparse(node.iter), ast.unparse(node.iter.func)
        for name in _names(node.target):
            known.pop(name, None)
        changed = {name for x in ast.walk(node) if isinstance(x, (ast.Assign, ast.AugAssign)) for name in _targets(x)}
        bounds = [self.value(x, known) for x in node.iter.args]
        for name in changed:  # its value is another in each turn
            known.pop(name, None)
        if kind != "tl.static_range":
            trips = None if None in bounds else Turns(len(range(*map(int, bounds))))
            hints = HINTS.get((self.kernel, text), [])
            if trips is None and (number := self.hinted.get(text, 0)) < len(hints):
                self.hinted[text] = number + 1
                try:
                    trips = hints[number](self.facts)
                except (KeyError, AttributeError, TypeError, ZeroDivisionError):  # the kernel has other arguments now
                    trips = None
            line = node.lineno + self.offset
            self.found[self.file, line] = SourceLoop(
                self.file, line, (node.end_lineno or node.lineno) + self.offset, text,
                None if trips is None else float(trips), getattr(trips, "full", 1.0),
            )  # fmt: skip
        self.block(node.body, known)

    def assign(self, node: ast.stmt, known: dict[str, Any]) -> None:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.bind(node.target, None if node.value is None else self.value(node.value, known), known)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            both = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
            self.bind(node.target, self.value(both, known), known)
        elif isinstance(node, ast.Assign):
            (target,) = node.targets
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                found = [self.value(x, known) for x in node.value.elts]
                for part, value in zip(target.elts, found, strict=True):
                    self.bind(part, value, known)
            else:
                self.bind(target, self.value(node.value, known), known)

    def bind(self, target: ast.expr, value: Any, known: dict[str, Any]) -> None:
        values = value if isinstance(target, ast.Tuple) and isinstance(value, tuple) else None
        for i, name in enumerate(_names(target)):
            of = values[i] if values is not None else None if isinstance(target, ast.Tuple) else value
            known.pop(name, None) if of is None else known.__setitem__(name, of)

    def calls(self, node: ast.AST, known: dict[str, Any]) -> None:
        """Reads the functions that a statement calls."""
        for x in ast.walk(node):
            if isinstance(x, ast.Call) and isinstance(x.func, ast.Name):
                called = self.globals.get(x.func.id)
                if isinstance(called, JITFunction):
                    given = dict(zip(called.arg_names, x.args, strict=False))
                    given |= {word.arg: word.value for word in x.keywords}
                    values = {name: self.value(value, known) for name, value in given.items()}
                    self.function(
                        called, {k: v for k, v in values.items() if v is not None or k in _nones(given, known)}
                    )

    def value(self, node: ast.expr, known: dict[str, Any]) -> Any:
        """What an expression is, or None where it is not known."""
        found = {k: v.value if isinstance(v, tl.constexpr) else v for k, v in self.globals.items()}
        constants = {k: v for k, v in found.items() if isinstance(v, (int, float, str))}
        expression = ast.fix_missing_locations(ast.Expression(node))
        try:
            return eval(
                compile(expression, "kernel", "eval"), {"tl": LANGUAGE, **constants, "__builtins__": {}, **known}
            )
        except Exception:  # whatever a name that is missing leads to
            return None


def _nones(given: dict[str, ast.expr], known: dict[str, Any]) -> set[str]:
    """Arguments that are None and not unknown."""
    return {k for k, v in given.items() if isinstance(v, ast.Name) and v.id in known and known[v.id] is None}


def _names(target: ast.expr) -> list[str]:
    return [x.id for x in ast.walk(target) if isinstance(x, ast.Name)]


def _targets(node: ast.Assign | ast.AugAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name for target in targets for name in _names(target)]
