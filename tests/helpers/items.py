"""Batches of random graphs for the ops on graphs, and what these must equal, written out with dense matrices."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from probsym_fast.ops import OPS, Permutation, soft_permutation
from probsym_fast.ops._patches import PAD_MODES, patch_size
from tests.conftest import GRADIENT, VALUE, assert_near
from tests.ops.test_soft_permutation import published

DTYPES = [torch.float64, torch.float32]
HALF = {torch.bfloat16: 8e-3, torch.float16: 2e-3}  # rounded once to the dtype, relative to the largest entry
# N slots in a grid: padding none, short, longer than the data; one slot; one patch
GRIDS = [(9, 3), (9, 2), (12, 5), (3, 14), (2, 14), (1, 1), (1, 5), (6, 1)]
PADDINGS = list(itertools.product(PAD_MODES, (False, True)))


@dataclass
class Batch:
    """Graphs of the given sizes in N slots, float64: parallel edges, self loops, a graph without edges; S samples."""

    ptr: Tensor
    edges: Tensor
    attr: Tensor  # (E, C): some rows zero, some one-hot, others mixed
    x: Tensor  # (nodes, C)
    matrix: Tensor  # (B, N, N, C)
    scores: Tensor  # (B, S, N)
    order: Tensor  # (B, S, N): any permutation, for a hard one

    @property
    def N(self) -> int:
        return self.scores.shape[-1]

    def soft(self, scores: Tensor, backend: str = "auto", tau: float = 0.5):
        named = backend in OPS["soft_permutation"].backends(
            scores.device.type
        )  # ops may have kernels of different kinds
        return soft_permutation(scores, self.ptr.diff(), tau=tau, backend=backend if named else "auto")


def batch(sizes: list[int], N: int, C: int = 3, S: int = 3, edges: int = 6, device="cpu") -> Batch:
    ptr = torch.tensor([0, *itertools.accumulate(sizes)])
    pairs = [torch.zeros(2, 0, dtype=torch.int64)]
    for b, n in enumerate(sizes):
        if n and not (b == 1 and len(sizes) > 2):
            pair = torch.randint(n, (2, edges))
            pair[:, -1] = pair[:, 0]  # parallel to the first
            pair[1, edges // 2] = pair[0, edges // 2]  # a self loop
            pairs.append(pair + ptr[b])
    pairs = torch.cat(pairs, 1)
    E = pairs.shape[1]
    attr = torch.randn(E, C) * (torch.rand(E, C) > 0.3)
    attr[::3] = torch.nn.functional.one_hot(torch.randint(C, (len(attr[::3]),)), C).float()
    attr[1::7] = 0
    B = len(sizes)
    order = torch.rand(B, S, N).argsort(-1)
    data = attr, torch.randn(int(ptr[-1]), C), torch.randn(B, N, N, C), torch.randn(B, S, N)
    return Batch(ptr.to(device), pairs.to(device), *(x.double().to(device) for x in data), order.to(device))


def weights(D: int, C: int, *patch: int, device="cpu") -> Tensor:
    return torch.randn(D, C, *patch, dtype=torch.float32).double().to(device) / 2


def value_and_gradients(call, leaves, wanted=None, rounded: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """call(*leaves), and the gradients of a fixed random combination of it to the leaves (or those numbered `wanted`).

    rounded: to a dtype, the weights of the combination.
    """
    wanted = range(len(leaves)) if wanted is None else wanted
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
    out = call(*leaves)
    combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(rounded or out.dtype).to(out)
    return out.detach(), *torch.autograd.grad((out * combination).sum(), [leaves[i] for i in wanted])


def assert_same(found, expected, dtype=None):
    """A value and its gradients, by the tables."""
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_near(x, y, GRADIENT if i else VALUE, dtype)


def check(op: str, call, leaves, dtype):
    """call(backend, *leaves) of the kernel in dtype against the reference in float64: the value and every gradient."""
    device = leaves[0].device
    leaves = [x.to(dtype) for x in leaves]
    backend = OPS[op].backends(device.type)[0] if dtype in OPS[op].kernel_dtypes(device.type) else "auto"
    found = value_and_gradients(lambda *x: call(backend, *x), leaves)
    assert all(x.dtype == dtype for x in found)
    expected = value_and_gradients(lambda *x: call("reference", *x), [x.double() for x in leaves])
    assert_same(found, expected)


def check_half(op: str, call, leaves, dtype, wide=()):
    """`check` of a GPU's kernel on leaves of a half dtype, those numbered `wide` in float32: what it sums is float32."""
    device = leaves[0].device.type
    if dtype not in OPS[op].kernel_dtypes(device):
        pytest.skip(f"{op} has no kernel for {dtype} on {device}")
    leaves = [x.to(torch.float32 if i in wide else dtype) for i, x in enumerate(leaves)]
    found = value_and_gradients(lambda *x: call(OPS[op].backends(device)[0], *x), leaves)
    assert [x.dtype for x in found] == [dtype, *(x.dtype for x in leaves)]
    exact = [x.double() for x in leaves]
    expected = value_and_gradients(lambda *x: call("reference", *x), exact, rounded=dtype)
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, HALF | {torch.float32: GRADIENT[torch.float32]})


