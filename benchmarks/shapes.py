"""The least that each op's computation needs, and how a case is called: for the benchmarks and for the model of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GRID, WIDTH = 14, 768  # tokens a side and width of a ViT-B/16
TAU, ITERATIONS = 0.01, 20
SOFT = {"cpu": [(4, 10, 188), (1, 4, 444), (8, 10, 64)], "cuda": [(128, 10, 188), (32, 10, 444), (8, 10, 64)]}


@dataclass(frozen=True)
class Needs:
    """case: its name. bytes, operations: read and written once, and the arithmetic, of the part that `of` names."""

    case: str
    bytes: int
    operations: int
    of: str = "forward and backward"

    @property
    def counts(self) -> dict[str, int]:
        return {"bytes": self.bytes, "operations": self.operations}


def name_of(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else ", bf16"


def soft_permutation(shape: tuple[int, int, int]) -> Needs:
    """With the entropy. Two scans a product: 4 N operations, 4 (+ 2 for 1/x) an iteration side; forward, again in the
    backward, and its adjoints."""
    numbers = shape[0] * shape[1] * shape[2]
    case = f"soft_permutation + entropy, forward and backward, {shape}"
    return Needs(case, numbers * (4 * (1 + 3 + 3 + 1 + 1) + 8 * 3), numbers * ITERATIONS * 2 * (6 + 6 + 12))


def permute(B: int, N: int) -> Needs:
    """Forward and backward of the values and of the permutation, one number a slot."""
    return Needs(f"permute, forward and backward, {(B, 1, N)}", B * N * (4 * 4 + 2 * 8 + 6 * 4), B * N * 30)


def noise(shape: tuple[int, ...], normal: bool) -> Needs:
    return Needs(
        f"noise, {'normal' if normal else 'uniform'}, {shape}", 8 * torch.Size(shape).numel(), 0, "forward"
    )  # float64


def orthogonal_frame(M: int, special: bool) -> Needs:
    case = f"orthogonal_frame{' special' if special else ''}, forward and backward, ({M}, 3, 3)"
    return Needs(case, M * 9 * 4 * 6, M * (120 + 150))


def act_orthogonal(B: int, S: int, n: int, d: int, C: int, mean: bool) -> Needs:
    case = f"act_orthogonal{', mean' if mean else ''}, forward and backward, {(B, S, n, d, C)}"
    out = B * n * d * C * (1 if mean else S)
    return Needs(case, 4 * (2 * B * n * d * C + 3 * B * S * d * d + 2 * out), B * S * n * d * C * 6 * 3)


def vector_edge_convolution(C: int, d: int, n: int, M: int, w: int) -> Needs:
    case = f"vector_edge_convolution, forward and backward, {(C, d, n, M)} to {w} channels"
    maps, pooling = 4 * w * C * n, w * w * n * n
    return Needs(case, 4 * 5 * n * d * M * (C + w), 2 * d * M * (5 * maps + pooling))


def embed(N: int, graphs: int, edges: int, samples: int, dtype: torch.dtype) -> Needs:
    about = f"N {N}, {graphs} graphs, {edges} edges, {samples} samples{name_of(dtype)}"
    bytes = dtype.itemsize * samples * (graphs * GRID**2 + edges) * WIDTH
    return Needs(f"action + tokens, Peptides-like ({about})", bytes, 2 * samples * edges * WIDTH, "forward")


def embed_matrix(N: int, sizes: list[int], samples: int, channels: int, dtype: torch.dtype) -> Needs:
    patch = -(-N // GRID)
    used = sum(min(GRID, -(-n // patch)) ** 2 for n in sizes) * samples  # tokens with valid slots
    mean = round(sum(sizes) / len(sizes))
    about = f"N {N}, mean {mean}, 40 % dense, {len(sizes)} graphs, {samples} samples{name_of(dtype)}"
    bytes = dtype.itemsize * len(sizes) * samples * GRID**2 * WIDTH
    operations = 2 * used * patch * patch * channels * WIDTH
    return Needs(f"action + tokens, PATTERN-like ({about})", bytes, operations, "forward")


def embed_image(
    op: str, B: int, S: int, C: int, H: int, P: int, D: int, dtype: torch.dtype, gradients: str = ""
) -> Needs:
    """gradients: "", "plane" (one more product), "weight" (of it and the plane: two; of turns one), "pixels" (all: two)."""
    tokens, K = B * S * (H // P) ** 2, C * P * P
    more = {"": 0, "plane": 1, "weight": 1 + (op == "embed_image"), "pixels": 2}[gradients]
    part = "forward and backward" if gradients else "forward"
    which = part + {"plane": ", to the plane only", "pixels": ", also to pixels"}.get(gradients, "")
    moved = "quarter turns" if op == "embed_turned" else "angles"
    case = f"{op}, {which}, ({B} images of {H}, {S} {moved}, patch {P}, width {D}{name_of(dtype)})"
    once = B * C * H * H * (1 + bool(gradients) + (gradients == "pixels")) + (tokens + K) * D * (1 + bool(gradients))
    return Needs(case, dtype.itemsize * once, 2 * tokens * K * D * (1 + more), part)


def readout(where: str, N: int, graphs: int, outputs: int, samples: int, dtype: torch.dtype) -> Needs:
    """Each token that some output needs is read once."""
    axes = 1 if where == "nodes" else 2
    about = f"N {N}, {graphs} graphs, {outputs} outputs, {samples} samples{name_of(dtype)}"
    bytes = dtype.itemsize * samples * WIDTH * min(graphs * GRID**axes, outputs)
    return Needs(f"readout of {where} ({about})", bytes, 2 * samples * outputs * WIDTH, "forward")


def node_identifiers(B: int, S: int, n: int, D: int) -> Needs:
    """Of graphs of n nodes; the identifiers themselves are few."""
    return Needs(f"node_identifiers ({B} graphs of {n} nodes, {S} samples, width {D})", 4 * B * n * S * D, 0, "forward")


def aggregate(edges: int, shape: tuple[int, ...], dtype: torch.dtype) -> Needs:
    case = f"aggregate, forward and backward, ({edges} edges, {shape}{name_of(dtype)})"
    return Needs(case, 5 * dtype.itemsize * torch.Size(shape).numel(), 0)


def linear_batch_norm_relu(M: int, C: int) -> Needs:
    """x, y; x, d_y, d_x; z is computed twice."""
    case = f"linear_batch_norm_relu, forward and backward, {(M, C, C)}"
    return Needs(case, 4 * 5 * M * C, 8 * M * C * C)
