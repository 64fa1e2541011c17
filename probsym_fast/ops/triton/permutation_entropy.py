"""permutation_entropy and its gradient; formulas as in csrc/cuda/permutation_entropy.h.

A normalised row of P[i, j] = r_i K_ij c_j does not depend on r: p_ij = K_ij c_j / m_i with m = K c; columns are the same
with r in place of c. With l = log v, D the scaled distances and q = K(v l) - (D o K) v:   H_i = log m_i - q_i / m_i.
With alpha = 1 / m, beta = -q / m^2, signs S and w the gradient of the row's sum:
    d l = -w v (l K alpha - (D o K) alpha + K beta)
    d t = w (alpha (S K (v l) - S D K v) + beta S K v + v (l S K alpha - S D K alpha + S K beta)) / tau
"""
# mypy: disable-error-code="assignment"
# (a tuple that begins empty grows, slot by slot)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import long_rows
from probsym_fast.ops.triton._launch import cdiv, check_tensors, fresh_like, kernel
from probsym_fast.ops.triton.laplace import (
    MOST,
    across,
    check_slots,
    decays,
    far_product,
    full,
    load_slots,
    places,
    store_slots,
    team,
    valid_slots,
)


@triton.jit
def weights(p_log, o_at, o_slot, b_n, T: tl.constexpr, K: tl.constexpr):
    """l, v = exp(l) and v l."""
    logs = load_slots(p_log, o_at, o_slot, b_n, T, K)
    v = ()
    v_logs = ()
    for i in tl.static_range(K):
        v = v + (tl.exp(logs[i]),)
        v_logs = v_logs + (v[i] * logs[i],)
    return logs, v, v_logs


