"""The row kernels of csrc/cuda run on the host, thread for thread, against the float64 reference.

They are the very files that nvcc compiles, launched as on a GPU; only the CUDA runtime is another (tests/cuda_host):
coroutines that meet at every shuffle and barrier, in random order in between; every access is traced.
"""

import ctypes

import pytest
import torch

from probsym_fast.ops.permutation import valid_slots
from probsym_fast.ops.reference.permutation_entropy import permutation_entropy as dense_entropy
from probsym_fast.ops.reference.soft_permutation import soft_permutation as dense
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.helpers import cuda_on_host

pytestmark = pytest.mark.skipif(cuda_on_host.unable() is not None, reason=str(cuda_on_host.unable()))
LAUNCH, IN_TURN, MEMORY = -1, -2, 0  # the launch as it is, with half its blocks, with slots in memory
WARP, BLOCK = 32, 256


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(cuda_on_host.built(tmp_path_factory)))


def run(library: ctypes.CDLL, name: str, dtype: torch.dtype, *arguments) -> None:
    """The entry point `name` of rows.cpp; tensors are passed by address, and stay alive until it returns."""
    function = getattr(library, f"{name}_{'double' if dtype == torch.float64 else 'float'}")
    function.restype = ctypes.c_char_p

    def c(x):
        if x is None or isinstance(x, torch.Tensor):
            assert x is None or x.is_contiguous()
            return ctypes.c_void_p(x.data_ptr() if x is not None else None)
        return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)

    problem = function(*map(c, arguments))
    assert problem is None, problem.decode()


def call(library: ctypes.CDLL, name: str, *arguments, slots=LAUNCH, threads=BLOCK, seed=1) -> None:
    """The kernel `name` of the tensors' dtype."""
    dtype = next(x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point())
    run(library, name, dtype, *arguments, slots, threads, seed)


class Rows:
    """Inputs, and what the kernels made of them."""

    def __init__(self, library, scores, num_nodes=None, tau=0.05, iterations=20, normalize=True, **options):
        self.scores, self.num_nodes, self.settings = scores, num_nodes, (tau, iterations, normalize)
        empty = lambda: torch.full_like(scores, torch.nan)  # noqa: E731
        self.t, self.log_r, self.log_c, self.d_scores = empty(), empty(), empty(), empty()
        self.order, self.rank = (torch.full(scores.shape, -1, dtype=torch.int64) for _ in range(2))
        found, shape = (self.t, self.log_r, self.log_c, self.order, self.rank), scores.shape
        call(library, "soft_permutation", scores, num_nodes, *shape, *self.settings, False, *found, **options)
        self.weights = [torch.randn(shape, dtype=torch.float64).to(scores.dtype) for _ in range(3)]
        arguments = (*self.weights, scores, self.order, self.t, num_nodes, *shape, tau, iterations, normalize)
        call(library, "soft_permutation_backward", *arguments, self.d_scores, **options)
        # the entropy, and its gradient by each vector
        sums, vectors = torch.full(shape[:2], torch.nan, dtype=torch.float64), (self.t, self.log_r, self.log_c)
        call(library, "permutation_entropy", *vectors, num_nodes, *shape, tau, sums, **options)
        self.entropy, self.d_vectors = sums.sum(), [empty() for _ in range(3)]
        one = torch.ones((), dtype=scores.dtype)
        call(library, "permutation_entropy_backward", one, *vectors, num_nodes, *shape, tau, *self.d_vectors, **options)

    def check(self, bound=None):
        """Values and gradients are those of the definition in float64."""
        values, gradients = (table | bound if bound else table for table in (VALUE, GRADIENT))
        exact, dtype = self.scores.double().requires_grad_(), self.scores.dtype
        t, log_r, log_c, order, rank = dense(exact, self.num_nodes, *self.settings)
        n = self.scores.shape[-1]
        inside = torch.ones_like(order, dtype=torch.bool)
        if self.num_nodes is not None:
            inside = valid_slots(self.num_nodes, n).expand(order.shape)
        assert torch.equal(self.order, order) and torch.equal(self.rank, rank)
        slots = torch.arange(n).expand(self.order.shape)
        assert torch.equal(self.order.gather(-1, self.rank), slots)
        for name, expected in (("t", t), ("log_r", log_r), ("log_c", log_c)):
            found = getattr(self, name)
            assert (found[~inside] == 0).all()
            assert_near(found[inside], expected[inside], values, dtype)
        loss = sum((x * w.double() * inside).sum() for x, w in zip((t, log_r, log_c), self.weights, strict=True))
        (expected,) = torch.autograd.grad(loss, exact)
        assert (self.d_scores[~inside] == 0).all()
        assert_near(self.d_scores, expected.masked_fill(~inside, 0), gradients, dtype)

        vectors = [x.double().requires_grad_() for x in (self.t, self.log_r, self.log_c)]
        entropy = dense_entropy(*vectors, self.num_nodes, self.settings[0])
        assert_near(self.entropy, entropy, values, dtype)
        for found, expected in zip(self.d_vectors, torch.autograd.grad(entropy, vectors), strict=True):
            assert (found[~inside] == 0).all()
            assert_near(found, expected.masked_fill(~inside, 0), gradients, dtype)
        return self


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 128, 129, 188, 192, 193, 256])
def test_a_warp_takes_a_row(library, n, dtype):
    Rows(library, torch.randn(1, 2, n, dtype=dtype), tau=0.05, iterations=5).check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [257, 512, 513, 1024])
