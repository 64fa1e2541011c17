"""Cases of permutations, by hand and from scores."""

import torch

from probsym_fast.ops import Permutation, SoftPermutation, permutation_entropy, soft_permutation
from tests.ops.fuzz.draws import DEVICE, Case, Draw


def soft_permutation_case(d: Draw) -> Case:
    B, S, N, normalize = d.size(0, 4), d.size(0, 4), 0 if d.chance(0.01) else d.slots(), d.chance(0.7)
    d.refused |= N == 0
    scores = (d.numbers(B, S, N) * 64).round() / 64  # equal, or so far apart that rounding does not change their order
    counts = d.integers(1, N + 1, B) if N and d.chance(0.5) else None
    if counts is not None and B and d.spoil():
        counts[-1] = d.pick(0, N + 1)
    elif scores.numel() and d.spoil():
        scores[-1, -1, 0] = d.pick(float("nan"), float("inf"), -float("inf"))
    unit = d.unit(20)
    tau, iterations = 10 ** d.random.uniform(-1.5, 1), d.pick(0, 1, 5, 20)
    d.leaf("scores", scores, unit)
    counts = None if counts is None else d.index(counts)
    settings = {"tau": tau if normalize else tau * unit, "iterations": iterations, "normalize": normalize}
    settings["dtype"] = torch.float64 if d.chance(0.3) else None  # the reference's is float64 in any case

    def call(backend, x):
        p = soft_permutation(x.scores, counts, **settings, backend=backend)
        return p.scores, p.log_r, p.log_c, p.order, p.rank

    d.amplified = 2 / tau * (1 + iterations)  # the kernels keep no iteration: backward runs them again
    if normalize and scores.numel():  # the gradient is divided by the norm, also where it should vanish
        d.amplified /= min(1.0, float(scores.nan_to_num().norm(dim=-1).min().clamp(min=1e-6)))
    case = d.case(call, 1.0 if normalize else unit, 1.0, 1.0, 1.0, 1.0)
    case.combined = max(case.units)
    return case


def permutation_entropy_case(d: Draw) -> Case:
    B, S, N = d.size(1, 4), d.size(1, 4), d.slots()
    counts = d.integers(1, N + 1, B) if d.chance(0.5) else None
    tau = 10 ** d.random.uniform(-1.5, 1)
    d.amplified = 1 / tau
    soft = soft_permutation(d.numbers(B, S, N), counts, tau, d.pick(0, 1, 20), backend="reference")
    wide = torch.promote_types(d.dtype, torch.float32)
    for name, x in (("t", soft.scores), ("log_r", soft.log_r), ("log_c", soft.log_c)):
        d.leaf(name, x, dtype=wide)
    order, rank = d.index(soft.order), d.index(soft.rank)
    counts = None if counts is None else d.index(counts)
    short = d.spoil()

    def call(backend, x):
        p = SoftPermutation(order, counts, rank, x.t, x.log_r, x.log_c[..., 1:] if short else x.log_c, tau)
        return (permutation_entropy(p, backend),)

    return d.case(call)


def permutation_case(d: Draw) -> Case:
    """A permutation by hand against what it should be, by sorting."""
    B, S, N = d.size(0, 4), d.size(0, 4), d.size(0, 12)
    counts = d.integers(1, N + 1, B) if N and d.chance(0.5) else None
    keys = d.uniform(B, S, N)
    if counts is not None:
        keys = torch.where(torch.arange(N) < counts[:, None, None], keys, 2.0 + torch.arange(N))
    order = keys.argsort(-1)
    rank = order.argsort(-1) if d.chance(0.5) else None
    if N > 1 and B * S and d.chance(0.2):
        spoilt = order if rank is None else rank
        spoilt[-1, -1, 0] = d.pick(int(spoilt[-1, -1, 1]), -1, N)
        d.refused = True
    order, rank = d.index(order), None if rank is None else d.index(rank)

    def call(backend, x):
        if backend != "reference":
            p = Permutation(order, None if counts is None else counts.to(DEVICE), rank)
            return p.order, p.rank, p.hard(torch.float64), p.inverse().order
        slots = torch.arange(N, device=DEVICE).expand(order.shape)
        inverse = order.argsort(-1)
        if not torch.equal(order.sort(-1).values, slots) or (rank is not None and not torch.equal(rank, inverse)):
            raise ValueError
        hard = torch.zeros(B, S, N, N, dtype=torch.float64, device=DEVICE).scatter_(2, order[..., None, :], 1.0)
        return order, inverse, hard, inverse

    return d.case(call, 1.0, 1.0, 1.0, 1.0)