@kernel({"maxnreg": 255})
def _entropies(
    p_t, p_log_r, p_log_c, p_nodes, p_sums, rows, S, N, by_tau: tl.float64,
    ROWS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """sums (B S), float64: the entropy of each sample, divided by its valid nodes."""
    T: tl.constexpr = p_t.dtype.element_ty
    o_row, o_at, o_slot = places(tl.program_id(0), rows, N, ROWS, LANES, K)
    b_n = valid_slots(p_nodes, o_row, rows, S, N)
    a, d = decays(p_t, o_at, o_slot, b_n, by_tau, K)
    links = across(a, d, K)
    b_sum = tl.zeros((ROWS, LANES), T)
    for side in range(2):
        _, v, v_logs = weights(p_log_c if side == 0 else p_log_r, o_at, o_slot, b_n, T, K)
        m, _, q, _ = far_product(a, d, links, v, v_logs, K)
        for i in tl.static_range(K):
            b_sum += tl.log(m[i]) - q[i] * (1.0 / m[i])
    b_sum = tl.sum(b_sum, 1, keep_dims=True).to(tl.float64)
    tl.store(p_sums + o_row, b_sum / tl.maximum(b_n, 1).to(tl.float64), mask=o_row < rows)


@kernel({"maxnreg": 255})
def _entropies_backward(
    p_d_entropy, p_t, p_log_r, p_log_c, p_nodes, p_d_t, p_d_log_r, p_d_log_c, rows, S, N, by_tau: tl.float64,
    ROWS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = p_t.dtype.element_ty
    o_row, o_at, o_slot = places(tl.program_id(0), rows, N, ROWS, LANES, K)
    b_n = valid_slots(p_nodes, o_row, rows, S, N)
    b_count = tl.maximum(b_n, 1).to(tl.float64) * rows
    b_weight = (tl.load(p_d_entropy).to(tl.float64) / b_count).to(T)
    a, d = decays(p_t, o_at, o_slot, b_n, by_tau, K)
    links = across(a, d, K)
    d_t = full(0.0, T, ROWS, LANES, K)
    for side in range(2):
        logs, v, v_logs = weights(p_log_c if side == 0 else p_log_r, o_at, o_slot, b_n, T, K)
        m, signed_v, q, signed_q = far_product(a, d, links, v, v_logs, K)
        alpha = ()
        beta = ()
        for i in tl.static_range(K):
            alpha = alpha + (1.0 / m[i],)
            beta = beta + (-q[i] * alpha[i] * alpha[i],)
        near, signed_near, far, signed_far = far_product(a, d, links, alpha, beta, K)
        sum_t = ()
        d_log = ()
        for i in tl.static_range(K):
            b_outer = alpha[i] * signed_q[i] + beta[i] * signed_v[i]
            sum_t = sum_t + (d_t[i] + b_outer + v[i] * (logs[i] * signed_near[i] + signed_far[i]),)
            d_log = d_log + (-b_weight * v[i] * (logs[i] * near[i] + far[i]),)
        d_t = sum_t
        p_d_log = p_d_log_c if side == 0 else p_d_log_r
        store_slots(p_d_log, o_row, o_at, o_slot, b_n, rows, N, d_log, K)
    b_scale = b_weight * tl.full((1, 1), by_tau, T)
    scaled = ()
    for i in tl.static_range(K):
        scaled = scaled + (d_t[i] * b_scale,)
    store_slots(p_d_t, o_row, o_at, o_slot, b_n, rows, N, scaled, K)


def _checked(t: Tensor, log_r: Tensor, log_c: Tensor, num_nodes: Tensor | None) -> tuple:
    B, _, _ = slots = check_slots("t", t)
    check_tensors(t.device, log_r=(log_r, slots), log_c=(log_c, slots), num_nodes=(num_nodes, (B,)))
    return *(x.contiguous() for x in (t, log_r, log_c)), None if num_nodes is None else num_nodes.contiguous()


def forward(t: Tensor, log_r: Tensor, log_c: Tensor, num_nodes: Tensor | None, tau: float) -> Tensor:
    t, log_r, log_c, num_nodes = _checked(t, log_r, log_c, num_nodes)
    B, S, N = t.shape
    if N > MOST:
        entropies = torch.zeros_like(t[..., 0])
        for log in (log_c, log_r):
            log, v = _masked(log, num_nodes)
            m, _, q, _ = long_rows.products(t, num_nodes, tau, v, v * log)
            entropies = entropies + (m.log() - q / m).sum(-1)
        return (entropies.double() / _counts(t, num_nodes)).mean().to(t.dtype)
    sums = torch.empty(B, S, dtype=torch.float64, device=t.device)

    def grid(settings):
        return (cdiv(B * S, settings["ROWS"]),)

    _entropies(grid, t, log_r, log_c, num_nodes, sums, B * S, S, N, 1.0 / tau, **team(N))
    return sums.mean().to(t.dtype)


def backward(
    d_entropy: Tensor, t: Tensor, log_r: Tensor, log_c: Tensor, num_nodes: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    t, log_r, log_c, num_nodes = _checked(t, log_r, log_c, num_nodes)
    check_tensors(t.device, d_entropy=(d_entropy, ()))
    B, S, N = t.shape
    if N > MOST:
        return _long_gradient(d_entropy, t, log_r, log_c, num_nodes, tau)
    d_t, d_log_r, d_log_c = fresh_like(t), fresh_like(t), fresh_like(t)

    def grid(settings):
        return (cdiv(B * S, settings["ROWS"]),)

    results = d_t, d_log_r, d_log_c
    _entropies_backward(grid, d_entropy, t, log_r, log_c, num_nodes, *results, B * S, S, N, 1.0 / tau, **team(N))
    return results


def _counts(t: Tensor, num_nodes: Tensor | None) -> Tensor | int:
    """Valid nodes, to broadcast over (B, S)."""
    return t.shape[-1] if num_nodes is None else num_nodes[:, None]


def _masked(log: Tensor, num_nodes: Tensor | None) -> tuple[Tensor, Tensor]:
    """l, 0 in the padding, and v = exp(l)."""
    if num_nodes is not None:
        log = log.masked_fill(torch.arange(log.shape[-1], device=log.device) >= num_nodes[:, None, None], 0)
    return log, log.exp()


def _long_gradient(d_entropy, t, log_r, log_c, num_nodes, tau) -> tuple[Tensor, Tensor, Tensor]:
    """`backward`, a launch for each pair of products."""
    B, S, _ = t.shape
    count = _counts(t, num_nodes) * torch.ones(B, S, dtype=torch.float64, device=t.device)
    weight = (d_entropy / (count * (B * S))).to(t.dtype)[..., None]
    d_t, d_logs = torch.zeros_like(t), []
    for log in (log_c, log_r):
        log, v = _masked(log, num_nodes)
        m, signed_v, q, signed_q = long_rows.products(t, num_nodes, tau, v, v * log)
        alpha = m.reciprocal()
        beta = -q * alpha * alpha
        near, signed_near, far, signed_far = long_rows.products(t, num_nodes, tau, alpha, beta)
        d_t += alpha * signed_q + beta * signed_v + v * (log * signed_near + signed_far)
        d_logs.append(_masked(-weight * v * (log * near + far), num_nodes)[0])
    d_log_c, d_log_r = d_logs
    return _masked(d_t * weight / tau, num_nodes)[0], d_log_r, d_log_c
