"""soft_permutation: torch sorts, the iterations and their gradient run in registers. As csrc/cuda/soft_permutation.h.

Iterations r = 1 / (K c), c = 1 / (K r) from c = 1. Back through x = 1 / (K y), with w = x dL/dx:
    d log y = -y (K w),   d t = (w ((sgn o K) y) + y ((sgn o K) w)) / tau.
"""
# mypy: disable-error-code="assignment"
# (a tuple that begins empty grows, slot by slot)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import long_rows
from probsym_fast.ops.triton._launch import bucket, cdiv, check_tensors, fresh_like, kernel
from probsym_fast.ops.triton.laplace import (
    MOST,
    across,
    check_slots,
    decays,
    full,
    load_slots,
    places,
    product,
    store_slots,
    team,
    valid_slots,
)

BYTES = 2**28  # of c in all iterations; if all rows at once need more, a program takes several in turn


@triton.jit
def norm_of(p_x, b_n, BLOCK: tl.constexpr):
    """sqrt(sum of squares) of the first n numbers, at least 1e-6."""
    T: tl.constexpr = p_x.dtype.element_ty
    b_top = tl.zeros((BLOCK,), T)
    for first in range(0, b_n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b_top = tl.maximum(b_top, tl.abs(tl.load(p_x + o, mask=o < b_n, other=0)))
    b_least = tl.full((1,), 1e-6, T)
    b_top = tl.max(b_top, 0)
    b_scale = tl.where(b_top > b_least, b_top, 1.0)  # squares of scaled scores do not overflow
    b_sum = tl.zeros((BLOCK,), T)
    for first in range(0, b_n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b_s = tl.load(p_x + o, mask=o < b_n, other=0) / b_scale
        b_sum += b_s * b_s
    b_norm = tl.sqrt(tl.sum(b_sum, 0)) * b_scale
    return tl.where(b_norm < b_least, b_least, b_norm)


@kernel({"num_warps": 4})
def _keys(p_scores, p_nodes, p_keys, rows, S, N, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What to sort: the normalised scores, -infinity in the padding. A NaN sorts first."""
    i_row = tl.program_id(0).to(tl.int64)
    b_n = valid_slots(p_nodes, i_row, rows, S, N)
    p_row, b_norm = p_scores + i_row * N, tl.full((1,), 1.0, p_keys.dtype.element_ty)
    if NORMALIZE:
        b_norm = norm_of(p_row, b_n, BLOCK)
    for first in range(0, N, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b_s = tl.load(p_row + o, mask=o < b_n, other=0)
        if b_s.dtype == tl.float32:
            b_s = tl.div_rn(b_s, b_norm)
        else:
            b_s = b_s / b_norm
        b_s = tl.where(b_s == 0, 0.0, tl.where(b_s == b_s, b_s, float("inf")))  # -0 equals 0 for every sort
        tl.store(p_keys + i_row * N + o, tl.where(o < b_n, b_s, -float("inf")), mask=o < N)


@kernel({"num_warps": 4})
def _ranks(p_order, p_nodes, p_t, p_rank, rows, S, N, BLOCK: tl.constexpr):
    """rank[order[j]] = j; t = 0 in the padding."""
    i_row = tl.program_id(0).to(tl.int64)
    b_n = valid_slots(p_nodes, i_row, rows, S, N)
    for first in range(0, N, BLOCK):
        o = first + tl.arange(0, BLOCK)
        b_node = tl.load(p_order + i_row * N + o, mask=o < N, other=0)
        tl.store(p_rank + i_row * N + b_node, o.to(tl.int64), mask=o < N)
        tl.store(p_t + i_row * N + o, 0.0, mask=(o >= b_n) & (o < N))


@triton.jit
def inverse(a, links, v, K: tl.constexpr):
    """1 / (K v) and (sgn o K) v."""
    whole, signed = product(a, links, v, K)
    x = ()
    for i in tl.static_range(K):
        x = x + (1.0 / whole[i],)
    return x, signed


@kernel({"maxnreg": 255})
def _iterate(
    p_t, p_nodes, p_log_r, p_log_c, rows, S, N, iterations, by_tau: tl.float64,
    ROWS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = p_t.dtype.element_ty
    o_row, o_at, o_slot = places(tl.program_id(0), rows, N, ROWS, LANES, K)
    b_n = valid_slots(p_nodes, o_row, rows, S, N)
    a, d = decays(p_t, o_at, o_slot, b_n, by_tau, K)
    links = across(a, d, K)
    c = full(1.0, T, ROWS, LANES, K)
    r = c
    for _ in range(iterations):
        r, _ = inverse(a, links, c, K)
        c, _ = inverse(a, links, r, K)
    log_r = ()
    log_c = ()
    for i in tl.static_range(K):
        log_r = log_r + (tl.log(r[i]),)
        log_c = log_c + (tl.log(c[i]),)
    store_slots(p_log_r, o_row, o_at, o_slot, b_n, rows, N, log_r, K)
    store_slots(p_log_c, o_row, o_at, o_slot, b_n, rows, N, log_c, K)


@kernel({"maxnreg": 255})
def _iterate_backward(
    p_d_t, p_d_log_r, p_d_log_c, p_t, p_nodes, p_kept, p_out, rows, S, N, iterations, by_tau: tl.float64,
    ROWS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out: the whole gradient of t. kept (programs, iterations - 1, K, ROWS, LANES): c after all iterations but the last."""
    T: tl.constexpr = p_t.dtype.element_ty
    o_kept = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    o_kept += tl.program_id(0).to(tl.int64) * (iterations - 1) * K * ROWS * LANES
    for i_group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        o_row, o_at, o_slot = places(i_group, rows, N, ROWS, LANES, K)
        b_n = valid_slots(p_nodes, o_row, rows, S, N)
        a, d = decays(p_t, o_at, o_slot, b_n, by_tau, K)
        links = across(a, d, K)
        # x: c after an iteration; r, the c before it and the signed product of that one. Of values of their own: triton
        # takes a variable that is set to another with the same first value for one that the loop leaves alone.
        x = full(1.0, T, ROWS, LANES, K)
        r = full(1.0, T, ROWS, LANES, K)
        c = full(1.0, T, ROWS, LANES, K)
        signed_c = full(1.0, T, ROWS, LANES, K)
        for step in range(1, iterations + 1):
            c = x
            r, signed_c = inverse(a, links, c, K)
            x, _ = inverse(a, links, r, K)
            for i in tl.static_range(K):
                p_i = p_kept + o_kept + ((step - 1) * K + i) * ROWS * LANES
                tl.store(p_i, x[i], mask=(o_kept >= 0) & (step < iterations))
        tl.debug_barrier()
        d_log_c = load_slots(p_d_log_c, o_at, o_slot, b_n, T, K)
        w = ()
        for i in tl.static_range(K):
            w = w + (d_log_c[i] * x[i],)
        d_t = full(0.0, T, ROWS, LANES, K)
        for back in range(iterations):
            step = iterations - back
            K_w, signed_w = product(a, links, w, K)
            _, signed_r = product(a, links, r, K)
            d_log_r = load_slots(p_d_log_r, o_at, o_slot, tl.where(back == 0, b_n, 0), T, K)
            w_r = ()
            before = ()
            both = ()
            for i in tl.static_range(K):
                both = both + (d_t[i] + w[i] * signed_r[i] + r[i] * signed_w[i],)
                w_r = w_r + ((d_log_r[i] - r[i] * K_w[i]) * r[i],)
                p_i = p_kept + o_kept + ((step - 3) * K + i) * ROWS * LANES
                before = before + (tl.load(p_i, mask=(o_kept >= 0) & (step > 2), other=1),)
            K_w, signed_w = product(a, links, w_r, K)
            r, signed_before = inverse(a, links, before, K)
            d_t = ()
            w = ()
            for i in tl.static_range(K):
                d_t = d_t + (both[i] + c[i] * signed_w[i] + w_r[i] * signed_c[i],)
                w = w + (-c[i] * K_w[i] * c[i],)
            c, signed_c = before, signed_before
        b_by_tau = tl.full((1, 1), by_tau, T)
        outside = load_slots(p_d_t, o_at, o_slot, b_n, T, K)
        whole = ()
        for i in tl.static_range(K):
            whole = whole + (outside[i] + d_t[i] * b_by_tau,)
        store_slots(p_out, o_row, o_at, o_slot, b_n, rows, N, whole, K)
        tl.debug_barrier()  # the next rows use the memory of these


@kernel({"num_warps": 4})
def _to_scores(
    p_d_t, p_t, p_scores, p_order, p_nodes, p_d_scores, rows, S, N, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """t = s / norm: d_s = (d_t - t <t, d_t>) / norm, without the second term if the norm is clamped."""
    T: tl.constexpr = p_t.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    b_n = valid_slots(p_nodes, i_row, rows, S, N)
    p_g, p_s, b_at = p_d_t + i_row * N, p_t + i_row * N, i_row * N
    b_inner, b_norm = tl.zeros((BLOCK,), T), tl.full((1,), 1.0, T)
    if NORMALIZE:
        for first in range(0, b_n, BLOCK):
            o = first + tl.arange(0, BLOCK)
            b_inner += tl.load(p_g + o, mask=o < b_n, other=0) * tl.load(p_s + o, mask=o < b_n, other=0)
        b_norm = norm_of(p_scores + b_at, b_n, BLOCK)
        b_inner = tl.where(b_norm > tl.full((1,), 1e-6, T), tl.sum(b_inner, 0), 0.0)
    for first in range(0, N, BLOCK):
        o = first + tl.arange(0, BLOCK)
        m_o = o < b_n
        b_d = tl.load(p_g + o, mask=m_o, other=0) - tl.load(p_s + o, mask=m_o, other=0) * b_inner
        b_node = tl.where(m_o, tl.load(p_order + b_at + o, mask=m_o, other=0), o)
        m_node = (o < N) & (b_node >= 0) & (b_node < N)
        tl.store(p_d_scores + b_at + b_node, tl.where(m_o, b_d / b_norm, 0.0), mask=m_node)


def _sorted(
    scores: Tensor, num_nodes: Tensor | None, normalize: bool, presorted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """t, order, rank."""
    B, S, N = scores.shape
    keys, sizes, block = fresh_like(scores), (B * S, S, N), min(MOST, bucket(N))
    _keys(lambda settings: (B * S,), scores, num_nodes, keys, *sizes, NORMALIZE=normalize, BLOCK=block)
    if presorted:
        t, order = keys, torch.arange(N, device=keys.device).expand(B, S, N).contiguous()
    else:
        t, order = keys.sort(dim=-1, descending=True, stable=True)
    rank = fresh_like(order)
    _ranks(lambda settings: (B * S,), order, num_nodes, t, rank, *sizes, BLOCK=block)
    return t, order, rank


def forward(
    scores: Tensor, num_nodes: Tensor | None, tau: float, iterations: int, normalize: bool, presorted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, S, N = check_slots("scores", scores)
    check_tensors(scores.device, num_nodes=(num_nodes, (B,)))
    num_nodes = None if num_nodes is None else num_nodes.contiguous()
    t, order, rank = _sorted(scores.contiguous(), num_nodes, normalize, presorted)
    if N > MOST:
        r = c = torch.ones_like(t)
        for _ in range(iterations):
            r = long_rows.products(t, num_nodes, tau, c)[0].reciprocal()
            c = long_rows.products(t, num_nodes, tau, r)[0].reciprocal()
        return t, r.log(), c.log(), order, rank
    log_r, log_c, shape = fresh_like(t), fresh_like(t), team(N)

    def grid(settings):
        return (cdiv(B * S, settings["ROWS"]),)

    _iterate(grid, t, num_nodes, log_r, log_c, B * S, S, N, iterations, 1.0 / tau, **shape)
    return t, log_r, log_c, order, rank


def backward(
    d_t: Tensor | None,
    d_log_r: Tensor | None,
    d_log_c: Tensor | None,
    scores: Tensor,
    order: Tensor,
    t: Tensor,
    num_nodes: Tensor | None,
    tau: float,
    iterations: int,
    normalize: bool,
) -> Tensor:
    B, S, N = slots = check_slots("scores", scores)
    check_tensors(
        scores.device, order=(order, slots), t=(t, slots), num_nodes=(num_nodes, (B,)), d_t=(d_t, slots),
        d_log_r=(d_log_r, slots), d_log_c=(d_log_c, slots),
    )  # fmt: skip
    given = tuple(None if x is None else x.contiguous() for x in (d_t, d_log_r, d_log_c))
    num_nodes = None if num_nodes is None else num_nodes.contiguous()
    scores, order, t = scores.contiguous(), order.contiguous(), t.contiguous()
    through = _long_gradient if N > MOST else _gradient
    whole, d_scores = through(given, t, num_nodes, tau, iterations), fresh_like(scores)
    _to_scores(
        lambda settings: (B * S,), whole, t, scores, order, num_nodes, d_scores, B * S, S, N,
        NORMALIZE=normalize, BLOCK=min(MOST, bucket(N)),
    )  # fmt: skip
    return d_scores


def _gradient(given, t, num_nodes, tau, iterations) -> Tensor:
    """The whole gradient of t, (B, S, N). given: d_t, d_log_r, d_log_c, or None."""
    B, S, N = t.shape
    shape, whole = team(N), fresh_like(t)
    groups, width = cdiv(B * S, shape["ROWS"]), shape["ROWS"] * shape["LANES"] * shape["K"]
    kept = max(1, iterations - 1) * width
    programs = min(groups, max(1, BYTES // (kept * t.element_size())))
    memory = t.new_empty(programs, kept)
    sizes = B * S, S, N, iterations, 1.0 / tau
    _iterate_backward(lambda settings: (programs,), *given, t, num_nodes, memory, whole, *sizes, **shape)
    return whole


def _long_gradient(given, t, num_nodes, tau, iterations) -> Tensor:
    """`_gradient`, a launch for each product. Some graphs at a time."""
    B, S, N = t.shape
    part = max(1, BYTES // (max(1, iterations * S * N) * t.element_size()))
    if part < B:
        found = []
        for graphs in (slice(first, first + part) for first in range(0, B, part)):
            some = [None if x is None else x[graphs] for x in (*given, num_nodes)]
            found.append(_long_gradient(some[:3], t[graphs], some[3], tau, iterations))
        return torch.cat(found)
    beyond = None if num_nodes is None else torch.arange(N, device=t.device) >= num_nodes[:, None, None]
    zeros = torch.zeros_like(t)
    d_t, d_log_r, d_log_c = (zeros if x is None else x if beyond is None else x.masked_fill(beyond, 0) for x in given)

    def products(v):
        return long_rows.products(t, num_nodes, tau, v)

    kept = [torch.ones_like(t)]
    for _ in range(iterations):
        kept.append(products(products(kept[-1])[0].reciprocal())[0].reciprocal())
    w, rho, whole = d_log_c * kept[-1], d_log_r, zeros
    for c in reversed(kept[:-1]):
        K_c, signed_c = products(c)
        r = K_c.reciprocal()
        (_, signed_r), (K_w, signed_w) = products(r), products(w)
        whole = whole + w * signed_r + r * signed_w
        w = (rho - r * K_w) * r
        K_w, signed_w = products(w)
        whole = whole + w * signed_c + c * signed_w
        w, rho = -c * K_w * c, zeros
    return d_t + whole / tau
