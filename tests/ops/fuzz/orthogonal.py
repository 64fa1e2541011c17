"""Cases of frames, their action, noise and images."""

import torch
from torch import Tensor

from probsym_fast.ops import act_orthogonal, embed_image, noise, orthogonal_frame
from tests.ops.fuzz.draws import DEVICE, Case, Draw


def embed_image_case(d: Draw, turned: bool = False) -> Case:
    B, S, C, D, P, Q = d.size(0, 4), d.size(1, 4), d.size(1, 6), d.size(1, 40), d.size(1, 9), d.size(1, 9)
    H, W, unit, scale = P * d.size(1, 4), Q * d.size(1, 4), d.unit(), d.unit()
    d.amplified = float(max(H, W))  # of coordinates
    d.leaf("pixels", d.numbers(B, C + d.spoil(), H, W), unit)
    d.leaf("weight", d.numbers(*(D, C, P, Q)[d.spoil() :]), scale)
    if d.chance(0.5):
        d.leaf("bias", d.numbers(D), unit * scale)
    settings = {"pad_mode": "elsewhere" if d.spoil() else d.pick("zeros", "replicate")}
    turns = None
    if turned:
        turns = d.integers(0, 8, B, S) if H == W else 2 * d.integers(0, 4, B, S)
        if B and d.spoil():
            turns[-1, -1] = d.pick(-1, 8, 2**40)
        turns = d.index(turns)
    else:
        d.leaf("plane", torch.randn(B, S, 2, 2, generator=d.generator, dtype=torch.float64))

    def call(backend, x):
        plane = x.plane if turns is None else turns
        return (embed_image(x.pixels, plane, x.weight, x.bias, **settings, backend=backend),)

    return d.case(call, unit * scale)


def embed_turned_case(d: Draw) -> Case:
    return embed_image_case(d, turned=True)


def orthogonal_frame_case(d: Draw) -> Case:
    size, lead, special = d.pick(1, 2, 3, 3, 3, 4, 5), [d.size(0, 20) for _ in range(d.pick(0, 1, 2))], d.chance(0.5)
    a = d.numbers(*lead, size, size)
    if d.chance(0.5):  # independent, but for what follows
        a = a + 4 * torch.eye(size).flip(0)
    for _ in range(d.pick(0, 0, 1, 2)):
        column, other = d.random.randrange(size), d.random.randrange(size)
        a[..., column] = d.pick(0.0, 1.0, -1.0, 2.0, -0.25) * a[..., other]
    shares = independent_shares(a, d.dtype)
    narrow = torch.finfo(d.dtype).bits < 64
    if (
        (shares > 1e-15) & (shares < (1e-5 if narrow else 1e-12))
    ).any():  # the definition replaces such a column by dtype
        a, shares = a + 16 * torch.eye(size).flip(0), torch.ones(())
    kept = torch.where(shares > 1e-15, shares, 1.0).prod(
        -1
    )  # gradients are divided by the one column's and the next one's
    d.amplified = (
        1 / float(kept.min()) ** 2 if kept.numel() else 1.0
    )  # what rounds in q = u / |u| is divided by |u| again
    if a.numel() and d.spoil():
        a[..., -1, -1] = d.pick(float("nan"), float("inf"))
    most = {torch.float64: 900, torch.float16: 0}.get(d.dtype, 110)
    unit = 2.0 ** d.random.randint(-most, most) if d.chance(0.3) else 1.0
    d.leaf("matrices", a, unit)

    def call(backend, x):
        backend = backend if size <= 3 or backend == "reference" else "auto"  # beyond 3 there is the reference only
        return (orthogonal_frame(x.matrices, special=special, backend=backend),)

    return d.case(call)


def independent_shares(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Of every column in this dtype: its length without what depends on the frame's columns before, by its length."""
    a = a.to(dtype).double()
    along = (orthogonal_frame(a, backend="reference") * a).sum(-2).abs()
    return along / a.norm(dim=-2).clamp(min=1e-300)


def noise_case(d: Draw) -> Case:
    shape = [d.size(0, 20), d.size(0, 9), *[d.size(0, 40) for _ in range(d.pick(0, 1, 1, 2))]]
    seed = torch.tensor(d.pick(0, -1, 2**63 - 1, d.random.randrange(2**62)), device=DEVICE)
    rows = d.pick(None, d.index(d.integers(-(2**62), 2**62, shape[0])))
    settings = {
        "normal": d.chance(0.5),
        "first": d.pick(0, 1, 2**40),
        "mirrored": d.chance(0.5),
        "block": d.pick(1, 2, 5),
    }
    forks = d.pick((), (0,), (3, 1))
    if d.spoil():
        settings |= d.pick({"block": 0}, {"first": -1}, {"rows": torch.zeros(shape[0] + 1, dtype=torch.int64)})
    settings = {"rows": rows} | settings
    return d.case(lambda backend, x: (noise(seed, shape, "x", forks=forks, **settings, backend=backend),))


def act_orthogonal_case(d: Draw) -> Case:
    B, S, n, size, C = d.size(0, 4), d.size(1, 5), d.size(0, 20), d.size(1, 5), d.size(0, 9)
    flags, unit = {"inverse": d.chance(0.5), "mean": d.chance(0.5)}, d.unit()
    lead = (B,) if d.chance(0.5) else (B, S)
    d.leaf("vectors", d.numbers(*lead, n, size + d.spoil(), C), unit)
    wide = torch.promote_types(d.dtype, torch.float32) if d.chance(0.5) else None
    d.leaf("frames", d.numbers(B, S, size, size), dtype=wide)
    return d.case(lambda backend, x: (act_orthogonal(x.vectors, x.frames, **flags, backend=backend),), unit)