def test_a_block_takes_a_row(library, n, dtype):
    Rows(library, torch.randn(1, 1, n, dtype=dtype), tau=0.02, iterations=2).check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "threads"), [(1025, LAUNCH), (50, 32 * 2), (300, 32 * 4), (1100, 32 * 2)])
def test_rows_of_any_length_are_held_in_memory(library, n, threads, dtype):
    options = {} if threads == LAUNCH else {"slots": MEMORY, "threads": threads}
    Rows(library, torch.randn(1, 1, n, dtype=dtype), tau=0.02, iterations=2, **options).check()


@pytest.mark.parametrize("options", [{}, {"slots": MEMORY, "threads": 64}])
@pytest.mark.parametrize("counts", [[17, 1, 5], [9, 16, 2]])
def test_padding(library, counts, options):
    num_nodes = torch.tensor(counts)
    scores = torch.randn(3, 2, 17, dtype=torch.float64)
    whole = Rows(library, scores, num_nodes, tau=0.1, **options)
    whole.check()
    beyond = ~valid_slots(num_nodes, 17).expand(scores.shape)
    slots = torch.arange(17).expand(scores.shape)
    assert torch.equal(whole.order[beyond], slots[beyond]) and torch.equal(whole.rank[beyond], slots[beyond])
    torch.manual_seed(7)
    first = Rows(library, scores, num_nodes, tau=0.1, **options)
    torch.manual_seed(7)
    second = Rows(library, scores.masked_fill(beyond, torch.nan), num_nodes, tau=0.1, **options)
    assert torch.equal(first.d_scores, second.d_scores) and torch.equal(first.log_c, second.log_c)


@pytest.mark.parametrize("n", [70, 300])
def test_padding_of_many_slots(library, n):
    Rows(library, torch.randn(2, 1, n, dtype=torch.float64), torch.tensor([n - 37, 3]), tau=0.1, iterations=2).check()


@pytest.mark.parametrize(
    ("iterations", "normalize"), [(0, True), (0, False), (1, True), (2, False), (3, True), (40, True)]
)
def test_iterations(library, iterations, normalize):
    scores = torch.randn(1, 2, 40, dtype=torch.float64)
    rows = Rows(library, scores, tau=0.2, iterations=iterations, normalize=normalize)
    if iterations:
        rows.check()
        return
    assert (rows.log_r == 0).all() and (rows.log_c == 0).all()
    exact = scores.clone().requires_grad_()
    t = dense(exact, None, *rows.settings)[0]
    (expected,) = torch.autograd.grad((t * rows.weights[0]).sum(), exact)
    assert_near(rows.d_scores, expected, GRADIENT)


@pytest.mark.parametrize("n", [5, 40, 300])
@pytest.mark.parametrize("kind", ["all", "some", "signed zeros"])
def test_ties_go_by_index(library, n, kind):
    scores = {
        "all": torch.ones(1, 1, n),
        "some": torch.randint(0, 3, (1, 1, n)).float(),
        "signed zeros": torch.where(torch.arange(n) % 2 == 0, 0.0, -0.0).expand(1, 1, n).contiguous(),
    }[kind]
    rows = Rows(library, scores.double(), tau=0.1, iterations=3).check()
    assert torch.equal(rows.order, scores.argsort(dim=-1, descending=True, stable=True))


