"""soft_permutation and permutation_entropy: rows in registers and in memory, and their edges."""

import math

import pytest
import torch

from probsym_fast.ops import OPS
from probsym_fast.ops.triton import _lazy as launcher
from tests.conftest import assert_near
from tests.ops.triton.soft_permutation import check_soft_permutation

SOFT = {  # dtype, B, S, N, valid nodes, tau, iterations, normalize, which outputs have a gradient
    "rows": (torch.float64, 3, 2, 5, [5, 1, 3], 0.05, 3, True, (1, 1, 1)),  # several a program, and two programs
    "lanes": (torch.float32, 1, 1, 70, None, 0.1, 2, False, (1, 0, 1)),
    "memory": (torch.float64, 2, 1, 20, [20, 5], 0.05, 2, True, (0, 1, 1)),  # rows of three blocks
    "sorted": (torch.float32, 2, 1, 3, None, 0.1, 0, True, (1, 1, 1)),
}


@pytest.fixture
def rows_in_memory(monkeypatch):
    for name in ("soft_permutation", "permutation_entropy"):
        monkeypatch.setattr(f"probsym_fast.ops.triton.{name}.MOST", 16)
    monkeypatch.setattr("probsym_fast.ops.triton.long_rows.BLOCK", 8)


@pytest.mark.parametrize("case", SOFT)
def test_soft_permutation(case, monkeypatch, request):
    """And the entropy of what it gives. Too little memory for c in all iterations: rows, or graphs, in turn."""
    dtype, B, S, N, counts, tau, iterations, normalize, wanted = SOFT[case]
    monkeypatch.setattr("probsym_fast.ops.triton.soft_permutation.BYTES", 1 if case != "lanes" else 2**20)
    if case == "memory":
        request.getfixturevalue("rows_in_memory")
    num_nodes = None if counts is None else torch.tensor(counts)
    scores = torch.randn(B, S, N, dtype=dtype)
    check_soft_permutation(scores, num_nodes, tau, iterations, normalize, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # of numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_soft_permutation_at_its_edges(normalize, dtype):
    """Ties and -0, gaps that overflow, an outlier, equal scores; NaN among the nodes stays in its row and sorts first."""
    most = torch.finfo(dtype).max / 8
    scores = torch.tensor(
        [
            [0.0, -0.0, 1.0, 0.0, 1.0, -1.0],
            [0.3, -1.0, 0.7, 1.0, -0.2, 0.1],
            [1e15, 1.0, 2.0, 3.0, 4.0, 5.0],
            [0.0] * 6,
            [1.0, math.nan, 2.0, 3.0, 4.0, 5.0],
            [1.0, 3.0, 2.0, math.nan, math.inf, -math.inf],
        ],
        dtype=dtype,
    )[:, None]
    scores[1] *= most
    num_nodes, settings = torch.tensor([6, 6, 6, 6, 6, 3]), (1e-4, 2, normalize)
    t, log_r, log_c, order, rank = launcher("soft_permutation", "forward")(scores, num_nodes, *settings, False)
    assert torch.equal(order.sort(-1)[0], torch.arange(6).expand(6, 1, 6))
    assert torch.equal(order.gather(-1, rank), torch.arange(6).expand(6, 1, 6))
    whole = torch.tensor([0, 1, 2, 3, 5])
    clean = torch.where(torch.arange(6) < num_nodes[:, None, None], scores, 0)[whole]
    assert torch.equal(order[whole], OPS["soft_permutation"].reference(clean, num_nodes[whole], *settings)[3])
    assert normalize or order[4, 0, 0] == 1
    gradient = launcher("soft_permutation", "backward")(t, log_r, log_c, scores, order, t, num_nodes, *settings)
    kept = [x[whole] for x in (t, log_r, log_c)]
    entropy = launcher("permutation_entropy", "forward")(*kept, num_nodes[whole], 1e-4)
    turned = launcher("permutation_entropy", "backward")(torch.ones((), dtype=dtype), *kept, num_nodes[whole], 1e-4)
    assert all(x.isfinite().all() for x in (*kept, gradient[whole], entropy, *turned))
    assert not t[5, 0, 3:].any() and not gradient[5, 0, 3:].any() and not t[4].isfinite().all()
    ties = torch.tensor([[2, 2, 3, 3, 3, 1]]).double()
    assert_near(log_r[0], -ties.log())
    assert not log_r[1].any() and not turned[0][1].any()  # a hard permutation


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (0, 1, 20)])
def test_soft_permutation_of_nothing(shape, rows_in_memory):
    x, order, num_nodes = torch.randn(shape), torch.zeros(shape, dtype=torch.int64), torch.ones(shape[:1]).long()
    found = launcher("soft_permutation", "forward")(x, num_nodes, 0.1, 2, True, False)
    gradient = launcher("soft_permutation", "backward")(x, None, None, x, order, x, num_nodes, 0.1, 2, True)
    turned = launcher("permutation_entropy", "backward")(torch.ones(()), x, x, x, num_nodes, 0.1)
    assert all(y.shape == shape for y in (*found, gradient, *turned))
    assert launcher("permutation_entropy", "forward")(x, x, x, num_nodes, 0.1).isnan()
