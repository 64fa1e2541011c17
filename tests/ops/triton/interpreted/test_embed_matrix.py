"""embed_matrix: tokens of whole matrices."""

import pytest
import torch

from probsym_fast.ops._patches import patch_size
from tests.helpers.items import batch, weights
from tests.ops.triton.inputs import axis_of, soft_arguments
from tests.ops.triton.interpreted.checks import BOUND, TF32, check, in_dtypes
from tests.ops.triton.interpreted.test_items import GRIDS


@pytest.mark.parametrize(("dtype", "N", "grid", "pad_mode", "centered"), in_dtypes(*GRIDS))
def test_embed_matrix(N, grid, pad_mode, centered, dtype):
    data, P, D = batch([max(1, N - 2), N, 1], N, C=2, S=2), patch_size(N, grid), 20
    axis = axis_of(N, grid, pad_mode, centered)
    arguments = [data.matrix.to(dtype), data.ptr.diff(), *soft_arguments(data)[1:], *axis]
    arguments += [weights(D, 2, P, P).to(dtype), torch.randn(D).to(dtype)]
    single = TF32 if dtype == torch.float16 else BOUND[dtype]  # dA' is kept in bfloat16 if the matrix is
    check("embed_matrix", arguments, [0, 4, 5, 6, 11, 12], single)
    if pad_mode == "zeros":
        arguments[4:7] = [None] * 3
        check("embed_matrix", [*arguments[:-1], None], [11])


@pytest.mark.parametrize("parts", [False, True])
def test_embed_matrix_beyond_one_block(parts, monkeypatch):
    """Patch lines, widths and slots of several blocks; tokens in several parts, a graph's samples in several chunks, more
    tokens than programs list at once, addresses in 64 bits."""
    N, grid, C, D = (10, 5, 4, 5) if parts else (66, 2, 1, 258)
    data, P = batch([N, N] if parts else [N], N, C=C, S=3 if parts else 1), patch_size(N, grid)
    if parts:
        sample = 4 * grid**2 * P * P * C  # bytes
        for name, value in (
            ("matrix_gradient.PRODUCTS", 2 * sample),
            ("patches.BYTES", 3 * sample),
            ("products.SPLIT", 5),
            ("products.NARROW", 0),
            ("used_tokens.PROGRAMS", 2),
            ("used_tokens.TILE", 16),
        ):
            monkeypatch.setattr(f"probsym_fast.ops.triton.{name}", value)
    axis, weight = axis_of(N, grid), weights(D, C, P, P).float() / P
    arguments = [data.matrix.float(), None, *soft_arguments(data)[1:], *axis, weight, None]
    check("embed_matrix", arguments, [0, 4, 5, 6, 11])


@pytest.mark.parametrize(("dtype", "counts"), in_dtypes(([5, 0, 2, 9],), ([0, 0, 0, 0],), ([1, 7, 9, 4],)))
def test_tokens_that_are_not_used_are_the_bias(counts, dtype, monkeypatch):
    """Also of graphs without nodes, in every part; a width of several blocks that does not fill the last."""
    B, S, N, grid, C, D = 4, 3, 9, 4, 3, 272
    monkeypatch.setattr("probsym_fast.ops.triton.patches.BYTES", 5 * dtype.itemsize * grid**2 * 32)  # samples at a time
    matrix = torch.randn(B, N, N, C)
    order = [torch.cat([torch.randperm(n), torch.arange(n, N)]) for n in counts for _ in range(S)]
    order, counts = torch.stack(order).view(B, S, N), torch.tensor(counts)
    rank = order.argsort(-1)
    soft, axis = [torch.zeros(B, S, N)] * 3, axis_of(N, grid)
    arguments = [matrix.to(dtype), counts, rank, order, *soft, 0.5, *axis]
    arguments += [weights(D, C, 3, 3).to(dtype), torch.randn(D).to(dtype)]
    check("embed_matrix", arguments, [11, 12])


@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0)])
def test_embed_matrix_of_nothing(B, S):
    axis, order = axis_of(4, 2), torch.arange(4).expand(B, S, 4)
    soft = [torch.zeros(B, S, 4)] * 3
    arguments = [torch.randn(B, 4, 4, 2), torch.ones(B, dtype=torch.int64), order, order, *soft, 0.5, *axis]
    check("embed_matrix", [*arguments, weights(5, 2, 2, 2).float(), torch.randn(5)], [0, 4, 5, 6, 11, 12])