@pytest.mark.parametrize("scale", [1e-15, 1e30])
@pytest.mark.parametrize("tau", [1e-4, 10.0])
def test_extremes(library, scale, tau):
    for dtype in (torch.float32, torch.float64):
        rows = Rows(library, (torch.randn(1, 2, 33) * scale).to(dtype), tau=tau)
        for x in (rows.t, rows.log_r, rows.log_c, rows.d_scores, rows.entropy, *rows.d_vectors):
            assert x.isfinite().all()
        if dtype == torch.float64 and scale == 1e30:
            rows.check({torch.float64: 1e-8})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 33, 188, 300, 1025])
def test_presorted_scores_are_not_sorted(library, n, dtype):
    """Bit by bit what sorting them again gives; others stay where they are."""
    shape, num_nodes = (2, 1, n), torch.tensor([n, (n + 1) // 2])
    drawn = torch.randn(shape, dtype=dtype)
    inside = valid_slots(num_nodes, n)
    for scores in (drawn.masked_fill(~inside, -torch.inf).sort(-1, descending=True).values, drawn):
        vectors = [torch.full((2, 3, *shape), torch.nan, dtype=dtype), torch.full((2, 2, *shape), -1)]
        for presorted in (False, True):
            found = *vectors[0][int(presorted)], *vectors[1][int(presorted)]
            call(library, "soft_permutation", scores, num_nodes, *shape, 0.1, 2, False, presorted, *found)
        slots = torch.arange(n).expand(shape)
        assert all(torch.equal(x, slots) for x in vectors[1][1])
        if scores is drawn:
            assert torch.equal(vectors[0][1, 0], drawn.masked_fill(~inside, 0))
        else:
            assert torch.equal(vectors[0][0], vectors[0][1]) and torch.equal(vectors[1][0], vectors[1][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_leave_a_permutation(library, bad):
    """Values are not looked at on a GPU; what reads memory by order and rank must stay inside the row."""
    scores = torch.randn(1, 1, 40, dtype=torch.float64)
    scores[..., 11] = bad
    for num_nodes in (None, torch.tensor([30])):
        rows = Rows(library, scores, num_nodes, iterations=1)
        assert torch.equal(rows.order.sort(-1).values, torch.arange(40).expand(1, 1, 40))
        assert torch.equal(rows.order.gather(-1, rows.rank), torch.arange(40).expand(1, 1, 40))
        assert not rows.log_r.isfinite().all() or not rows.t.isfinite().all()


@pytest.mark.parametrize("count", [-3, 0, 41])
def test_counts_out_of_range_leave_memory_alone(library, count):
    scores = torch.randn(1, 1, 40, dtype=torch.float64)
    rows = Rows(library, scores, torch.tensor([count]), iterations=1)
    assert torch.equal(rows.order.gather(-1, rows.rank), torch.arange(40).expand(1, 1, 40))


def test_only_some_gradients_come(library):
    """A gradient that did not come is zeros."""
    scores = torch.randn(1, 2, 21, dtype=torch.float64)
    rows = Rows(library, scores)
    arguments = (scores, rows.order, rows.t, None, *scores.shape, *rows.settings)
    parts, empty = [], lambda: torch.full_like(scores, torch.nan)
    for i in range(3):
        only = [w if i == j else None for j, w in enumerate(rows.weights)]
        parts.append(empty())
        call(library, "soft_permutation_backward", *only, *arguments, parts[-1])
    assert_near(sum(parts), rows.d_scores, GRADIENT)


@pytest.mark.parametrize("n", [20, 300])
def test_the_order_of_the_threads_does_not_change_a_bit(library, n):
    scores, results = torch.randn(1, 1, n, dtype=torch.float32), []
    for seed in (1, 2, 3):
        torch.manual_seed(0)
        rows = Rows(library, scores, iterations=2, seed=seed)
        results.append((rows.order, rows.log_r, rows.d_scores, rows.entropy, *rows.d_vectors))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{"slots": IN_TURN}, {"slots": MEMORY, "threads": 64}])
def test_a_block_takes_rows_in_turn(library, options):
    """As it does where all rows at once would need too much memory."""
    n = 60 if "threads" in options else 300
    Rows(library, torch.randn(2, 3, n), torch.tensor([n, n // 2]), tau=0.2, iterations=2, **options).check()


@pytest.mark.parametrize("count", [0, 1, 300, 1000])
def test_a_block_adds_up(library, count):
    for dtype in (torch.float64, torch.float32):
        sums, out = torch.randn(count, dtype=torch.float64), torch.full((1,), torch.inf, dtype=dtype)
        run(library, "add_up", dtype, sums, count, out, 1)
        assert out.isnan() if count == 0 else torch.allclose(out, sums.sum().to(dtype))