def bit_equal_on_any_threads(call, leaves, products=()):
    """Repeated, and on one to three threads; `products`: results that the library's matrix products make, whose last bit
    may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        first = value_and_gradients(call, leaves)
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            for i, (x, y) in enumerate(zip(value_and_gradients(call, leaves), first, strict=True)):
                if i in products and count != threads:
                    assert_near(x, y, GRADIENT)
                else:
                    assert torch.equal(x, y), (count, i)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


# --- the dense way, with nothing of the package but the definition of the soft permutation in its test ---


def slot_of_place(place: int, N: int, front: int, pad_mode: str) -> int:
    """The slot in a place of the padded axis, -1 for a zero: a walk from slot 0, one place at a time."""
    slot, step = 0, 1 if place >= front else -1
    for _ in range(abs(place - front)):
        if 0 <= slot + step < N:
            slot += step
        elif pad_mode == "zeros":
            return -1
        elif pad_mode == "circular":
            slot = 0 if step > 0 else N - 1
        elif pad_mode == "reflect" and N > 1:
            step = -step
            slot += step
    return slot


def front_and_back(N: int, grid: int, centered: bool) -> tuple[int, int]:
    padding = grid * patch_size(N, grid) - N
    front = padding // 2 if centered else 0
    return front, padding - front


def padded(x: Tensor, grid: int, pad_mode: str, centered: bool, axes: int) -> Tensor:
    """x (B, C, N[, N]) by torch.nn.functional.pad where that defines it, else by the walk."""
    N = x.shape[-1]
    front, back = front_and_back(N, grid, centered)
    longest = {"reflect": N - 1, "circular": N}.get(pad_mode, back)
    if max(front, back) <= longest:
        return pad(x, (front, back) * axes, mode={"zeros": "constant"}.get(pad_mode, pad_mode))
    slots = [slot_of_place(place, N, front, pad_mode) for place in range(front + N + back)]
    for axis in range(axes):
        x = x.index_select(2 + axis, torch.tensor(slots))
    return x


def dense_permutation(scores: Tensor, ptr: Tensor, tau: float = 0.5) -> Tensor:
    """(B, S, N, N), rows nodes, columns slots: hard, with the gradient of the soft one; identity beyond a graph."""
    B, S, N = scores.shape
    p = torch.eye(N, dtype=scores.dtype).repeat(B, S, 1, 1)
    for b, n in enumerate(ptr.diff().tolist()):
        soft = published(scores[b : b + 1, :, :n], tau)[0][0]
        hard = torch.zeros(S, n, n, dtype=scores.dtype)
        hard.scatter_(1, scores[b, :, :n].argsort(dim=-1, descending=True)[:, None], 1.0)
        p[b, :, :n, :n] = hard + soft - soft.detach()
    return p


def hard_matrix(p: Permutation) -> Tensor:
    matrix = torch.zeros(*p.shape, p.shape[-1], dtype=torch.float64)
    return matrix.scatter_(2, p.order[:, :, None], 1.0)


def dense_graphs(edges: Tensor, attr: Tensor, x: Tensor, ptr: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Adjacency (B, C, N, N) and features (B, C, N)."""
    B = len(ptr) - 1
    graph = torch.tensor([b for b, n in enumerate(ptr.diff().tolist()) for _ in range(n)])
    local = torch.cat([torch.arange(n) for n in ptr.diff().tolist()])
    u, v = edges
    adjacency = attr.new_zeros(B, N, N, attr.shape[1])
    adjacency = adjacency.index_put((graph[u], local[u], local[v]), attr, accumulate=True)
    features = x.new_zeros(B, N, x.shape[1]).index_put((graph, local), x)
    return adjacency.permute(0, 3, 1, 2), features.mT
