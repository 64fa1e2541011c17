"""Every public op, module and whole model as a small program of tensors: the rows of the matrix in docs/programs.md.

A program is a module with one argument, a tuple of tensors, `Graphs` and `PointClouds`. Its inputs are made for a `Size`, and
which of their axes vary follows from two sizes (`varying`).
"""

from tests.programs.rows import backbones, distributions, embeddings, ops, readouts, whole
from tests.programs.rows.base import SIZES, Row, Size, step, varying

__all__ = ["ROWS", "SIZES", "Row", "Size", "step", "varying"]

ROWS = ops.ROWS | embeddings.ROWS | readouts.ROWS | distributions.ROWS | backbones.ROWS | whole.ROWS
