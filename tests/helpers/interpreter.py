"""What triton's interpreter leaves out: programs in any order, products as the tensor cores round them, scans in less than
minutes. Imported after TRITON_INTERPRET=1 is set."""

import numpy
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ScanOps, TensorHandle

KEPT_BY_TF32 = numpy.uint32(0xFFFFE000)  # of the 23 bits after the point, 10


class Programs:
    """Runs the programs of every grid in an order of its own, which depends on `seed` and the size of the grid; for a seed
    of None in the order of their numbers."""

    def __init__(self, monkeypatch, seed: int | None = 1):
        self.seed, self.order = seed, numpy.arange(0)
        set_dim, set_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

        def set_grid_dim(builder, *size):
            set_dim(builder, *size)
            count = int(numpy.prod(size))
            random = numpy.random.default_rng((self.seed or 0, count))
            self.order = numpy.arange(count) if self.seed is None else random.permutation(count)

        def set_grid_idx(builder, *program):
            number = numpy.ravel_multi_index(program, builder.grid_dim)
            set_idx(builder, *map(int, numpy.unravel_index(self.order[number], builder.grid_dim)))

        monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)


def round_products(monkeypatch) -> None:
    """Products in tf32 read 10 bits after the point, as the tensor cores do. Those of bfloat16, which the interpreter keeps
    as uint16 and would multiply so, get it as float32."""
    multiply = InterpreterBuilder.create_dot

    def read(x, precision):
        if x.dtype.scalar == tl.bfloat16:
            return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)
        if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            return TensorHandle(
                (numpy.ascontiguousarray(x.data).view(numpy.uint32) & KEPT_BY_TF32).view(numpy.float32), tl.float32
            )
        return x

    def create_dot(builder, a, b, d, precision, *rest):
        return multiply(builder, read(a, precision), read(b, precision), d, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def index_by_one_element(monkeypatch) -> None:
    """triton 3.6 makes integers of arrays of one element, which numpy refuses since 2.4; later ones squeeze them first."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def scan_whole_blocks(monkeypatch) -> None:
    """By doubling the distance; the interpreter's own scan combines number after number, in Python."""

    def by_doubling(self, given):
        blocks, count = [x.handle.data for x in given], given[0].handle.data.shape[self.axis]
        place = numpy.arange(count).reshape([-1 if axis == self.axis else 1 for axis in range(blocks[0].ndim)])
        for step in (2**k for k in range((count - 1).bit_length())):
            before = [numpy.roll(x, step, self.axis) for x in blocks]
            both = zip([*before, *blocks], [*given, *given], strict=True)
            joined = self.combine_fn.fn(*(self.to_tensor(x, y.dtype) for x, y in both))
            blocks = [numpy.where(place < step, x, y.handle.data) for x, y in zip(blocks, joined, strict=True)]
        return [self.to_tensor(x, y.dtype) for x, y in zip(blocks, given, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", by_doubling)
